"""`python -m compressor.cli` is `compress`."""

from compressor.cli.main import program

program()
