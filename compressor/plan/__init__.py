"""A recipe and headers in, everything decided out: what can fail, fails here."""
