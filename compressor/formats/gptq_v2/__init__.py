"""The format gptq-v2."""
