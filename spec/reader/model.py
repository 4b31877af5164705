"""The profile of model files (metadata.md §2 and §3): what `model.*` keys say, and the tensors they ask for."""

import re
from dataclasses import dataclass, field

from errors import StbError

LLAMA, DECODER = "llama", "decoder"
MAX_WIDTH = 1 << 24
SIZE_LIMITS = {                 # the u64 of §2.1 that all models have
    "model.vocab_size": MAX_WIDTH,
    "model.hidden_size": MAX_WIDTH,
    "model.intermediate_size": MAX_WIDTH,
    "model.layers": 4096,
    "model.heads": 65536,
    "model.kv_heads": 65536,
    "model.head_dim": 65536,
    "model.context_length": 1 << 32,
}
MAX_EXPERTS = 4096
ROPE_KEYS = {                   # what each value of model.rope.scaling asks for
    "none": {},
    "linear": {"factor": float},
    "llama3": {
        "factor": float, "low_freq_factor": float, "high_freq_factor": float,
        "original_context": int,
    },
    "dynamic": {"factor": float, "original_context": int},
    "yarn": {
        "factor": float, "beta_slow": float, "beta_fast": float, "truncate": bool,
        "attention_factor": float, "original_context": int,
    },
    "longrope": {
        "short_factors": str, "long_factors": str, "attention_factor": float,
        "original_context": int,
    },
}
LLAMA_CHOICES = {               # texts with a fixed set of values, in the order of their checks
    "model.norm": {"rmsnorm"},
    "model.activation": {"silu"},
    "model.rope.pairing": {"half", "interleaved"},
    "model.rope.scaling": {"none", "linear", "llama3"},
}
DECODER_CHOICES = LLAMA_CHOICES | {
    "model.norm": {"rmsnorm", "rmsnorm_plus_one", "layernorm"},
    "model.activation": {"silu", "relu", "gelu", "gelu_tanh"},
    "model.rope.scaling": set(ROPE_KEYS),
}
OPTIONAL_CHOICES = {            # §2.5: the default first
    "model.norm_placement": ("pre", "post", "sandwich"),
    "model.mlp": ("gated", "plain"),
    "model.attention.qk_norm": ("none", "head", "full"),
    "model.position": ("rope", "learned"),
}
NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)


@dataclass
class Experts:
    """The mixtures of experts of a model."""

    count: int
    active: int
    intermediate_size: int
    normalize: bool
    layers: list[int] | None    # None: all


@dataclass
class Profile:
    """The keys of §2.1 and §2.5, with defaults. Lists of layers are None for all layers."""

    norm: str
    activation: str
    pairing: str
    scaling: str
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    context_length: int = 0
    norm_eps: float = 0.0
    theta: float = 0.0
    tied_embeddings: bool = False
    rope: dict = field(default_factory=dict)        # the keys of the scaling, without `model.rope.`
    norm_placement: str = "pre"
    mlp: str = "gated"
    qk_norm: str = "none"
    position: str = "rope"
    final_norm: bool = True
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    bias_qkv: bool = False
    bias_attention_output: bool = False
    bias_mlp: bool = False
    attention_scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    window_layers: list[int] | None = None
    rope_dim: int | None = None
    rope_layers: list[int] | None = None
    local_theta: float | None = None
    experts: Experts | None = None
    logit_soft_cap: float | None = None

    @property
    def embedding_width(self) -> int:
        return self.embedding_size or self.hidden_size

    @property
    def rotated(self) -> int:
        """The elements R of a head that rotate."""
        return self.rope_dim or self.head_dim

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and contains(self.experts.layers, layer)

    def has_window(self, layer: int) -> bool:
        return self.window is not None and contains(self.window_layers, layer)


def contains(layers: list[int] | None, layer: int) -> bool:
    """Whether a list of layers, of which None means all, has this layer."""
    return layers is None or layer in layers


class Keys:
    """Typed access to metadata (STB-R-060)."""

    def __init__(self, metadata: dict):
        self.metadata = metadata

    def get(self, key: str, type_: type):
        value = self.metadata.get(key)
        if type(value) is not type_:                    # a bool is no int here
            raise StbError("STB-R-060", f"{key} is missing or of another type")
        return value

    def optional(self, key: str, type_: type, default=None):
        return self.get(key, type_) if key in self.metadata else default

    def choice(self, key: str, known) -> str:
        value = self.get(key, str)
        if value not in known:
            raise StbError("STB-R-061", f"unknown value of {key}")
        return value


def is_model(metadata: dict) -> bool:
    """Whether the metadata are those of a model file (§2), of whatever quality."""
    return "model.architecture" in metadata


