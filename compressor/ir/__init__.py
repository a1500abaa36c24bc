"""What a model is while it is compiled: values only."""
