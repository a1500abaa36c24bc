"""A cache of chosen key blocks on the device, for a KV cache that lives in host memory.

Between two steps of decoding most chosen blocks stay the same. `place_blocks` gives each wanted
block a slot: the one it is in, or else one whose block is not wanted any more. `fetch_blocks`
copies what is missing from pinned host memory, with a few programs that leave the device to the
work on other streams (the prefetch of SparDA, arXiv 2606.04511, which knows the blocks of layer
l + 1 while layer l runs). `block_attention(..., slots=...)` reads the cache.

Layouts: wanted and slots int32 [lanes, K], held int32 [lanes, slots] with lanes = batch * KV heads;
host k and v [lanes, T, D], cached k and v [lanes, slots * block_size, D], all dense.
"""

import torch
from torch import Tensor

from compressor_kernels.triton.launch import pow2


def place_blocks(wanted: Tensor, held: Tensor, missing: Tensor, count: Tensor) -> Tensor:
    """Slots of the wanted blocks, int32 [lanes, K]; `held` is brought up to date in place.

    wanted: ascending, -1 behind the last, never twice the same; held: block in each slot, -1 for
    none, at least K slots. What is not in the cache is listed in `missing`, int32 [lanes * K, 3]
    (lane, block, slot) in any order, its number added to `count`, int32 [1], which the caller sets
    to zero.
    """
    from compressor_kernels.attention import block_cache_jit as jit

    (lanes, k), slots = wanted.shape, held.shape[1]
    _check(wanted, held, missing)
    out = torch.empty_like(wanted)
    jit.place_kernel[(lanes,)](
        wanted.contiguous(),
        held,
        out,
        missing,
        count,
        K=k,
        SLOTS=slots,
        K_POW2=pow2(k),
        SLOTS_POW2=pow2(slots),
        num_warps=4,
    )
    return out


def place_blocks_ref(wanted: Tensor, held: Tensor, missing: Tensor, count: Tensor) -> Tensor:
    """`place_blocks` in plain Python: free slots are filled in order; lists lane by lane."""
    _check(wanted, held, missing)
    out = torch.full_like(wanted, -1)
    listed = int(count)
    for lane, (blocks, row) in enumerate(zip(wanted.tolist(), held.tolist(), strict=True)):
        needed = [block for block in blocks if block >= 0]
        free = iter([slot for slot, block in enumerate(row) if block not in needed])
        for at, block in enumerate(needed):
            if block in row:
                out[lane, at] = row.index(block)
                continue
            slot = next(free)
            out[lane, at] = slot
            held[lane, slot] = block
            missing[listed] = torch.tensor([lane, block, slot])
            listed += 1
    count.fill_(listed)
    return out


def fetch_blocks(
    host: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    missing: Tensor,
    count: Tensor,
    *,
    block_size: int,
    programs: int = 32,
) -> None:
    """Copy the listed blocks of keys and values from the host into their slots.

    host: pinned memory that the device reads by itself; the last block may be shorter.
    """
    from compressor_kernels.attention import block_cache_jit as jit

    _, tokens, dim = host[0].shape
    jit.fetch_kernel[(programs,)](
        *host,
        *cache,
        missing,
        count,
        tokens,
        cache[0].shape[1],
        PROGRAMS=programs,
        BLOCK=block_size,
        BLOCK_POW2=pow2(block_size),
        D=dim,
        BLOCK_D=pow2(dim),
        num_warps=4,
    )


def fetch_blocks_ref(
    host: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    missing: Tensor,
    count: Tensor,
    *,
    block_size: int,
) -> None:
    """`fetch_blocks` in plain PyTorch."""
    for lane, block, slot in missing[: int(count)].tolist():
        for source, target in zip(host, cache, strict=True):
            rows = source[lane, block * block_size : (block + 1) * block_size]
            at = slot * block_size
            target[lane, at : at + rows.shape[0]] = rows.to(target.device)


def _check(wanted: Tensor, held: Tensor, missing: Tensor) -> None:
    if wanted.shape[0] != held.shape[0] or held.shape[1] < wanted.shape[1]:
        raise ValueError(
            f"{tuple(held.shape)} slots cannot hold {tuple(wanted.shape)} wanted blocks"
        )
    if missing.shape != (wanted.numel(), 3):
        raise ValueError(f"the list of missing blocks needs room for {wanted.numel()}")
