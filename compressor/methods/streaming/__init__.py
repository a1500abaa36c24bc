"""StreamingLLM: sinks and a window for every head."""

from compressor.methods.streaming.method import PASS

__all__ = ["PASS"]
