"""The one exception that a reader of .stb files raises for a file it refuses."""

from contextlib import contextmanager


class StbError(ValueError):
    """A file was refused, or a tensor of it.

    `rule` is the id of the requirement that is broken (``"STB-R-nnn"``), or None if the file may be
    fine and the reader ran out of memory: then no rule is named (README, Conformance).
    """

    def __init__(self, rule: str | None, message: str):
        super().__init__(f"{rule}: {message}" if rule else message)
        self.rule = rule
        self.message = message


@contextmanager
def memory_guard():
    """Turn a MemoryError into an StbError without a rule; also works as a decorator."""
    try:
        yield
    except MemoryError:
        raise StbError(None, "not enough memory to read this file") from None
