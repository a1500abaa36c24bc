"""How ModelOpt's FP8 checkpoints are read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(holds="FP8 weights and static inputs, FP8 KV cache", transformers=False)
