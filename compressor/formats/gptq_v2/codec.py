"""GPTQ's file format, version 2: zero points are stored as they are, so all weights have a form."""

from compressor.formats.gptq.codec import GPTQ

FORMAT = GPTQ(name="gptq-v2", marker="gptq_v2", shift=0)
