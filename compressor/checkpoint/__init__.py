"""Files of checkpoints: find, read, write, commit."""
