"""Weights that are stored in low precision and read as floats, unit by unit: one file a layout."""
