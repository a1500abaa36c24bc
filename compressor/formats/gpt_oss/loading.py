"""How gpt-oss's own files are read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(
    holds="MXFP4 experts of gpt-oss, stacked under its own names",
    proof="**reader**, and transformers",
    note="transformers makes floats of the experts where it has no kernels.",
)
