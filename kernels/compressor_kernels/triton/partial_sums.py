"""Sums of what several programs computed for one row each, where a product's inputs were shared."""

from torch import Tensor

from compressor_kernels.triton.launch import launch_early, overlaps


def reduce_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the sum of fp32 parts [SPLIT, M, O], in order, plus the bias into y [M, O]."""
    from compressor_kernels.triton import partial_sums_jit as jit

    count, outputs = y.shape
    early = overlaps(y)
    jit.reduce_kernel[(-(-outputs // 512), count)](
        parts,
        y if bias is None else bias,
        y,
        count,
        outputs,
        SPLIT=parts.shape[0],
        HAS_BIAS=bias is not None,
        EARLY=early,
        BN=512,
        num_warps=4,
        **launch_early(early),
    )
