"""StreamingLLM: sinks and a window for every head."""
