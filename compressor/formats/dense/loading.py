"""How plain floats are read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(holds="floats: what a quantized model computes with", proof="safetensors")
