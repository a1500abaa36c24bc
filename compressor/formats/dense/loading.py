"""How plain floats are read elsewhere."""

from __future__ import annotations

from compressor.formats.loading import Loading

LOADING = Loading(holds="floats: what a quantized model computes with", proof="safetensors")
