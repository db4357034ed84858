"""Only what is faster is kept: the statistics on a clock that the tests turn, and what becomes of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from onnx_models import batchnorm, model, node, norm, operators

import reparamc
from reparamc.errors import InputError
from reparamc.onnx import latency as onnx_latency
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.latency import FEWEST, MOST, compare_latency, compare_runs
from reparamc.report.data import Latency, Report


class Clock:
    """Time that passes only in the runs, and the order in which they came."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.order.append(name)
            self.now += seconds()

        return run


def timed(original: Callable[[], float], result: Callable[[], float]) -> Latency:
    clock = Clock()
    return compare_runs(clock.run("original", original), clock.run("result", result), clock)


def test_exact_times() -> None:
    found = timed(lambda: 0.4, lambda: 0.3)
    assert (found.original, found.result) == pytest.approx((0.4, 0.3))
    assert (found.low, found.ratio, found.high) == pytest.approx((0.75, 0.75, 0.75))
    assert found.turns == FEWEST
    assert found.faster


@pytest.mark.parametrize(("ratio", "faster"), [(0.5, True), (0.9, True), (1.0, False), (1.1, False)])
@pytest.mark.parametrize("seed", range(5))
def test_noise(ratio: float, faster: bool, seed: int) -> None:
    """10 % of noise in each run; every seventh run meets something that takes ten times as long."""
    rng = np.random.default_rng(seed)

    def noisy(seconds: float) -> Callable[[], float]:
        return lambda: seconds * rng.normal(1, 0.1) * (10 if rng.random() < 1 / 7 else 1)

    found = timed(noisy(0.01), noisy(0.01 * ratio))
    assert found.turns == MOST
    assert found.ratio == pytest.approx(ratio, rel=0.08)
    assert found.faster == faster


def test_a_difference_within_noise_is_none() -> None:
    rng = np.random.default_rng(0)
    found = timed(lambda: 0.2 * rng.lognormal(0, 0.5), lambda: 0.199 * rng.lognormal(0, 0.5))
    assert found.low < 1 < found.high
    assert not found.faster


def test_drift_meets_both_alike() -> None:
    """A machine that slows down all the time: who runs first in a turn must not win by that."""
    state = {"slow": 0.2}

    def run() -> float:
        state["slow"] *= 1.02
        return state["slow"]

    assert not timed(run, run).faster
    assert timed(run, run).ratio == pytest.approx(1, abs=0.05)


def test_turns_alternate_and_the_first_do_not_count() -> None:
    clock, calls = Clock(), iter([9.0] * onnx_latency.WARM_UP + [1.0] * MOST)
    found = compare_runs(clock.run("o", lambda: next(calls)), clock.run("r", lambda: 1.0), clock)
    assert found.original == found.ratio == found.high == 1
    counted = clock.order[2 * onnx_latency.WARM_UP :]
    assert "".join(counted[:8]) == "orroorro"


@pytest.mark.parametrize("n", [FEWEST, 50, MOST])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    k = onnx_latency._rank(n)
    samples = np.sort(np.random.default_rng(0).exponential(1, (20_000, n)), axis=1)
    held = np.mean((samples[:, k] < np.log(2)) & (np.log(2) < samples[:, n - 1 - k]))
    assert 0.945 < held < 0.98


# Models


def conv_norm() -> ModelProto:
    weight = np.random.default_rng(0).standard_normal((6, 6, 3, 3)).astype(np.float32)
    nodes = [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), batchnorm("c", "n", "b"), node("Relu", "b", "y")]
    return model(nodes, {"w": weight, **norm("n", 6)}, ("N", 6, "H", "W"))


FASTER = Latency(original=0.04, result=0.03, ratio=0.75, low=0.7, high=0.8, turns=21)
NOISE = Latency(original=0.04, result=0.0396, ratio=0.99, low=0.95, high=1.01, turns=21)


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> Callable[[Latency], list[ModelProto]]:
    def set_(latency: Latency) -> list[ModelProto]:
        seen: list[ModelProto] = []

        def compare(original: ModelProto, result: ModelProto) -> Latency:
            seen.extend([original, result])
            return latency

        monkeypatch.setattr("reparamc.onnx.latency.compare_latency", compare)
        return seen

    return set_


