"""A recipe: a frozen value made from YAML and checked; unknown keys name the nearest valid one."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from compressor.audit.settings import AuditSettings
from compressor.errors import InputError, Problems, nearest
from compressor.evaluate.gate import Gate
from compressor.evaluate.settings import Evaluation
from compressor.ir.frozen import Strict
from compressor.methods.base import Method, get_pass, pass_names
from compressor.plan.byte_sizes import parse_size
from compressor.plan.calibration import Calibration
from compressor.plan.explain import WrongKey, explain
from compressor.plan.recipe_file import Written, read_recipe
from compressor.report.settings import CardSection, Publish
from compressor.runtimes.contract import Runtime, parse_runtime

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


LARGEST_COUNT, LARGEST_SIZE = 10**9, 2**63 - 1
SIZES = ("seed", "max_shard_size", "activation_store.max_size")
"""Of numbers in a recipe: rows, steps and the like; bytes and the seed."""


class Step(BaseModel):
    """One entry of `passes`: a pass and its parameters."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    name: str
    params: Method

    def plain(self) -> dict[str, Any]:
        """The parameters as plain data; one that is null by default and left so is left out."""
        fields = type(self.params).model_fields
        data = self.params.model_dump(mode="json")
        return {k: v for k, v in data.items() if v is not None or fields[k].default is not None}


class ActivationStore(Strict):
    """Where hidden states are kept, for other passes and runs to read."""

    dir: str = Field(
        "~/.cache/compressor/activations", description="its folder; several runs may share it"
    )
    max_size: Size = Field(20 * 10**9, description="most bytes in it, or such as 20GB")

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, data: Any) -> Any:
        return {"dir": data} if isinstance(data, str) else data


