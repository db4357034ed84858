"""Write the documentation of the passes from the passes: a page for each, and the table in README.md and rewrites.md.

python docs/generate.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "passes")]

from reparamc.algebra.expr import flatten  # noqa: E402
from reparamc.algebra.rewrite import Pass, simplify  # noqa: E402
from reparamc.algebra.text import parse  # noqa: E402
from reparamc_passes import PASSES  # noqa: E402

CASES = ROOT / "tests" / "algebra" / "cases"
MARKS = re.compile(r"(<!-- passes: .*? -->\n).*?(<!-- end of passes -->)", re.DOTALL)


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def pages() -> dict[Path, str]:
    """Every file that is generated, in whole or in part, and what it should hold."""
    found = {ROOT / "docs" / "passes" / f"{p.name}.md": page(p) for p in PASSES}
    for path, folder in ((ROOT / "README.md", "docs/passes"), (ROOT / "docs" / "rewrites.md", "passes")):
        rows = table(folder)
        found[path] = MARKS.sub(lambda m, rows=rows: f"{m[1]}{rows}{m[2]}", path.read_text())
    return found


def table(folder: str) -> str:
    rows = ["| pass | identity | exact when |", "|---|---|---|"]
    for p in PASSES:
        identity = "<br>".join(f"`{part}`" for part in re.split(r"[;,]  ", p.equation))
        rows.append(f"| [{p.name}]({folder}/{p.name}.md) | {identity} | {p.exact_when} |")
    return "\n".join(rows) + "\n"


def page(p: Pass) -> str:
    module = p.name.replace("-", "_")
    source = (ROOT / "passes" / "reparamc_passes" / f"{module}.py").read_text()
    text = source.split('"""')[1].strip()
    parts = [
        f"<!-- written by docs/generate.py from passes/reparamc_passes/{module}.py -->",
        f"# {p.name}",
        text,
        f"**Exact when:** {p.exact_when}.",
    ]
    cases = list(read_cases(p))
    reasons: dict[str, str] = {}
    for about, before, _ in cases:
        for refusal in simplify(flatten(parse(before)), (p,)).refusals:
            reasons.setdefault(re.sub(r"\d[\dx.]*", "N", refusal.reason), f"| {refusal.reason} | {about} |")
    if reasons:
        parts.append("\n".join(["| declined because | case |", "|---|---|", *reasons.values()]))
    examples = [case for case in cases if "# becomes" in case[2]]
    for about, before, after in sorted(examples, key=lambda case: len("".join(case[1:])))[:2]:
        parts += [f"Example: {about}", f"```text\n{before}\n{after}\n```"]
    if examples:
        parts.append(f"All cases: `tests/algebra/cases/{p.name}`.")
    return "\n\n".join(parts) + "\n"


def read_cases(p: Pass) -> Iterator[tuple[str, str, str]]:
    """Of each golden case what it is about, the expression, and the verdict."""
    for path in sorted((CASES / p.name).glob("*.txt")):
        text = path.read_text().strip()
        comments = re.findall(r"^# (?!becomes|unchanged|refused|sizes|algebra only)(.+)$", text, re.MULTILINE)
        cut = re.search(r"^# (becomes|unchanged|refused)", text, re.MULTILINE)
        at = cut.start() if cut else len(text)
        before = "\n".join(line for line in text[:at].splitlines() if not line.startswith("#"))
        yield " ".join(comments) or path.stem.replace("-", " "), before, text[at:]


if __name__ == "__main__":
    main()
