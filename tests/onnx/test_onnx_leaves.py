"""Parameters are loaded when a rule asks for their values, once for each region, and released."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from onnx_models import N, batchnorm, model, node, rand

from reparamc.algebra.arrays import Parameter
from reparamc.compiler.plan import make_plan
from reparamc.onnx.graph import OnnxGraph
from reparamc.onnx.values import Constants
from reparamc_passes import PASSES

PAD = {"pads": [1] * 4}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each constant is decoded."""
    found: Counter[str] = Counter()
    decode = Constants.array

    def counting(self: Constants, name: str) -> np.ndarray:
        found[name] += 1
        return decode(self, name)

    monkeypatch.setattr(Constants, "array", counting)
    return found


def planned(nodes: list, parameters: dict) -> OnnxGraph:
    graph = OnnxGraph(model(nodes, parameters, ("N", 6, 8, 8)))
    plan = make_plan(graph, PASSES, verify=False)
    assert len(plan.splices) == len(parameters.keys() & N.keys()) // 4
    return graph


def test_weights_that_no_rule_touches_are_not_loaded(loads: Counter[str]) -> None:
    nodes = [node("Conv", "x w", "c", **PAD), node("Relu", "c", "r"), node("Conv", "r v", "y", **PAD)]
    planned(nodes, {"w": rand(6, 6, 3, 3), "v": rand(6, 6, 3, 3)})
    assert not loads


def test_what_is_folded_is_loaded_once_and_released(loads: Counter[str]) -> None:
    nodes = [node("Conv", "x w", "c", **PAD), batchnorm("c", "n", "b"), node("Relu", "b", "r")]
    graph = planned([*nodes, node("Conv", "r v", "y", **PAD)], {"w": rand(6, 6, 3, 3), "v": rand(6, 6, 3, 3), **N})
    assert loads == dict.fromkeys(["w", *N], 1)
    readings = [graph.read(value) for value in graph.values()]
    assert not [leaf.names for r in readings for leaf in getattr(r, "leaves", ()) if leaf.is_loaded]


def test_a_parameter_is_an_array() -> None:
    count = 0

    def load() -> np.ndarray:
        nonlocal count
        count += 1
        return np.arange(6.0).reshape(2, 3)

    leaf = Parameter(("w",), (2, 3), load)
    assert (leaf.ndim, leaf.shape, count) == (2, (2, 3), 0)
    for found in (leaf * 2, 2 * leaf, leaf + leaf, np.add(leaf, leaf)):
        np.testing.assert_array_equal(found, 2 * np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(np.asarray(leaf)[1], leaf[1])
    assert (leaf.T.shape, leaf.sum(), count) == ((3, 2), 15, 1)
    leaf.release()
    assert (np.array(leaf, copy=True).shape, count) == ((2, 3), 2)
    with pytest.raises(AttributeError):
        leaf.nothing  # noqa: B018
