"""The `compress` command line: one command per file."""
