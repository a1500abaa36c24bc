"""How compressed-tensors' layouts are read elsewhere."""

from compressor.formats.loading import Loading

LOADING = Loading(
    holds="int2 to int8, weights alone or with int8 inputs; FP8 with static or dynamic inputs; "
    "NVFP4, MXFP4 and MXFP8 with inputs or without; FP8 KV cache",
    install="pip install compressed-tensors",
    with_zeros=Loading(
        install="pip install compressed-tensors",
        imports=", CompressedTensorsConfig",
        arguments=", quantization_config=CompressedTensorsConfig(dequantize=True)",
        note="Without that argument transformers does not load packed weights that have zero "
        "points; with it they are dequantized while they are loaded.",
    ),
)
