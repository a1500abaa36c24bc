"""Sums over groups of products against the plain reference."""

import pytest
import torch
from compressor_kernels.search.group_dot import group_dot, group_dot_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size"), [(1, 16), (37, 128), (5, 96), (3, 5000)])
def test_sums_of_products(count, size, kind):
    draw = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, size, generator=draw).to(DEVICE) for _ in range(2))
    found = group_dot(a.to(kind), b.bfloat16())
    assert torch.allclose(found, group_dot_ref(a.to(kind), b.bfloat16()), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 128, 11008])
def test_real_shapes_on_a_device(size):
    draw = torch.Generator().manual_seed(size)
    a, b = (torch.randn(4096, size, generator=draw).to(DEVICE).bfloat16() for _ in range(2))
    found = group_dot(a, b)
    assert torch.allclose(found, group_dot_ref(a, b), rtol=1e-4, atol=1e-3)
    assert torch.equal(group_dot(a, b), found)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="\\[2, 16\\]"):
        group_dot(torch.zeros(2, 16), torch.zeros(2, 8))
