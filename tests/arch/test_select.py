"""Which linears a pattern means: by role, by path, by expression, and what is left out."""

import pytest

from compressor.arch.select import Selection, matches
from compressor.errors import InputError
from compressor.ir.layout import Linear, Rows


def linear(name: str, role: str, **more: object) -> Linear:
    return Linear(name, role, out_features=8, in_features=8, site="x", **more)


Q = linear("model.layers.0.self_attn.q_proj", "attn.q")
DOWN = linear("model.layers.10.mlp.down_proj", "mlp.down")
ROUTER = linear("model.layers.1.mlp.gate", "router")
HEAD = linear("lm_head", "lm_head")
ONE = linear("model.layers.1.self_attn.o_proj", "attn.o")
EVERY = (Q, DOWN, ROUTER, HEAD, ONE)


@pytest.mark.parametrize(
    "pattern, meant",
    [
        ("linear", (Q, DOWN, HEAD, ONE)),
        ("attn.q", (Q,)),
        ("attn.*", (Q, ONE)),
        ("mlp.*", (DOWN,)),  # a router lies among what it gates
        ("model.layers.1.mlp.gate", (ROUTER,)),
        (r"re:.*\.mlp\..*", (DOWN, ROUTER)),
        ("router", (ROUTER,)),
        ("lm_head", (HEAD,)),
        ("down_proj", (DOWN,)),
        ("self_attn.q_proj", (Q,)),
        ("layers.1*.mlp.*", (DOWN,)),
        ("layers.1.*", (ONE,)),  # not layer 10
        ("model.layers.0.*", (Q,)),
        ("*_proj", (Q, DOWN, ONE)),
        (r"re:.*layers\.1\d\..*", (DOWN,)),
        ("re:lm_head", (HEAD,)),
        ("ATTN.Q", ()),
        ("proj", ()),
        ("", ()),
    ],
)
def test_a_pattern_means(pattern: str, meant: tuple[Linear, ...]) -> None:
    assert Selection((pattern,)).pick(EVERY) == meant


def test_a_fused_linear_is_meant_by_the_role_of_any_of_its_rows() -> None:
    parts = tuple(Rows(f"attn.{part}", 8 * i, 8) for i, part in enumerate("qkv"))
    fused = linear("model.layers.0.attn.c_attn", "attn.qkv", rows=parts)
    assert matches("attn.k", fused) and matches("attn.qkv", fused)
    assert not matches("attn.o", fused)


def test_what_is_ignored_is_left_out_and_order_stays() -> None:
    chosen = Selection(("lm_head", "linear"), ignore=("mlp.down", "layers.7.*"))
    assert chosen.pick(EVERY) == (Q, HEAD, ONE)
    assert chosen.counts(EVERY) == {"lm_head": 1, "linear": 4}
    assert chosen.ignored_counts(EVERY) == {"mlp.down": 1, "layers.7.*": 0}


def test_a_bad_expression_is_an_error() -> None:
    with pytest.raises(InputError, match="bad regular expression"):
        Selection(("re:layers.(0",)).pick(EVERY)
