"""The encodings of weights (encodings.md): lengths, content checks, decoding to float32.

`codec_for(encoding, params, shape)` gives the codec of one tensor, or None if the encoding is
unknown. A codec knows the `length` of its payload, and can `check` and `decode` a payload of that
length. Decoding is exact, bit for bit.

Matrices are worked on in slabs of rows, so that intermediate arrays stay small. Whatever is indexed
with the content of a payload is as large as any content can reach.
"""

import numpy as np

from errors import StbError

SLAB_WEIGHTS = 1 << 20          # weights that are unpacked at a time, about

# By the value of a byte: its bits (bit 0 first), how many are set, how many are set below each bit.
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
POPCOUNT = BITS.sum(axis=1, dtype=np.uint8)
BITS_BELOW = np.cumsum(BITS, axis=1, dtype=np.uint8) - BITS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def align_up(x: int, a: int) -> int:
    return ceil_div(x, a) * a


def u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def unpack_bits(array):
    """Bits of the bytes along the last axis, bit 0 first."""
    return np.unpackbits(array, axis=-1, bitorder="little")


def unpack_nibbles(array):
    """Low halves, then high halves, of the bytes along the last axis."""
    return np.concatenate([array & 15, array >> 4], axis=-1)


def require_params(valid: bool, unused: bytes, message: str):
    """STB-R-036: the parameters are valid and the bytes without a meaning are zero."""
    if not valid:
        raise StbError("STB-R-036", message)
    if any(unused):
        raise StbError("STB-R-036", "bytes of params that have no meaning are not zero")


def require_finite(array, what: str):
    """STB-R-042."""
    if not np.isfinite(array).all():
        raise StbError("STB-R-042", f"{what} is infinite or not a number")


class Dense:
    """Encodings 1, 2 and 3 (§2): f32, f16 or bf16 in row-major order."""

    def __init__(self, stored: str, params: bytes, shape: tuple[int, ...]):
        require_params(True, params, "")
        self.stored = np.dtype(stored)
        self.shape = shape
        self.length = self.stored.itemsize
        for dim in shape:
            self.length *= dim

    def check(self, payload):
        require_finite(self._values(payload), "a weight")

    def decode(self, payload):
        return self._values(payload).astype(np.float32).reshape(self.shape)

    def _values(self, payload):
        values = np.frombuffer(payload, self.stored)
        if self.stored.kind == "u":                     # bf16: the upper half of a binary32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


