"""An .stb file: head, sections, tensor table, verification (container.md).

    file = StbFile.open("model.stb")        # level *inspect*: structure and metadata are checked
    file.metadata["model.layers"]
    file.weights("model.norm.weight")       # level *dequantize*: a float32 array
    file.verify()                           # everything, and the profile of a model file
"""

import struct
from dataclasses import dataclass

import numpy as np

import model
from errors import StbError, memory_guard
from metadata import read_metadata
from weights import align_up, codec_for
from xxh3 import xxh3_64

VERSION = 2
MAGIC = bytes.fromhex("8f 53 54 42 0d 0a 1a 0a")

HEAD_SIZE = 4096
HEADER = struct.Struct("<8sHHIQIIQ24s")
HEADER_CHECKSUM_AT = 4088
MAX_SECTIONS = 64
SECTION_ENTRY = struct.Struct("<IIQQQ16s")
SECTION_ALIGNMENT = 4096
DATA, TENSORS, META = 1, 2, 3
SECTION_NAMES = {DATA: "DATA", TENSORS: "TENSORS", META: "META"}
CRITICAL = 1

TENSORS_HEADER = struct.Struct("<IIQ")
TENSOR_ENTRY = struct.Struct("<IHBBII16s4QQQQQ")
PAYLOAD_ALIGNMENT = 64
MAX_TENSORS = 1 << 20
MAX_DIM = (1 << 32) - 1
MAX_ELEMENTS = 1 << 48
MAX_NAME = 255
NAME_BYTES = frozenset(range(0x21, 0x7F))


@dataclass(frozen=True)
class Section:
    """An entry of the section directory (§3.2)."""

    type: int
    flags: int
    offset: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Tensor:
    """An entry of the tensor table (§3.3). `codec` is None if the encoding is unknown."""

    name: str
    shape: tuple[int, ...]
    elements: int
    encoding: int
    offset: int                 # within DATA
    length: int
    checksum: int
    codec: object

    @property
    def end(self) -> int:
        return self.offset + self.length


