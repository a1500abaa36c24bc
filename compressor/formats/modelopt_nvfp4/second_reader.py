"""ModelOpt's NVFP4 checkpoints, read by their description."""

from compressor.formats.second_reader.arrays import Arrays, Config, numbers
from compressor.formats.second_reader.grids import CodedWeight, nvfp4

READS = {"quant_method": ["modelopt"], "quant_algo": ["NVFP4", "W4A16_NVFP4"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    if "weight_scale" not in tensors:
        return None
    multiplier = numbers(tensors, "weight_scale_2", shape=(), dtypes=("float32",))
    return nvfp4(tensors, "weight", multiplier=float(multiplier))
