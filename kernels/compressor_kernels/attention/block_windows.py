"""Scores of key blocks from compressed keys: SparDA's forecast and InfLLM-V2's attention.

Keys are mean-pooled in windows of `kernel_size` tokens every `stride` tokens, and a block's score
is the best of all windows that touch it (windows that start in it, or before it and reach in).

Forecast (arXiv 2606.04511): a predicted vector for each token and KV head times the window (no
scale, no softmax); a window counts for a query if it starts at or before it.
Attention (InfLLM-V2, the selector of MiniCPM4): softmax of the real queries over the windows,
summed over the query heads of a group; a window counts once the query or a token before it ends
it, and a block without any such window scores 0.

Layouts: forecast [B, G, Tq, D], queries [B, H, Tq, D], keys [B, G, T, D], compressed keys
[B, G, windows, D], scores [B, G, Tq, blocks] fp32. Queries are the last Tq tokens of the text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compressor_kernels.attention.block_selection import BlockRule, positions, top_blocks
from compressor_kernels.triton.launch import LOG2_E, dense, pow2, score_scale

# Intermediate values of one prefill piece: more would only take memory.
PIECE_BYTES = 1 << 28
PIECE_TOKENS = 64  # pieces are whole multiples of this
LOGIT_TILE = 128


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Mean pooling of keys: `kernel_size`, and the block size of the rule, in whole strides."""

    kernel_size: int = 32
    stride: int = 16

    def __post_init__(self) -> None:
        if self.stride < 1 or self.kernel_size < 1 or self.kernel_size % self.stride:
            raise ValueError(
                f"kernel_size {self.kernel_size} must be a multiple of stride {self.stride}"
            )

    def windows(self, tokens: int) -> int:
        """Compressed keys of a text: full windows only."""
        return max(0, (tokens - self.kernel_size) // self.stride + 1)

    def ratio(self, rule: BlockRule) -> int:
        """Windows that start in one block. Raises ValueError if blocks cut through strides."""
        if rule.block_size % self.stride:
            raise ValueError(f"blocks of {rule.block_size} are not whole strides of {self.stride}")
        return rule.block_size // self.stride

    @property
    def reach(self) -> int:
        """Windows that start before a block and reach into it."""
        return self.kernel_size // self.stride - 1


def compress_keys(k: Tensor, windows: WindowRule) -> Tensor:
    """Mean of each full window of keys: [B, G, T, D] to [B, G, windows, D] in k's dtype."""
    from compressor_kernels.attention import block_windows_jit as jit

    k = dense(k)
    batch, groups, tokens, dim = k.shape
    n = windows.windows(tokens)
    out = torch.empty((batch, groups, n, dim), dtype=k.dtype, device=k.device)
    if out.numel():
        jit.compress_kernel[(-(-n // 32), batch * groups)](
            k,
            out,
            n,
            groups,
            *k.stride()[:3],
            KERNEL=windows.kernel_size,
            STRIDE=windows.stride,
            D=dim,
            BLOCK_N=32,
            BLOCK_D=pow2(dim),
        )
    return out


def compress_keys_ref(k: Tensor, windows: WindowRule) -> Tensor:
    """`compress_keys` in plain PyTorch."""
    if k.shape[2] < windows.kernel_size:
        return k[:, :, :0]
    wide = k.to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    return wide.unfold(2, windows.kernel_size, windows.stride).mean(-1).to(k.dtype)


def forecast_scores(
    forecast: Tensor,
    compressed: Tensor,
    rule: BlockRule,
    windows: WindowRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    behind: int = 0,
) -> Tensor:
    """Best forecast score of each block, fp32 [B, G, Tq, blocks]; blocks past a query undefined.

    `compressed` may have room for more windows than the text has. tokens, lengths, behind: as in
    `top_blocks`. Blocks without a window hold -inf.
    """
    from compressor_kernels.attention import block_windows_jit as jit

    forecast, compressed = dense(forecast), dense(compressed)
    _check(forecast, compressed, windows, tokens=tokens)
    batch, groups, q_len, dim = forecast.shape
    if groups != compressed.shape[1]:
        raise ValueError(f"{groups} forecasts a token do not fit {compressed.shape[1]} KV heads")
    blocks = rule.blocks(tokens)
    out = torch.empty((batch, groups, q_len, blocks), dtype=torch.float32, device=forecast.device)
    block_m, block_b = (1, 32) if q_len == 1 else (64, 64)
    jit.forecast_kernel[(-(-blocks // block_b), -(-q_len // block_m), batch * groups)](
        forecast,
        compressed,
        lengths,
        out,
        q_len,
        tokens,
        behind,
        blocks,
        groups,
        *forecast.stride()[:3],
        *compressed.stride()[:3],
        **_pooling(rule, windows),
        D=dim,
        BLOCK_M=block_m,
        BLOCK_B=block_b,
        BLOCK_D=pow2(dim),
        num_warps=4,
    )
    return out


def forecast_scores_ref(
    forecast: Tensor,
    compressed: Tensor,
    rule: BlockRule,
    windows: WindowRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    behind: int = 0,
) -> Tensor:
    """`forecast_scores` in plain PyTorch; blocks past a query hold -inf."""
    n = windows.windows(tokens)
    wide = torch.float64 if forecast.dtype == torch.float64 else torch.float32
    raw = forecast.to(wide) @ compressed[:, :, :n].to(wide).transpose(-1, -2)
    length, position = positions(forecast, tokens=tokens, lengths=lengths, behind=behind)
    start = torch.arange(n, device=forecast.device) * windows.stride
    unseen = (start > position) | (start + windows.kernel_size > length)
    return pool_windows_ref(raw.masked_fill(unseen, -torch.inf), rule, windows, tokens=tokens)


def attention_scores(
    q: Tensor,
    compressed: Tensor,
    rule: BlockRule,
    windows: WindowRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    behind: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Best attention of each block, fp32 [B, G, Tq, blocks]; blocks past a query undefined.

    q [B, H, Tq, D] with H a multiple of G; scale is 1/sqrt(D) if not given. The logits of all
    windows are held in fp32: give long prompts in pieces (`attention_blocks` does).
    """
    from compressor_kernels.attention import block_windows_jit as jit

    q, compressed = dense(q), dense(compressed)
    _check(q, compressed, windows, tokens=tokens)
    batch, heads, q_len, dim = q.shape
    groups, blocks, n = compressed.shape[1], rule.blocks(tokens), windows.windows(tokens)
    group = heads // groups
    tiles = -(-n // LOGIT_TILE)
    fp32 = {"dtype": torch.float32, "device": q.device}
    out = torch.empty((batch, groups, q_len, blocks), **fp32)
    logits = torch.empty((batch, groups, q_len * group, n), **fp32)
    lse = torch.empty((batch, groups, q_len * group, tiles), **fp32)
    rows = max(16, min(64, pow2(q_len * group)))
    if n:
        jit.logit_kernel[(tiles, -(-q_len * group // rows), batch * groups)](
            q,
            compressed,
            lengths,
            logits,
            lse,
            q_len,
            tokens,
            behind,
            n,
            groups,
            score_scale(scale, dim) * LOG2_E,
            *q.stride()[:3],
            *compressed.stride()[:3],
            KERNEL=windows.kernel_size,
            STRIDE=windows.stride,
            GROUP=group,
            D=dim,
            BLOCK_M=rows,
            BLOCK_N=LOGIT_TILE,
            BLOCK_D=pow2(dim),
            num_warps=4,
        )
    block_t = 1 if q_len == 1 else max(1, 64 // pow2(group))
    block_b = 32
    jit.share_kernel[(-(-blocks // block_b), -(-q_len // block_t), batch * groups)](
        logits,
        lse,
        lengths,
        out,
        q_len,
        tokens,
        behind,
        blocks,
        n,
        groups,
        **_pooling(rule, windows),
        GROUP=group,
        GROUP_POW2=pow2(group),
        TILE=LOGIT_TILE,
        BLOCK_T=block_t,
        BLOCK_B=block_b,
        num_warps=4,
    )
    return out


def attention_scores_ref(
    q: Tensor,
    compressed: Tensor,
    rule: BlockRule,
    windows: WindowRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    behind: int = 0,
    scale: float | None = None,
) -> Tensor:
    """`attention_scores` in plain PyTorch; blocks past a query score 0."""
    n, groups = windows.windows(tokens), compressed.shape[1]
    batch, heads, q_len, dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(wide).view(batch, groups, heads // groups, q_len, dim)
    raw = queries @ compressed[:, :, None, :n].to(wide).transpose(-1, -2)
    position = positions(q, tokens=tokens, lengths=lengths, behind=behind)[1][:, :, None]
    end = torch.arange(n, device=q.device) * windows.stride + windows.kernel_size
    raw = (raw * score_scale(scale, dim)).masked_fill(end > position + 1, -torch.inf)
    shares = torch.nan_to_num(raw.softmax(-1)).sum(2)
    return pool_windows_ref(shares, rule, windows, tokens=tokens, empty=0.0)


def pool_windows_ref(
    raw: Tensor, rule: BlockRule, windows: WindowRule, *, tokens: int, empty: float = -torch.inf
) -> Tensor:
    """Best of the windows that touch each block: [..., windows] to [..., blocks]."""
    ratio, reach, blocks = windows.ratio(rule), windows.reach, rule.blocks(tokens)
    after = max(0, blocks * ratio - raw.shape[-1])
    padded = torch.nn.functional.pad(raw, (reach, after), value=empty)
    return padded.unfold(-1, ratio + reach, ratio)[..., :blocks, :].amax(-1)


def forecast_blocks(
    forecast: Tensor,
    compressed: Tensor,
    rule: BlockRule,
    windows: WindowRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """Blocks that each query attends to by its forecast, int32 [B, G, Tq, min(top_k, blocks)].

    Ascending, then -1. Long prompts are scored in pieces.
    """
    score = partial(forecast_scores, compressed=compressed, rule=rule, windows=windows)
    row_bytes = 4 * forecast.shape[1] * rule.blocks(tokens)
    return _in_pieces(score, forecast, rule, tokens, lengths, row_bytes)


def attention_blocks(
    q: Tensor,
    compressed: Tensor,
    rule: BlockRule,
    windows: WindowRule,
    *,
    tokens: int,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`forecast_blocks` for InfLLM-V2's selector: q [B, H, Tq, D], one set for each KV head."""
    score = partial(
        attention_scores, compressed=compressed, rule=rule, windows=windows, scale=scale
    )
    row_bytes = 4 * q.shape[1] * windows.windows(tokens)
    return _in_pieces(score, q, rule, tokens, lengths, row_bytes)


def _in_pieces(
    score: Callable[..., Tensor],
    queries: Tensor,
    rule: BlockRule,
    tokens: int,
    lengths: Tensor | None,
    row_bytes: int,
) -> Tensor:
    """The best blocks by `score`, chosen for piece after piece of the queries, so that scores,
    `row_bytes` for one token of one text, stay small."""
    q_len = queries.shape[2]
    room = PIECE_BYTES // max(1, queries.shape[0] * row_bytes)
    piece = max(1, room // PIECE_TOKENS) * PIECE_TOKENS
    chosen = []
    for start in range(0, q_len, piece):
        part = queries[:, :, start : start + piece]
        behind = q_len - start - part.shape[2]
        scores = score(part, tokens=tokens, lengths=lengths, behind=behind)
        chosen.append(top_blocks(scores, rule, tokens=tokens, lengths=lengths, behind=behind))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)


def _pooling(rule: BlockRule, windows: WindowRule) -> dict[str, int]:
    """Constants of the kernels that pool windows to blocks."""
    return {
        "KERNEL": windows.kernel_size,
        "STRIDE": windows.stride,
        "RATIO": windows.ratio(rule),
        "REACH": windows.reach,
        "BLOCK": rule.block_size,
    }


def _check(queries: Tensor, compressed: Tensor, windows: WindowRule, *, tokens: int) -> None:
    same = queries.shape[0] == compressed.shape[0] and queries.shape[3] == compressed.shape[3]
    if not same or queries.shape[1] % compressed.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} do not fit compressed keys {tuple(compressed.shape)}"
        )
    if compressed.shape[2] < windows.windows(tokens):
        raise ValueError(f"{compressed.shape[2]} compressed keys are too few for {tokens} tokens")
