"""The GPU that a command is told is the one that its kernels start on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.errors import InputError
from compressor.plan.recipe import make_recipe
from compressor.run import session
from compressor.run.session import choose_device, compile_checkpoint, prepare
from compressor.verify.apart import Apart
from compressor.verify.verify import verify


def test_triton_starts_kernels_where_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(session, "lock_pages_in_threads", lambda: None)
    for name, index, told in (("cuda", 0, 0), ("cuda:0", 0, 0), ("cuda:1", 1, 1), ("cpu", None, 1)):
        assert choose_device(name).index == index
        assert current == [torch.device("cuda", 1)] * told
    with pytest.raises(InputError, match="there is no cuda:2"):
        choose_device("cuda:2")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_writes_and_proves_what_the_first_does(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, written = tiny_model("llama"), []
    for name in ("cuda:0", "cuda:1"):
        with torch.cuda.device(0), Apart(name) as apart:
            recipe = {
                "model": str(model),
                "output": str(tmp_path / name[-1]),
                "calibration": {"samples": 8, "length": 64},
                "passes": [{"awq": {"bits": 4, "group_size": 32}}],
            }
            device = choose_device(name)
            output = compile_checkpoint(prepare(make_recipe(recipe), device=device)).output
            assert verify(output, against=model, device=device, apart=apart).ok
            assert apart._process.wait() == 0
            written.append((output / "model.safetensors").read_bytes())
    assert written[0] == written[1]
