"""How QServe's files are read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(
    holds="W4A8: int4 per channel or in int8 groups of 128, int8 inputs, for QServe's kernels",
    transformers=False,
    vllm=False,
)
