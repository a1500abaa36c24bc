"""`python -m compressor.cli` is `compress`."""

from compressor.cli.process import program

program()
