"""Rows that several processes share: each has some of the positions, and attention goes over all of them."""
