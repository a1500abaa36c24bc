"""The page on formats and runtimes, from the formats and the contracts themselves."""

from collections.abc import Iterable

import torch

from compressor.formats.base import ModelSchemes, format_names, get_format
from compressor.formats.loading import loading_of
from compressor.ir.layout import Linear, ModelLayout, Sizes, UnitLayout
from compressor.ir.qtensor import MXFP4, MXFP8, NVFP4, QuantSpec
from compressor.ir.scheme import ActivationSpec, KVSpec, Scheme
from compressor.runtimes.contract import (
    Contract,
    Fused,
    Known,
    Runtime,
    load_contract,
    runtime_names,
)
from compressor.runtimes.loads import Written, fitting_lines, loads, written_form

WRITTEN = "<!-- Written by scripts/make_docs.py from the code and compressor/runtimes/*.yaml. -->"
LINEAR = Linear("model.layers.0.mlp.down_proj", "mlp.down", 4096, 4096, "mlp.out")
LAYOUT = ModelLayout(
    "llama", (UnitLayout("model.layers.0", "block", 0, (), (LINEAR,)),), Sizes(1, 1)
)

INT8, FP8 = ActivationSpec("int8", "token"), ActivationSpec("fp8_e4m3", "token")

FP8_CHANNEL = QuantSpec("fp8_e4m3", 8, "channel")
FP8_STATIC = Scheme(QuantSpec("fp8_e4m3", 8, "tensor"), ActivationSpec("fp8_e4m3", "static"))
FP8_BLOCKS = Scheme(
    QuantSpec("fp8_e4m3", 8, "block", block=(128, 128)), ActivationSpec("fp8_e4m3", "group", 128)
)
NVFP4_BOTH = Scheme(NVFP4, ActivationSpec("fp4_e2m1", "local", 16))
MXFP4_BOTH = Scheme(MXFP4, ActivationSpec("fp4_e2m1", "mx", 32))
MXFP8_BOTH = Scheme(MXFP8, ActivationSpec("fp8_e4m3", "mx", 32))


def _int(bits: int, group: int | None = 128, *, zeros: bool = False) -> QuantSpec:
    zero, by = ("subtract" if zeros else "none"), ("group" if group else "channel")
    return QuantSpec("int", bits, by, group, zero=zero, scale_dtype=torch.bfloat16)  # type: ignore[arg-type]


SCHEMES: tuple[tuple[str, str, Scheme], ...] = (
    ("int4 groups of 128", "compressed-tensors", Scheme(_int(4))),
    ("int4 groups of 128, zero points", "compressed-tensors", Scheme(_int(4, zeros=True))),
    ("int8 groups of 128", "compressed-tensors", Scheme(_int(8))),
    ("int2 groups of 64", "compressed-tensors", Scheme(_int(2, 64))),
    ("int3 groups of 64", "compressed-tensors", Scheme(_int(3, 64))),
    ("int8 per channel, int8 inputs per token", "compressed-tensors", Scheme(_int(8, None), INT8)),
    ("int8 in groups, int8 inputs per token", "compressed-tensors", Scheme(_int(8), INT8)),
    ("int4 groups of 128, int8 inputs per token", "compressed-tensors", Scheme(_int(4), INT8)),
    ("int4 groups of 128, FP8 inputs per token", "compressed-tensors", Scheme(_int(4), FP8)),
    ("FP8 per channel, inputs per token", "compressed-tensors", Scheme(FP8_CHANNEL, FP8)),
    ("FP8 per tensor, static inputs", "compressed-tensors", FP8_STATIC),
    ("FP8 in blocks of 128 x 128, inputs by 128", "compressed-tensors", FP8_BLOCKS),
    ("FP8 per channel, weights alone", "compressed-tensors", Scheme(FP8_CHANNEL)),
    ("NVFP4, weights alone", "compressed-tensors", Scheme(NVFP4)),
    ("NVFP4, inputs too", "compressed-tensors", NVFP4_BOTH),
    ("MXFP4, weights alone", "compressed-tensors", Scheme(MXFP4)),
    ("MXFP4, inputs too", "compressed-tensors", MXFP4_BOTH),
    ("MXFP8, inputs too", "compressed-tensors", MXFP8_BOTH),
    ("int4 groups of 128, zero points", "autoawq", Scheme(_int(4, zeros=True))),
    ("int4 groups of 128", "gptq", Scheme(_int(4))),
    ("int4 groups of 128, zero points", "gptq", Scheme(_int(4, zeros=True))),
    ("int3 groups of 128", "gptq", Scheme(_int(3))),
    ("int4 groups of 128", "gptq-v2", Scheme(_int(4))),
    ("FP8 in blocks of 128 x 128, inputs by 128", "fp8", FP8_BLOCKS),
    ("FP8 per tensor, static inputs", "modelopt-fp8", FP8_STATIC),
    ("NVFP4, inputs too", "modelopt-nvfp4", NVFP4_BOTH),
    ("W4A8 of QoQ", "qserve", Scheme(_int(4), INT8)),
    ("floats", "dense", Scheme()),
    ("signs and scales", "bitdelta", Scheme()),
)
CACHES = (
    ("FP8, a scale per tensor", KVSpec("fp8_e4m3", "tensor")),
    ("FP8, a scale per KV head", KVSpec("fp8_e4m3", "head")),
    ("int8", KVSpec("int8", "tensor")),
    ("int4", KVSpec("int4", "token_head")),
)


