"""Where tokens stand: absolute, relative and rotary position codes, for sequences and for grids."""
