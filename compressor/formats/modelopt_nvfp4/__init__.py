"""The format modelopt-nvfp4."""