def formats_page() -> str:
    """The text of docs/formats.md."""
    columns = [
        Runtime(name=name, version=version)
        for name in runtime_names()
        for version in load_contract(name).versions
    ]
    parts = [
        "# Formats and runtimes",
        WRITTEN,
        "A format is a codec over the same codes and scales, so a checkpoint can be written in any "
        "that holds its schemes, and `compress convert` moves it to another one. Where a scale or "
        "zero point has no exact form in the target, it refuses or says by how much it rounded.",
        _table(
            ["format", "what it holds", "second reader"],
            [[x, loading_of(x).holds, loading_of(x).proof] for x in format_names()],
        ),
        "A second reader shares no code with the writer and follows the format's description: it "
        "decodes the same codes and scales. The tests are `tests/interop/` (runtimes and "
        "converters), `tests/formats/test_second_reader.py` and `tests/golden/` (published "
        "vectors). Those of gptqmodel are slow and run where it is installed: it asks for a torch "
        "of its own. Last seen to pass with gptqmodel 7.7.0, optimum 2.3.0 and torch 2.14.1, in an "
        "environment beside the project's "
        "(`python -m pytest -m slow tests/interop/test_read_by_others.py`).",
        "## What loads where",
        "`runtime: vllm` in a recipe (or `vllm@0.24`, or `{name: vllm, tp: 2, gpu: h100}`), or "
        "`--for vllm` on `compress plan` and `run`, refuses what that runtime would not load, says "
        "why and what would, and picks the format where the recipe names none. "
        "`compress inspect CHECKPOINT --for sglang` answers for a finished file. Without it `plan` "
        "says so where nothing that serves models loads the result.",
        "Each cell says how it is known: **run**: we have loaded it and compared what it computes; "
        "read: in the source of that version; *reported*: by its documentation or an issue; no: it "
        "does not load it, or computes wrongly.",
        _table(
            ["scheme", "format", *(runtime.title for runtime in columns)],
            [
                [title, fmt, *(_cell(runtime, written(fmt, scheme)) for runtime in columns)]
                for title, fmt, scheme in SCHEMES
            ],
        ),
        "The KV cache, in compressed-tensors:",
        _table(
            ["cache", *(runtime.title for runtime in columns)],
            [[title, *(_cache_cell(runtime, kv) for runtime in columns)] for title, kv in CACHES],
        ),
    ]
    for name in runtime_names():
        parts += _section(load_contract(name))
    parts += [
        "## Traps",
        "- transformers reads ModelOpt's FP8 checkpoints without an error and without their "
        "scales: its logits are wrong. Use vLLM or TensorRT-LLM, or write compressed-tensors.\n"
        "- Runtimes fuse q, k and v, and gate and up, into one matrix. A recipe that would give "
        "them different schemes is refused.\n"
        "- `ignore` lists are written as exact names: runtimes read patterns in different ways.\n"
        "- Attention policies (`attention_policy.json`) are our own; [recipe.md](recipe.md) says "
        "which passes write one. `compress eval` follows them.\n"
        "- GGUF files are read as sources (`model: model.gguf`), not written.",
    ]
    return "\n\n".join(parts) + "\n"


