"""How a delta becomes a model."""

from compressor.formats.loading import Loading

LOADING = Loading(
    holds="a fine-tune as signs and scales on top of its base; `compress delta apply` makes a "
    "model of both",
    proof="**reader**, and rebuilt from its base against published vectors",
    transformers=False,
    vllm=False,
    note="It is a difference to another model, which config.json names. With that model in the "
    "folder BASE, `compress delta apply BASE DELTA OUT` makes a dense checkpoint that "
    "everything loads.",
)
