"""The documentation: what is generated is fresh, and what is linked is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from test_packaging import EDGES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_generated_pages_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [str(path.relative_to(ROOT)) for path, text in generate.pages().items() if path.read_text() != text]
    assert not stale, "run `python docs/generate.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:reparamc|passes|tests|docs|benchmarks|examples|fastvit_zoo)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"`(reparamc(?:\.[a-z_]+)+)`", text):
        base = ROOT.joinpath(*module.split("."))
        assert base.with_suffix(".py").exists() or base.is_dir() or _is_name(module), module


def _is_name(dotted: str) -> bool:
    """Whether ``dotted`` is a public name of a module, such as reparamc.fuse_fx."""
    home, _, name = dotted.rpartition(".")
    return hasattr(importlib.import_module(home), name)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_nothing_speaks_of_the_workplace() -> None:
    words = re.compile(r"/work/|issue [0-9]+")
    assert not [page.name for page in PAGES if words.search(page.read_text())]


def test_the_table_of_folders_is_the_one_that_is_enforced() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", text, re.MULTILINE)
    assert {name: set(re.findall(r"\w+", allowed)) for name, allowed in rows} == EDGES
