import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from types import MappingProxyType, TracebackType
from typing import Any, Optional, TypedDict, Union

import numpy as np
from numpy.typing import NDArray

_Path = Union[str, PathLike[str]]
_Messages = Sequence[Mapping[str, object]]
_Tools = Optional[Sequence[Mapping[str, object]]]

class Quality(TypedDict, total=False):
    """What the converter measured. Standard errors are over windows; absent for a single window."""

    verdict: str
    """``close``, ``worse``, ``poor``, ``broken`` or ``unchecked``."""
    meaning: str
    kl: float
    """KL divergence from the original model, in nats per token."""
    kl_standard_error: float
    top1: float
    """Share of tokens for which both models have the same most likely prediction."""
    top1_standard_error: float
    perplexity: float
    perplexity_standard_error: float
    source_perplexity: float
    source_perplexity_standard_error: float
    tokens: int
    windows: int
    text: str

class Usage(TypedDict):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float

class Verified(TypedDict):
    valid: bool
    model: bool
    tensors: int
    unknown_encodings: int

class Tensor:
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def encoding(self) -> str: ...
    @property
    def encoding_id(self) -> int: ...
    @property
    def encoding_params(self) -> builtins.bytes: ...
    @property
    def bits_per_weight(self) -> float: ...
    @property
    def bytes(self) -> int: ...
    def dequantize(self) -> NDArray[np.float32]: ...
    def packed(self) -> NDArray[np.uint8]: ...

class Tokenizer:
    def encode(self, text: str, *, add_bos: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    @property
    def bos(self) -> Optional[int]: ...
    @property
    def eos(self) -> list[int]: ...
    @property
    def vocab_size(self) -> int: ...
    def token(self, id: int) -> Optional[str]: ...
    def token_id(self, token: str) -> Optional[int]: ...
    @property
    def has_chat_template(self) -> bool: ...
    def apply_chat_template(
        self, messages: _Messages, *, tools: _Tools = None, **variables: object
    ) -> str: ...

class Generation:
    def __iter__(self) -> Iterator[str]: ...
    def __next__(self) -> str: ...
    def __enter__(self) -> Generation: ...
    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
        /,
    ) -> None: ...
    def complete(self) -> str: ...
    def close(self) -> None: ...
    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def finish_reason(self) -> Optional[str]: ...
    @property
    def usage(self) -> Optional[Usage]: ...

class Divergence:
    @property
    def perplexity(self) -> float: ...
    @property
    def perplexity_standard_error(self) -> Optional[float]: ...
    @property
    def nll_difference(self) -> float: ...
    @property
    def nll_difference_standard_error(self) -> Optional[float]: ...
    @property
    def kl(self) -> float: ...
    @property
    def kl_standard_error(self) -> Optional[float]: ...
    @property
    def top1(self) -> float: ...
    @property
    def top1_standard_error(self) -> Optional[float]: ...

class Perplexity:
    @property
    def perplexity(self) -> float: ...
    @property
    def perplexity_standard_error(self) -> Optional[float]: ...
    @property
    def mean_nll(self) -> float: ...
    @property
    def standard_error(self) -> Optional[float]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def windows(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def reference(self) -> Optional[Divergence]: ...

class Model:
    @property
    def path(self) -> PathLike[str]: ...
    @property
    def metadata(self) -> dict[str, Union[str, int, float, bool, list[int]]]: ...
    @property
    def architecture(self) -> Optional[str]: ...
    @property
    def recipe(self) -> Optional[str]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def true_bits(self) -> float: ...
    @property
    def quality(self) -> Optional[Quality]: ...
    @property
    def context(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def tensors(self) -> MappingProxyType[str, Tensor]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def generate(
        self,
        prompt: Union[str, Sequence[int]],
        *,
        max_tokens: Optional[int] = None,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        min_p: Optional[float] = None,
        repeat_penalty: Optional[float] = None,
        presence_penalty: Optional[float] = None,
        frequency_penalty: Optional[float] = None,
        seed: Optional[int] = None,
        stop: Union[str, Sequence[str], None] = None,
        ignore_eos: bool = False,
    ) -> Generation: ...
    def chat(
        self,
        messages: _Messages,
        *,
        tools: _Tools = None,
        template_variables: Optional[Mapping[str, object]] = None,
        max_tokens: Optional[int] = None,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        min_p: Optional[float] = None,
        repeat_penalty: Optional[float] = None,
        presence_penalty: Optional[float] = None,
        frequency_penalty: Optional[float] = None,
        seed: Optional[int] = None,
        stop: Union[str, Sequence[str], None] = None,
        ignore_eos: bool = False,
    ) -> Generation: ...
    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...
    def perplexity(
        self,
        text: Union[str, PathLike[str]],
        *,
        context: Optional[int] = None,
        windows: Optional[int] = None,
        reference: Optional[_Path] = None,
        separator: Optional[str] = None,
        rows: bool = False,
        threads: Optional[int] = None,
        progress: Optional[Callable[[int, int], object]] = None,
    ) -> Perplexity: ...
    def _layout(self) -> dict[str, Any]: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Model: ...
    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
        /,
    ) -> None: ...

def open(
    path: _Path,
    *,
    threads: Optional[int] = None,
    context: Optional[int] = None,
    exact: bool = False,
    verify: str = "auto",
    mmap: bool = True,
) -> Model: ...
def convert(
    source: _Path,
    out: _Path,
    *,
    recipe: Optional[_Path] = None,
    bits: Optional[float] = None,
    max_kl: Optional[float] = None,
    progress: Optional[Callable[[int, int, str], object]] = None,
    check: bool = True,
    calib: Optional[_Path] = None,
    calib_samples: Optional[int] = None,
    calib_len: Optional[int] = None,
    seed: Optional[int] = None,
    distill_layers: Optional[int] = None,
    distill: Optional[int] = None,
    force: bool = False,
    threads: Optional[int] = None,
    device: str = "cpu",
) -> dict[str, Any]: ...
def linear(
    x: NDArray[np.float32],
    payload: NDArray[np.uint8],
    encoding: tuple[int, bytes],
    out: int,
    exact: bool,
) -> NDArray[np.float32]: ...
def rows(
    numbers: NDArray[np.int64],
    payload: NDArray[np.uint8],
    encoding: tuple[int, bytes],
    shape: tuple[int, int],
) -> NDArray[np.float32]: ...
def set_threads(threads: int) -> None: ...
def verify(path: _Path) -> Verified: ...
def recipes() -> dict[str, str]: ...
