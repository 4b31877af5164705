"""The computation of model files (metadata.md §2.2 and §2.7), in binary64 and without a cache: to compare with.

    Decoder(StbFile.open("model.stb")).logits([1, 17, 200])     # [tokens, vocabulary]
"""

import math

import numpy as np

from model import Profile, contains, read_profile

erf = np.vectorize(math.erf, otypes=[float])
ACTIVATIONS = {
    "silu": lambda z: z / (1 + np.exp(-z)),
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z / 2 * (1 + erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
}


def soft_cap(values, cap: float | None):
    return values if cap is None else cap * np.tanh(values / cap)


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Decoder:
    """A model with all its weights in memory."""

    def __init__(self, file):
        file.check_model()
        self.profile = read_profile(file.metadata)
        self.tensors = {name: file.weights(name).astype(float) for name in file.tensors}

    def logits(self, ids: list[int], context: int | None = None) -> np.ndarray:
        """The logits after each token, [tokens, vocabulary]. `context` is what the reader provides for the
        sequence, by default the length of `ids`."""
        p = self.profile
        x = p.embedding_scale * self.tensors["model.embed_tokens.weight"][ids]
        if p.embedding_size is not None:
            x = self.linear("model.project_in", x)
        if p.position == "learned":
            x = x + self.tensors["model.embed_positions.weight"][: len(ids)]
        for l in range(p.layers):
            x = self.layer(l, x, context or len(ids))
        if p.final_norm:
            x = self.norm("model.norm", x)
        if p.embedding_size is not None:
            x = self.linear("model.project_out", x)
        head = "model.embed_tokens" if p.tied_embeddings else "lm_head"
        return soft_cap(self.linear(head, x), p.logit_soft_cap)

    def linear(self, name: str, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x):
        """Over the last dimension."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias", 0.0)
        if self.profile.norm == "layernorm":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.profile.norm_eps)
        return ((1 + weight) if self.profile.norm == "rmsnorm_plus_one" else weight) * x + bias

    def layer(self, l: int, x, context: int):
        prefix = f"model.layers.{l}"
        n1, n2 = f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"
        if self.profile.norm_placement == "post":
            x = self.norm(n1, x + self.attention(l, x, context))
            return self.norm(n2, x + self.mlp(l, x))
        sandwich = self.profile.norm_placement == "sandwich"
        attention = self.attention(l, self.norm(n1, x), context)
        if sandwich:
            attention = self.norm(f"{prefix}.self_attn.output_norm", attention)
        x = x + attention
        mlp = self.mlp(l, self.norm(n2, x))
        if sandwich:
            mlp = self.norm(f"{prefix}.mlp.output_norm", mlp)
        return x + mlp

    def attention(self, l: int, z, context: int):
        p, prefix, tokens = self.profile, f"model.layers.{l}.self_attn", len(z)
        q, k, v = (self.linear(f"{prefix}.{name}_proj", z) for name in "qkv")
        if p.qk_norm == "full":
            q, k = self.norm(f"{prefix}.q_norm", q), self.norm(f"{prefix}.k_norm", k)
        q, k, v = (x.reshape(tokens, -1, p.head_dim) for x in (q, k, v))
        if p.qk_norm == "head":
            q, k = self.norm(f"{prefix}.q_norm", q), self.norm(f"{prefix}.k_norm", k)
        if p.position == "rope" and contains(p.rope_layers, l):
            angles, magnitude = rotation(p, tokens, context, is_local=p.has_window(l))
            q, k = (rotated(x, angles, magnitude, p.pairing) for x in (q, k))

        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        hidden = distance < 0
        if p.has_window(l):
            hidden |= distance >= p.window
        scale = 1 / math.sqrt(p.head_dim) if p.attention_scale is None else p.attention_scale
        heads = []
        for a in range(p.heads):
            shared = a * p.kv_heads // p.heads
            scores = soft_cap(scale * (q[:, a] @ k[:, shared].T), p.soft_cap)
            heads.append(softmax(np.where(hidden, -np.inf, scores)) @ v[:, shared])
        return self.linear(f"{prefix}.o_proj", np.concatenate(heads, axis=-1))

    def mlp(self, l: int, z):
        prefix = f"model.layers.{l}.mlp"
        if not self.profile.has_experts(l):
            return self.feed_forward(prefix, z)
        experts = self.profile.experts
        shares = softmax(self.linear(f"{prefix}.router", z))
        out = np.zeros_like(z)
        for token, row in enumerate(shares):
            active = np.argsort(-row, kind="stable")[: experts.active]
            total = row[active].sum() if experts.normalize else 1.0
            for e in active:
                output = self.feed_forward(f"{prefix}.experts.{e}", z[token])
                out[token] += row[e] / total * output
        return out

    def feed_forward(self, prefix: str, z):
        act = ACTIVATIONS[self.profile.activation]
        up = self.linear(f"{prefix}.up_proj", z)
        if self.profile.mlp == "gated":
            inner = act(self.linear(f"{prefix}.gate_proj", z)) * up
        else:
            inner = act(up)
        return self.linear(f"{prefix}.down_proj", inner)


def rotation(p: Profile, tokens: int, context: int, is_local: bool):
    """Angles [tokens, R/2] and the factor of cosine and sine."""
    rope, R = p.rope, p.rotated
    i = np.arange(R // 2)
    positions = np.arange(tokens)[:, None]
    if is_local and p.local_theta is not None:
        return positions * p.local_theta ** (-2 * i / R), 1.0
    f = p.theta ** (-2 * i / R)
    N = rope.get("original_context")
    if p.scaling == "linear":
        f = f / rope["factor"]
    elif p.scaling == "llama3":
        turns = N * f / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        s = np.clip((turns - low) / (high - low), 0, 1)
        f = f * (s + (1 - s) / rope["factor"])
    elif p.scaling == "dynamic":
        n = np.maximum(positions + 1, N)                # no growth up to N tokens
        growth = rope["factor"] * n / N - (rope["factor"] - 1)
        exponents = np.array([-2 * pair / (R - 2) if pair else 0.0 for pair in range(R // 2)])
        f = f * growth**exponents
    elif p.scaling == "yarn":
        t = yarn_ramp(p, i)
        f = f * (1 - t) + f * t / rope["factor"]
    elif p.scaling == "longrope":
        f = f / np.array(rope["long_factors" if context > N else "short_factors"])
    return positions * f, rope.get("attention_factor", 1.0)


def yarn_ramp(p: Profile, i):
    """0 for pairs that keep their frequency, 1 for those whose frequency is divided."""
    R, N = p.rotated, p.rope["original_context"]

    def pair_with(turns: float) -> float:
        return R * math.log(N / (2 * math.pi * turns)) / (2 * math.log(p.theta))

    low, high = pair_with(p.rope["beta_fast"]), pair_with(p.rope["beta_slow"])
    if p.rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high = low + 0.001
    return np.clip((i - low) / (high - low), 0, 1)


def rotated(x, angles, magnitude: float, pairing: str):
    """x, [tokens, heads, D], with the first elements of its heads rotated by angles [tokens, R/2]."""
    pairs = angles.shape[1]
    first = np.arange(pairs) if pairing == "half" else 2 * np.arange(pairs)
    second = first + pairs if pairing == "half" else first + 1
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    u, v = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = magnitude * (u * cos - v * sin)
    out[..., second] = magnitude * (v * cos + u * sin)
    return out
