"""Quality of llama.cpp's types beside that of our recipes on small models, in one table: perplexity, KL divergence, top-1.

    python3 -m venv target/quality
    target/quality/bin/pip install numpy gguf safetensors tokenizers cmake scikit-build-core
    target/quality/bin/python tests/bench/compare_quality.py --llama-cpp BUILD --out OUT --data ../shared/data \\
        --stb-run target/release/stb-run [--stb-convert target/release/stb-convert] [--models quill-4m]

Models, texts, windows and our recipes are those of `studies/frontier.toml`. Each model becomes a GGUF in f32, is quantized
by llama-quantize with an importance matrix of the study's calibration text, dequantized by llama-quantize, and measured as a
dense folder by `stb-run perplexity` with the checkpoint as reference. Our recipes (with --stb-convert) are measured by
`stb-convert study`, which is the same evaluation.

Token ids reach llama.cpp exactly: the GGUF has a vocabulary of one character per token, and texts are written in it. So
llama-perplexity sees the same windows; the column *by llama.cpp* is its own perplexity of some files, by its own kernels
(which round activations if weights are quantized). It usually scores the second half of a window only; the build here scores
all of it, as we do.

BUILD is where llama.cpp is built from the source distribution of llama-cpp-python, unless it is there already. OUT gets
`peers.csv`, `peers.md`, the chart `peers.svg` and a file per measurement: the same command goes on after an interruption.
"""

import argparse
import collections
import csv
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import numpy
import quality_chart
import tokenizers
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = ROOT / "tests/bench/studies/frontier.toml"
IMATRIX_WINDOWS = 512
TYPES = "IQ1_S IQ1_M TQ1_0 TQ2_0 Q1_0 Q2_0 IQ2_XXS IQ2_XS Q2_K IQ3_XXS Q3_K_S Q3_K_M Q4_0 IQ4_NL Q4_K_M Q8_0".split()
# Types for which the embeddings, 5 to 6 bits by default, are a good part of the file.
SMALL = "IQ1_S IQ1_M IQ2_XXS IQ2_XS Q2_K".split()
# Rows that llama.cpp evaluates too.
CHECKED = "F32 IQ1_S IQ2_XXS Q4_0".split()
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
MATRICES_OUTSIDE = ("token_embd.weight", "output.weight")
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
COLUMNS = ["model", "program", "type", "file_bytes", "tensor_bytes", "true_bits", "tensor_bits", "body_bits", "perplexity",
           "perplexity_se", "kl", "kl_se", "top1", "top1_se", "perplexity_by_llama_cpp", "stored_as", "fallback"]  # fmt: skip
DIGITS = {"file_bytes": 0, "tensor_bytes": 0, "true_bits": 3, "tensor_bits": 3, "body_bits": 3, "perplexity": 3, "kl": 4,
          "top1": 4, "perplexity_by_llama_cpp": 3}  # fmt: skip


def run(*command: object, cwd: pathlib.Path = ROOT) -> str:
    """What a command prints, standard error included."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout[-2000:]}")
    return done.stdout


def build_llama_cpp(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the sources."""
    sources = "llama_cpp_python-*/vendor/llama.cpp"
    programs = ["llama-quantize", "llama-imatrix", "llama-perplexity"]
    if all((folder / "build/bin" / program).exists() for program in programs):
        return next(folder.glob(sources))
    folder.mkdir(parents=True, exist_ok=True)
    pip, cmake = ([sys.executable, "-m", module] for module in ("pip", "cmake"))
    run(*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "llama-cpp-python", cwd=folder)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob(sources))
    scorer, half, whole = source / "tools/perplexity/perplexity.cpp", "const int first = n_ctx/2;", "const int first = 0;"
    assert half in scorer.read_text()
    scorer.write_text(scorer.read_text().replace(half, whole))
    off = [f"-DLLAMA_{part}=OFF" for part in "CURL OPENSSL BUILD_TESTS BUILD_EXAMPLES BUILD_SERVER BUILD_APP".split()]
    on = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
    run(*cmake, "-S", source, "-B", folder / "build", *on, *off)
    run(*cmake, "--build", folder / "build", "-j2", "--target", *programs)
    return source


