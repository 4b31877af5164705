"""Models of .stb files in Hugging Face transformers.

>>> from stb.transformers import StbForCausalLM, tokenizer_from_stb
>>> model = StbForCausalLM.from_stb("model.stb")
>>> tokenizer = tokenizer_from_stb("model.stb")

Linear layers and embeddings keep the packed bytes of the file and compute with the kernels of the package on the CPU; no
weights are dequantized. ``save_pretrained`` writes the packed bytes, and ``from_pretrained`` reads them once this module
is imported.
"""

from __future__ import annotations

import json
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import stb
from stb import _native
from stb.errors import Error, UnsupportedError

METHOD = "stb"
"""The value of ``quant_method`` in ``config.json``."""


@torch.library.custom_op("stb::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, payload: Tensor, encoding: list[int], out: int, exact: bool) -> Tensor:
    """x [..., in] times the transpose of a packed matrix [out, in]: [..., out], of the type of x."""
    flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    numbers = (encoding[0], bytes(encoding[1:]))
    y = _native.linear(flat.numpy(), payload.numpy(), numbers, out, exact)
    return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], out)


@_linear.register_fake
def _(x: Tensor, payload: Tensor, encoding: list[int], out: int, exact: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


@torch.library.custom_op("stb::rows", mutates_args=(), device_types="cpu")
def _rows(
    numbers: Tensor, payload: Tensor, encoding: list[int], rows: int, cols: int
) -> Tensor:
    """Rows of a packed matrix [rows, cols] by their numbers [...]: float32 [..., cols]."""
    flat = numbers.reshape(-1).to(torch.int64).contiguous()
    found = _native.rows(
        flat.numpy(), payload.numpy(), (encoding[0], bytes(encoding[1:])), (rows, cols)
    )
    return torch.from_numpy(found).reshape(*numbers.shape, cols)


@_rows.register_fake
def _(numbers: Tensor, payload: Tensor, encoding: list[int], rows: int, cols: int) -> Tensor:
    return payload.new_empty(*numbers.shape, cols, dtype=torch.float32)


class _Packed(nn.Module):
    """A matrix as it lies in a file, in pieces of rows.

    ``pieces`` has for each the number of rows, the bytes, and the encoding: its id and 16 parameter bytes.
    """

    def __init__(self, pieces: list[dict[str, Any]]):
        super().__init__()
        self.pieces = pieces
        for index, piece in enumerate(pieces):
            empty = torch.empty(piece["bytes"], dtype=torch.uint8)
            self.register_buffer(f"packed_{index}", empty)
        # Code of transformers looks at the type of weights, and initializes them. These have no elements.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def payload(self, index: int) -> Tensor:
        """The bytes of a piece."""
        payload = getattr(self, f"packed_{index}")
        if payload.device.type not in ("cpu", "meta"):
            raise UnsupportedError(
                f"stb.transformers computes on the CPU, not on {payload.device}: use model.to('cpu')"
            )
        return payload

    def product(self, x: Tensor, exact: bool) -> Tensor:
        """x [..., in] times the transpose of the matrix."""
        parts = [
            _linear(x, self.payload(index), piece["encoding"], piece["rows"], exact)
            for index, piece in enumerate(self.pieces)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class StbLinear(_Packed):
    """A linear layer on packed weights [out, in], in place of ``nn.Linear`` and ``Conv1D``."""

    def __init__(self, pieces: list[dict[str, Any]], features: tuple[int, int], **options: Any):
        super().__init__(pieces)
        self.in_features, self.out_features = features
        self.exact = bool(options.get("exact"))
        self.bias: Optional[nn.Parameter] = None
        if options.get("bias"):
            self.bias = nn.Parameter(torch.empty(self.out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.exact)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        size = sum(piece["bytes"] for piece in self.pieces)
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={size}"


class StbEmbedding(_Packed):
    """Embeddings from packed rows [vocab, width]. ``scale`` multiplies them, as in Gemma."""

    def __init__(self, pieces: list[dict[str, Any]], shape: tuple[int, int], scale: float):
        super().__init__(pieces)
        self.num_embeddings, self.embedding_dim = shape
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        [piece] = self.pieces
        shape = (self.num_embeddings, self.embedding_dim)
        found = _rows(ids, self.payload(0), piece["encoding"], *shape)
        return (found if self.scale == 1.0 else found * self.scale).to(self.weight.dtype)


class StbTiedHead(nn.Module):
    """The lm_head of a model that uses the embeddings for it."""

    def __init__(self, embedding: StbEmbedding, exact: bool):
        super().__init__()
        # Not a child: its bytes belong to the embeddings.
        self._embedding = [embedding]
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        return self._embedding[0].product(x, self.exact)


@register_quantization_config(METHOD)
class StbConfig(QuantizationConfigMixin):
    """Which modules of a model are packed.

    ``modules`` has the pieces of each by its name. ``tied_head`` is the name of the embeddings that the lm_head uses.
    With ``exact``, activations are not quantized to 8 bits.
    """

    def __init__(
        self,
        modules: dict[str, list[dict[str, Any]]],
        tied_head: Optional[str] = None,
        exact: bool = False,
        **_: Any,
    ):
        # transformers takes any registered name, though its type is an enumeration of its own.
        self.quant_method = METHOD  # type: ignore[assignment]
        self.modules = modules
        self.tied_head = tied_head
        self.exact = exact


@register_quantizer(METHOD)
class StbQuantizer(HfQuantizer):
    """Puts modules on packed bytes in the place of those of transformers."""

    quantization_config: StbConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        for name, pieces in config.modules.items():
            parent, _dot, child = name.rpartition(".")
            module = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, _in_place_of(module, pieces, config.exact))
        if config.tied_head is not None:
            embedding = model.get_submodule(config.tied_head)
            assert isinstance(embedding, StbEmbedding)
            model.set_output_embeddings(StbTiedHead(embedding, config.exact))

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _in_place_of(module: nn.Module, pieces: list[dict[str, Any]], exact: bool) -> nn.Module:
    """The packed module for one of transformers."""
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "scalar_embed_scale", 1.0))
        return StbEmbedding(pieces, (module.num_embeddings, module.embedding_dim), scale)
    if isinstance(module, nn.Linear):
        features, bias = (module.in_features, module.out_features), module.bias is not None
    elif isinstance(module, Conv1D):
        features, bias = (module.weight.shape[0], module.weight.shape[1]), True
    else:
        raise UnsupportedError(f"{type(module).__name__} has no packed form in stb.transformers")
    return StbLinear(pieces, features, bias=bias, exact=exact)


