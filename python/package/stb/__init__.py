"""Opens, runs, evaluates and converts .stb models.

>>> import stb
>>> model = stb.open("model.stb")
>>> for piece in model.chat([{"role": "user", "content": "Hello"}]):
...     print(piece, end="", flush=True)
"""

from stb._native import (
    Divergence,
    Generation,
    Model,
    Perplexity,
    Tensor,
    Tokenizer,
    convert,
    open,
    recipes,
    verify,
)
from stb.errors import DeviceError, Error, FormatError, UnsupportedError

__all__ = [
    "DeviceError",
    "Divergence",
    "Error",
    "FormatError",
    "Generation",
    "Model",
    "Perplexity",
    "Tensor",
    "Tokenizer",
    "UnsupportedError",
    "convert",
    "open",
    "recipes",
    "verify",
]
