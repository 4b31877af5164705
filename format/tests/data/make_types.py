"""Writes types.gguf: blocks of every tensor type that stb decodes, and their values as llama.cpp decodes them.

    python3 make_types.py path/to/libggml-base.so types.gguf

Needs the Python packages gguf and numpy, and llama.cpp's library ggml-base, built without native instructions so
that it uses no fused multiply-add. Per type there are two tensors of shape [3, 256]: NAME, whose first row is
quantized normal noise and whose other rows are random codes, and NAME.f32, its values.
"""

import ctypes
import sys

import gguf
import numpy as np

NAMES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS "
    "IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 Q1_0 Q2_0"
).split()
IDS = dict(F32=0, F16=1, Q4_0=2, Q4_1=3, Q5_0=6, Q5_1=7, Q8_0=8, Q2_K=10, Q3_K=11, Q4_K=12, Q5_K=13, Q6_K=14,
           IQ2_XXS=16, IQ2_XS=17, IQ3_XXS=18, IQ1_S=19, IQ4_NL=20, IQ3_S=21, IQ2_S=22, IQ4_XS=23, IQ1_M=29,
           BF16=30, TQ1_0=34, TQ2_0=35, MXFP4=39, Q1_0=41, Q2_0=42)
COLS = 256


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def main(library, out):
    lib = ctypes.CDLL(library)
    lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]
    generator = np.random.default_rng(20261129)

    def quantized(kind, size):
        values = generator.standard_normal(COLS, dtype=np.float32)
        data = np.zeros(size, np.uint8)
        if kind == 0:
            return values.view(np.uint8)
        if kind == 30:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        weights = np.ones(COLS, np.float32)
        lib.ggml_quantize_chunk(kind, pointer(values), pointer(data), 0, 1, COLS, pointer(weights))
        return data

    def decoded(name, data):
        values = np.zeros(COLS, np.float32)
        if name == "F32":
            return data.view(np.float32).copy()
        if name == "F16":
            return data.view(np.float16).astype(np.float32)
        if name == "BF16":
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        function = getattr(lib, "dequantize_row_" + name.lower().replace("_k", "_K"))
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        function(pointer(data), pointer(values), COLS)
        return values

    def random(name, size):
        while True:
            data = generator.integers(0, 256, size, dtype=np.uint8)
            if np.isfinite(decoded(name, data)).all():
                return data

    tensors = []
    for name in NAMES:
        kind = IDS[name]
        size = lib.ggml_row_size(kind, COLS)
        rows = [quantized(kind, size), random(name, size), random(name, size)]
        tensors.append((name, kind, np.stack(rows)))
        values = np.stack([decoded(name, row) for row in rows])
        tensors.append((name + ".f32", 0, np.ascontiguousarray(values).view(np.uint8)))
    write(out, tensors)


def write(out, tensors):
    """The package's writer does not know the newest types, so that only its constants are used."""
    def text(value):
        value = value.encode()
        return len(value).to_bytes(8, "little") + value

    def u32(value):
        return value.to_bytes(4, "little")

    def u64(value):
        return value.to_bytes(8, "little")

    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    head = u32(gguf.GGUF_MAGIC) + u32(gguf.GGUF_VERSION) + u64(len(tensors)) + u64(1)
    head += text("general.architecture") + u32(8) + text("none")
    data = b""
    for name, kind, rows in tensors:
        data += bytes(-len(data) % alignment)
        head += text(name) + u32(2) + u64(COLS) + u64(len(rows)) + u32(kind) + u64(len(data))
        data += rows.tobytes()
    head += bytes(-len(head) % alignment)
    with open(out, "wb") as file:
        file.write(head + data)


main(*sys.argv[1:])
