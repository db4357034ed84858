"""Files that nobody meant to write: a few of those that `benchmarks/fuzz_files.py` makes, from one seed."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from onnx import ModelProto

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOUND = (21903, 40325, 40619, 40632, 60819, 101815, 103259, 200539, 200948, 201887)
"""They ended in a traceback, a hang or a wrong result once."""


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fuzz_files")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutated_files_are_refused_in_one_line_or_fused(fuzz: ModuleType, tmp_path: Path) -> None:
    outcomes = {seed: fuzz.try_one(seed, tmp_path) for seed in (*range(80), *FOUND)}
    assert not {seed: found for seed, found in outcomes.items() if found[0] in fuzz.BAD}
    counts = Counter(verdict for verdict, _ in outcomes.values())
    assert min(counts["refused"], counts["fused"], counts["same"]) > 0


def test_the_models_are_valid_before(fuzz: ModuleType) -> None:
    for data in fuzz.ORIGINALS:
        fuzz.fuse_model(ModelProto.FromString(data), verify="off")


def test_a_traceback_and_a_wrong_result_are_noticed(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = [seed for seed in range(80) if fuzz.try_one(seed, tmp_path)[0] == "fused"][:3]
    real = fuzz.fuse_model

    def wrong(model: ModelProto, **options: object) -> object:
        result, report = real(model, **options)
        for tensor in result.graph.initializer:
            if tensor.name.endswith(".bias") and tensor.raw_data:
                tensor.raw_data = b"\x00\x00\x80\x42" * (len(tensor.raw_data) // 4)
        return result, report

    monkeypatch.setattr(fuzz, "fuse_model", wrong)
    assert "wrong" in {fuzz.try_one(seed, tmp_path)[0] for seed in seeds}
    monkeypatch.setattr(fuzz, "fuse_model", lambda *_, **__: 1 / 0)
    assert fuzz.try_one(seeds[0], tmp_path)[0] == "traceback"