Verdict = Callable[[Latency], list[ModelProto]]


def test_what_is_faster_is_returned(verdict: Verdict) -> None:
    seen, original = verdict(FASTER), conv_norm()
    result, report = fuse_model(original, only_if_faster=True)
    assert operators(result) == {"Conv": 1, "Relu": 1}
    assert seen[0] == original
    assert operators(seen[1]) == {"Conv": 1, "Relu": 1}
    assert report.latency == FASTER
    assert not report.original_kept
    assert "latency    40.00 ms before, 30.00 ms after, ratio 0.750 (0.700 to 0.800, 21 turns)" in report.table()
    assert "kept" not in report.table()


def test_what_is_not_faster_is_not(verdict: Verdict) -> None:
    verdict(NOISE)
    original = conv_norm()
    result, report = fuse_model(original, only_if_faster=True)
    assert result is not original
    assert result.SerializeToString() == original.SerializeToString()
    assert report.original_kept
    assert "ratio 0.990 (0.950 to 1.010, 21 turns)" in report.table()
    assert "kept       the original, unchanged" in report.table()
    data = json.loads(report.to_json())
    assert data["original_kept"] is True
    assert data["latency"] == {
        "original": 0.04, "result": 0.0396, "ratio": 0.99, "low": 0.95, "high": 1.01, "turns": 21,
    }  # fmt: skip


def test_nothing_is_timed_unasked_or_where_nothing_was_done(verdict: Verdict) -> None:
    seen = verdict(NOISE)
    _, report = fuse_model(conv_norm())
    assert report.latency is None
    assert json.loads(report.to_json())["original_kept"] is False
    _, report = fuse_model(conv_norm(), passes=[], only_if_faster=True)
    assert report.latency is None
    assert not seen


def with_a_tail(m: ModelProto) -> bytes:
    """``m`` in bytes that no serialiser writes: a field twice, the last counts."""
    return m.SerializeToString() + ModelProto(producer_version="2").SerializeToString()


def test_a_kept_file_keeps_its_bytes(verdict: Verdict, tmp_path: Path) -> None:
    verdict(NOISE)
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    twice = ModelProto(producer_version="1").SerializeToString() + with_a_tail(conv_norm())
    assert onnx.load_from_string(twice).SerializeToString() != twice
    source.write_bytes(twice)
    reports: list[Report] = []
    assert reparamc.fuse_onnx(source, output=target, only_if_faster=True, on_report=reports.append) == target
    assert reports[0].original_kept
    assert target.read_bytes() == twice


def test_a_kept_file_with_weights_beside_it_is_whole(verdict: Verdict, tmp_path: Path) -> None:
    verdict(NOISE)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source, target = tmp_path / "a" / "in.onnx", tmp_path / "b" / "out.onnx"
    onnx.save(conv_norm(), source, save_as_external_data=True, location="weights", size_threshold=0)
    reparamc.fuse_onnx(source, output=target, only_if_faster=True)
    loaded = onnx.load(target)
    for a, b in zip(conv_norm().graph.initializer, loaded.graph.initializer, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))
    assert operators(loaded)["BatchNormalization"] == 1


def test_really(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, on a model of unknown sizes; who wins is not for a test to say."""
    monkeypatch.setattr(onnx_latency, "BUDGET", 0.1)
    original = conv_norm()
    fused, _ = fuse_model(original)
    found = compare_latency(original, fused)
    assert FEWEST <= found.turns <= MOST
    assert 0 < found.low <= found.ratio <= found.high < 100


def test_a_model_that_does_not_run_on_random_inputs() -> None:
    scatter = model([node("Gather", "t x", "y")], {"t": np.ones(1, np.float32)}, (3,), dtype=onnx.TensorProto.INT64)
    scatter.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(InputError, match="so leave out --only-if-faster"):
        compare_latency(scatter, scatter)
