"""How AutoAWQ's files are read elsewhere."""

from compressor.formats.loading import GPTQMODEL, Loading

LOADING = Loading(
    holds="int4, groups, with zero points",
    proof="**reader**, and compressed-tensors' converter",
    install=GPTQMODEL,
    arguments=", dtype=torch.float16",
)
