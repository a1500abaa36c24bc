"""Manifests of strangers."""

import pytest

from compressor.checkpoint.manifest import VERSION, as_manifest
from compressor.errors import InputError


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [{"x": -float("inf")}]])
def test_numbers_that_json_does_not_have_are_damage(value: object) -> None:
    """They could be read, and not be written into what is made of this."""
    sound = {"version": VERSION, "files": {}, "tensors": {}}
    assert as_manifest({**sound, "about": {"a": 1.5}}).about == {"a": 1.5}
    with pytest.raises(InputError, match="is damaged"):
        as_manifest({**sound, "about": {"a": value}})
