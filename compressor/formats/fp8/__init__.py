"""The format fp8."""