class StbForCausalLM:
    """Makes models of transformers from .stb files."""

    @classmethod
    def from_stb(cls, path: Union[str, PathLike[str]], *, exact: bool = False) -> PreTrainedModel:
        """The model of a file: that of its architecture in transformers, float32, on the CPU.

        With ``exact``, activations are not quantized to 8 bits; slower. ``stb.transformers.set_threads(N)`` sets the
        number of threads of the packed layers.

        Raises the errors of ``stb.open``; UnsupportedError for mixtures of experts and for files without the
        ``config.json`` of the original model.
        """
        with stb.open(path) as file:
            layout = file._layout()
            config = json.loads(layout["config"])
            if any(".experts." in tensor["name"] for tensor in layout["tensors"]):
                raise UnsupportedError(
                    f"{path} is a mixture of experts, which stb.transformers does not support: use stb.open"
                )
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            state, quantization = _state(file, layout["tensors"], skeleton, exact)
            generation = str(file.metadata.get("source.generation_config.json", "{}"))
        config["quantization_config"] = quantization.to_dict()
        # The tied lm_head is a module of its own here.
        config["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            config.pop(key, None)
        made = AutoConfig.for_model(**config)
        model = type(skeleton).from_pretrained(
            None, config=made, state_dict=state, dtype=torch.float32
        )
        model.generation_config = GenerationConfig.from_dict(json.loads(generation))
        return model.eval()


def _state(
    file: stb.Model, tensors: list[dict[str, Any]], skeleton: PreTrainedModel, exact: bool
) -> tuple[dict[str, Tensor], StbConfig]:
    """The state of the model, with packed bytes where modules are packed, and which these are."""
    names = dict(skeleton.named_modules())
    state: dict[str, Tensor] = {}
    modules: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        name = _module_name(tensor["name"], skeleton)
        module = names.get(name.removesuffix(".weight"))
        pieces = [file.tensors[piece["tensor"]] for piece in tensor["pieces"]]
        if name.endswith(".weight") and _is_packable(module):
            modules[name.removesuffix(".weight")] = [
                {
                    "rows": piece.shape[0],
                    "bytes": piece.bytes,
                    "encoding": [piece.encoding_id, *piece.encoding_params],
                }
                for piece in pieces
            ]
            for index, piece in enumerate(pieces):
                key = f"{name.removesuffix('.weight')}.packed_{index}"
                state[key] = torch.from_numpy(piece.packed())
        else:
            state[name] = _dense(tensor, pieces)
    head = skeleton.get_output_embeddings()
    embeddings = skeleton.get_input_embeddings()
    by_module = {module: name for name, module in names.items()}
    is_tied = by_module[head] not in modules
    tied_head = by_module[embeddings] if is_tied else None
    return state, StbConfig(modules, tied_head, exact)


def _module_name(name: str, skeleton: PreTrainedModel) -> str:
    """The name of a tensor in the model: checkpoints may leave out the prefix of the decoder."""
    prefix = skeleton.base_model_prefix + "."
    known = {key for key, _ in skeleton.named_parameters(remove_duplicate=False)}
    if name in known:
        return name
    if prefix + name in known:
        return prefix + name
    raise Error(f"the model of transformers has no {name}")


def _is_packable(module: Optional[nn.Module]) -> bool:
    # Classes derived from nn.Embedding may do anything with the numbers; that of Gemma scales the rows.
    is_embedding = type(module) is nn.Embedding or hasattr(module, "scalar_embed_scale")
    return type(module) in (nn.Linear, Conv1D) or is_embedding


def _dense(tensor: dict[str, Any], pieces: list[stb.Tensor]) -> Tensor:
    """A tensor that is small or has no packed form, as the checkpoint has it."""
    whole = torch.zeros(tensor["shape"])
    for where, piece in zip(tensor["pieces"], pieces):
        values = torch.from_numpy(piece.dequantize()) - where["included"]
        first = where["first"]
        if where["is_transposed"]:
            whole[:, first : first + values.shape[0]] = values.T
        else:
            whole[first : first + values.shape[0]] = values
    return whole


def tokenizer_from_stb(path: Union[str, PathLike[str]]) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, with its chat template.

    Raises the errors of ``stb.open``; FormatError if the file has no tokenizer.
    """
    with stb.open(path, verify="off") as file:
        metadata = file.metadata
        file.tokenizer  # An error that says what is wrong.
    texts = {
        "tokenizer.json": metadata.get("tokenizer.json"),
        "tokenizer_config.json": metadata.get("source.tokenizer_config.json"),
        "chat_template.jinja": metadata.get("tokenizer.chat_template"),
        "config.json": metadata.get("source.config.json"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            if text is not None:
                Path(folder, name).write_text(str(text), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


set_threads = _native.set_threads
