"""Packed layers through the kernels that multiply by them, against float64."""