def check_model(metadata: dict, tensors: dict[str, tuple[int, ...]], parameters: int):
    """STB-R-060 to STB-R-064 in the order of §3; `tensors` maps names to shapes."""
    keys = Keys(metadata)
    profile = read_profile(metadata)
    _check_tensors(tensors, expected_tensors(profile))
    if keys.get("model.parameters", int) != parameters:
        raise StbError("STB-R-064", f"model.parameters is not {parameters}")

    keys.get("tokenizer.json", str)
    tokens = list(keys.get("tokenizer.eos_ids", list))
    if keys.get("tokenizer.add_bos", bool) or "tokenizer.bos_id" in metadata:
        tokens.append(keys.get("tokenizer.bos_id", int))
    if max(tokens, default=0) >= profile.vocab_size:
        raise StbError("STB-R-062", "a begin or end token is outside the vocabulary")


def read_profile(metadata: dict) -> Profile:
    """The profile, after STB-R-060 to STB-R-062 as far as they are about the keys of §2.1 and §2.5."""
    keys = Keys(metadata)
    is_decoder = keys.choice("model.architecture", (LLAMA, DECODER)) == DECODER
    choices = DECODER_CHOICES if is_decoder else LLAMA_CHOICES
    profile = Profile(*(keys.choice(key, known) for key, known in choices.items()))
    for name, type_ in ROPE_KEYS[profile.scaling].items():
        profile.rope[name] = keys.get(f"model.rope.{name}", type_)
    for name in ("short_factors", "long_factors"):
        if name in profile.rope:
            profile.rope[name] = _read_numbers(name, profile.rope[name])
    for key in SIZE_LIMITS:
        setattr(profile, key.removeprefix("model."), keys.get(key, int))
    profile.norm_eps = keys.get("model.norm_eps", float)
    profile.theta = keys.get("model.rope.theta", float)
    profile.tied_embeddings = keys.get("model.tied_embeddings", bool)
    if is_decoder:
        _read_decoder(keys, profile)
    _check_values(profile)
    return profile


def _read_numbers(name: str, text: str) -> list[float]:
    words = text.split(" ")
    if not all(NUMBER.fullmatch(word) for word in words):
        raise StbError("STB-R-060", f"model.rope.{name} does not consist of numbers")
    return [float(word) for word in words]


def _read_decoder(keys: Keys, profile: Profile):
    """The keys of §2.5."""
    for key, known in OPTIONAL_CHOICES.items():
        if key in keys.metadata:
            setattr(profile, key.rpartition(".")[2], keys.choice(key, known))
    profile.final_norm = keys.optional("model.final_norm", bool, True)
    profile.embedding_size = keys.optional("model.embedding_size", int)
    profile.embedding_scale = keys.optional("model.embedding_scale", float, 1.0)
    profile.bias_qkv = keys.optional("model.bias.qkv", bool, False)
    profile.bias_attention_output = keys.optional("model.bias.attention_output", bool, False)
    profile.bias_mlp = keys.optional("model.bias.mlp", bool, False)
    profile.attention_scale = keys.optional("model.attention.scale", float)
    profile.soft_cap = keys.optional("model.attention.soft_cap", float)
    profile.window = keys.optional("model.attention.window", int)
    if profile.window is not None:
        profile.window_layers = keys.optional("model.attention.window_layers", list)
    profile.rope_dim = keys.optional("model.rope.dim", int)
    profile.rope_layers = keys.optional("model.rope.layers", list)
    profile.local_theta = keys.optional("model.rope.local_theta", float)
    profile.logit_soft_cap = keys.optional("model.logit_soft_cap", float)
    if "model.experts.count" in keys.metadata:
        profile.experts = Experts(
            keys.get("model.experts.count", int),
            keys.get("model.experts.active", int),
            keys.get("model.experts.intermediate_size", int),
            keys.get("model.experts.normalize", bool),
            keys.optional("model.experts.layers", list),
        )


