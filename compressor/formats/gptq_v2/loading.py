"""How version 2 of GPTQ's files is read elsewhere."""

from compressor.formats.loading import GPTQMODEL, Loading

LOADING = Loading(
    holds="as gptq, zero points stored as they are",
    install=GPTQMODEL,
    arguments=", dtype=torch.float16",
)
