"""DuoAttention (arXiv 2410.10819): which heads need the whole context."""
