"""What a proof may cost: structures that grow exponentially when they are multiplied out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from onnx import ModelProto, NodeProto
from onnx_models import model, node

from reparamc.certificate.axes import Dim
from reparamc.certificate.budget import ELEMENTS, Exceeded, Meter
from reparamc.certificate.kernels import mixed
from reparamc.certificate.normal_form import leaf
from reparamc.certificate.normal_form import stacked as side_by_side
from reparamc.certificate.onnx import certify_onnx

Step = Callable[[str, str, str], list[NodeProto]]


def doubled(a: str, b: str, prefix: str) -> list[NodeProto]:
    return [node("Add", f"{a} {a}", b)]


def stacked(a: str, b: str, prefix: str) -> list[NodeProto]:
    return [node("Concat", f"{a} {a}", b, axis=1)]


def two_kernels(a: str, b: str, prefix: str) -> list[NodeProto]:
    kernels = [node("Conv", f"{a} {w}", f"{prefix}{w}", pads=[1] * 4) for w in "wv"]
    return [*kernels, node("Add", f"{prefix}w {prefix}v", b)]


def gated(a: str, b: str, prefix: str) -> list[NodeProto]:
    return [node("Tanh", a, f"{prefix}t"), node("Exp", a, f"{prefix}e"), node("Mul", f"{prefix}t {prefix}e", b)]


def chain(step: Step, times: int, prefix: str) -> ModelProto:
    """``times`` steps; tensors in between are called by ``prefix``."""
    names = ["x", *(f"{prefix}{n}" for n in range(1, times)), "y"]
    nodes = [n for a, b in pairwise(names) for n in step(a, b, f"{prefix}{b}")]
    random = np.random.default_rng(0)
    weights = {w: random.standard_normal((2, 2, 3, 3)).astype(np.float32) / 8 for w in "wv"}
    used = {name: a for name, a in weights.items() if any(name in n.input for n in nodes)}
    return model(nodes, used, ("N", 2, "H", "W"))


@pytest.mark.parametrize("step", [doubled, two_kernels, gated])
def test_paths_that_double_are_proven_in_linear_time(step: Step) -> None:
    found = certify_onnx(chain(step, 20, "a"), chain(step, 20, "b"))
    assert found.holds
    assert found.equal == 1


def test_what_grows_exponentially_by_itself_is_undecided() -> None:
    found = certify_onnx(chain(stacked, 24, "a"), chain(stacked, 24, "b"))
    assert [(w.where, w.verdict) for w in found.windows] == [("y", "undecided")]
    assert "too" in found.windows[0].reason


def test_a_window_that_takes_too_much_leaves_enough_for_others() -> None:
    meter = Meter(100)
    meter.start()
    with pytest.raises(Exceeded, match="too long"):
        meter.spend(26)
    meter.start()
    meter.spend(20)
    with pytest.raises(Exceeded, match="too much memory"):
        meter.spend(0, ELEMENTS + 1)
    with pytest.raises(Exceeded):
        meter.spend(60)
    with pytest.raises(Exceeded, match="whole proof"):
        meter.start()


def test_a_matrix_of_parts_side_by_side_costs_what_its_columns_cost() -> None:
    meter, size, parts = Meter(1e9), 64, 16
    meter.start()
    inner = [mixed(leaf(f"x{n}", (Dim(1), Dim(8)), meter), np.full((size, 8), 0.5), 1) for n in range(parts)]
    whole = side_by_side(inner, 1)
    before = meter.left
    mixed(whole, np.ones((size, size * parts)), 1)
    assert before - meter.left < size * size * 8 * parts
