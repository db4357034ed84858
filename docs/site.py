"""Pages of the site that are files of the repository: README, CONTRIBUTING and CHANGELOG. A hook of mkdocs.yml."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", _link, (ROOT / source).read_text())
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links out of the folder of the pages become their text."""
    return re.sub(r"\[[^\]]+\]\(\.\./((?!passes/)[^)]+)\)", r"`\1`", markdown)


def _link(match: re.Match[str]) -> str:
    """A link as it is on the site; one to a file that is not on it becomes its text."""
    text, target = match[1], match[2]
    if target.startswith(("http", "#")):
        return match[0]
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    return f"[{text}]({PAGES[target]})" if target in PAGES else f"`{target}`"
