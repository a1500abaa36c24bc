"""Float tensors that are made wide, and changed, when they are read."""

from collections.abc import Callable
from pathlib import Path

import torch

from compressor.checkpoint.source import open_source
from compressor.ir.floats import Floats, narrow, replaced
from compressor.ir.qtensor import QuantSpec
from compressor.ir.unit import Unit
from compressor.numerics import quantize


def test_what_is_read_is_float32_and_what_is_held_stays_as_it_is() -> None:
    held = {"a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    floats = Floats(held)
    assert floats["a"].dtype == torch.float32 and floats["a"].tolist() == [1.5, -2.0]
    assert narrow(floats, "a") is held["a"]
    wide = Floats({"a": torch.tensor([0.1], dtype=torch.float64)})
    assert narrow(wide, "a").dtype == torch.float32  # not rounded twice on its way to disk


def test_changes_are_made_in_their_order_each_time_and_only_of_what_is_read() -> None:
    made: list[str] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        made.append("doubled")
        return 2 * x

    held = {"a": torch.ones(1, dtype=torch.float16), "b": torch.zeros(1)}
    floats = Floats(held).changed({"a": doubled}).changed({"a": lambda x: x + 1})
    assert set(floats) == {"a", "b"} and "a" in floats and not made
    assert floats["a"].item() == 3 and floats["a"].item() == 3 and made == ["doubled"] * 2
    assert narrow(floats, "a").item() == 3
    assert held["a"].item() == 1


def test_a_replaced_tensor_has_no_change_of_what_it_replaces() -> None:
    floats = Floats({"a": torch.ones(1)}).changed({"a": lambda x: 5 * x})
    assert replaced(floats, {"a": torch.full((1,), 7.0)})["a"].item() == 7
    assert replaced({"a": torch.ones(1)}, {"b": torch.zeros(1)}).keys() == {"a", "b"}
    assert "a" not in floats.without({"a"})


def test_codes_wait_where_the_weight_did_that_is_read_elsewhere(
    tiny_model: Callable[..., Path],
) -> None:
    layout = open_source(tiny_model("mixtral")).layout.units[1]
    (waiting, here) = (x for x in layout.linears if x.expert in (0, 1) and x.role == "expert.up")
    held = {waiting.weight_name: torch.empty(waiting.shape, device="meta")}
    held |= {here.weight_name: torch.ones(here.shape)}
    unit = Unit(layout=layout, tensors=Floats(held, device=torch.device("cpu")))
    q = quantize(torch.ones(here.shape), QuantSpec("int", 4, "group", 32))
    assert unit.where_it_waits(here, q) is q
    assert unit.where_it_waits(waiting, q).device.type == "meta"
    coded = unit.with_codes([(waiting, q), (here, q)]).quantized
    assert [coded[x.name].device.type for x in (waiting, here)] == ["meta", "cpu"]
