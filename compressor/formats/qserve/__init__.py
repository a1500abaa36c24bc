"""The format qserve."""
