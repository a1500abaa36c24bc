"""What a run will take: bytes, peak memory and time, from shapes alone.

Memory follows what is alive at the worst moment of the largest unit. Throughputs are rough figures
of common machines, so the time is an estimate of its order, not a promise.
"""

import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from compressor.attention.masked import PIECE_ELEMENTS
from compressor.audit.sweep import COARSE_CONTEXTS, COARSE_LENGTH, CONTROLS, EXAMINED
from compressor.audit.weights import CHUNK
from compressor.evaluate.perplexity import LOGIT_ELEMENTS
from compressor.ir.layout import Linear
from compressor.ir.same_shape import of_one_shape
from compressor.plan.moving_memory import ahead_bytes, page_locked_bytes, streamed_bytes
from compressor.plan.plan import Plan
from compressor.plan.row_memory import hidden_size, row_bytes
from compressor.plan.spread import memory_of, working_bytes
from compressor.plan.unit_plan import PassPlan, UnitPlan
from compressor.plan.verify_memory import parameters, source_bytes, verifying_bytes
from compressor.runner.expert_groups import experts_at_once

STARTED_BYTES = {"cpu": 250 << 20, "cuda": 1280 << 20}
"""What a process takes beyond PyTorch before it holds any weight: transformers with a model's code
and a tokenizer, workspaces of products, and CUDA's context and kernels. On a CPU it was the same to
a few MB with either build of PyTorch; as a figure it spares `plan` the imports of a run."""

FACTORING_BYTES = 512 << 20
"""What a GPU's run that factors Gram matrices took beyond that and the units (GPTQ of blocks of
Qwen3-30B-A3B's shape, on an H200): the libraries that do it are loaded then."""

PLAIN_BYTES = 45 << 20
"""The same on a CPU where no token is run, so that neither tokenizer nor model code is loaded."""

CPU_CORE_FLOPS = 6e10
CUDA_FLOPS = 3e14
CPU_CORE_SCORES, CUDA_SCORES = 4e7, 5e9
"""Products of queries with keys a second, with the softmax and the pooling of a teacher after."""
DISK_BYTES_PER_SECOND = 1e9
SEARCH_CANDIDATES = 21
KEPT_ACTIVATIONS = 3
"""What a forward pass keeps for its gradients, in activations of a row that runs without."""
AHEAD_SHARE = 0.8
"""Of a GPU's memory: where a block fills more of it, the next one is not brought beside it."""
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Estimates:
    """Bytes and seconds of a run; `device_bytes` is 0 on a CPU.

    batch    rows in one forward pass
    offload  whether hidden states wait in main memory between blocks, since the device has no room
    experts_apart  whether experts do, too, and some at a time are on the device
    alone    what one rank would take of the device where experts are spread over several; else 0
    ahead    whether the next block is brought to the device while one is worked on
    """

    source_bytes: int
    output_bytes: int
    host_bytes: int
    device_bytes: int
    batch: int
    seconds: float
    offload: bool = False
    experts_apart: bool = False
    alone: int = 0
    ahead: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    plan: Plan,
    *,
    device: torch.device,
    resident: int,
    device_memory: int | None = None,
    world: int = 1,
) -> Estimates:
    """Estimate a run on a device, and of several ranks one of them.

    resident       resident bytes of a process that has imported this code, and so PyTorch, and done
                   nothing. It is measured, since PyTorch's build decides it (250 MB for a CPU, 550
                   MB with CUDA, also where no GPU is). `plan` and `run` differ by 2 MB in it
    device_memory  bounds the batch as in the run itself;  world  how many ranks there are
    """
    kind = device.type
    inputs, offload = _input_bytes(plan, device), False
    apart = experts_apart(plan, device=device, device_memory=device_memory)
    batch = batch_rows(plan, device=device, device_memory=device_memory)
    works = partial(_working_bytes, plan, device=device, batch=batch)
    room = (device_memory or memory_of(device)) - inputs
    working, alone = working_bytes(plan, works, room=room, world=world)
    if apart and alone and working <= room:
        apart = False
    elif apart:
        working, alone = max(works(unit, apart=True) for unit in plan.units), 0
    if device_memory is not None and kind == "cuda" and not any(u.tuned for u in plan.units):
        offload = inputs + working > device_memory
    coming = ahead_bytes(plan) if kind == "cuda" and not (offload or apart or alone) else 0
    most = device_memory or AHEAD_SHARE * memory_of(device)
    ahead = 0 < coming <= most - inputs - working
    raw = [sum(source_bytes(plan, unit.layout)) for unit in plan.units]
    streams = page_locked_bytes(plan, ahead=ahead) if kind == "cuda" else streamed_bytes(plan)
    bases = (plan.target.base_shapes(unit.layout).values() for unit in plan.units)
    streams += max(sum(spec.nbytes for spec in base) for base in bases)
    idle = not (plan.calibrated or plan.recipe.evaluate is not None or _audited_tokens(plan))
    started = PLAIN_BYTES if kind == "cpu" and idle else STARTED_BYTES[kind]
    host = resident + started + streams
    if kind == "cuda" and any(map(_factors, plan.passes)):
        host += FACTORING_BYTES
    held, learning = 0, _learning_bytes(plan, device, apart=apart, spread=working * (alone > 0))
    if kind == "cuda":
        held = max(working + (0 if offload else inputs) + ahead * coming, learning)
        # They wait in float32.
        host += inputs * 4 // plan.compute_dtype(device).itemsize if offload else 0
        host += max(_codes_of_experts(plan, unit) for unit in plan.units) if apart else 0
    else:
        host += max(inputs + working, learning)
    verifying, verified_there = verifying_bytes(plan, device)
    audited, trying = _auditing_bytes(plan, device)
    held = max(held, trying, verified_there)
    judging = max(verifying, _evaluating_bytes(plan, device), audited)
    if plan.recipe.verify and not plan.source.arch.free:
        started = STARTED_BYTES[kind]  # blocks of both run on held-out text
    host = max(host, resident + started + judging)
    return Estimates(
        source_bytes=sum(raw),
        output_bytes=plan.shards.size,
        host_bytes=host,
        device_bytes=held,
        batch=batch,
        seconds=_seconds(plan, device),
        offload=offload,
        experts_apart=apart,
        alone=alone and inputs + alone,
        ahead=ahead,
    )


