"""What methods learn: frozen values, and how they are stored."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, ValidationError
from torch import Tensor

from compressor.errors import InputError
from compressor.ir.frozen import Strict


class Learned(Strict):
    """What a method learned; by itself, nothing.

    A field is a tensor, a dict of tensors by name, or plain data. Tensors are stored as `FIELD` or
    `FIELD.NAME`, plain data as JSON: in the work folder while a run goes on, and of what decides a
    policy beside it, as `METHOD.FIELD` in its tensors and in its `made_by`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the name under which they are stored."""
        found: dict[str, Tensor] = {}
        for name, value in self:
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, dict):
                parts = value.items()
                found |= {f"{name}.{key}": part for key, part in parts if isinstance(part, Tensor)}
        return found

    def figures(self) -> dict[str, Any]:
        """The rest, as plain data."""
        stored = {name.partition(".")[0] for name in self.tensors()}
        return self.model_dump(mode="json", exclude=stored)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> Self:
        """The value that these tensors and figures are of; others beside them are left alone.
        Raises InputError where one is missing or not what it should be."""
        values: dict[str, Any] = {
            name: figures[name] for name in cls.model_fields if name in figures
        }
        for name, tensor in tensors.items():
            field, _, key = name.partition(".")
            if field in cls.model_fields:
                values[field] = {**values.get(field, {}), key: tensor} if key else tensor
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = ", ".join(str(item["loc"][0]) for item in error.errors())
            raise InputError(f"what was learned is not stored whole: {wrong}") from error


def of_shape(name: str, tensor: Tensor, *shape: int) -> Tensor:
    """The tensor. Raises InputError where it has another shape than the model has layers and
    heads."""
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} have shape {list(tensor.shape)}, the model has {list(shape)}")
    return tensor
