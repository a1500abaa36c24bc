"""How ModelOpt's NVFP4 checkpoints are read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(
    holds="NVFP4 weights and inputs, FP8 KV cache",
    proof="**reader**, and compressed-tensors' converter",
    transformers=False,
)
