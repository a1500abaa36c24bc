"""What rounding explains of the error of a block's outputs."""

import pytest
import torch

from compressor.ir.scheme import ActivationSpec
from compressor.numerics.activations import fake_quantize_activation, stored_scale
from compressor.runner.simulate import StoredInput
from compressor.verify.compare_outputs import WIDER, _own_scale

STATIC = ActivationSpec("int8", "static")


@pytest.mark.parametrize(("stored", "used"), [(0.25, 1.0), (1.0, 1.0), (2.5, 2.5), (100.0, WIDER)])
def test_a_static_scale_of_other_text_may_be_wider_but_not_narrower_nor_any_width(stored, used):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    own = stored_scale(x.abs().amax(), STATIC)
    enter = _own_scale(StoredInput(STATIC, stored * own))
    assert torch.equal(enter(x), fake_quantize_activation(x, STATIC, used * own))


def test_no_input_stays_none_and_a_dynamic_scale_is_the_inputs_own():
    zero = torch.zeros(2, 16)
    assert torch.equal(_own_scale(StoredInput(STATIC, torch.ones(1)))(zero), zero)
    spec = ActivationSpec("int8", "token")
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_own_scale(StoredInput(spec))(x), fake_quantize_activation(x, spec))
