"""Checks that every measured figure in README is in a record.

    python3 tests/bench/check_claims.py

A block of README (a paragraph, a table, an item of a list with what belongs to it) may link to records. Each of its figures has to
be in one of them, or in a record of its section, or in any if the section links to none; a record may have more digits. Figures are numbers with a decimal
point, and whole numbers with a unit of measurement. What stands in backticks or in a link's target is no claim.
"""

import pathlib
import re
import sys
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORDS = ROOT / "tests/bench/record"
LINK = re.compile(r"\]\((tests/bench/record/[^)#]+)(?:#[^)]*)?\)")
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
UNIT = r"tokens/s|tokens per second|tokens a second|%|MB|GB|KB|times|nats|minutes|seconds|ms\b"
# Versions, and sizes of models.
NO_FIGURE = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|\(\d\.\d+ or newer\)|[\d.]+ (?:million|billion|M-)\s?parameters?")


def blocks(section: str) -> list[str]:
    """A section in parts that belong together: lines up to an empty one, and indented lines after an item of a list."""
    found: list[str] = []
    for part in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", section, flags=re.S)):
        first, *items = re.split(r"\n(?=- )", part)
        if first.startswith("  ") and found:
            found[-1] += "\n\n" + first
        else:
            found.append(first)
        found += items
    return found


def links(text: str) -> list[str]:
    """The names of the records that a text links to."""
    return [pathlib.Path(link).name for link in LINK.findall(text)]


def figures(block: str) -> set[str]:
    """The figures of a block as they are written, without separators of thousands."""
    plain = NO_FIGURE.sub(" ", block)
    found = {n for n in re.findall(rf"(?<![\w.,-])(?:{NUMBER})(?![\w]|\.\d)", plain) if "." in n}
    found |= set(re.findall(rf"(?<![\w.,-])({NUMBER})\s?(?:{UNIT})", plain))
    for line in plain.splitlines():
        # The cells of a table have their unit in its head.
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        found |= {cell for cell in cells if re.fullmatch(NUMBER, cell)}
    return {number.replace(",", "") for number in found}


def numbers(text: str) -> set[Decimal]:
    """All numbers of a record."""
    return {Decimal(number.replace(",", "")) for number in re.findall(NUMBER, text)}


def is_in(figure: str, known: set[Decimal]) -> bool:
    """Whether a number of a record, rounded to the digits of `figure`, is the same."""
    wanted = Decimal(figure)
    step = Decimal(1).scaleb(wanted.as_tuple().exponent)
    near = (number for number in known if abs(number - wanted) < step)
    return any(number.quantize(step, way) == wanted for number in near for way in (ROUND_HALF_UP, ROUND_HALF_EVEN))


def main() -> None:
    """Checks README; prints each figure without a source."""
    all_records = {path.name: numbers(path.read_text()) for path in sorted(RECORDS.glob("*.md"))}
    readme = (ROOT / "README.md").read_text()
    missing = [f"there is no record {name}" for name in links(readme) if name not in all_records]
    checked = 0
    for section in re.split(r"\n(?=## )", readme):
        for block in blocks(section):
            linked = [name for name in links(block) or links(section) if name in all_records]
            known = set().union(*(all_records[name] for name in linked or all_records))
            for figure in sorted(figures(block)):
                checked += 1
                if not is_in(figure, known):
                    start = " ".join(block.split())[:100]
                    missing.append(f"{figure} is not in {', '.join(linked) or 'any record'}: {start}…")
    if missing:
        sys.exit("README has figures without a record:\n" + "\n".join(missing))
    print(f"{checked} figures of README are in the records")


if __name__ == "__main__":
    main()
