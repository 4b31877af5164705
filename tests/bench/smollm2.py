"""Quality of a real model from 1 to 6 true bits: a table and a chart of everything that tells whether a file is still the model.

    python3 tests/bench/smollm2.py --model DIR --data ../shared/data --out OUT --build new=target/release [--build old=FOLDER]
        [--llama-quantize PROGRAM --gguf FILE [--imatrix FILE]] [--only REGEX]

DIR is a checkpoint in the Hugging Face layout (SmolLM2-135M-Instruct in the record). Each BUILD is a folder with `stb-convert` and
`stb-run`; every file is measured by the `stb-run` of the first. With `--llama-quantize`, types of llama.cpp are made from
`--gguf FILE` and measured by the same `stb-run`, which reads GGUF.

Per file: true bits of the whole file; KL divergence, same top token and perplexity on WikiText-2 (the first 120 000 characters,
windows of 512), on children's stories and on chats (`studies/chats.txt`, in the model's chat format); accuracy on PIQA and
ARC-easy (400 questions each); whether the greedy answer to "What is the capital of France?" names Paris; seconds to convert; and
the divergence that the converter itself found on calibration text it had held out, with its verdict.

OUT gets one JSON file per row, so that the same command goes on after an interruption, and `smollm2.md` and `smollm2.svg`.
"""

import argparse
import json
import pathlib
import re
import subprocess
import time

import quality_chart

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Name of the row: arguments of stb-convert. Sizes are measured, not taken from the names.
RECIPES = {
    "default": [],
    "int4": ["--recipe", "int4"],
    "int3": ["--recipe", "int3"],
    "int2": ["--recipe", "int2"],
    "nm-2of4": ["--recipe", "nm-2of4"],
    "stbllm-4of8": ["--recipe", "stbllm-4of8"],
    **{f"bits-{bits}": ["--bits", bits] for bits in ("5.45", "4.5", "3.75", "3", "2.5", "2", "1.5", "1.2")},
    "bits-2, distilled": ["--bits", "2", "--distill", "2"],
    # The calibration: text of the model itself, and other numbers of windows of 256 tokens than 128.
    "bits-3, self": ["--bits", "3", "--calib", "self"],
    **{f"bits-3, {n} windows": ["--bits", "3", "--calib-samples", n] for n in ("32", "512")},
}
LLAMA_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ1_S"]
TEXT_BYTES = {"wikitext": 120_000, "stories": 50_000, "chats": 50_000}
WINDOWS = {"wikitext": 57, "stories": 20, "chats": 20}
QUESTIONS = 400
TASKS = {"piqa": "piqa_val.jsonl", "arc_easy": "arc_easy_test.jsonl"}
PROMPT, ANSWER = "What is the capital of France?", "Paris"
CONVERT_HOURS = 4


def run(*command: object) -> str:
    """The standard output of a command; its standard error is part of the error."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", timeout=CONVERT_HOURS * 3600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
    return done.stdout


def texts(data: pathlib.Path, out: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files with the beginnings of the evaluation texts."""
    sources = {
        "wikitext": data / "text/wikitext-2/wiki.test.joined.txt",
        "stories": data / "text/tinystories/eval.txt",
        "chats": ROOT / "tests/bench/studies/chats.txt",
    }
    paths = {}
    for name, source in sources.items():
        paths[name] = out / f"{name}.txt"
        start = source.read_bytes()[: TEXT_BYTES[name]].decode(errors="ignore")
        paths[name].write_text(start.replace("<|endoftext|>", ""))
    return paths