def _check_values(profile: Profile):
    """STB-R-062 without the token ids."""

    def require(holds: bool, message: str):
        if not holds:
            raise StbError("STB-R-062", message)

    sizes = {
        key: (getattr(profile, key.removeprefix("model.")), limit)
        for key, limit in SIZE_LIMITS.items()
    }
    sizes["model.embedding_size"] = profile.embedding_size, MAX_WIDTH
    sizes["model.rope.dim"] = profile.rope_dim, profile.head_dim
    sizes["model.attention.window"] = profile.window, 1 << 32
    experts = profile.experts
    if experts:
        sizes["model.experts.count"] = experts.count, MAX_EXPERTS
        sizes["model.experts.active"] = experts.active, experts.count
        sizes["model.experts.intermediate_size"] = experts.intermediate_size, MAX_WIDTH
        require(profile.mlp == "gated", "experts without gates")
    for key, (value, limit) in sizes.items():
        require(value is None or 1 <= value <= limit, f"{key} is {value}, not 1 to {limit}")
    require(profile.heads % profile.kv_heads == 0, "model.kv_heads does not divide model.heads")
    require(profile.head_dim % 2 == 0, "model.head_dim is odd")
    require(profile.rotated % 2 == 0, "model.rope.dim is odd")

    rope = profile.rope
    positive = [
        profile.norm_eps, profile.theta, profile.local_theta, profile.attention_scale,
        profile.soft_cap, profile.embedding_scale, profile.logit_soft_cap,
        *(value for value in rope.values() if not isinstance(value, list)),
        *rope.get("short_factors", []), *rope.get("long_factors", []),
    ]
    for value in positive:
        require(
            value is None or isinstance(value, bool) or 0 < value < float("inf"),
            f"{value} is not above 0",
        )
    if profile.scaling == "llama3":
        require(rope["high_freq_factor"] > rope["low_freq_factor"], "an empty llama3 range")
    if profile.scaling == "dynamic":
        require(rope["factor"] >= 1, "a dynamic factor below 1")
    if profile.scaling == "yarn":
        require(rope["beta_fast"] > rope["beta_slow"], "an empty yarn range")
        require(profile.theta > 1, "yarn with a base of at most 1")
    if profile.scaling == "longrope":
        for name in ("short_factors", "long_factors"):
            require(len(rope[name]) * 2 == profile.rotated, f"another number of {name}")

    for layers in (profile.rope_layers, profile.window_layers, experts and experts.layers):
        ascending = layers is None or all(a < b for a, b in zip(layers, layers[1:]))
        require(ascending, "a list of layers that does not ascend")
        require(not layers or layers[-1] < profile.layers, "a layer that does not exist")


def expected_tensors(profile: Profile):
    """Names and shapes of §2.2 and §2.6, one after another: they may be many more than the file has."""
    V, E, H = profile.vocab_size, profile.embedding_width, profile.hidden_size
    yield "model.embed_tokens.weight", (V, E)
    if profile.position == "learned":
        yield "model.embed_positions.weight", (profile.context_length, H)
    if profile.embedding_size is not None:
        yield "model.project_in.weight", (H, E)
        yield "model.project_out.weight", (E, H)
    if profile.final_norm:
        yield "model.norm.weight", (H,)
        if profile.norm == "layernorm":
            yield "model.norm.bias", (H,)
    if not profile.tied_embeddings:
        yield "lm_head.weight", (V, E)
    for l in range(profile.layers):
        for name, shape in _layer_tensors(profile, l).items():
            yield f"model.layers.{l}.{name}", shape


def _layer_tensors(profile: Profile, layer: int) -> dict[str, tuple[int, ...]]:
    H, D = profile.hidden_size, profile.head_dim
    queries, keys = profile.heads * D, profile.kv_heads * D
    tensors = {}

    def linear(name: str, outputs: int, inputs: int, bias: bool = False):
        tensors[f"{name}.weight"] = (outputs, inputs)
        if bias:
            tensors[f"{name}.bias"] = (outputs,)

    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = (H,)
        if profile.norm == "layernorm":
            tensors[f"{name}.bias"] = (H,)
    linear("self_attn.q_proj", queries, H, profile.bias_qkv)
    linear("self_attn.k_proj", keys, H, profile.bias_qkv)
    linear("self_attn.v_proj", keys, H, profile.bias_qkv)
    linear("self_attn.o_proj", H, queries, profile.bias_attention_output)
    if profile.qk_norm != "none":
        is_full = profile.qk_norm == "full"
        tensors["self_attn.q_norm.weight"] = (queries if is_full else D,)
        tensors["self_attn.k_norm.weight"] = (keys if is_full else D,)
    if profile.norm_placement == "sandwich":
        tensors["self_attn.output_norm.weight"] = (H,)
        tensors["mlp.output_norm.weight"] = (H,)
    if profile.has_experts(layer):
        J = profile.experts.intermediate_size
        linear("mlp.router", profile.experts.count, H)
        for e in range(profile.experts.count):
            linear(f"mlp.experts.{e}.gate_proj", J, H)
            linear(f"mlp.experts.{e}.up_proj", J, H)
            linear(f"mlp.experts.{e}.down_proj", H, J)
    else:
        I = profile.intermediate_size
        if profile.mlp == "gated":
            linear("mlp.gate_proj", I, H, profile.bias_mlp)
        linear("mlp.up_proj", I, H, profile.bias_mlp)
        linear("mlp.down_proj", H, I, profile.bias_mlp)
    return tensors


def _check_tensors(tensors: dict, expected):
    """STB-R-063."""
    found = set()
    for name, shape in expected:
        if name not in tensors:
            raise StbError("STB-R-063", f"there is no tensor {name}")
        if tensors[name] != shape:
            raise StbError("STB-R-063", f"{name} has the shape {tensors[name]}, not {shape}")
        found.add(name)
    for name in tensors:
        if name not in found:
            raise StbError("STB-R-063", f"the tensor {name} is not one of the model")
