"""The profile of model files (metadata.md §2 and §3)."""

from errors import StbError

SHAPE_LIMITS = {                # all u64 of §2.1 that describe tensors or their use
    "model.vocab_size": 1 << 24,
    "model.hidden_size": 1 << 24,
    "model.intermediate_size": 1 << 24,
    "model.layers": 4096,
    "model.heads": 65536,
    "model.kv_heads": 65536,
    "model.head_dim": 65536,
    "model.context_length": 1 << 32,
}
ROPE_KEYS = {                   # what each value of model.rope.scaling asks for
    "none": {},
    "linear": {"model.rope.factor": float},
    "llama3": {
        "model.rope.factor": float,
        "model.rope.low_freq_factor": float,
        "model.rope.high_freq_factor": float,
        "model.rope.original_context": int,
    },
}
CHOICES = {                     # texts with a fixed set of values, in the order of their checks
    "model.architecture": {"llama"},
    "model.norm": {"rmsnorm"},
    "model.activation": {"silu"},
    "model.rope.pairing": {"half", "interleaved"},
    "model.rope.scaling": set(ROPE_KEYS),
}


def is_model(metadata: dict) -> bool:
    """Whether the metadata are those of a model file (§2), of whatever quality."""
    return "model.architecture" in metadata


def check_model(metadata: dict, tensors: dict[str, tuple[int, ...]], parameters: int):
    """STB-R-060 to STB-R-064 in the order of §3; `tensors` maps names to shapes."""

    def get(key: str, type_: type):
        value = metadata.get(key)
        if type(value) is not type_:                    # a bool is no int here
            raise StbError("STB-R-060", f"{key} is missing or of another type")
        return value

    for key, known in CHOICES.items():
        if get(key, str) not in known:
            raise StbError("STB-R-061", f"unknown value of {key}")
    rope_keys = ROPE_KEYS[metadata["model.rope.scaling"]]
    rope = {key: get(key, type_) for key, type_ in rope_keys.items()}
    sizes = {key: get(key, int) for key in SHAPE_LIMITS}
    positive = {key: get(key, float) for key in ("model.norm_eps", "model.rope.theta")}
    tied = get("model.tied_embeddings", bool)

    _check_values(sizes, positive | rope)
    _check_tensors(tensors, _expected_tensors(sizes, tied))
    if get("model.parameters", int) != parameters:
        raise StbError("STB-R-064", f"model.parameters is not {parameters}")

    get("tokenizer.json", str)
    tokens = list(get("tokenizer.eos_ids", list))
    if get("tokenizer.add_bos", bool) or "tokenizer.bos_id" in metadata:
        tokens.append(get("tokenizer.bos_id", int))
    if max(tokens, default=0) >= sizes["model.vocab_size"]:
        raise StbError("STB-R-062", "a begin or end token is outside the vocabulary")


def _check_values(sizes: dict[str, int], positive: dict[str, float | int]):
    """STB-R-062 without the token ids."""
    for key, limit in SHAPE_LIMITS.items():
        if not 1 <= sizes[key] <= limit:
            raise StbError("STB-R-062", f"{key} is {sizes[key]}, not 1 to {limit}")
    if sizes["model.heads"] % sizes["model.kv_heads"]:
        raise StbError("STB-R-062", "model.kv_heads does not divide model.heads")
    if sizes["model.head_dim"] % 2:
        raise StbError("STB-R-062", "model.head_dim is odd")
    for key, value in positive.items():
        if not value > 0:
            raise StbError("STB-R-062", f"{key} is {value}, not above 0")
    low = positive.get("model.rope.low_freq_factor")
    if low is not None and not positive["model.rope.high_freq_factor"] > low:
        raise StbError("STB-R-062", "model.rope.high_freq_factor is not above low_freq_factor")


def _expected_tensors(sizes: dict[str, int], tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of §2.2."""
    V, H, I, L, A, K, D = (
        sizes[f"model.{name}"]
        for name in (
            "vocab_size", "hidden_size", "intermediate_size",
            "layers", "heads", "kv_heads", "head_dim",
        )
    )
    layer = {
        "input_layernorm": (H,),
        "self_attn.q_proj": (A * D, H),
        "self_attn.k_proj": (K * D, H),
        "self_attn.v_proj": (K * D, H),
        "self_attn.o_proj": (H, A * D),
        "post_attention_layernorm": (H,),
        "mlp.gate_proj": (I, H),
        "mlp.up_proj": (I, H),
        "mlp.down_proj": (H, I),
    }
    expected = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    for l in range(L):
        for name, shape in layer.items():
            expected[f"model.layers.{l}.{name}.weight"] = shape
    if not tied:
        expected["lm_head.weight"] = (V, H)
    return expected


def _check_tensors(tensors: dict, expected: dict):
    """STB-R-063."""
    for name, shape in expected.items():
        if name not in tensors:
            raise StbError("STB-R-063", f"there is no tensor {name}")
        if tensors[name] != shape:
            raise StbError("STB-R-063", f"{name} has the shape {tensors[name]}, not {shape}")
    for name in tensors:
        if name not in expected:
            raise StbError("STB-R-063", f"the tensor {name} is not one of the model")