def _learning_bytes(plan: Plan, device: torch.device, *, apart: bool, spread: int) -> int:
    """The whole model, and its base where there is one, for passes that learn through its depth; a
    block for others, of which a rank takes `spread` where experts are spread."""
    dtype = plan.compute_dtype(device)
    costs = [p.cost(dtype) for p in plan.passes if p.needs.whole_model]
    if not costs:
        # A teacher's scores of some queries, in float32, four times over; one block beside them.
        pieces = 16 * PIECE_ELEMENTS[device.type] if _learning_scores(plan) else 0
        streamed = spread or max(
            _working_bytes(plan, u, device=device, batch=1, apart=apart) for u in plan.units
        )
        return max([pieces + streamed, *(p.cost(dtype).memory for p in plan.passes)])
    entries = plan.source.checkpoint.entries.values()
    count = sum(torch.Size(entry.spec.shape).numel() for entry in entries)
    base = sum(
        math.prod(spec.shape)
        for unit in plan.units
        for spec in plan.target.base_shapes(unit.layout).values()
    )
    beside = max(cost.memory for cost in costs)
    # Beside both there are the signs, and one block twice: its weights and their gradients.
    block = max(
        sum(x.out_features * x.in_features for x in unit.layout.linears)
        for unit in plan.units
        if unit.layout.kind == "block"
    )
    return dtype.itemsize * (count + base + 2 * block) + base // 8 + beside


def experts_apart(plan: Plan, *, device: torch.device, device_memory: int | None) -> bool:
    """Whether a block's experts do not fit beside each other, and can be worked on some at a time:
    not where a block runs with gradients."""
    if device.type != "cuda" or any(unit.tuned for unit in plan.units):
        return False
    room = device_memory or memory_of(device)
    return any(
        unit.layout.experts and _working_bytes(plan, unit, device=device, batch=1) > room
        for unit in plan.units
    )


def _codes_of_experts(plan: Plan, unit: UnitPlan) -> int:
    """Codes of a unit's experts, a byte each, which wait in main memory until they are packed."""
    schemes, linears = plan.schemes.linears, unit.layout.linears
    coded = [x for x in linears if x.expert is not None and schemes[x.name].weight is not None]
    return sum(math.prod(x.shape) for x in coded)


