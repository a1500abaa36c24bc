"""How GPTQ's files are read elsewhere."""

from compressor.formats.loading import GPTQMODEL, Loading

LOADING = Loading(
    holds="int2, int3, int4 and int8, groups; no zero point of 0",
    install=GPTQMODEL,
    arguments=", dtype=torch.float16",
)
