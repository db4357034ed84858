"""Every fault in the table changes what a model computes, and none gets through.

Also that each layer by itself sees the faults that it must see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import fault_models
import pytest
from fault_models import CONV_NORM, net
from faults import ALL, ONNX_READERS
from planting import (
    ENOUGH,
    FX_LAYERS,
    ONNX_LAYERS,
    Fault,
    Replace,
    Verdict,
    escapes,
    fault,
    given,
    judge,
    judge_onnx,
    planted,
    relative_error,
    result,
)

from reparamc.algebra.kernels import merge
from reparamc.certificate.proof import Certificate

nn: Any = fault_models.nn
WAYS = ("onnx", "fx") if nn is not None else ("onnx",)
PLANTED = [(f, way) for f in ALL for way in WAYS if f.text or getattr(f, way)]
EXPECTED = (
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:Using padding='same':UserWarning",
    "ignore:region .* failed verification:RuntimeWarning",
)
IDS = [f"{way}-{f.where}-{f.name}" for f, way in PLANTED]


@pytest.fixture(scope="module")
def verdict() -> Callable[[Fault, str], Verdict]:
    """Every fault is judged once."""
    known: dict[tuple[str, str, str], Verdict] = {}

    def ask(fault: Fault, way: str) -> Verdict:
        key = (fault.name, fault.where, way)
        if key not in known:
            known[key] = judge(fault, (way,)).verdicts[way]
        return known[key]

    return ask


@pytest.mark.filterwarnings(*EXPECTED)
@pytest.mark.parametrize(("fault", "way"), PLANTED, ids=IDS)
def test_no_fault_gets_through(fault: Fault, way: str, verdict: Callable[[Fault, str], Verdict]) -> None:
    found = verdict(fault, way)
    assert found.error >= fault.least, "it changes nothing, so it is no fault"
    assert found.outcome != "escaped"
    assert found.seen_by


@pytest.mark.filterwarnings(*EXPECTED)
@pytest.mark.parametrize(("fault", "way"), PLANTED, ids=IDS)
def test_no_fault_gets_through_at_any_level(fault: Fault, way: str) -> None:
    """Below the comparison of whole models, and without inputs for it, what is not proven is undone."""
    assert escapes(fault, way) == []


def test_the_table_is_large_and_names_are_unique() -> None:
    assert len(ALL) >= 100
    assert Counter((f.name, f.where, bool(f.fx)) for f in ALL).most_common(1)[0][1] == 1


@pytest.mark.filterwarnings(*EXPECTED)
@pytest.mark.parametrize("way", WAYS)
def test_every_layer_sees_what_it_is_for(way: str, verdict: Callable[[Fault, str], Verdict]) -> None:
    seen = {f.name: verdict(f, way).seen_by for f, w in PLANTED if w == way}
    times = Counter(layer for layers in seen.values() for layer in layers)
    assert set(times) >= set(ONNX_LAYERS if way == "onnx" else FX_LAYERS)
    assert "region" in seen["bias not scaled"]
    assert "region" not in seen["padding: end before begin" if way == "onnx" else "padding of the wrong axes"]
    assert "host" in seen["stride ignored" if way == "onnx" else "axes of a padding"]
    assert "host" in seen["bias not scaled"]
    assert times["region"] >= 35
    assert times["certificate"] >= (90 if way == "onnx" else 75)
    assert times["host"] >= 20
    assert times["end to end"] >= (80 if way == "onnx" else 70)


# The instrument itself


def test_a_fault_that_changes_nothing_is_told() -> None:
    harmless = fault("harmless", "reparamc.algebra.kernels:coefficients", given(lambda e: (e,)), text=CONV_NORM)
    found = judge(harmless, ("onnx",)).verdicts["onnx"]
    assert found.error < ENOUGH
    assert (found.seen_by, found.outcome) == ((), "kept")


def test_a_fault_that_nobody_sees_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparamc.onnx.end_to_end.verify_end_to_end", lambda original, result, regions: [])
    monkeypatch.setattr("reparamc.compiler.reference.Reference.compare", lambda *_: (None, None))
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    monkeypatch.setattr("planting.ONNX_LAYERS", {})
    reader = ONNX_READERS[0]
    assert reader.onnx is not None
    found = judge_onnx(reader, reader.onnx())
    assert (found.seen_by, found.outcome) == ((), "escaped")


def test_a_planted_fault_is_gone_afterwards() -> None:
    before = merge.__code__
    changes = (Replace("reparamc.algebra.kernels:merge", result(lambda conv: conv)),)
    with planted(changes):
        assert merge.__code__ is not before
    assert merge.__code__ is before
    with pytest.raises(ZeroDivisionError), planted(changes):
        raise ZeroDivisionError
    assert merge.__code__ is before


def counted(n: int) -> int:
    return n + counted(n - 1) if n else 0


class Base:
    def size(self) -> int:
        return 1


class Derived(Base):
    def size(self) -> int:
        return super().size() + 1

    @staticmethod
    def plain(n: int, *, more: int = 2) -> int:
        return n + more


def test_a_replacement_calls_the_original_and_is_seen_by_all_who_hold_the_function() -> None:
    held, here = counted, __name__
    with planted((Replace(f"{here}:counted", result(lambda n: 2 * n)),)):
        assert held(2) == 2 * (2 + 2 * (1 + 2 * 0))
    changes = (
        Replace(f"{here}:Derived.size", result(lambda n: n + 10)),
        Replace(f"{here}:Derived.plain", given(lambda n: (n + 1,))),
        Replace(f"{here}:Derived.plain", result(lambda n: 10 * n)),
    )
    with planted(changes):
        assert Derived().size() == 12
        assert (Derived.plain(1), Derived.plain(1, more=3)) == (40, 50)
    assert (held(2), Derived().size(), Derived.plain(1)) == (3, 2, 3)


def test_a_fault_in_what_is_no_longer_there_is_told() -> None:
    with pytest.raises(AttributeError, match="gone"), planted((Replace("reparamc.algebra.kernels:gone", result(id)),)):
        pass


def test_errors_are_relative_and_shapes_count() -> None:
    import numpy as np

    assert relative_error(np.array([2.0, 1.0]), np.array([2.0, 4.0])) == 0.75
    assert relative_error(np.zeros(3), np.zeros(4)) == float("inf")
    assert relative_error(np.array([np.nan]), np.array([1.0])) == float("inf")


@pytest.mark.skipif(nn is None, reason="PyTorch is not installed")
def test_models_have_norms_that_do_something() -> None:
    model: Any = net(lambda x, n: n(x), nn.BatchNorm2d(4))[0]
    assert model.part0.running_mean.abs().max() > 0.1
