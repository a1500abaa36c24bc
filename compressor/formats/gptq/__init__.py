"""The format gptq."""
