"""Version 2 of GPTQ's files."""

from compressor.formats.gptq.second_reader import stored
from compressor.formats.second_reader.arrays import Arrays, Config
from compressor.formats.second_reader.grids import CodedWeight

READS = {"quant_method": ["gptq"], "checkpoint_format": ["gptq_v2"]}


def decode(config: Config, module: str, tensors: Arrays) -> CodedWeight | None:
    """The weight, or None where it is stored as floats."""
    return stored(config, tensors, shift=0) if "qweight" in tensors else None
