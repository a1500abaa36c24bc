"""What tests of other packages share."""

import inspect
from typing import Any

import pytest


@pytest.fixture
def attention_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's attention takes its cache as `past_key_values`.

    compressed-tensors 0.20 knows attention by this argument, which transformers 5.24 calls `cache`:
    without the old name neither it nor anything else rounds keys and values there.
    """
    from transformers.models.llama.modeling_llama import LlamaAttention

    own = LlamaAttention.forward
    if "past_key_values" in inspect.signature(own).parameters:
        return

    def forward(
        self: Any, *args: Any, past_key_values: Any = None, cache: Any = None, **options: Any
    ) -> Any:
        return own(
            self, *args, cache=cache if past_key_values is None else past_key_values, **options
        )

    monkeypatch.setattr(LlamaAttention, "forward", forward)
