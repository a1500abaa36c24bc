"""The format gpt-oss."""
