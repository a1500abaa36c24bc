"""The format modelopt-fp8."""
