"""Offsite-Tuning (arXiv 2302.04870): fewer blocks, on which the first and last are tuned."""
