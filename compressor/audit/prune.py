"""Fine-pruning: MLP channels that clean text hardly uses are silenced, in a model edited as it is
read.

Fine-Pruning (arXiv 1805.12185) sets out from backdoors that sit in neurons which clean data leaves
idle. Channels are ranked within their block by the mean size of what enters the down projection;
the columns of the lowest are zero. Training the model anew afterwards, the other half of the paper,
is not done. Planted triggers (NeuBA) are barely weakened by it: the audit after it says so.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from compressor_calibration.stats import StatNeeds
from torch import Tensor

from compressor.audit.edited import EditedCheckpoint, edited_checkpoint
from compressor.checkpoint.reader import Checkpoint
from compressor.errors import InputError
from compressor.ir.layout import Linear
from compressor.runner.observe import observe
from compressor.runner.source_model import SourceModel
from compressor.runner.sweep import Execution, Progress, sweep

ROLE = "mlp.down"


def pruned_checkpoint(
    original: Checkpoint, columns: Mapping[str, tuple[int, ...]]
) -> EditedCheckpoint:
    """The checkpoint with zeros in columns: weight [out, in] → its inputs that are silent."""
    return edited_checkpoint(
        original, {name: partial(_silenced, inputs=inputs) for name, inputs in columns.items()}
    )


def _silenced(weight: Tensor, *, inputs: Sequence[int]) -> Tensor:
    made = weight.clone()
    made[:, list(inputs)] = 0
    return made


def prunable(model: SourceModel) -> list[Linear]:
    """The down projections of a model, one a block. Raises InputError where a block has none that
    lies in the checkpoint as it runs."""
    found = []
    entries = model.source.checkpoint.entries
    for block in model.layout.blocks:
        down = [linear for linear in block.linears if linear.role == ROLE]
        entry = entries.get(down[0].weight_name) if len(down) == 1 else None
        if entry is None or tuple(entry.spec.shape) != down[0].shape:
            raise InputError(
                f"{block.name} has no MLP whose channels can be silenced one by one",
                hint="leave out --prune: experts, and weights that lie transposed, are not pruned",
            )
        found += down
    return found


def idle_channels(
    model: SourceModel, ids: Tensor, share: float, *, batch: int, progress: Progress
) -> dict[str, tuple[int, ...]]:
    """Weight of a down projection → the `share` of its inputs that are smallest over rows of clean
    tokens [rows, length]."""
    downs = {linear.weight_name for linear in prunable(model)}
    found: dict[str, tuple[int, ...]] = {}
    for step in sweep(model, ids, execution=Execution(batch, progress=progress)):
        (down,) = (x for x in step.layout.linears if x.weight_name in downs)
        needs = {down.site: StatNeeds(absmean=True)}
        with step.loaded() as block:
            seen = observe(block, step.stream, needs=needs, batch=batch)
            step.run()
        found[down.weight_name] = idlest(seen.stats[down.site].absmean.cpu(), share)
    return found


def idlest(sizes: Tensor, share: float) -> tuple[int, ...]:
    """The `share` of inputs whose mean size [inputs] is smallest."""
    order = torch.argsort(sizes, stable=True)
    return tuple(sorted(order[: int(share * len(order))].tolist()))
