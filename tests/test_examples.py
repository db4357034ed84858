"""Every example runs, from a folder that is not the project's."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SUITES = sorted(p for p in EXAMPLES.iterdir() if p.is_dir() and any(p.glob("test_*.py")))


PLUGIN_IS_INSTALLED = bool(importlib.metadata.entry_points(group="pytest11", name="reparamc"))
"""Not where the project was installed before it had a plugin, or is not installed at all."""


def run(folder: Path, *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_examples() -> None:
    assert SCRIPTS
    assert SUITES


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script(script: Path, tmp_path: Path) -> None:
    for package in ("torch", "sklearn"):
        if package in script.read_text():
            pytest.importorskip(package)
    assert run(tmp_path, "-W", "error::UserWarning:reparamc", script)


@pytest.mark.parametrize("suite", SUITES, ids=lambda p: p.name)
def test_suite(suite: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    plugin = [] if PLUGIN_IS_INSTALLED else ["-p", "reparamc.testing.pytest_plugin"]
    options = ["-q", *plugin, "-p", "no:cacheprovider", "--rootdir", suite, "-c", "/dev/null"]
    out = run(tmp_path, "-m", "pytest", *options, suite)
    assert " passed" in out.splitlines()[-1]


@pytest.mark.parametrize("suite", SUITES, ids=lambda p: p.name)
def test_training_script_of_a_suite(suite: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for script in suite.glob("train*.py"):
        assert "loss" in run(tmp_path, script)
