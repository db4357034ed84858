"""Graphs of all ranks, with bodies and functions: a few of those that `benchmarks/fuzz_graphs.py` draws."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from expression_models import run
from onnx_models import model, node, rand

from reparamc.onnx.fuse import fuse_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOUND = (68, 1091, 1442, 2530, 3261, 11091, 11408)
"""They ended in a traceback, a wrong result or a false alarm once."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    fuzz = importlib.import_module("fuzz_graphs")
    outcomes = {seed: fuzz.try_one(seed, ("off", "region")) for seed in (*range(30), *FOUND)}
    assert not {seed: found for seed, found in outcomes.items() if found[0] in fuzz.BAD}
    assert Counter(verdict for verdict, _ in outcomes.values())["fused"] > 5


@pytest.mark.parametrize("level", ["off", "region", "full"])
@pytest.mark.parametrize("sizes", [(4, 4), ("H", "W")])
def test_samples_of_a_batch_are_no_positions(sizes: tuple[int | str, int | str], level: str) -> None:
    """A slice along an open batch leaves a small one whole, which makes it no identity."""
    nodes = [node("Slice", "x a e zero", "s"), node("Conv", "s w", "y")]
    whole = {name: np.array([n]) for name, n in (("a", 0), ("e", 3), ("zero", 0))}
    fused, _ = fuse_model(model(nodes, {"w": rand(2, 2, 1, 1), **whole}, ("N", 2, *sizes)), verify=level)
    assert len(fused.graph.node) == 2
    assert run(fused, {"x": rand(5, 2, 4, 4)})[0].shape == (3, 2, 4, 4)