def _section(contract: Contract) -> list[str]:
    """All lines of one contract."""
    rows = [[_when(line), line.describe(), line.gpus, *_how(line)] for line in contract.loads]
    for kv in contract.kv:
        per, elements = " or ".join(kv.per), " or ".join(kv.elements)
        about = f"KV cache of {elements} per {per}, as {' or '.join(kv.formats)}"
        rows.append([_when(kv), about, "", *_how(kv)])
    versions = " and ".join(contract.versions)
    parts = [
        f"### {contract.title} {versions}",
        _table(["versions", "loads", "compute capability", "known", "source"], rows),
    ]
    facts = []
    targets = contract.targets
    if targets is not None:
        for what, form in (
            ("config groups", targets.form),
            ("more than one config group", targets.mixed),
            ("config groups of experts", targets.experts),
        ):
            if form == "names":
                facts.append(f"- {what}: each linear by name ({targets.known}: {targets.source})")
    if contract.tensor_parallel is not None:
        facts.append(
            "- tensor parallelism: heads divide between the GPUs, KV heads too or are shared "
            "evenly, and no group or block of scales is split "
            f"({contract.tensor_parallel.known}: {contract.tensor_parallel.source})"
        )
    if contract.fused is not None:
        facts += _fused(contract.fused)
    for hole in contract.holes:
        where = f"{_when(hole)}, " if hole.versions else ""
        weights = f", {hole.weights.describe()}" if hole.weights else ""
        only = f", {', '.join(f'`{name}`' for name in hole.models)}" if hole.models else ""
        only += f", {hole.modules} only" if hole.modules else ""
        only += ", linears that lie [in, out]" if hole.transposed else ""
        only += f", sizes that are no multiple of {hole.uneven}" if hole.uneven > 1 else ""
        only += ", tied head" if hole.tied else ""
        only += ", beside another scheme" if hole.mixed else ""
        only += ", with a quantized KV cache" if hole.cached else ""
        only += ", experts in float one by one" if hole.plain_experts else ""
        only += ", experts in float in one tensor" if hole.plain_stacks else ""
        facts.append(
            f"- hole ({where}{' and '.join(hole.formats)}{weights}{only}): {hole.says}. "
            f"Instead: {hole.instead}. {' '.join(_how(hole))}"
        )
    return [*parts, *(["\n".join(facts)] if facts else [])]


def _fused(fused: Fused) -> list[str]:
    """What is made one linear of several, by model type."""
    facts = []
    for row in fused.classes:
        made = "; ".join(f"{', '.join(parts)} are one {name}" for name, parts in row.fuses.items())
        types = ", ".join(f"`{name}`" for types in row.models.values() for name in types)
        where = f" ({', '.join(row.versions)})" if row.versions else ""
        facts.append(f"- {made}{where}, with one scheme: {types}")
    return [*facts, f"- what is fused: {' '.join(_how(fused))}"]


def _when(line: Known) -> str:
    return ", ".join(line.versions) or "all"


def _how(line: Known) -> list[str]:
    source = f"[{line.source}]({line.issue})" if line.issue else line.source
    ran = f" ({', '.join(line.ran)})" if line.ran else ""
    return [f"{line.known}{ran}", f"{source}; {line.note}" if line.note else source]


def written(name: str, scheme: Scheme) -> Written:
    """A model of one linear in a format and scheme."""
    fmt = get_format(name)
    schemes = ModelSchemes(linears={LINEAR.name: scheme})
    tensors = {}
    if scheme.weight is not None:
        dtype = fmt.model_dtype(torch.bfloat16)
        tensors[LINEAR.name] = fmt.layout(
            scheme.weight, LINEAR.shape, model_dtype=dtype, input=scheme.input
        )
    return written_form(fmt, LAYOUT, schemes, tensors, config={}, tied=False)


def _cell(runtime: Runtime, written: Written) -> str:
    if loads(runtime, written):
        return "no"
    lines = fitting_lines(runtime, written)
    return _known(lines[0].known_in(runtime.version)) if lines else "no"


def _cache_cell(runtime: Runtime, kv: KVSpec) -> str:
    for line in runtime.contract.kv:
        fits = "compressed-tensors" in line.formats and kv.element in line.elements
        if fits and kv.per in line.per and line.holds_in(runtime.version):
            known = _known(line.known_in(runtime.version))
            return f"{known}; {line.note}" if line.note else known
    return "no"


def _known(known: str) -> str:
    return {"run": "**run**", "read": "read", "reported": "*reported*"}[known]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)
