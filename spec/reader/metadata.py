"""The META section (metadata.md §1)."""

import math
import struct
import zlib

from errors import StbError

MAX_ENTRIES = 4096
MAX_KEY = 255
MAX_VALUE = 1 << 28
MAX_INFLATED = 1 << 28
MAX_RATIO = 1032                # bytes that a byte of DEFLATE stands for, at most
KEY_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789._-")

TEXT, U64, F64, BOOL, U64_LIST, DEFLATED_TEXT = range(1, 7)

Value = str | int | float | bool | list[int]


def read_metadata(section, min_reader: int) -> dict[str, Value]:
    """All entries, checked in the order of the page: STB-R-020 to STB-R-026.

    A text, deflated or not, becomes a str, a u64 an int, an f64 a float, a bool a bool, a u64 list a list of int.
    """
    if len(section) < 8:
        raise StbError("STB-R-020", "META is shorter than its header")
    count, reserved = struct.unpack_from("<II", section)
    if reserved:
        raise StbError("STB-R-020", "the reserved field of META is not zero")
    if count > MAX_ENTRIES:
        raise StbError("STB-R-021", f"{count} metadata entries")

    newest = U64_LIST if min_reader < 2 else DEFLATED_TEXT
    metadata, inflated = {}, 0
    at, key_before = 8, b""
    for number in range(count):
        if len(section) - at < 8:
            raise StbError("STB-R-020", f"META ends in or before entry {number}")
        key_length, type_, reserved, value_length = struct.unpack_from("<HBBI", section, at)
        if not 1 <= key_length <= MAX_KEY or value_length > MAX_VALUE:
            raise StbError(
                "STB-R-021",
                f"entry {number} has a key of {key_length} and a value of {value_length} bytes",
            )
        value_at = at + 8 + key_length
        at = value_at + value_length
        if at > len(section):
            raise StbError("STB-R-020", f"META ends in entry {number}")

        key = bytes(section[value_at - key_length : value_at])
        if not KEY_BYTES.issuperset(key):
            raise StbError("STB-R-022", f"the key of entry {number} has other characters")
        if key <= key_before:
            raise StbError("STB-R-023", f"the key of entry {number} is not above the one before")
        key_before = key

        name = key.decode("ascii")
        if not TEXT <= type_ <= newest:
            raise StbError("STB-R-024", f"{name} has a value of type {type_}")
        if reserved:
            raise StbError("STB-R-025", f"the reserved byte of {name} is not zero")
        value = section[value_at:at]
        if type_ == DEFLATED_TEXT:
            if len(value) < 8:
                raise StbError("STB-R-025", f"the deflated text {name} has no length")
            length = int.from_bytes(value[:8], "little")
            inflated += length
            if inflated > MAX_INFLATED:
                raise StbError("STB-R-021", f"{inflated} bytes of deflated texts up to {name}")
            metadata[name] = _inflate(name, length, value[8:])
        else:
            metadata[name] = _read_value(name, type_, value)
    if at != len(section):
        raise StbError("STB-R-020", "META goes on after its last entry")
    return metadata


def _inflate(name: str, length: int, stream) -> str:
    """STB-R-026. The text has at most `length` + 1 bytes in memory, whatever the stream says."""
    if length > MAX_RATIO * len(stream):
        raise StbError("STB-R-026", f"the text {name} is shorter than stated")
    inflater = zlib.decompressobj(wbits=-15)
    try:
        text = inflater.decompress(stream, max_length=length + 1)
    except zlib.error as error:
        raise StbError("STB-R-026", f"the stream of {name} is damaged: {error}") from None
    if len(text) > length:
        raise StbError("STB-R-026", f"the text {name} is longer than stated")
    if not inflater.eof or inflater.unused_data:
        raise StbError("STB-R-026", f"the stream of {name} does not end with its value")
    if len(text) < length:
        raise StbError("STB-R-026", f"the text {name} is shorter than stated")
    try:
        return str(text, "utf-8")
    except UnicodeDecodeError:
        raise StbError("STB-R-026", f"the text {name} is not UTF-8") from None


def _read_value(name: str, type_: int, value) -> Value:
    """STB-R-025."""
    if type_ == TEXT:
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            raise StbError("STB-R-025", f"the text {name} is not UTF-8") from None
    if type_ == U64_LIST:
        if len(value) % 8:
            raise StbError("STB-R-025", f"the list {name} has {len(value)} bytes")
        return list(struct.unpack(f"<{len(value) // 8}Q", value))
    if len(value) != (1 if type_ == BOOL else 8):
        raise StbError("STB-R-025", f"the value of {name} has {len(value)} bytes")
    if type_ == BOOL:
        if value[0] > 1:
            raise StbError("STB-R-025", f"the bool {name} has the value {value[0]}")
        return bool(value[0])
    if type_ == U64:
        return int.from_bytes(value, "little")
    (number,) = struct.unpack("<d", value)
    if not math.isfinite(number):
        raise StbError("STB-R-025", f"the number {name} is infinite or not a number")
    return number
