"""SpaLoc's Hoyer-square and information sufficiency, as its repository computes them."""

import pytest
import torch
from torch import Tensor

from compressor.numerics.head_gates import hoyer_square, hoyer_threshold
from compressor.numerics.sufficiency import sufficiency
from tests.support.golden_files import vectors

HOYER = "systems/spaloc_hoyer"


def test_hoyer_square_and_its_threshold() -> None:
    """Of rows, by the largest channel; all zero is 1 here, where the reference has NaN."""
    found = vectors(HOYER)
    cases = [name.removesuffix(".hoyer_square") for name in found if name.endswith("r_square")]
    assert len(cases) == 9
    for case in cases:
        value = found[f"{case}.value"].requires_grad_()
        rows = value.abs().amax(1)
        ours = hoyer_square(rows)
        torch.testing.assert_close(ours, found[f"{case}.hoyer_square"], rtol=1e-5, atol=1e-6)
        if f"{case}.tau" in found:
            tau = float(found[f"{case}.tau"])
            assert hoyer_threshold(rows.detach()) == pytest.approx(tau, rel=1e-4)
        wanted = found.get(f"{case}.hoyer_square_grad")
        # Ties between channels, and the sign at 0, are left to autograd.
        if wanted is not None and case not in ("onehot", "two_of_four", "uniform"):
            (grad,) = torch.autograd.grad(ours, value)
            of_rows = [one.abs().sum(1) for one in (grad, wanted)]
            torch.testing.assert_close(*of_rows, rtol=1e-3, atol=1e-4)
    assert found["allzero.hoyer_square_reference"].isnan()
    assert float(hoyer_square(torch.zeros(4))) == 1


def test_the_published_penalty_of_several_sets_of_gates() -> None:
    """Effective numbers, each a mean over the batch, over how many gates there are, both with the
    weights of their arity."""
    found = vectors("systems/spaloc_sparsity_loss")
    gates = {n: t.clone().requires_grad_() for n, t in found.items() if n.startswith("gate.")}
    active, space = torch.zeros(()), torch.zeros(())
    for depth in range(3):
        for arity in (1, 2):
            both = [gates[f"gate.d{depth}.o{arity}.b{b}"] for b in (0, 1)]
            mean = torch.stack([hoyer_square(gate.flatten()) for gate in both]).mean()
            torch.testing.assert_close(
                mean, found["hoyer_square_mean"][depth, arity], rtol=1e-5, atol=1e-5
            )
            weight = found["multiplier"][depth, arity]
            active = active + weight * mean
            space = space + weight * both[0].numel()
    loss = active / (1e-6 + space)
    torch.testing.assert_close(loss, found["sparsity_loss"], rtol=1e-5, atol=1e-6)
    loss.backward()
    for name in ("gate.d0.o1.b0", "gate.d0.o2.b1"):
        torch.testing.assert_close(gates[name].grad, found[f"grad.{name}"], rtol=1e-4, atol=1e-6)


def paths(relations: Tensor, *, longest: int) -> Tensor:
    """How many paths of each length up to `longest` there are between every two objects."""
    one = relations.sum(-1)
    one = one + one.T
    total, power = torch.eye(len(one), dtype=one.dtype) + one, one
    for _ in range(longest - 1):
        power = power @ one
        total = total + power
    return total


@pytest.mark.parametrize(("name", "longest", "gamma"), [
    ("IS_gamma1.0_dim2", 2, 1.0), ("IS_gamma0.3_dim2", 2, 0.3), ("IS_k3_dim2", 3, 1.0),
])  # fmt: skip
def test_the_share_that_a_sample_holds(name: str, longest: int, gamma: float) -> None:
    """The published rule on the published counts: paths inside a sampled subgraph over all."""
    found = vectors("systems/spaloc_information_sufficiency")
    nodes, relations = found["nodes"], found["relations"].double()
    held = paths(relations[nodes][:, nodes], longest=longest)
    whole = paths(relations, longest=longest)[nodes][:, nodes]
    torch.testing.assert_close(sufficiency(held, whole, gamma=gamma), found[name])
