"""XXH3-64 with seed 0 and the default secret (checksum.md).

Short inputs are hashed with Python integers, as the page has it. Inputs above 240 bytes are hashed
with numpy: what the stripes of a block add to the accumulators does not depend on the accumulators,
so it is summed for many blocks at once, and only the scrambling between blocks is a loop.
"""

import numpy as np

MASK_64 = (1 << 64) - 1

P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
M1, M2 = 0x165667919E3779F9, 0x9FB21C651E98DF25

S = bytes.fromhex("""
    b8 fe 6c 39 23 a4 4b be 7c 01 81 2c f7 21 ad 1c de d4 6d e9 83 90 97 db
    72 40 a4 a4 b7 b3 67 1f cb 79 e6 4e cc c0 e5 78 82 5a d0 7d cc ff 72 21
    b8 08 46 74 f7 43 24 8e e0 35 90 e6 81 3a 26 4c 3c 28 52 bb 91 c3 00 cb
    88 d0 65 8b 1b 53 2e a3 71 64 48 97 a2 0d f9 4e 38 19 ef 46 a9 de ac d8
    a8 fa 76 3f e3 9c 34 3f f9 dc bb c7 c7 0b 4f 1d 8a 51 e0 4b cd b4 59 31
    c8 9f 7e c9 d9 78 73 64 ea c5 ac 83 34 d3 eb c3 c5 81 a0 ff fa 13 63 eb
    17 0d dd 51 b7 f0 da 49 d3 16 55 26 29 d4 68 9e 2b 16 be 58 7d 47 a1 fc
    8f f8 b8 d1 7a d0 31 ce 45 cb 3a 8f 95 16 04 28 af d7 fb ca bb 4b 40 7e
""")

STRIPE = 64                     # bytes that go into the eight accumulators in one step
BLOCK = 1024                    # bytes between two scramblings
BLOCKS_AT_ONCE = 1024           # bounds the memory for intermediate results

START = (P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1)
NEIGHBOUR = [1, 0, 3, 2, 5, 4, 7, 6]


def xxh3_64(data) -> int:
    """The checksum of a bytes-like object."""
    x = memoryview(data)
    n = len(x)
    if n > 240:
        return _long(x)
    if n > 128:
        return _129_to_240(x, n)
    if n > 16:
        return _17_to_128(x, n)
    if n > 8:
        return _9_to_16(x, n)
    if n > 3:
        return _4_to_8(x, n)
    if n > 0:
        c = x[0] << 16 | x[n // 2] << 24 | x[n - 1] | n << 8
        return _avalanche64(c ^ _read32(S, 0) ^ _read32(S, 4))
    return _avalanche64(_read64(S, 56) ^ _read64(S, 64))


def _read32(x, i: int) -> int:
    return int.from_bytes(x[i : i + 4], "little")


def _read64(x, i: int) -> int:
    return int.from_bytes(x[i : i + 8], "little")


def _swap(word: int) -> int:
    return int.from_bytes(word.to_bytes(8, "little"), "big")


def _rotl(word: int, bits: int) -> int:
    return (word << bits | word >> 64 - bits) & MASK_64


def _fold(a: int, b: int) -> int:
    product = a * b
    return product & MASK_64 ^ product >> 64


def _avalanche(h: int) -> int:
    h &= MASK_64
    h ^= h >> 37
    h = h * M1 & MASK_64
    return h ^ h >> 32


def _avalanche64(h: int) -> int:
    h ^= h >> 33
    h = h * P64_2 & MASK_64
    h ^= h >> 29
    h = h * P64_3 & MASK_64
    return h ^ h >> 32


def _mix16(x, i: int, k: int) -> int:
    return _fold(_read64(x, i) ^ _read64(S, k), _read64(x, i + 8) ^ _read64(S, k + 8))


def _4_to_8(x, n: int) -> int:
    h = (_read32(x, n - 4) + (_read32(x, 0) << 32)) ^ _read64(S, 8) ^ _read64(S, 16)
    h ^= _rotl(h, 49) ^ _rotl(h, 24)
    h = h * M2 & MASK_64
    h ^= (h >> 35) + n
    h = h * M2 & MASK_64
    return h ^ h >> 28


def _9_to_16(x, n: int) -> int:
    a = _read64(x, 0) ^ _read64(S, 24) ^ _read64(S, 32)
    b = _read64(x, n - 8) ^ _read64(S, 40) ^ _read64(S, 48)
    return _avalanche(n + _swap(a) + b + _fold(a, b))


def _17_to_128(x, n: int) -> int:
    h = n * P64_1
    for i in range((n - 1) // 32 + 1):
        h += _mix16(x, 16 * i, 32 * i) + _mix16(x, n - 16 * (i + 1), 32 * i + 16)
    return _avalanche(h)


def _129_to_240(x, n: int) -> int:
    h = n * P64_1 + sum(_mix16(x, 16 * i, 16 * i) for i in range(8))
    h = _avalanche(h)
    h += sum(_mix16(x, 16 * i, 16 * (i - 8) + 3) for i in range(8, n // 16))
    return _avalanche(h + _mix16(x, n - 16, 119))


def _words(x, at: int, count: int):
    return np.frombuffer(x, "<u8", count, at)


# The secret as one row of eight words for each stripe of a block, and for the other two steps.
STRIPE_SECRETS = np.stack([_words(S, 8 * s, 8) for s in range(BLOCK // STRIPE)])
SCRAMBLE_SECRET = _words(S, 128, 8)
LAST_SECRET = _words(S, 121, 8)


def _added(stripes, secrets):
    """What stripes (words of shape [..., stripe, 8]) add to the accumulators, summed over them."""
    m = stripes ^ secrets
    products = (m & 0xFFFFFFFF) * (m >> 32)
    products += stripes[..., NEIGHBOUR]
    return products.sum(axis=-2, dtype=np.uint64)


def _long(x) -> int:
    n = len(x)
    A = np.array(START, np.uint64)
    blocks = (n - 1) // BLOCK
    for first in range(0, blocks, BLOCKS_AT_ONCE):
        count = min(BLOCKS_AT_ONCE, blocks - first)
        words = _words(x, first * BLOCK, count * BLOCK // 8).reshape(count, -1, 8)
        for added in _added(words, STRIPE_SECRETS):
            A += added
            A ^= A >> 47
            A ^= SCRAMBLE_SECRET
            A *= P32_1

    stripes = (n - 1 - blocks * BLOCK) // STRIPE
    words = _words(x, blocks * BLOCK, stripes * 8).reshape(stripes, 8)
    A += _added(words, STRIPE_SECRETS[:stripes])
    A += _added(_words(x, n - STRIPE, 8)[np.newaxis], LAST_SECRET)

    A = A.tolist()
    h = n * P64_1
    for i in range(4):
        h += _fold(A[2 * i] ^ _read64(S, 11 + 16 * i), A[2 * i + 1] ^ _read64(S, 19 + 16 * i))
    return _avalanche(h)