class Matrix:
    """What encodings 16, 17, 32, 48, 64 and 80 have in common (§1): two dimensions, segments, rows.

    A subclass sets its parameters in `read_params`, gives the lengths of its segments, checks the
    content of a payload, and decodes some of its rows.
    """

    def __init__(self, params: bytes, shape: tuple[int, ...]):
        self.read_params(params)
        if len(shape) != 2:
            raise StbError("STB-R-037", f"the encoding is for two dimensions, not {len(shape)}")
        self.rows, self.cols = self.shape = shape
        self.segments, self.length = [], 0
        for length in self.segment_lengths():
            start = align_up(self.length, 64)
            self.length = start + length
            self.segments.append((start, self.length))

    def read_params(self, params: bytes):
        raise NotImplementedError

    def segment_lengths(self) -> list[int]:
        raise NotImplementedError

    def check(self, payload):
        raise NotImplementedError

    def decode_rows(self, parts, first: int, last: int):
        raise NotImplementedError

    def decode(self, payload):
        parts = self.split(payload)
        weights = np.empty(self.shape, np.float32)
        for first, last in self.slabs():
            weights[first:last] = self.decode_rows(parts, first, last)
        return weights

    def split(self, payload):
        """The segments, as arrays of bytes."""
        content = np.frombuffer(payload, np.uint8)
        return [content[start:end] for start, end in self.segments]

    def slabs(self):
        """Ranges of rows that cover the matrix; all start at a multiple of 16."""
        step = max(16, SLAB_WEIGHTS // align_up(self.cols, 128) // 16 * 16)
        for first in range(0, self.rows, step):
            yield first, min(first + step, self.rows)

    def require_unused_zero(self, payload, others_zero: bool):
        """STB-R-041, for the bytes between segments and for what the encoding has found."""
        end_before = 0
        for start, end in self.segments:
            if any(payload[end_before:start]):
                raise StbError("STB-R-041", "a byte between two segments is not zero")
            end_before = end
        if not others_zero:
            raise StbError("STB-R-041", "bits that belong to nothing in the tensor are not zero")


class IntGroup(Matrix):
    """Encoding 16 (§3): integers of 4 or 8 bits, with one scale for each group of G columns."""

    BITS_ALLOWED = (4, 8)

    def read_params(self, params):
        self.bits, self.G = params[0], u16(params, 2)
        require_params(
            self.bits in self.BITS_ALLOWED and self.G in (32, 64, 128),
            params[1:2] + params[4:],
            f"integers of {self.bits} bits in groups of {self.G}",
        )

    def segment_lengths(self):
        self.groups = ceil_div(self.cols, self.G)
        self.row_bytes = self.groups * self.G * self.bits // 8
        return [self.rows * self.row_bytes, self.rows * self.groups * 2]

    def check(self, payload):
        parts = self.split(payload)
        self.require_unused_zero(payload, not any(
            self._stored_codes(parts, first, last)[:, self.cols :].any()
            for first, last in self.slabs()
        ))
        require_finite(parts[1].view("<f2"), "a scale")

    def decode_rows(self, parts, first, last):
        codes = self._codes(self._stored_codes(parts, first, last)[:, : self.cols])
        scales = parts[1].view("<f2").reshape(self.rows, self.groups)[first:last]
        scales = np.repeat(scales.astype(np.float32), self.G, axis=1)[:, : self.cols]
        return scales * codes.astype(np.float32)

    def _stored_codes(self, parts, first, last):
        """The codes as they are stored, bytes or nibbles, of all columns of whole groups."""
        codes = parts[0].reshape(self.rows, self.row_bytes)[first:last]
        if self.bits == 4:
            codes = unpack_nibbles(codes.reshape(last - first, -1, 16))
        return codes.reshape(last - first, self.groups * self.G)

    def _codes(self, stored):
        return stored.view(np.int8) if self.bits == 8 else stored.astype(np.int8) - np.int8(8)


class OddGroup(IntGroup):
    """Encoding 17 (§3): odd integers of 1 to 3 bits; 3 bits are stored as planes of 2 and 1."""

    BITS_ALLOWED = (1, 2, 3)

    def _stored_codes(self, parts, first, last):
        rows = parts[0].reshape(self.rows, self.row_bytes)[first:last]
        stored = np.zeros((last - first, self.groups * self.G), np.uint8)
        at = shift = 0
        for width in [2, 1] if self.bits == 3 else [self.bits]:
            end = at + stored.shape[1] * width // 8
            units = rows[:, at:end].reshape(last - first, -1, 4 * width)
            fields = [units >> place & (1 << width) - 1 for place in range(0, 8, width)]
            stored |= np.concatenate(fields, axis=-1).reshape(stored.shape) << shift
            at, shift = end, shift + width
        return stored

    def _codes(self, stored):
        return stored.astype(np.int8) * np.int8(2) + np.int8(1 - (1 << self.bits))


class Stbllm(Matrix):
    """Encoding 32 (§4): N of 8 weights, three magnitudes, salient columns.

    Groups of 8 columns are bytes of the stored bitmaps, so all masks are arrays with one byte for
    each group.
    """

    def read_params(self, params):
        self.N, self.B = params[0], u16(params, 2)
        require_params(
            1 <= self.N <= 8 and self.B >= 32 and self.B % 32 == 0,
            params[1:2] + params[4:],
            f"{self.N} of 8 weights, blocks of {self.B}",
        )

    def segment_lengths(self):
        self.units = ceil_div(self.cols, 64)
        self.blocks = ceil_div(self.cols, self.B)
        return [
            self.units * 8,
            self.rows * self.units * 16,
            self.rows * self.units * self.N,
            self.rows * self.blocks * 10,
        ]

    def check(self, payload):
        parts = self.split(payload)
        salient = parts[0]
        exists = np.packbits(np.arange(self.units * 64) < self.cols, bitorder="little")
        to_keep = ceil_div(self.N * POPCOUNT[exists].astype(int), 8)
        sign_number = np.arange(self.N)

        unused_zero = not (salient & ~exists).any()
        for first, last in self.slabs():
            low, high = self._states(parts, first, last)
            kept = POPCOUNT[(low | high) & exists]
            self._require_valid_states(
                first, wrong_count=kept != to_keep, wrong_state=low & high & salient & exists != 0
            )
            signs = self._signs(parts, first, last)
            unused_zero &= not ((low | high) & ~exists).any()
            unused_zero &= not (signs & (sign_number >= kept[..., np.newaxis])).any()
        self.require_unused_zero(payload, unused_zero)
        require_finite(parts[3].view("<f2"), "a scale")

    def _require_valid_states(self, first, wrong_count, wrong_state):
        """STB-R-043 and 044, given where they are broken: unit by unit, and 043 first."""
        by_unit = (len(wrong_count), self.units, 8)
        wrong_count = wrong_count.reshape(by_unit).any(axis=2)
        wrong_state = wrong_state.reshape(by_unit).any(axis=2)
        wrong = wrong_count | wrong_state
        if wrong.any():
            row, unit = np.unravel_index(wrong.argmax(), wrong.shape)
            where = f"row {first + row}, columns from {64 * unit}"
            if wrong_count[row, unit]:
                raise StbError("STB-R-043", f"a group does not keep {self.N} of 8 weights: {where}")
            raise StbError("STB-R-044", f"a weight of a salient column has state 3: {where}")

    def decode_rows(self, parts, first, last):
        n = last - first
        low, high = self._states(parts, first, last)
        which_sign = np.minimum(BITS_BELOW[low | high], self.N - 1)
        negative = np.take_along_axis(self._signs(parts, first, last), which_sign, axis=2)
        negative = negative.reshape(n, -1)[:, : self.cols]
        state = (unpack_bits(low) + 2 * unpack_bits(high))[:, : self.cols]
        salient = unpack_bits(parts[0])[: self.cols]

        table = self._values(parts, first, last)
        block = np.arange(self.cols) // self.B
        index = 16 * block + (8 * salient + 4 * negative + state)
        return np.take_along_axis(table.reshape(n, -1), index, axis=1)

    def _values(self, parts, first, last):
        """All values that a weight can have: [row, block, salient, negative, state]."""
        s = parts[3].view("<f2").reshape(self.rows, self.blocks, 5)[first:last].astype(np.float32)
        table = np.zeros((last - first, self.blocks, 2, 2, 4), np.float32)
        for negative, signed in enumerate([s, -s]):
            table[:, :, 0, negative, 1:] = signed[:, :, :3]
            table[:, :, 1, negative, 1] = signed[:, :, 3] + s[:, :, 4]
            table[:, :, 1, negative, 2] = signed[:, :, 3] - s[:, :, 4]
        return table

    def _states(self, parts, first, last):
        """Bitmaps *low* and *high*: [row, group]."""
        states = parts[1].reshape(self.rows, self.units, 2, 8)[first:last]
        return (states[:, :, half].reshape(last - first, self.units * 8) for half in (0, 1))

    def _signs(self, parts, first, last):
        """Sign bits: [row, group, k]."""
        signs = parts[2].reshape(self.rows, self.units, self.N)[first:last]
        return unpack_bits(signs).reshape(last - first, self.units * 8, self.N)


class BlockScaled(Matrix):
    """What encodings 48 and 80 have in common (§5.3): tiles of 16 rows, and what scales weights.

    That is in three segments: column factors, row scales, block scales. FACTORS is the first.
    """

    FACTORS: int

    def valid_scales(self) -> bool:
        """Whether `flags` is valid, and `scale_bits` and `B` are allowed together."""
        valid_block = self.B >= 32 and self.B % 32 == 0 if self.scale_bits else self.B == 0
        return self.flags <= 1 and self.scale_bits in (0, 4, 8) and valid_block

    def scale_lengths(self) -> list[int]:
        self.tiles = ceil_div(self.rows, 16)
        self.blocks = ceil_div(self.cols, self.B) if self.scale_bits else 0
        factors = self.cols * 2 if self.flags & 1 else 0
        return [factors, self.rows * 2, self.tiles * self.blocks * 2 * self.scale_bits]

    def require_finite_scales(self, parts):
        require_finite(self._numbers(parts, 0), "a column factor")
        require_finite(self._numbers(parts, 1), "a row scale")

    def _numbers(self, parts, which):
        """Column factors (0) or row scales (1), as stored."""
        return parts[self.FACTORS + which].view("<f2")

    def _times_factors(self, parts, values):
        """Values [row, column], or [row, 1] for all columns, times column factors if present."""
        return values * self._numbers(parts, 0).astype(np.float32) if self.flags & 1 else values

    def _scales(self, parts, first, last):
        """Scales of weights, without column factors: [row, column], or [row, 1] without blocks."""
        scale = self._numbers(parts, 1)[first:last, np.newaxis].astype(np.float32)
        if self.scale_bits:
            codes = self._block_codes(parts, first, last)[: last - first]
            scale = scale * ((codes.astype(np.float32) + 1) / np.float32(1 << self.scale_bits))
            scale = scale[:, np.arange(self.cols) // self.B]
        return scale

    def _block_codes(self, parts, first, last):
        """Block scales of whole tiles: [row, block], also of rows that do not exist (§5.3)."""
        size = 2 * self.scale_bits
        scales = parts[self.FACTORS + 2].reshape(self.tiles, self.blocks, size)
        scales = scales[first // 16 : ceil_div(last, 16)]
        if self.scale_bits == 4:
            scales = unpack_nibbles(scales)
        rows = 16 if self.scale_bits else 0
        return scales.transpose(0, 2, 1).reshape(len(scales) * rows, self.blocks)

    def _unused_block_codes(self, parts):
        """Block scales of rows that do not exist; only the last tile can have some."""
        rest = self.rows % 16
        return self._block_codes(parts, self.rows - rest, self.rows)[rest:]


class JointNM(BlockScaled):
    """Encoding 48 (§5): at most N of M weights, their positions and signs in one code."""

    FACTORS = 0

    def read_params(self, params):
        self.N, self.M, self.scale_bits, self.flags = params[:4]
        self.B = u16(params, 4)
        require_params(
            self.N in (1, 2) and self.M in (4, 8) and self.valid_scales(),
            params[6:],
            f"{self.N} of {self.M} weights, {self.scale_bits} bits for the scale of "
            f"blocks of {self.B}, flags {self.flags:#x}",
        )

    def segment_lengths(self):
        p = self.M.bit_length() - 1
        self.beta = self.N * p + 1
        self.planes = [w for w in (4, 2, 1) if self.beta & w]
        self.groups = ceil_div(self.cols, self.M)
        quads = ceil_div(self.groups, 4)
        self.whole_chunks, self.quads_left = divmod(quads, 8)
        self.tile_bytes = 64 * self.beta * self.whole_chunks + sum(
            64 * ceil_div(self.quads_left * w, 8) for w in self.planes
        )
        return [*self.scale_lengths(), self.tiles * self.tile_bytes]

    def check(self, payload):
        parts = self.split(payload)
        unused_zero = not self._unused_block_codes(parts).any()
        for first, last in self.slabs():
            codes = self._codes(parts, first, last)
            unused_zero &= not codes[:, self.groups :].any()
            unused_zero &= not codes[last - first :].any()
        self.require_unused_zero(payload, unused_zero)
        self.require_finite_scales(parts)

    def decode_rows(self, parts, first, last):
        n = last - first
        scale = self._times_factors(parts, self._scales(parts, first, last))
        codes = self._codes(parts, first, last)[:n, : self.groups]
        keep, flip = self._bit_masks()
        keep = keep[codes].reshape(n, -1)[:, : self.cols]
        flip = flip[codes].reshape(n, -1)[:, : self.cols]
        return ((scale.view(np.uint32) ^ flip) & keep).view(np.float32)

    def _bit_masks(self):
        """For each code and position, bits of the magnitude to keep and bits to flip (§5.1)."""
        p = self.M.bit_length() - 1
        keep = np.zeros((1 << self.beta, self.M), np.uint32)
        flip = np.zeros_like(keep)
        for code in range(1 << self.beta):
            i, j, s = code & self.M - 1, code >> p & self.M - 1, code >> self.beta - 1
            if self.N == 1:
                j = i
            keep[code, [i, j]] = 0xFFFFFFFF
            flip[code, j] = (s != (i > j)) << 31
            flip[code, i] = s << 31
        return keep, flip

    def _codes(self, parts, first, last):
        """Codes of whole tiles: [row, group], also of rows and groups that do not exist (§5.2)."""
        tiles = parts[3].reshape(self.tiles, self.tile_bytes)[first // 16 : ceil_div(last, 16)]
        chunks = self.whole_chunks + (self.quads_left > 0)
        by_place = (len(tiles), chunks, 8, 4, 16)       # tile, chunk, quad, lane, row
        codes = np.zeros(by_place, np.uint8)
        whole_bytes = 64 * self.beta * self.whole_chunks
        whole = tiles[:, :whole_bytes].reshape(len(tiles), self.whole_chunks, 64 * self.beta)
        self._unpack_planes(whole, 8, codes[:, : self.whole_chunks])
        if self.quads_left:
            rest = tiles[:, np.newaxis, whole_bytes:]
            self._unpack_planes(rest, self.quads_left, codes[:, self.whole_chunks :])
        return codes.transpose(0, 4, 1, 2, 3).reshape(len(tiles) * 16, chunks * 32)

    def _unpack_planes(self, chunks, quads, codes):
        """Put together the codes of chunks [tile, chunk, byte] that have this number of quads."""
        at = shift = 0
        for w in self.planes:
            vectors = ceil_div(quads * w, 8)
            plane = chunks[:, :, at : at + 64 * vectors]
            plane = plane.reshape(*plane.shape[:2], vectors, 4, 16)
            codes_per_byte = 8 // w
            for k in range(codes_per_byte):
                part = plane >> k * w & (1 << w) - 1
                codes[:, :, k::codes_per_byte][:, :, :vectors] |= part << shift
            at += 64 * vectors
            shift += w


class Trellis(BlockScaled):
    """Encoding 80 (§7): a window of 8 bits moves over a stream, and tables make weights of it."""

    FACTORS = 1
    # Step bits k and step weights V that go together.
    STEPS = ((1, 2), (1, 1), (3, 2), (2, 1), (5, 2), (3, 1), (4, 1))

    def read_params(self, params):
        self.k, self.V, self.scale_bits, self.flags = params[:4]
        self.B = u16(params, 4)
        require_params(
            (self.k, self.V) in self.STEPS and self.valid_scales(),
            params[6:],
            f"steps of {self.k} bits for {self.V} weights, {self.scale_bits} bits for the scale of "
            f"blocks of {self.B}, flags {self.flags:#x}",
        )

    def segment_lengths(self):
        self.units = ceil_div(self.cols, 4 * self.V)
        scales = self.scale_lengths()
        return [self.V * 32, *scales, self.tiles * self.units * 8 * self.k]

    def check(self, payload):
        parts = self.split(payload)
        self.require_unused_zero(payload, not self._unused_block_codes(parts).any())
        self.require_finite_scales(parts)
        if (self._tables(parts).max(axis=2).sum(axis=1) > 127).any():
            raise StbError("STB-R-046", "the largest entries of two tables add up to more than 127")

    def decode_rows(self, parts, first, last):
        values = self._values(parts)
        windows = self._windows(parts, first, last)
        by_place = (len(windows), self.units, 16, self.V, 4)    # tile, unit, row, step weight, step
        weights = np.empty(by_place, np.float32)
        for which in range(self.V):
            weights[:, :, :, which] = values[which][windows]
        weights = weights.transpose(0, 2, 1, 3, 4).reshape(len(windows) * 16, -1)
        weights = self._times_factors(parts, weights[: last - first, : self.cols])
        return weights * self._scales(parts, first, last)

    def _windows(self, parts, first, last):
        """Windows of whole tiles: [tile, unit, row, step of 4]."""
        size = 8 * self.k
        streams = parts[4].reshape(self.tiles, self.units, size)[first // 16 : ceil_div(last, 16)]
        byte, bit = np.divmod(self.k * np.arange(64), 8)
        after = streams[:, :, (byte + 1) % size].astype(np.uint16)
        windows = (streams[:, :, byte] | after << 8) >> bit.astype(np.uint16) & 255
        return windows.reshape(len(streams), self.units, 16, 4)

    def _values(self, parts):
        """What each window stands for before it is scaled: [step weight, window]."""
        first, second = self._tables(parts).transpose(1, 0, 2)
        window = np.arange(256)
        levels = first[:, window & 15] + second[:, (window ^ window >> 4) & 15]
        return (levels - 64).astype(np.float32)

    def _tables(self, parts):
        return parts[0].reshape(self.V, 2, 16).astype(int)


class MixedRows(Matrix):
    """Encoding 64 (§6): all rows in one encoding, and the listed rows a second time in another."""

    def read_params(self, params):
        self.count = int.from_bytes(params[:4], "little")
        self.listed_id, self.all_id = params[4:6]
        self.listed_params = params[6:10] + bytes(12)
        self.all_params = params[10:] + bytes(10)
        factors = self.all_id == 48 and self.all_params[3] & 1
        require_params(
            self.count > 0 and self.listed_id in (16, 17)
            and self.all_id in (16, 17, 48, 80) and not factors,
            b"",
            f"{self.count} rows of encoding {self.listed_id}, all rows of {self.all_id}",
        )

    def segment_lengths(self):
        if self.count > self.rows:
            raise StbError("STB-R-037", f"{self.count} listed rows of {self.rows}")
        self.listed = MATRIX_CODECS[self.listed_id](self.listed_params, (self.count, self.cols))
        self.all = MATRIX_CODECS[self.all_id](self.all_params, (self.rows, self.cols))
        return [self.count * 4, self.listed.length, self.all.length]

    def check(self, payload):
        self.require_unused_zero(payload, True)
        rows, listed, everything = self.split(payload)
        rows = rows.view("<u4").astype(np.int64)
        if rows[-1] >= self.rows or (np.diff(rows) <= 0).any():
            raise StbError("STB-R-045", "the listed rows are not ascending rows of the matrix")
        self.listed.check(listed.tobytes())
        self.all.check(everything.tobytes())

    def decode(self, payload):
        rows, listed, everything = self.split(payload)
        weights = self.all.decode(everything.tobytes())
        weights[rows.view("<u4")] = self.listed.decode(listed.tobytes())
        return weights


ENCODING_NAMES = {
    1: "f32", 2: "f16", 3: "bf16", 16: "int group", 17: "odd group", 32: "stbllm", 48: "nm",
    64: "mixed rows", 80: "trellis",
}
DENSE_TYPES = {1: "<f4", 2: "<f2", 3: "<u2"}
MATRIX_CODECS = {
    16: IntGroup, 17: OddGroup, 32: Stbllm, 48: JointNM, 64: MixedRows, 80: Trellis,
}


def codec_for(encoding: int, params: bytes, shape: tuple[int, ...]):
    """The codec of a tensor, None if the encoding is unknown; checks STB-R-036 and STB-R-037."""
    if encoding in DENSE_TYPES:
        return Dense(DENSE_TYPES[encoding], params, shape)
    if encoding in MATRIX_CODECS:
        return MATRIX_CODECS[encoding](params, shape)
    return None