class Study:
    """Measures files and keeps a JSON file per row."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: pathlib.Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.texts = texts(options.data, self.out)
        self.program = next(iter(options.builds.values())) / "stb-run"

    def measure(self, file: pathlib.Path) -> dict:
        """Everything that is measured of one file."""
        row: dict = {}
        for name, text in self.texts.items():
            report = json.loads(run(
                self.program, "perplexity", file, "--text", text, "--ctx", 512, "--windows", WINDOWS[name],
                "--reference", self.options.model, "--json"))  # fmt: skip
            row["true_bits"] = report["true_bits_per_parameter"]
            # The reference has a perplexity, too.
            row[name] = {**report["reference"], "perplexity": report["perplexity"], "windows": report["windows"]}
        row["tasks"] = {task: self.accuracy(file, questions) for task, questions in TASKS.items()}
        row["answer"] = run(self.program, file, "--prompt", PROMPT, "--temp", 0, "-n", 32).strip()
        return row

    def accuracy(self, file: pathlib.Path, questions: str) -> dict:
        """Accuracy on the first questions of a task."""
        path = self.options.data / "tasks" / questions
        return json.loads(run(self.program, "zero-shot", file, path, "--limit", QUESTIONS, "--json"))["tasks"][0]

    def row(self, program: str, name: str, make) -> None:
        """Measures a row unless its file exists; `make` returns the file to measure and the seconds that it took to make."""
        safe = re.sub(r"[^\w.]+", "-", f"{program}-{name}")
        path = self.out / f"{safe}.json"
        if path.exists() or not re.search(self.options.only, f"{program} {name}"):
            return
        file, made = make(self.out / safe)
        found = {"program": program, "type": name, **made, **self.measure(file)}
        path.write_text(json.dumps(found, indent=1) + "\n")
        if file.parent == self.out:
            file.unlink()
        print(f"{program} {name}: KL {found['wikitext']['kl']:.3f}", flush=True)

    def convert(self, build: pathlib.Path, arguments: list[str], stem: pathlib.Path) -> tuple[pathlib.Path, dict]:
        """Converts the checkpoint."""
        file, report, started = stem.with_name(stem.name + ".stb"), stem.with_name(stem.name + ".report"), time.monotonic()
        run(build / "stb-convert", self.options.model, file, *arguments, "--force", "--quiet", "--report", report)
        seconds, found = time.monotonic() - started, json.loads(report.read_text())
        report.unlink()
        return file, {"seconds": seconds, "stages": found["stages"], "check": found["quality"]}

    def quantize(self, kind: str, stem: pathlib.Path) -> tuple[pathlib.Path, dict]:
        """Makes a type of llama.cpp."""
        file, started = stem.with_name(stem.name + ".gguf"), time.monotonic()
        matrix = ["--imatrix", self.options.imatrix] if self.options.imatrix else []
        run(self.options.llama_quantize, "--allow-requantize", *matrix, self.options.gguf, file, kind)
        return file, {"seconds": time.monotonic() - started}

    def all(self) -> None:
        """Measures every row."""
        self.row("dense", "checkpoint", lambda _: (self.options.model / "model.safetensors", {"seconds": 0.0}))
        for program, build in self.options.builds.items():
            for name, arguments in RECIPES.items():
                self.row(program, name, lambda stem, b=build, a=arguments: self.convert(b, a, stem))
        if self.options.llama_quantize:
            for kind in LLAMA_TYPES:
                self.row("llama.cpp", kind, lambda stem, k=kind: self.quantize(k, stem))


def table(rows: list[dict]) -> str:
    """All rows as Markdown, by program and size."""
    head = ["program", "type", "true bits", "KL WikiText", "stories", "chats", "same top token", "perplexity", "PIQA",
            "ARC-easy", "Paris", "seconds", "check", "verdict"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in sorted(rows, key=lambda row: (row["program"], -row["true_bits"])):
        wiki, check = row["wikitext"], row.get("check", {})
        cells = [
            row["program"], row["type"], f"{row['true_bits']:.2f}", f"{wiki['kl']:.3f}", f"{row['stories']['kl']:.3f}",
            f"{row['chats']['kl']:.3f}", f"{100 * wiki['top1']:.1f} %", f"{wiki['perplexity']:.2f}",
            *(f"{100 * row['tasks'][task]['acc_norm']:.1f} %" for task in TASKS), "yes" if ANSWER in row["answer"] else "no",
            f"{row['seconds']:.0f}", f"{check['kl']:.3f}" if "kl" in check else "", check.get("verdict", ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def chart(rows: list[dict], builds: list[str]) -> str:
    """KL on WikiText against true bits as SVG."""
    colors = [("#1f4e9c", "#10898d"), ("#d16ba5", "#e08e0b"), ("#7f8c8d", "#b2babb")]

    def family(name: str, pattern: str):
        return lambda row: row["program"] == name and re.fullmatch(pattern, row["type"]) is not None

    families = [("llama.cpp", "#c0392b", family("llama.cpp", ".*"), False)]
    for name, (line, points) in zip(builds, colors):
        families.append((f"{name}: --bits", line, family(name, r"bits-[\d.]+"), True))
        families.append((f"{name}: recipes", points, family(name, r"(?!bits).*"), False))
    quality_chart.RANGE = {"true_bits": (1.0, 6.0)}
    quality_chart.FAMILIES = families
    drawn = [{**row, "kl": row["wikitext"]["kl"]} for row in rows if row["program"] != "dense"]
    title = "SmolLM2-135M-Instruct: KL divergence from the checkpoint on WikiText-2 (nats per token)"
    return quality_chart.single(title, drawn, [family[0] for family in families])


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--build", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--only", default="", help="measure only rows whose program and type match")
    parser.add_argument("--llama-quantize", type=pathlib.Path)
    parser.add_argument("--gguf", type=pathlib.Path, help="an f32 GGUF of the same model")
    parser.add_argument("--imatrix", type=pathlib.Path)
    options = parser.parse_args()
    options.builds = {name: pathlib.Path(folder) for name, folder in (text.split("=", 1) for text in options.build)}
    study = Study(options)
    study.all()
    rows = [json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]
    (options.out / "smollm2.md").write_text(table(rows))
    (options.out / "smollm2.svg").write_text(chart(rows, list(options.builds)))


if __name__ == "__main__":
    main()
