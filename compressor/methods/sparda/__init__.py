"""SparDA (arXiv 2606.04511): forecasts of the blocks of keys that come to be read."""
