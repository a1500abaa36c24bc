"""DuoAttention (arXiv 2410.10819): which heads need the whole context."""

from compressor.methods.duo_attention.method import PASS

__all__ = ["PASS"]