def batch_rows(plan: Plan, *, device: torch.device, device_memory: int | None = None) -> int:
    """Rows of calibration tokens in one forward pass."""
    length, samples = plan.recipe.calibration.length, plan.recipe.calibration.samples
    batch = min(samples, max(1, TOKENS_PER_BATCH[device.type] // length))
    if device_memory is not None:
        apart = experts_apart(plan, device=device, device_memory=device_memory)
        works = partial(_working_bytes, plan, device=device, batch=0, apart=apart)
        fixed = _input_bytes(plan, device) + max(works(unit) for unit in plan.units)
        row = max(row_bytes(plan, unit.layout, device) for unit in plan.units)
        batch = max(1, min(batch, int((device_memory - fixed) // max(row, 1))))
    return batch


def _evaluating_bytes(plan: Plan, device: torch.device) -> int:
    """Hidden states of the written checkpoint, and of the original beside it; on a CPU their heads
    and logits too."""
    wanted = plan.recipe.evaluate
    if wanted is None:
        return 0
    models = 2 if wanted.against_original else 1
    beside = plan.layout.sizes.given + plan.layout.sizes.published
    states = 4 * wanted.windows * wanted.length * (hidden_size(plan) + beside)
    if device.type == "cuda":
        units = (sum(source_bytes(plan, u.layout, carried=False)) for u in plan.units)
        return models * (states + max(units))
    vocabulary = plan.layout.sizes.vocabulary
    head = plan.compute_dtype(device).itemsize * vocabulary * hidden_size(plan)
    logits = 4 * LOGIT_ELEMENTS[device.type]
    return models * (states + head + 3 * logits)


def _auditing_bytes(plan: Plan, device: torch.device) -> tuple[int, int]:
    """Main memory and the device's: a tensor with its values in float64 as an audit looks at them,
    then the whole model where tokens are tried in it."""
    wanted = plan.recipe.audit
    if wanted is None:
        return 0, 0
    shapes = [math.prod(e.spec.shape) for e in plan.source.checkpoint.entries.values()]
    looking = max(e.spec.nbytes for e in plan.source.checkpoint.entries.values())
    looking += 3 * 8 * min(CHUNK, max(shapes))
    if wanted.weights_only:
        return looking, 0
    whole = sum(shapes) * (plan.source.checkpoint.dtype.itemsize if device.type == "cuda" else 4)
    return (looking, whole) if device.type == "cuda" else (max(looking, whole), 0)


def _audited_tokens(plan: Plan) -> int:
    """Tokens that audits send through the model."""
    wanted = plan.recipe.audit
    if wanted is None or wanted.weights_only:
        return 0
    tried = min(wanted.tokens or plan.layout.sizes.vocabulary, plan.layout.sizes.vocabulary)
    each = (
        COARSE_CONTEXTS * COARSE_LENGTH * tried
        + (EXAMINED + CONTROLS) * wanted.contexts * wanted.length
    )
    return each * (2 if wanted.of == "both" else 1)


def _input_bytes(plan: Plan, device: torch.device) -> int:
    """The one buffer of activations, with what blocks are given beside them; another where the
    original's stand beside it, and one for what it makes of a block that runs with gradients."""
    if not plan.calibrated:
        return 0
    wanted = plan.recipe.calibration
    streams = (2 if plan.two_streams else 1) + any(unit.tuned for unit in plan.units)
    sizes = plan.layout.sizes
    token = streams * (hidden_size(plan) + sizes.published) + sizes.given
    return wanted.samples * wanted.length * token * plan.compute_dtype(device).itemsize


def _working_bytes(
    plan: Plan, unit: UnitPlan, *, device: torch.device, batch: int, apart: bool = False
) -> int:
    """What is alive while passes work on a unit: weights as the runner has them, experts once more
    where its stacks have their rows otherwise, all in float32 only where a method needs that;
    statistics, and the largest matrix a few times over.

    apart  experts and their codes wait in main memory, but for a group of them
    """
    layout, count = unit.layout, parameters(plan, unit.layout)
    experts = [x for x in layout.linears if x.expert is not None]
    away = 0
    if apart and experts:
        # One group is built while its experts come one after the other.
        of_all = sum(math.prod(x.shape) for x in experts)
        away = of_all - of_all * min(experts_at_once(layout) + 2, layout.experts) // layout.experts
        count -= away
    width = plan.compute_dtype(device).itemsize
    runtime = width * count if plan.calibrated or device.type == "cuda" else 0
    if not unit.steps:
        return runtime + 4 * count
    grams = beside = 0
    if experts and unit.calibrated:
        stacks = plan.source.arch.runtime.stacks
        if device.type == "cuda" and any(x.interleaved or x.transposed for x in stacks):
            runtime += width * (sum(math.prod(x.shape) for x in experts) - away)
        # What went to them all, and a stack of them at a time.
        beside += (
            plan.recipe.calibration.samples
            * plan.recipe.calibration.length
            * (width * hidden_size(plan))
        )
        downs = [x for x in experts if x.role == "expert.down" and x.site in unit.needs]
        together = [(len(x), x[0].in_features) for x in of_one_shape(downs, lambda x: x.role)]
        # Each by itself, and one above the other.
        grams += max((4 * n * size**2 * (2 if n > 1 else 1) for n, size in together), default=0)
    if any(_wide(plan.passes[number]) for number in unit.steps):
        beside += 4 * count
    shared = [site for site in unit.needs if not site.startswith("expert.") or site.endswith(".in")]
    for site in shared:
        if unit.needs[site].gram:
            grams += 4 * layout.site_linears(site)[0].in_features ** 2
        if unit.needs[site].cross and layout.kind == "block":
            # One site again with its cross products, and both in float64 while targets are solved
            # for; the block as it stands beside the original one.
            solving = 40 * layout.site_linears(site)[0].in_features ** 2
            beside = max(beside, solving + runtime)
    linears = [x for x in layout.linears if not x.beside or plan.schemes.linears[x.name].weight]
    worked_on = of_one_shape(linears, lambda x: x.role == "expert.down")
    largest = max((sum(math.prod(x.shape) for x in some) for some in worked_on), default=count)
    codes = sum(_coded_bytes(plan, x) for x in linears) - away
    rows = batch * row_bytes(plan, layout, device) if unit.needs else 0
    tuning = 0
    for wanted in unit.seen:
        if wanted.block is not None:
            # The block as it stands, candidates and their gradients, and what a step keeps.
            kept = min(batch, wanted.block.rows) * KEPT_ACTIVATIONS
            tuning = max(tuning, 4 * wanted.block.copies * codes + 2 * runtime)
            rows = max(rows, kept * row_bytes(plan, layout, device))
    # A weight, what it was scaled to and its errors, some rows at a time; without data all of them.
    linear = (10 if unit.calibrated else 16) * largest
    statistics = grams + beside
    if device.type != "cuda":
        return runtime + statistics + codes + max(rows, linear) + tuning
    packed = 0 if away else sum(spec.nbytes for spec in unit.outputs.values())
    if tuning:
        return runtime + statistics + codes + packed + max(rows, linear) + tuning
    # While passes watch, while they work, and while what was packed makes the next inputs.
    original = runtime if plan.two_streams else 0
    rows = max(rows, batch * row_bytes(plan, layout, device) if plan.calibrated else 0)
    working = statistics + codes + packed + linear
    return runtime + max(statistics + rows, working, original + codes + packed + rows)


def _coded_bytes(plan: Plan, linear: Linear) -> int:
    """Codes, a byte each, with their scales and zero points."""
    size, spec = math.prod(linear.shape), plan.schemes.linears[linear.name].weight
    if spec is None or spec.strategy == "block":
        return size
    each = spec.scale_dtype.itemsize + (spec.zero != "none")
    return size + each * math.prod(spec.scale_shape(*linear.shape))


def _wide(step: PassPlan) -> bool:
    """Whether a method leaves weights in float32, or factors Gram matrices, which is about as
    much; others read one linear after the other, and code it."""
    return step.effects.transforms or _factors(step)


def _factors(step: PassPlan) -> bool:
    """Whether a method factors Gram matrices."""
    return step.needs.stats.gram and not step.effects.rescales


def _seconds(plan: Plan, device: torch.device) -> float:
    """Products of forward passes, Gram matrices and searches, or the disk where it is slower."""
    wanted = plan.recipe.calibration
    tokens = wanted.samples * wanted.length if plan.calibrated else 0
    flops = sum(p.cost(plan.target.dtype).flops for p in plan.passes)
    for unit in plan.units:
        size = sum(x.out_features * x.in_features for x in unit.layout.linears)
        passes = 2 if plan.recipe.propagate == "quantized" else 1
        if plan.two_streams:
            # Both models up to each of four sites, and the original through the block.
            passes += 6 if any(p.needs.stats.cross for p in plan.passes) else 1
        if unit.layout.kind == "block":
            flops += 2.0 * (passes * tokens + _audited_tokens(plan)) * size
            for block in (seen.block for seen in unit.seen if seen.block):
                # Forwards, and products twice as large for both gradients.
                flops += 6.0 * block.steps * block.rows * wanted.length * size
        for site, needs in unit.needs.items():
            if needs.gram:
                linears = unit.layout.site_linears(site)
                columns = linears[0].in_features
                flops += (6.0 if needs.cross else 2.0) * tokens * columns**2
                rows = sum(linear.out_features for linear in linears)
                flops += 1.0 * SEARCH_CANDIDATES * rows * columns**2
    rate, score_rate = CUDA_FLOPS, CUDA_SCORES
    if device.type != "cuda":
        cores = os.cpu_count() or 1
        rate, score_rate = CPU_CORE_FLOPS * cores, CPU_CORE_SCORES * cores
    moved = (plan.source.checkpoint.nbytes + plan.shards.size) / DISK_BYTES_PER_SECOND
    return 5.0 + max(flops / rate, moved) + _learning_scores(plan) / score_rate


def _learning_scores(plan: Plan) -> float:
    return sum(p.cost(plan.target.dtype).scores for p in plan.passes)