class StbFile:
    """A file whose structure and metadata are valid: level *inspect*, in the order of §4."""

    @memory_guard()
    def __init__(self, content: bytes):
        self._content = memoryview(content).toreadonly()
        section_count = self._read_header()
        self.sections = self._read_directory(section_count)
        self._check_sections()
        by_type = {section.type: section for section in self.sections}
        self._data = self._bytes_of(by_type[DATA])
        tensors = read_tensors(self._bytes_of(by_type[TENSORS]), len(self._data))
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.metadata = read_metadata(self._bytes_of(by_type[META]), self.min_reader)

    @classmethod
    @memory_guard()
    def open(cls, path) -> "StbFile":
        """Read a file into memory, so that no other program can change it under us (§9)."""
        with open(path, "rb") as stream:
            return cls(stream.read())

    @property
    def size(self) -> int:
        return len(self._content)

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors, also of those with an unknown encoding."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def true_bits(self) -> float:
        """True bits per parameter (§7)."""
        return 8 * self.size / self.parameters

    @property
    def is_model(self) -> bool:
        return model.is_model(self.metadata)

    @memory_guard()
    def weights(self, name: str) -> np.ndarray:
        """Decode a tensor, after the checks of its payload (STB-R-050, 040 to 045)."""
        tensor = self.tensors[name]
        if tensor.codec is None:
            raise StbError("STB-R-050", f"{name} has the unknown encoding {tensor.encoding}")
        self._check_payload(tensor)
        return tensor.codec.decode(self._payload(tensor))

    @memory_guard()
    def verify(self):
        """Steps 7 and 8 of §4: padding of DATA, all payloads, the profile if it is a model file."""
        end_before = 0
        for tensor in self.tensors.values():
            if any(self._data[end_before : tensor.offset]):
                raise StbError("STB-R-039", f"a byte of DATA before {tensor.name} is not zero")
            end_before = tensor.end
        for tensor in self.tensors.values():
            self._check_payload(tensor)
        if self.is_model:
            self.check_model()

    def check_model(self):
        """STB-R-060 to STB-R-064, the first of them also for a file that is no model file."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors.values()}
        model.check_model(self.metadata, shapes, self.parameters)

    def _payload(self, tensor: Tensor):
        return self._data[tensor.offset : tensor.end]

    def _check_payload(self, tensor: Tensor):
        """STB-R-040, then the content checks in the order of the encoding."""
        payload = self._payload(tensor)
        if xxh3_64(payload) != tensor.checksum:
            raise StbError("STB-R-040", f"{tensor.name} does not match its checksum")
        if tensor.codec is not None:
            try:
                tensor.codec.check(payload)
            except StbError as error:
                raise StbError(error.rule, f"{tensor.name}: {error.message}") from None

    def _bytes_of(self, section: Section):
        return self._content[section.offset : section.end]

    def _read_header(self) -> int:
        """Step 1: the head without the entries of the directory. Returns section_count."""
        if self.size < HEAD_SIZE:
            raise StbError("STB-R-001", f"the file has {self.size} bytes, less than a head")
        head = self._content[:HEAD_SIZE]
        (magic, self.min_reader, self.written, header_size, file_size,
         section_count, section_entry_size, flags, reserved) = HEADER.unpack_from(head)
        if magic != MAGIC:
            raise StbError("STB-R-002", "the file does not start with the magic bytes")
        if self.min_reader > VERSION:
            raise StbError("STB-R-003", f"the file is for readers of version {self.min_reader}")
        (checksum,) = struct.unpack_from("<Q", head, HEADER_CHECKSUM_AT)
        if xxh3_64(head[:HEADER_CHECKSUM_AT]) != checksum:
            raise StbError("STB-R-004", "the head does not match its checksum")
        if header_size != HEADER.size or section_entry_size != SECTION_ENTRY.size:
            raise StbError(
                "STB-R-005", f"a header of {header_size} and entries of {section_entry_size} bytes"
            )
        if not 1 <= self.min_reader <= self.written:
            raise StbError(
                "STB-R-005", f"min_reader is {self.min_reader}, written is {self.written}"
            )
        directory_end = HEADER.size + SECTION_ENTRY.size * section_count
        if flags or any(reserved) or any(head[directory_end:HEADER_CHECKSUM_AT]):
            raise StbError("STB-R-006", "flags, reserved or padding of the head is not zero")
        if not 1 <= section_count <= MAX_SECTIONS:
            raise StbError("STB-R-007", f"{section_count} sections")
        if file_size != self.size:
            raise StbError("STB-R-008", f"the file has {self.size} bytes, not {file_size}")
        return section_count

    def _read_directory(self, section_count: int) -> list[Section]:
        """Steps 2 and 3."""
        sections, types = [], set()
        start = HEAD_SIZE
        for number in range(section_count):
            *fields, reserved = SECTION_ENTRY.unpack_from(
                self._content, HEADER.size + number * SECTION_ENTRY.size
            )
            section = Section(*fields)
            if section.type == 0 or section.flags & ~CRITICAL or any(reserved):
                raise StbError("STB-R-010", f"invalid type, flags or reserved of section {number}")
            if section.offset != start:
                raise StbError("STB-R-011", f"section {number} is at {section.offset}, not {start}")
            if section.end > self.size:
                raise StbError("STB-R-012", f"section {number} ends after the file")
            if section.type in SECTION_NAMES:
                if section.type in types:
                    raise StbError("STB-R-013", f"{SECTION_NAMES[section.type]} is there twice")
            elif section.flags & CRITICAL:
                raise StbError("STB-R-014", f"critical section of unknown type {section.type}")
            types.add(section.type)
            sections.append(section)
            start = align_up(section.end, SECTION_ALIGNMENT)

        if sections[-1].end != self.size:
            raise StbError("STB-R-012", "the file goes on after its last section")
        for type_, name in SECTION_NAMES.items():
            if type_ not in types:
                raise StbError("STB-R-013", f"there is no section {name}")
        return sections

    def _check_sections(self):
        """Step 4."""
        for section, following in zip(self.sections, self.sections[1:]):
            if any(self._content[section.end : following.offset]):
                raise StbError("STB-R-015", f"a byte before {following.offset} is not zero")
        for number, section in enumerate(self.sections):
            expected = 0 if section.type == DATA else xxh3_64(self._bytes_of(section))
            if section.checksum != expected:
                raise StbError("STB-R-016", f"section {number} does not match its checksum")


def read_tensors(section, data_length: int) -> list[Tensor]:
    """Step 5: the TENSORS section, STB-R-030 to STB-R-038."""
    if len(section) < TENSORS_HEADER.size:
        raise StbError("STB-R-030", "TENSORS is shorter than its header")
    count, entry_size, names_length = TENSORS_HEADER.unpack_from(section)
    if not 1 <= count <= MAX_TENSORS or entry_size != TENSOR_ENTRY.size:
        raise StbError("STB-R-030", f"{count} tensors with entries of {entry_size} bytes")
    names_at = TENSORS_HEADER.size + TENSOR_ENTRY.size * count
    if len(section) != names_at + names_length:
        raise StbError("STB-R-030", f"TENSORS has {len(section)} bytes, not what its counts give")
    names = section[names_at:]

    tensors, seen = [], set()
    name_at = start = 0
    for number in range(count):
        entry_at = TENSORS_HEADER.size + number * TENSOR_ENTRY.size
        (name_offset, name_length, ndim, reserved_7, encoding, reserved_12, params,
         *dims, offset, length, checksum, reserved_88) = TENSOR_ENTRY.unpack_from(section, entry_at)
        shape, elements = _read_shape(number, ndim, dims)

        if name_offset != name_at or not 1 <= name_length <= MAX_NAME:
            raise StbError("STB-R-032", f"invalid offset or length of the name of tensor {number}")
        name_at += name_length
        if name_at > names_length:
            raise StbError("STB-R-032", f"the name of tensor {number} ends outside the names")
        name = bytes(names[name_offset:name_at])
        if not NAME_BYTES.issuperset(name):
            raise StbError("STB-R-032", f"the name of tensor {number} is not printable ASCII")
        name = name.decode("ascii")
        if name in seen:
            raise StbError("STB-R-033", f"two tensors are called {name}")
        seen.add(name)

        if reserved_7 or reserved_12 or reserved_88:
            raise StbError("STB-R-034", f"a reserved field of {name} is not zero")
        if offset != start:
            raise StbError("STB-R-035", f"{name} is at {offset} of DATA, not at {start}")
        if offset + length > data_length:
            raise StbError("STB-R-035", f"{name} ends after DATA")
        start = align_up(offset + length, PAYLOAD_ALIGNMENT)
        try:
            codec = codec_for(encoding, params, shape)
        except StbError as error:
            raise StbError(error.rule, f"{name}: {error.message}") from None
        if codec is not None and length != codec.length:
            raise StbError("STB-R-038", f"{name} has {length} bytes, not {codec.length}")
        tensors.append(Tensor(name, shape, elements, encoding, offset, length, checksum, codec))

    if name_at != names_length:
        raise StbError("STB-R-032", "names are left over after that of the last tensor")
    if tensors[-1].end != data_length:
        raise StbError("STB-R-035", "DATA goes on after its last payload")
    return tensors


def _read_shape(number: int, ndim: int, dims: list[int]) -> tuple[tuple[int, ...], int]:
    """STB-R-031. Returns shape and number of elements."""
    if not 1 <= ndim <= len(dims):
        raise StbError("STB-R-031", f"tensor {number} has {ndim} dimensions")
    shape, unused = tuple(dims[:ndim]), dims[ndim:]
    if any(unused) or not all(1 <= dim <= MAX_DIM for dim in shape):
        raise StbError("STB-R-031", f"a dimension of tensor {number} is out of range: {dims}")
    elements = 1
    for dim in shape:
        elements *= dim
    if elements > MAX_ELEMENTS:
        raise StbError("STB-R-031", f"tensor {number} has {elements} elements")
    return shape, elements
