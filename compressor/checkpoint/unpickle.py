"""One file of pickled weights as safetensors; run as a process of its own by `pickles`."""

import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Write the tensors of `source`, each with memory of its own."""
    import torch
    from safetensors.torch import save_file

    loaded = torch.load(source, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise SystemExit("it is no dictionary of tensors")
    other = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise SystemExit(f"{other[0]!r} is no tensor")
    tensors, seen = {}, set()
    for name, value in loaded.items():
        place = value.untyped_storage().data_ptr()
        tensors[str(name)] = value.detach().clone() if place in seen else value.detach()
        seen.add(place)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