class Recipe(Strict):
    """Everything a run depends on."""

    model: str = Field(description="folder, Hub id (id@revision pins one) or GGUF file")
    map: str | None = Field(
        None,
        description="none: weights by shape and name alone, without the model running; or a map "
        "file; null: the map of config.json's model_type. Also model: {path: …, map: …}",
    )
    output: str = Field(description="folder to write; it must be new or this recipe's own")
    seed: int = Field(0, description="of everything that is drawn")
    calibration: Calibration = Field(Calibration(), description="tokens for statistics")
    passes: tuple[Step, ...] = Field(min_length=1, description="what is done, in order")
    format: str = Field("compressed-tensors", description="what is written: docs/formats.md")
    runtime: Runtime | None = Field(
        None, description="where it is to be loaded: vllm, or vllm@0.24; refuses what would not"
    )
    propagate: Literal["quantized", "original"] = Field(
        "quantized", description="which block's outputs the next block is calibrated on"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of what stays unquantized; auto: as in the source"
    )
    dequantize_source: bool = Field(False, description="accept an already quantized source")
    untie: bool = Field(False, description="write a tied lm_head as a tensor of its own")
    reproducible: bool = Field(
        False, description="continue only where instructions, threads and libraries are the same"
    )
    max_shard_size: Size = Field(5 * 10**9, description="largest file: bytes, or such as 2GB")
    activation_store: ActivationStore | None = Field(
        None, description="keep hidden states on disk and read what is known; {} or a folder"
    )
    audit: AuditSettings | None = Field(
        None, description="look for signs of a backdoor or of damage: docs/audit.md; {} will do"
    )
    verify: bool = Field(True, description="reopen the written files and prove them")
    evaluate: Evaluation | None = Field(None, description="measure the written files; {} will do")
    gate: Gate | None = Field(None, description="limits; a run that misses one ends with exit 1")
    report: bool = Field(True, description="write report.html, report.json and the model card")
    card: CardSection = Field(CardSection(), description="what the card cannot know by itself")
    publish: Publish | None = Field(None, description="upload a checkpoint that passed everything")

    @model_validator(mode="before")
    @classmethod
    def _map_beside_path(cls, data: Any) -> Any:
        model = data.get("model") if isinstance(data, dict) else None
        if not isinstance(model, dict):
            return data
        if not {"path", "map"} >= model.keys() >= {"path"} or "map" in data:
            raise ValueError("model is a path or {path: …, map: …}")
        return {**data, "model": model["path"], "map": model.get("map")}

    @field_validator("runtime", mode="before")
    @classmethod
    def _known_runtime(cls, value: Any) -> Any:
        try:
            return None if value is None else parse_runtime(value)
        except InputError as error:
            raise ValueError("; ".join(filter(None, (error.message, error.hint)))) from error

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with every default filled in, without where it writes and what
        it keeps, which change no byte of the artefact."""
        left_out = {"output", "passes", "publish", "activation_store"}
        data = self.model_dump(mode="json", exclude=left_out, exclude_none=True)
        data["passes"] = [{s.name: s.plain()} for s in self.passes]
        return {key: value for key, value in data.items() if value != {}}


KEYS = frozenset(Recipe.model_fields)
AFTERWARDS = ("audit", "verify", "evaluate", "gate", "report", "card")
"""Keys that decide nothing of the artefact: a finished one can be judged by other limits."""


def load_recipe(path: Path, overrides: Sequence[str] = (), **top: Any) -> Recipe:
    """Read a recipe. `overrides` are key.path=value (YAML values); `top` replaces top-level keys
    that are not None. Raises InputError or Problems."""
    data = read_recipe(path)
    data.replace(overrides, top)
    return make_recipe(data)


def make_recipe(data: Mapping[str, Any]) -> Recipe:
    """Validate plain data. Raises Problems with everything that is wrong, and for data that was
    read from a file on which line."""
    try:
        return _make_recipe(data)
    except Problems as error:
        if isinstance(data, Written):
            raise Problems([data.located(problem) for problem in error.problems]) from error
        raise


def _make_recipe(data: Mapping[str, Any]) -> Recipe:
    problems: list[Any] = [*_too_large(data)]
    if problems:
        raise Problems(problems)
    steps = []
    entries = data.get("passes")
    if not isinstance(entries, list) or not entries:
        message = "passes is not a list" if entries else "passes: at least one pass is needed"
        problems.append(WrongKey(message, place="passes", hint="passes: [{rtn: {}}]"))
        entries = []
    for number, entry in enumerate(entries):
        try:
            steps.extend(_make_steps(entry, f"passes.{number}"))
        except Problems as error:
            problems.extend(error.problems)
        except InputError as error:
            problems.append(error)
    only = [form for step in steps if (form := step.params.effects().only_format) is not None]
    if only and "format" not in data:
        data = {**data, "format": only[0]}
    try:
        recipe = Recipe.model_validate({**data, "passes": steps or [_PLACEHOLDER]})
    except ValidationError as error:
        problems.extend(explain(error, Recipe, ""))
    if problems:
        raise Problems(problems)
    return recipe


def _too_large(value: Any, place: str = "") -> Iterator[InputError]:
    """Numbers that no count is as large as, and loops would run for ever over."""
    most = LARGEST_SIZE if place in SIZES else LARGEST_COUNT
    if isinstance(value, int) and abs(value) > most:
        yield WrongKey(f"{place} is too large", place=place, hint=f"at most {most}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _too_large(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _too_large(inner, f"{place}.{number}")


def _make_steps(entry: Any, where: str) -> list[Step]:
    """A pass, or the passes that it stands for."""
    step = _make_step(entry, where)
    parts = step.params.stands_for()
    return [_make_step({name: dict(params)}, where) for name, params in parts] or [step]


def _make_step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        message = f"{where}: a pass is one name with its parameters"
        raise WrongKey(message, place=where, hint=_one_pass(entry))
    name, params = next(iter(entry.items()))
    if name not in pass_names():
        beside = f"{name} stands beside passes, as a key of its own" if name in KEYS else ""
        hint = beside or nearest(str(name), pass_names())
        raise WrongKey(f"{where}: unknown pass {name!r}", place=where, hint=hint)
    kind = get_pass(name)
    try:
        return Step(name=name, params=kind.model_validate(params or {}))
    except ValidationError as error:
        raise Problems([*explain(error, kind, f"{where}.{name}.")]) from error


def _one_pass(entry: Any) -> str:
    """How an entry would look that was meant as a pass."""
    names = [name for name in entry if name in pass_names()] if isinstance(entry, dict) else []
    if len(names) > 1:
        return "one dash for each: " + ", ".join(f"- {name}: {{…}}" for name in names)
    if names and entry[names[0]] is None:
        return f"indent its parameters further than its name: - {names[0]}: {{…}}"
    return "- awq: {bits: 4}"


class _Nothing(Method):
    """Stands in for passes that were already reported as wrong."""


_PLACEHOLDER = Step(name="", params=_Nothing())


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe's YAML; each pass brings the schema of its parameters."""
    schema = Recipe.model_json_schema(
        schema_generator=_StepsLeftOut, ref_template="#/$defs/{model}", mode="validation"
    )
    options: list[dict[str, Any]] = [{"enum": pass_names()}]
    for name in pass_names():
        found = get_pass(name).model_json_schema(ref_template="#/$defs/{model}")
        schema.setdefault("$defs", {}).update(found.pop("$defs", {}))
        options.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": [found, {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    schema["properties"]["passes"] = {"type": "array", "minItems": 1, "items": {"anyOf": options}}
    schema["properties"]["max_shard_size"] = {"type": ["integer", "string"], "default": 5 * 10**9}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


class _StepsLeftOut(GenerateJsonSchema):
    """Steps hold a pass of any class, whose schema is put in by name."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}
