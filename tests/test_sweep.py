"""The judgements of benchmarks/sweep.py: it must be able to find a wrong result, a slow one and a death."""

import argparse
import importlib
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sweep")


def test_error_is_relative_and_sees_shapes_and_nan(sweep: ModuleType) -> None:
    a = [np.array([1.0, -4.0])]
    assert sweep.error(a, a) == 0
    assert sweep.error([np.array([1.0, -3.0])], a) == 0.25
    assert sweep.error([np.array([1.0])], a) == np.inf
    assert sweep.error([np.array([1.0, np.nan])], a) == np.inf
    assert sweep.error([], a) == np.inf


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"error_before": 1e-6, "error_after": 2e-6}, False),
        ({"error_before": 1e-6, "error_after": 1e-3}, True),
        ({"error_before": 1e-2, "error_after": 1e-2, "error_float64": 1e-12}, False),
        ({"error_before": 1e-2, "error_after": 1e-2, "error_float64": 1e-6}, True),
        ({"error_before": 1e-6, "error_after": float("nan")}, True),
    ],
)
def test_inexact(sweep: ModuleType, found: dict[str, float], wrong: bool) -> None:
    assert bool(sweep.inexact([{"model": "m", "fx": found}])) is wrong


def test_slower_needs_the_whole_interval(sweep: ModuleType) -> None:
    noise = np.random.default_rng(0).normal(1, 0.05, 31)
    for factor, expected in ((1.0, []), (1.2, ["m"])):
        ratio, low, high = sweep.median_interval(factor * noise)
        assert low < ratio < high
        timed = {"before": 1.0, "after": factor, "ratio": ratio, "low": low, "high": high}
        assert [text.split(":")[0] for text in sweep.slower([{"model": "m", "latency": timed}])] == expected


def test_worse_than_its_own_method(sweep: ModuleType) -> None:
    own = {"conv": 5, "bn": 0, "linear": 1}
    for ours, expected in (({**own, "conv": 4}, 0), (own, 0), ({**own, "bn": 1}, 1)):
        assert len(sweep.worse([{"model": "m", "onnx": {"after": ours}, "own": {"onnx": own}}])) == expected


def test_reasons_without_names_and_numbers(sweep: ModuleType) -> None:
    assert sweep.generic("'a.b' has 3 of 1.5e-05") == sweep.generic("'c' has 14 of 2") == "NAME has N of N"


def test_a_death_and_a_hang_are_records(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(name: str, options: argparse.Namespace) -> dict[str, object]:
        if name == "dies":
            os._exit(7)
        if name == "hangs":
            import time

            time.sleep(60)
        if name == "raises":
            raise ValueError("no")
        return {"model": name, "seconds": 1}

    monkeypatch.setattr(sweep, "examine", examine)
    found: list[dict[str, object]] = []
    sweep.sweep(["dies", "hangs", "raises", "works"], argparse.Namespace(jobs=2, timeout=2), found.append)
    records = {str(r["model"]): r for r in found}
    assert records["dies"]["died"] == "exit status 7"
    assert "no result" in str(records["hangs"]["died"])
    assert "ValueError" in str(records["raises"]["sweep"])
    assert records["works"] == {"model": "works", "seconds": 1}


def test_table_names_each_model_once(sweep: ModuleType) -> None:
    names = sweep.table()
    assert len(names) == len(set(names)) >= 150
