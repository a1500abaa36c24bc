"""Codecs between QTensors and the tensors on disk: one format per file."""
