"""Calibration data and statistics."""
