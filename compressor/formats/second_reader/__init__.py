"""A second reader of packed weights, which shares no code with the first."""
