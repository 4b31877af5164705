"""The exceptions of the package.

Beside these, functions raise ``OSError`` and its subclasses for files that cannot be read or written, ``ValueError`` and
``TypeError`` for wrong arguments, and ``KeyboardInterrupt``.
"""

from __future__ import annotations

from typing import Optional


class Error(Exception):
    """An error of the package; a bug if it is of no subclass."""

    rule: Optional[str] = None
    """The broken rule of the specification, such as ``STB-R-002``, if one is known."""
    offset: Optional[int] = None
    """Where in the file, in bytes."""
    tensor: Optional[str] = None
    """In which tensor."""


class FormatError(Error):
    """A file, tokenizer, chat template or checkpoint has invalid content."""


class UnsupportedError(Error):
    """The content may be valid, but this version does not support it."""


class DeviceError(Error):
    """A device cannot be used, or failed."""
