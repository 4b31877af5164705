"""Draws `docs/quality.svg`, the chart of the README, from the table of a record.

    python3 tests/bench/readme_chart.py

The record's own chart has six panels of ten families; this one has one panel (quill-4m, bits of the whole file) and the
families that the README speaks of. Left out are types of llama.cpp for models that were trained in them, and those rows whose
embeddings have another type.
"""

import pathlib

import quality_chart

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests/bench/record/2026-11-26-frontier.md"
MODEL = "quill-4m"
TRAINED = {"Q1_0", "Q2_0", "TQ1_0", "TQ2_0"}
# Names in the chart, by the family's name in quality_chart.
SHOWN = {
    "llama.cpp": "llama.cpp types",
    "--bits, distilled": "--bits X --distill 4",
    "--bits": "--bits X",
    "nm": "nm-1of8, 1of4, 2of8, 2of4",
    "int, sign": "sign, int2, int3, int4",
    "stbllm": "stbllm-4of8, 5of8, 6of8",
}


def table(text: str, model: str) -> list[dict]:
    """The rows of `model`, with numbers as text and without their standard errors."""
    lines = text.split(f"### {model}\n", 1)[1].split("\n###", 1)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names = [name.replace(" ", "_") for name in rows[0]]
    return [dict(zip(names, (cell.split(" ±")[0] for cell in row))) for row in rows[2:]]


def draw(rows: list[dict]) -> str:
    """The chart as SVG."""
    quality_chart.RANGE = {"true_bits": (1.0, 5.5)}
    quality_chart.FAMILIES = [family for family in quality_chart.FAMILIES if family[0] in SHOWN]
    belongs = [family[2] for family in quality_chart.FAMILIES]
    rows = [row for row in rows if any(test(row) for test in belongs)]
    rows = [row for row in rows if row["type"] not in TRAINED and "embeddings" not in row["type"]]
    names = [SHOWN[family[0]] for family in quality_chart.FAMILIES]
    return quality_chart.single(f"{MODEL}: KL divergence from the checkpoint (nats per token), lower is better", rows, names)


def main() -> None:
    text = RECORD.read_text(encoding="utf-8")
    (ROOT / "docs/quality.svg").write_text(draw(table(text, MODEL)), encoding="utf-8")


if __name__ == "__main__":
    main()
