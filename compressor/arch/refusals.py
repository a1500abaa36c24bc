"""What is said of a checkpoint that a map does not fit: ways out, and experts that are not those
of config.json."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compressor.arch.schema import MapFile
from compressor.arch.sizes import CHOSEN, ConfigReader
from compressor.errors import InputError
from compressor.ir.layout import weight_name

CODES = {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax"}


def broken_requirements(read: ConfigReader) -> Iterator[InputError]:
    """What config.json says and a map is not right for."""
    for row in read.arch.require:
        value = read.value(row.key)
        needed = row.value if row.size is None else read.size(row.size)
        if value is not None and value != needed:
            yield InputError(
                f"{read.arch.model_type} with {row.key} {value!r} is not supported",
                hint=f"{row.why}; map: none rounds its weights"
                if row.why
                else f"only {row.key} {needed!r} is",
            )


def way_out(names: Iterable[str], config: Mapping[str, Any]) -> str:
    """What to do about tensors that a map has no place for."""
    if any("lora_" in name or ".base_layer." in name for name in names):
        return "an adapter is not merged: merge it first (peft: merge_and_unload)"
    leaves = {name.rpartition(".")[2] for name in names}
    if "quantization_config" in config or leaves & CODES:
        return "this checkpoint is already quantized: start from the original"
    return (
        "if the model does without them, as transformers does, save it once more without: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


def headless(names: Iterable[str], arch: MapFile) -> str | None:
    """What to do about a head that is not there."""
    if weight_name(arch.head.linear) not in names:
        return None
    return (
        "if the head shares the embedding, config.json has to say tie_word_embeddings: true; "
        "a model that was saved without its head cannot be made into a causal model"
    )


def wrong_experts(
    arch: MapFile, experts: int | None, names: Iterable[str], config: Mapping[str, Any]
) -> Iterator[InputError]:
    """Experts that are not as many as config.json says: of a block, where each has tensors of its
    own, and of those that a token is sent to."""
    if experts is None:
        return
    for chosen in CHOSEN:
        count = arch.value(config, chosen)
        if count is not None and (type(count) is not int or not 1 <= count <= experts):
            yield InputError(f"config.json: {chosen} is {count!r}, which is no choice of {experts}")
    yield from _wrong_groups(arch, experts, config)
    wrong: dict[str, str] = {}
    for block, there in _numbered(arch, names).items():
        lacking = sorted(set(range(experts)) - there)
        beyond = sorted(there - set(range(experts)))
        if lacking and max(there) + 1 < experts and len(there) == max(there) + 1:
            wrong[block] = f"has {len(there)}"
        elif lacking:
            wrong[block] = f"lacks {_listed(lacking)}"
        elif beyond:
            wrong[block] = f"has {_listed(beyond)} beside them"
    if wrong:
        block, what = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more blocks like it" if len(wrong) > 1 else ""
        yield InputError(
            f"config.json says {_key(arch, config)} {experts}, numbered from 0; {block} {what}"
            f"{more}",
            hint="config.json is another model's, or a shard is missing",
        )


def _wrong_groups(arch: MapFile, experts: int, config: Mapping[str, Any]) -> Iterator[InputError]:
    """Groups of experts, of which the router chooses some before it chooses experts in them."""
    groups = arch.value(config, "n_group")
    kept = arch.value(config, "topk_group")
    if groups is None or arch.value(config, "topk_method") == "greedy":
        return
    if type(groups) is not int or groups < 1 or experts % groups:
        said = f"{_key(arch, config)} {experts}"
        yield InputError(f"config.json: n_group is {groups!r}, which does not divide {said}")
        return
    if kept is not None and (type(kept) is not int or not 1 <= kept <= groups):
        yield InputError(f"config.json: topk_group is {kept!r}, which is no choice of {groups}")
        return
    chosen = arch.value(config, "num_experts_per_tok")
    left = experts // groups * (groups if kept is None else kept)
    if type(chosen) is int and left < chosen <= experts:
        yield InputError(
            f"config.json: num_experts_per_tok is {chosen}, and topk_group {kept} of n_group "
            f"{groups} leaves {left} experts"
        )


def _numbered(arch: MapFile, names: Iterable[str]) -> dict[str, set[int]]:
    """Block → numbers of the experts that have weights of their own there."""
    rows = {row.name for section in arch.mlp for row in section.linears if "{e}" in row.name}
    inner = "|".join(re.escape(name).replace(r"\{e\}", r"(\d+)") for name in sorted(rows))
    if not inner:
        return {}
    pattern = re.compile(
        rf"({re.escape(arch.layer).replace(re.escape('{i}'), r'[0-9]+')})\.(?:{inner})\.weight\w*"
    )
    found: dict[str, set[int]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is not None:
            number = next(group for group in match.groups()[1:] if group is not None)
            found.setdefault(match[1], set()).add(int(number))
    return found


def _key(arch: MapFile, config: Mapping[str, Any]) -> str:
    keys = arch.sizes.get("experts", "experts")
    keys = (keys,) if isinstance(keys, str) else keys
    return next((key for key in keys if arch.value(config, key) is not None), keys[0])


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:4]))
    return f"expert {shown}" + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