class Model:
    """A checkpoint in the Hugging Face layout, and its way to GGUF and back."""

    def __init__(self, name: str, path: pathlib.Path, context: int) -> None:
        self.name, self.path, self.context = name, path, context
        self.config = json.loads((path / "config.json").read_text())
        self.tensors = {name: tensor.astype(numpy.float32) for name, tensor in load_file(path / "model.safetensors").items()}
        self.parameters = sum(tensor.size for tensor in self.tensors.values())
        self.names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTSIDE.items()}
        for layer in range(self.config["num_hidden_layers"]):
            for ours, theirs in LAYER.items():
                self.names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"

    def rotate(self, name: str, tensor: numpy.ndarray, back: bool = False) -> numpy.ndarray:
        """Rows of queries and keys: halves of a head (Hugging Face) become pairs (GGUF), or `back`."""
        kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        heads = next((self.config[key] for kind, key in kinds.items() if kind in name), None)
        if heads is None:
            return tensor
        half = tensor.shape[0] // heads // 2
        split = tensor.reshape(heads, *((half, 2) if back else (2, half)), -1)
        return numpy.ascontiguousarray(split.swapaxes(1, 2)).reshape(tensor.shape)

    def write_gguf(self, path: pathlib.Path) -> None:
        config, writer = self.config, gguf.GGUFWriter(str(path), "llama")
        heads, vocabulary = config["num_attention_heads"], config["vocab_size"]
        metadata = {
            "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
            "head_count": heads, "head_count_kv": config["num_key_value_heads"], "layer_norm_rms_eps": config["rms_norm_eps"],
            "rope_dimension_count": config["hidden_size"] // heads, "vocab_size": vocabulary, "file_type": 0,
            "rope_freq_base": config.get("rope_parameters", config).get("rope_theta", 10000.0), "tokenizer_model": "llama",
            "token_list": [character(token).encode() for token in range(vocabulary)], "token_scores": [0.0] * vocabulary,
            "token_types": [gguf.TokenType.NORMAL] * vocabulary, "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"], "add_bos_token": False, "add_eos_token": False, "add_space_prefix": False,
        }  # fmt: skip
        for key, value in metadata.items():
            getattr(writer, f"add_{key}")(value)
        for name, tensor in self.tensors.items():
            writer.add_tensor(self.names[name], self.rotate(name, tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def write_folder(self, dequantized: pathlib.Path, folder: pathlib.Path) -> None:
        """A GGUF in f32 as a folder that `stb-run` reads."""
        folder.mkdir(exist_ok=True)
        for file in self.path.glob("*.j*"):
            shutil.copyfile(file, folder / file.name)
        found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(dequantized).tensors}
        tensors = {name: found[self.names[name]].reshape(shape.shape) for name, shape in self.tensors.items()}
        assert all(tensor.dtype == numpy.float32 for tensor in tensors.values())
        save_file({name: self.rotate(name, tensor, back=True) for name, tensor in tensors.items()}, folder / "model.safetensors")

    def tokens(self, text: pathlib.Path, separator: str) -> list[int]:
        """As `stb-run perplexity --separator` does: documents, stripped, each after a begin token."""
        documents = [document.strip() for document in text.read_text().split(separator)]
        tokenizer = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
        encoded = tokenizer.encode_batch([document for document in documents if document], add_special_tokens=False)
        return [token for document in encoded for token in [self.config["bos_token_id"], *document.ids]]


def character(token: int) -> str:
    """One ideograph per token: llama.cpp's tokenizer finds exactly that token, and has nothing to merge."""
    return chr(0x4E00 + token)


class Peers:
    """llama.cpp's types of one model."""

    def __init__(self, options: argparse.Namespace, study: dict, model: Model) -> None:
        self.options, self.model, text = options, model, study["text"][0]
        self.work = options.out / model.name
        self.work.mkdir(parents=True, exist_ok=True)
        self.protocol = ["--separator", text["separator"], "--windows", text["windows"], "--ctx", model.context]
        self.exactly = ["-c", model.context, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", 1]
        self.text = pathlib.Path(text["path"].format(data=options.data))
        calibration = pathlib.Path(study["calibration"]["path"].format(data=options.data))
        self.tokens = self.write_text("eval.txt", model.tokens(self.text, text["separator"]), text["windows"])
        self.write_text("calib.txt", model.tokens(calibration, study["calibration"]["separator"]), IMATRIX_WINDOWS)
        model.write_gguf(self.work / "dense.gguf")
        if not (self.work / "imatrix.gguf").exists():
            self.llama("imatrix", "-m", "dense.gguf", "-f", "calib.txt", "-o", "imatrix.gguf", "--no-ppl", *self.exactly)

    def write_text(self, name: str, tokens: list[int], windows: int) -> int:
        (self.work / name).write_text("".join(map(character, tokens[: windows * self.model.context])))
        return len(tokens)

    def llama(self, program: str, *arguments: object) -> str:
        return run(self.options.llama_cpp / "build/bin" / f"llama-{program}", *arguments, cwd=self.work)

    def variants(self) -> dict[str, list[object]]:
        """Label: arguments of llama-quantize. Embeddings of 4.5 bits are what our recipes have."""
        embeddings = "Q4_K" if self.model.config["hidden_size"] % 256 == 0 else "Q4_0"
        small = [kind for kind in self.options.types if kind in SMALL]
        with_embeddings = {f"{kind}, embeddings {embeddings}": ["--token-embedding-type", embeddings, kind] for kind in small}
        return {kind: [kind] for kind in ["F32", *self.options.types]} | with_embeddings

    def row(self, label: str, arguments: list[object], seen: dict[str, str]) -> dict:
        """Quantizes and measures; `seen` has what was stored by earlier labels."""
        model, file = self.model, label.replace(", ", "-").replace(" ", "-") + ".gguf"
        row = {"model": model.name, "program": "llama.cpp", "type": label}
        try:
            log = self.llama("quantize", "--imatrix", "imatrix.gguf", *arguments[:-1], "dense.gguf", file, arguments[-1], 2)
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if "fail" in line or "no tensor type fallback" in line]
            return row | {"fallback": f"refused: {lines[0] if lines else str(error)[-200:]}"}
        tensors = gguf.GGUFReader(self.work / file).tensors
        body = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
        stored = [f"{count} {kind}" for kind, count in collections.Counter(t.tensor_type.name for t in body).most_common()]
        stored += [f"{t.name.split('.')[0]} {t.tensor_type.name}" for t in tensors if t.name in MATRICES_OUTSIDE]
        fallbacks = collections.Counter(re.findall(r"required for type\s+(\w+)\).*falling back to\s+(\w+)", log))
        row["stored_as"] = ", ".join(stored)
        row["fallback"] = ", ".join(f"{count} of {kind} to {other}" for (kind, other), count in fallbacks.items())
        if sum(fallbacks.values()) >= len(body):
            return row | {"fallback": f"not measured, no layer is {arguments[-1]}: {row['fallback']}"}
        if seen.setdefault(row["stored_as"], label) != label:
            return row | {"fallback": f"not measured, the same as {seen[row['stored_as']]}"}
        row["file_bytes"], row["tensor_bytes"] = (self.work / file).stat().st_size, sum(int(t.n_bytes) for t in tensors)
        row["true_bits"], row["tensor_bits"] = (8 * row[key] / model.parameters for key in ("file_bytes", "tensor_bytes"))
        row["body_bits"] = 8 * sum(int(t.n_bytes) for t in body) / sum(int(t.n_elements) for t in body)
        return row | self.quality(label, file)

    def quality(self, label: str, file: str) -> dict:
        self.llama("quantize", "--allow-requantize", file, "dequantized.gguf", "F32", 2)
        folder = self.work / "dequantized"
        self.model.write_folder(self.work / "dequantized.gguf", folder)
        text = ["--text", self.text, *self.protocol, "--reference", self.model.path]
        printed = run(self.options.stb_run, "perplexity", folder, *text, "--json", "-t", 2)
        found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
        assert found["tokens"] == self.tokens, "both programs have to see the same tokens"
        result = {"perplexity": found["perplexity"], "perplexity_se": found["perplexity_standard_error"]}
        for key in ("kl", "top1"):
            result |= {key: found["reference"][key], f"{key}_se": found["reference"][f"{key}_standard_error"]}
        if label in CHECKED:
            own = self.llama("perplexity", "-m", file, "-f", "eval.txt", *self.exactly)
            result["perplexity_by_llama_cpp"] = float(re.search(r"Final estimate: PPL = ([\d.]+)", own)[1])
        return result

    def rows(self) -> list[dict]:
        rows, seen = [], {}
        for label, arguments in self.variants().items():
            cell = self.work / f"{label}.json"
            row = json.loads(cell.read_text()) if cell.exists() else self.row(label, arguments, seen)
            if "perplexity" in row:
                seen.setdefault(row["stored_as"], label)
            cell.write_text(json.dumps(row))
            print(json.dumps(row), flush=True)
            rows.append(row)
        return rows


def our_rows(options: argparse.Namespace, models: list[Model]) -> list[dict]:
    """Our recipes by `stb-convert study`, for the models asked for."""
    blocks = re.split(r"\n(?=\[\[)", STUDY.read_text())
    wanted = tuple(f'[[model]]\nname = "{model.name}"' for model in models)
    blocks = [block for block in blocks if block.startswith(wanted) or not block.startswith("[[model]]")]
    (options.out / "ours.toml").write_text("\n".join(blocks))
    paths = [argument for model in models for argument in ("--model", f"{model.name}={model.path}")]
    places = [options.out / "ours.toml", options.out / "ours", "--define", f"data={options.data}"]
    try:
        run(options.stb_convert, "study", *places, *paths)
    except RuntimeError as error:
        # Sizes that a model cannot have are rows without figures.
        if "not all cells could be measured" not in str(error):
            raise
    with open(next((options.out / "ours").glob("*.csv"))) as file:
        found = list(csv.DictReader(file))
    other = {"recipe": "type", "error": "fallback"}
    found = [{other.get(key, key): value for key, value in row.items()} | {"program": "stb"} for row in found]
    return [{key: value for key, value in row.items() if key in COLUMNS} for row in found]


def write_tables(out: pathlib.Path, rows: list[dict]) -> None:
    with open(out / "peers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)

    def cell(row: dict, column: str) -> str:
        value, error = row.get(column, ""), row.get(f"{column}_se", "")
        if column not in DIGITS or value == "":
            return value
        digits = DIGITS[column]
        return f"{float(value):.{digits}f}" + (f" ± {float(error):.{digits}f}" if error != "" else "")

    columns = [column for column in COLUMNS if not column.endswith("_se")]
    lines = [columns, ["---"] * len(columns), *([cell(row, column) for column in columns] for row in rows)]
    (out / "peers.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    quality_chart.write(out / "peers.svg", rows)


def main() -> None:
    def path(text: str) -> pathlib.Path:
        return pathlib.Path(text).resolve()

    def words(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=path, required=True, help="folder with models and texts")
    parser.add_argument("--out", type=path, required=True, help="folder for results")
    parser.add_argument("--llama-cpp", type=path, required=True, help="folder to build llama.cpp in, unless it is there")
    parser.add_argument("--stb-run", type=path, default=ROOT / "target/release/stb-run")
    parser.add_argument("--stb-convert", type=path, help="measure our recipes too")
    parser.add_argument("--models", type=words, help="names in the study; default: all")
    parser.add_argument("--types", type=words, default=TYPES, help="types of llama.cpp")
    options = parser.parse_args()
    global gguf  # that of these sources: the one on PyPI lags behind in types
    sys.path.insert(0, str(build_llama_cpp(options.llama_cpp) / "gguf-py"))
    import gguf

    study = tomllib.loads(STUDY.read_text())
    models = []
    for entry in study["model"]:
        if not options.models or entry["name"] in options.models:
            folder = STUDY.parent / entry["path"].format(data=options.data)
            models.append(Model(entry["name"], folder.resolve(), entry["context"]))
    rows = []
    for model in models:
        rows += Peers(options, study, model).rows()
        write_tables(options.out, rows)
    if options.stb_convert:
        rows += our_rows(options, models)
        write_tables(options.out, rows)
    print((options.out / "peers.md").read_text())


if __name__ == "__main__":
    main()
