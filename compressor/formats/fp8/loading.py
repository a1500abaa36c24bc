"""How FP8 in blocks is read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(
    holds="FP8 weights in blocks of 128 x 128, with inputs in groups of 128",
    note="transformers takes the size of a block from its number, so that weights whose sizes are "
    "no multiples of 128 are read wrongly there.",
)
