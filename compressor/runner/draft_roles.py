"""What names of linears say of their roles, and roles of shapes and of shared inputs."""

ROLES = (
    (r"q_proj", "attn.q"),
    (r"k_proj", "attn.k"),
    (r"v_proj", "attn.v"),
    (r"(qkv_proj|query_key_value|Wqkv|c_attn)", "attn.qkv"),
    (r"(o_proj|attn\.(out_proj|c_proj)|(self_)?attn\.dense|attention\.dense)", "attn.o"),
    (r"gate_up_proj", "mlp.gate_up"),
    (r"(gate_proj|w1)", "mlp.gate"),
    (r"(up_proj|w3|fc1|c_fc|dense_h_to_4h)", "mlp.up"),
    (r"(down_proj|w2|fc2|mlp\.c_proj|dense_4h_to_h)", "mlp.down"),
    (r"(gate|router|shared_expert_gate)", "router"),
)
SHAPES = {
    "attn.q": ("q", "hidden"),
    "attn.k": ("kv", "hidden"),
    "attn.v": ("kv", "hidden"),
    "attn.qkv": ("qkv", "hidden"),
    "attn.o": ("hidden", "q"),
    "mlp.gate": ("ff", "hidden"),
    "mlp.up": ("ff", "hidden"),
    "mlp.gate_up": ("gate_up", "hidden"),
    "mlp.down": ("hidden", "ff"),
    "router": ("experts", "hidden"),
}
FUSED = {"attn.q": "qkv_proj", "attn.k": "qkv_proj", "attn.v": "qkv_proj"} | {
    "mlp.gate": "gate_up_proj",
    "mlp.up": "gate_up_proj",
}


def site_of(roles: set[str]) -> str:
    """The name of an input that linears of these roles read."""
    reads = any(role.startswith("attn.") and role != "attn.o" for role in roles)
    widens = any(role in ("mlp.gate", "mlp.up", "mlp.gate_up") for role in roles)
    if "router" in roles or roles & {"shared.gate", "shared.up"}:
        return "expert.in"
    if reads:
        return "block.in" if widens else "attn.in"
    if widens:
        return "mlp.in"
    names = {"attn.o": "attn.out", "mlp.down": "mlp.out", "shared.down": "shared.out"}
    return next((names[role] for role in roles if role in names), "other.in")
