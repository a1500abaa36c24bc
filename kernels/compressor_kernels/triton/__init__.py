"""Launching, and pieces that several kernels share."""
