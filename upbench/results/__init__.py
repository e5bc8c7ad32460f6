"""Records of cells, and what is derived from them. Imports no torch."""
