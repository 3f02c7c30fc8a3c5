"""Kernels that do in one pass what takes several operators elsewhere; whoever calls them has those operators, too."""
