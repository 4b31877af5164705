"""Quality against size as a chart: one row of panels per model, by bits of the whole file and of the decoder's matrices."""

import math
import pathlib
import re
from collections.abc import Callable
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP, FOOT = 470, 340, 64, 46, 76, 84
RANGE = {"true_bits": (0.5, 4.5), "body_bits": (0.5, 4.5)}
AXES = {"true_bits": "bits per parameter, whole file", "body_bits": "bits per weight of the decoder's matrices"}
# Name, color, which rows, whether they are joined.
FAMILIES: list[tuple[str, str, Callable[[dict], bool], bool]] = [
    ("llama.cpp", "#c0392b", lambda row: row["program"] == "llama.cpp", False),
    ("--bits, distilled", "#6c3483", lambda row: re.match("bits-.*(fine-tuned|distilled)", row["type"]) is not None, True),
    ("--bits", "#1f4e9c", lambda row: row["type"].startswith("bits-") and "," not in row["type"], True),
    ("nm, distilled", "#d16ba5", lambda row: re.match("nm-.*(fine-tuned|distilled)", row["type"]) is not None, True),
    ("nm", "#2e86de", lambda row: row["type"].startswith("nm-") and "," not in row["type"], True),
    ("int, sign", "#10898d", lambda row: re.match(r"int\d|sign", row["type"]) is not None, True),
    ("stbllm", "#e08e0b", lambda row: row["type"].startswith("stbllm-"), True),
    ("GPTQ", "#7f8c8d", lambda row: row["type"].startswith("gptq-"), True),
    ("RTN", "#b2babb", lambda row: row["type"].startswith("rtn-"), True),
    ("BiLLM without means", "#8e44ad", lambda row: row["type"].startswith("BiLLM"), False),
]


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


class Panel:
    """One chart: KL divergence, on a logarithmic axis, against a size."""

    def __init__(self, x: float, y: float, size: str, rows: list[dict]) -> None:
        self.x, self.y, self.size = x, y, size
        first, last = RANGE[size]
        usable = [row for row in rows if row.get(size) not in ("", None) and row.get("kl") not in ("", None)]
        self.rows = [row for row in usable if first <= float(row[size]) <= last and float(row["kl"]) > 0]
        values = [float(row["kl"]) for row in self.rows] or [0.1, 1.0]
        self.low, self.high = min(values) / 1.2, max(values) * 1.2

    def across(self, bits: float) -> float:
        first, last = RANGE[self.size]
        return self.x + (bits - first) / (last - first) * WIDTH

    def up(self, kl: float) -> float:
        share = (math.log(kl) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return self.y + HEIGHT * (1 - share)

    def draw(self, title: str) -> list[str]:
        out = [f'<text x="{self.x}" y="{self.y - 10}" class="title">{escape(title)}</text>']
        for kl in ticks(self.low, self.high):
            y = self.up(kl)
            out.append(f'<line x1="{self.x}" x2="{self.x + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            out.append(f'<text x="{self.x - 6}" y="{y + 4:.1f}" class="end">{kl:g}</text>')
        first, last = RANGE[self.size]
        for half in range(math.ceil(2 * first), math.floor(2 * last) + 1):
            x = self.across(half / 2)
            out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{self.y}" y2="{self.y + HEIGHT}" class="grid"/>')
            out.append(f'<text x="{x:.1f}" y="{self.y + HEIGHT + 16}" class="middle">{half / 2:g}</text>')
        axis = f'<text x="{self.x + WIDTH / 2}" y="{self.y + HEIGHT + 34}" class="middle">{AXES[self.size]}</text>'
        out.append(axis)
        for name, color, belongs, joined in FAMILIES:
            rows = sorted((row for row in self.rows if belongs(row)), key=lambda row: float(row[self.size]))
            points = [(self.across(float(row[self.size])), self.up(float(row["kl"]))) for row in rows]
            if joined and len(points) > 1:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                out.append(f'<polyline points="{path}" stroke="{color}"/>')
            for (x, y), row in zip(points, rows):
                label = escape(row["type"])
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"><title>{label}</title></circle>')
                if name == "llama.cpp" and "," not in label:
                    at, side = (x + 5, "") if x < self.x + WIDTH - 60 else (x - 5, " end")
                    out.append(f'<text x="{at:.1f}" y="{y - 4:.1f}" class="small{side}" fill="{color}">{label}</text>')
        return out


def single(title: str, rows: list[dict], names: list[str]) -> str:
    """One panel as SVG: bits of the whole file, with `names` of the families in the legend."""
    global WIDTH, HEIGHT
    WIDTH, HEIGHT = 690, 360
    width, height = 770, 510
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="13">',
        "<style>.title{font-size:15px;font-weight:bold}.end{text-anchor:end}.middle{text-anchor:middle}.small{font-size:11px}"
        ".grid{stroke:#ddd}polyline{fill:none;stroke-width:2}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *Panel(56, 44, "true_bits", rows).draw(title),
    ]
    for i, (name, (_, color, _, _)) in enumerate(zip(names, FAMILIES)):
        x, y = 64 + i % 3 * 240, height - 44 + i // 3 * 24
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{color}"/><text x="{x + 12}" y="{y}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>\n"])


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """Draws `rows`, those of compare_quality.py."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    height = TOP + len(models) * (HEIGHT + GAP) + FOOT
    width = 2 * (WIDTH + LEFT) + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        "<style>.title{font-size:14px;font-weight:bold}.end{text-anchor:end}.middle{text-anchor:middle}.small{font-size:10px}"
        ".grid{stroke:#ddd}polyline{fill:none;stroke-width:1.5}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        for j, size in enumerate(RANGE):
            panel = Panel(LEFT + j * (WIDTH + LEFT), TOP + i * (HEIGHT + GAP), size, mine)
            out += panel.draw(f"{model}: KL from the dense model, nats per token")
    for i, (name, color, _, _) in enumerate(FAMILIES):
        x, y = LEFT + i % 4 * 250, height - FOOT + 24 + i // 4 * 20
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{color}"/><text x="{x + 10}" y="{y}">{escape(name)}</text>')
    path.write_text("\n".join([*out, "</svg>\n"]))
