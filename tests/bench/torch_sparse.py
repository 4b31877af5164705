"""Prompt products of PyTorch on this machine's GPU: dense bf16 (cuBLAS) and 2:4 sparse bf16 and int8 (cuSPARSELt).

A baseline for `gpu-check --part prefill` besides cuBLAS, with the same shapes and numbers of tokens. Sparse weights have full
values (16 or 8 bits): 9 or 5 bits per weight with indices, where N:M codes have 0.5 to 1.3. PyTorch prepares each sparse
product on the host, which takes longer than a product with 512 tokens, so compare the results for 8192.

    python tests/bench/torch_sparse.py [--json FILE]
"""

import argparse
import json
import statistics
import sys
import time

SHAPES = [(4096, 4096), (4096, 11008), (4096, 14336)]
TOKENS = [512, 2048, 8192]
# Seconds of a sample, and of warming up.
SAMPLE, WARM = 0.02, 0.3


def seconds(torch, run, samples=9):
    """Median, smallest and largest time of `run`, as many in a row as take SAMPLE."""
    started, one, count = time.perf_counter(), float("inf"), 0
    while count < 2 or time.perf_counter() - started < WARM:
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        one, count = min(one, time.perf_counter() - start), count + 1
    repeats = max(1, min(1000, round(SAMPLE / one)))
    found = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / repeats)
    return statistics.median(found), min(found), max(found)


def kernels(torch, rows, cols, tokens):
    """Products `x` · `w`ᵀ by name; those that this version cannot make are said to be missing."""
    device = "cuda"
    w = torch.randn(rows, cols, device=device, dtype=torch.bfloat16)
    x = torch.randn(tokens, cols, device=device, dtype=torch.bfloat16)
    yield "dense bf16", lambda: torch.nn.functional.linear(x, w)
    mask = torch.tensor([1, 1, 0, 0], device=device, dtype=torch.bool).tile(rows, cols // 4)
    torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = False
    sparse = torch.sparse.to_sparse_semi_structured(w * mask)
    yield "2:4 bf16", lambda: torch.nn.functional.linear(x, sparse)
    w8 = torch.randint(-127, 127, (rows, cols), device=device, dtype=torch.int8) * mask
    x8 = torch.randint(-127, 127, (tokens, cols), device=device, dtype=torch.int8)
    compressed = torch._cslt_compress(w8)
    yield "2:4 int8", lambda: torch._cslt_sparse_mm(compressed, x8.t(), out_dtype=torch.bfloat16)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--json", metavar="FILE", help="where to write the figures")
    arguments = arguments.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("torch_sparse.py: PyTorch is not installed (pip install torch)")
    if not torch.cuda.is_available():
        sys.exit("torch_sparse.py: PyTorch finds no CUDA device")
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, flush=True)
    found = []
    for rows, cols in SHAPES:
        for tokens in TOKENS:
            dense = None
            every = kernels(torch, rows, cols, tokens)
            while True:
                try:
                    name, run = next(every)
                    median, low, high = seconds(torch, run)
                except StopIteration:
                    break
                except (RuntimeError, NotImplementedError, AttributeError) as error:
                    print(f"  {rows}x{cols}, {tokens} tokens: not measured: {error}", flush=True)
                    # A generator that has raised is at its end.
                    break
                dense = median if dense is None else dense
                rate = 2 * rows * cols * tokens / median / 1e12
                print(
                    f"  {name:<10} {rows}x{cols}, {tokens:>4} tokens: {median * 1e6:8.1f} us "
                    f"({low * 1e6:.1f} to {high * 1e6:.1f}), {rate:6.0f} TFLOP/s, {dense / median:.2f} x dense",
                    flush=True,
                )
                found.append(
                    {"kernel": name, "rows": rows, "cols": cols, "tokens": tokens, "seconds": median,
                     "fastest": low, "slowest": high, "times_dense": dense / median}
                )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "prefill": found}, file, indent=2)


if __name__ == "__main__":
    main()
