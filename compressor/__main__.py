"""`compress`, and `python -m compressor` from a source tree that is not installed."""

from compressor.cli.process import program

if __name__ == "__main__":
    program()
