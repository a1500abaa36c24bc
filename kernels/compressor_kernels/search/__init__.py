"""What methods compute again and again while they search."""
