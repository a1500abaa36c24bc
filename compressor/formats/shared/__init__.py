"""What the integer formats share: bits in words, and the checks on values and files."""
