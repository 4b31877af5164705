"""Prefill and decode speed beside llama.cpp on models of LLaMA-7B's shape with random weights, alternating in one run.

    python3 -m venv target/gguf && target/gguf/bin/pip install gguf numpy
    target/gguf/bin/python tests/bench/compare_llama_cpp.py --llama-cpp BUILD/bin [--layers 4] [--threads 1,2]

BUILD is a build of llama.cpp with the targets llama-bench and llama-quantize (GGML_NATIVE=ON), made
outside this repository. Files go to --work (a temporary folder by default): 2 GB for 4 layers. Run it
on an idle machine. Prints one line of JSON per measurement and a table of medians.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import gguf
import numpy

ROOT = pathlib.Path(__file__).resolve().parents[2]
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 4096, 11008, 32000, 32


def write_gguf(path: pathlib.Path, layers: int) -> None:
    """The shape of LLaMA-7B in f16 with `layers` layers."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(1)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(VOCABULARY - 3)]
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = numpy.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=numpy.float32) * 0.02
        writer.add_tensor(f"{name}.weight", values.astype(numpy.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(HIDDEN, numpy.float32))

    matrix("token_embd", VOCABULARY, HIDDEN)
    for layer in range(layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm")
        norm(block + "ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(block + part, HIDDEN, HIDDEN)
        matrix(block + "ffn_gate", INTERMEDIATE, HIDDEN)
        matrix(block + "ffn_up", INTERMEDIATE, HIDDEN)
        matrix(block + "ffn_down", HIDDEN, INTERMEDIATE)
    norm("output_norm")
    matrix("output", VOCABULARY, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def output(*command: object) -> str:
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
    return done.stdout


def prepare(options: argparse.Namespace, work: pathlib.Path) -> None:
    output("cargo", "build", "--release")
    output("cargo", "build", "--release", "-p", "stb-tests", "--example", "random-model")
    for recipe in options.recipes:
        random_model = ROOT / "target/release/examples/random-model"
        if not (work / f"{recipe}.stb").exists():
            output(random_model, "llama-7b", work / f"{recipe}.stb", "--recipe", recipe, "--layers", options.layers)
    types = [kind for kind in options.types if not (work / f"{kind}.gguf").exists()]
    if types:
        dense = work / "f16.gguf"
        write_gguf(dense, options.layers)
        for kind in types:
            output(options.llama_cpp / "llama-quantize", dense, work / f"{kind}.gguf", kind, 2)
        dense.unlink()


def measure_llama(options: argparse.Namespace, file: pathlib.Path, threads: int) -> dict:
    bench = [options.llama_cpp / "llama-bench", "-m", file, "-t", threads, "-r", options.runs, "-o", "json"]
    found = json.loads(output(*bench, "-p", options.prompt, "-n", options.tokens, "-d", options.depth))
    prefill = [result["avg_ts"] for result in found if result["n_prompt"]]
    decode = [result["avg_ts"] for result in found if result["n_gen"]]
    return {"program": "llama.cpp", "prefill": prefill[0], "decode": decode[0], "file_bytes": found[0]["model_size"]}


def measure_stb(options: argparse.Namespace, file: pathlib.Path, threads: int) -> dict:
    program = ROOT / "target/release/stb-run"
    bench = [program, "bench", file, "-t", threads, "-r", options.runs, "--json"]
    result = json.loads(output(*bench, "-p", options.prompt, "-n", options.tokens, "-d", options.depth))
    return {
        "program": "stb",
        "prefill": result["prefill_tokens_per_second"]["median"],
        "decode": result["decode_tokens_per_second"]["median"],
        "file_bytes": result["file_bytes"],
        "isa": result["isa"],
        "gigabytes_per_second": result["decode_gigabytes_per_second"],
        "machine_gigabytes_per_second": result["machine_read_bytes_per_second"]["median"] / 1e9,
    }


def main() -> None:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=pathlib.Path, required=True, help="folder with llama-bench and llama-quantize")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=words, default=["2", "1"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0, help="tokens in the cache before both are measured (stb: before decoding)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", type=words, default=["nm-1of8", "nm-1of4", "nm-2of8", "nm-2of4"])
    parser.add_argument("--types", type=words, default=["TQ2_0", "Q2_K", "Q4_0"], help="types of llama.cpp")
    parser.add_argument("--work", type=pathlib.Path, help="folder for the models; they stay there, and those that are there already are used")
    options = parser.parse_args()
    options.llama_cpp = options.llama_cpp.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or pathlib.Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        prepare(options, work)
        found: dict[tuple, list[dict]] = {}
        for threads in options.threads:
            for _ in range(options.rounds):
                runs = [(kind, measure_llama, f"{kind}.gguf") for kind in options.types]
                runs += [(recipe, measure_stb, f"{recipe}.stb") for recipe in options.recipes]
                for name, measure, file in runs:
                    result = {"name": name, "threads": int(threads)} | measure(options, work / file, int(threads))
                    print(json.dumps(result), flush=True)
                    found.setdefault((threads, name), []).append(result)
    print("\n| threads | type or recipe | file, MB | prefill, tokens/s | decode, tokens/s |\n| --- | --- | --- | --- | --- |")
    for (threads, name), results in found.items():
        cells = [f"{results[0]['file_bytes'] / 1e6:.0f}"]
        for what in ("prefill", "decode"):
            rates = [result[what] for result in results]
            cells.append(f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})")
        print(f"| {threads} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
