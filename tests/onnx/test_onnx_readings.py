"""Readers are held to the framework's own operators: a misread attribute is wrong before and after a rewrite alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expression_models import operators, run
from onnx import ModelProto, NodeProto
from onnx_models import PAD, N, assert_equal_outputs, batchnorm, model, node, rand

from reparamc import fuse_onnx
from reparamc.algebra.expr import BatchNorm, Conv, Expr
from reparamc.certificate.proof import Certificate
from reparamc.compiler.readings import Reading
from reparamc.onnx import operators as onnx_readers
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.graph import OnnxGraph
from reparamc.onnx.reference import in_float64


def two_blocks(**attributes: Any) -> ModelProto:
    """Conv and BatchNorm, a ReLU, and linear layers after the mean, which a misread convolution does not touch."""
    nodes = [
        node("Conv", "x w", "c", name="conv", **{**PAD, **attributes}), batchnorm("c", "n", "b", name="norm"),
        node("Relu", "b", "r"), node("MatMul", "r k", "m", name="inner"), node("Add", "m s", "y", name="outer"),
    ]  # fmt: skip
    return model(nodes, {"w": rand(6, 6, 3, 3), "k": rand(8, 5), "s": rand(5), **N}, (1, 6, 8, 8))


def misread(op: str, change: Callable[[Expr], Expr], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reader of ``op`` build something else."""
    reader = onnx_readers.READERS[op]

    def wrong(graph: OnnxGraph, n: NodeProto, output: str) -> Any:
        reading = reader(graph, n, output)
        if not isinstance(reading, Reading):
            return reading
        return Reading(change(reading.template))

    monkeypatch.setitem(onnx_readers.READERS, op, wrong)


def other_eps(e: Expr) -> Expr:
    assert isinstance(e, BatchNorm)
    return replace(e, eps=1e-6)


def other_pads(e: Expr) -> Expr:
    assert isinstance(e, Conv)
    return replace(e, offset=(0, 0), delta=(0, 0))


def other_dilation(e: Expr) -> Expr:
    assert isinstance(e, Conv)
    return replace(e, dilation=(1, 1), delta=(0, 0))


MISREAD: dict[str, tuple[str, Callable[[Expr], Expr], dict[str, Any]]] = {
    "eps": ("BatchNormalization", other_eps, {}),
    "pads": ("Conv", other_pads, {}),
    "dilations": ("Conv", other_dilation, {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
}


@pytest.mark.parametrize("attribute", MISREAD)
def test_a_misread_attribute_is_caught_and_the_rest_is_still_rewritten(
    attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, change, attributes = MISREAD[attribute]
    misread(op, change, monkeypatch)
    made = two_blocks(**attributes)
    fused, report = fuse_model(made)
    (failed,) = report.failed
    assert (failed.where, failed.check) == ("norm", "reading")
    assert operators(fused)["BatchNormalization"] == 1
    assert [r.where for r in report.rewrites] == ["outer"] or not report.rewrites
    assert_equal_outputs(made, fused)
    with pytest.warns(RuntimeWarning, match=r"region 'norm' failed verification.*framework's own operators"):
        fuse_onnx(made)


def test_a_misread_attribute_shows_in_no_other_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the checks on samples it is the host alone that sees it."""
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    misread("BatchNormalization", other_eps, monkeypatch)
    monkeypatch.setattr(OnnxGraph, "run", None)  # not to be called: the framework cannot be asked
    fused, report = fuse_model(two_blocks(), verify="region")
    assert not report.failed
    assert operators(fused)["BatchNormalization"] == 0
    assert report.host is not None
    assert report.host.unable[0].where == "norm"
    assert "could not be run" in report.table()


def test_one_region_speaks_for_its_kind_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = OnnxGraph.run

    def counted(self: OnnxGraph, value: Any, *rest: Any) -> Any:
        asked.append(str(value))
        return ask(self, value, *rest)

    monkeypatch.setattr(OnnxGraph, "run", counted)
    nodes: list[NodeProto] = []
    weights: dict[str, np.ndarray] = {}
    x = "x"
    for i, eps in enumerate((1e-5, 1e-5, 1e-3)):
        nodes += [node("Conv", f"{x} w{i}", f"c{i}", **PAD), batchnorm(f"c{i}", "n", f"b{i}", epsilon=eps)]
        nodes += [node("Relu", f"b{i}", f"r{i}")]
        weights[f"w{i}"], x = rand(6, 6, 3, 3, seed=i), f"r{i}"
    made = model(nodes, {**weights, **N}, outputs="r2")
    _, report = fuse_model(made, verify="region")
    assert len(report.rewrites) == 3
    assert report.host is not None
    assert (report.host.kinds, report.host.unable) == (2, [])
    assert set(asked) == {"c0", "b0", "c2", "b2"}


def test_equal_readings_of_operators_that_differ_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    def same_padding(e: Expr) -> Expr:
        assert isinstance(e, Conv)
        return replace(e, offset=(-1, -1), delta=(0, 0))

    nodes = [
        node("Conv", "x w", "a", **PAD),
        node("Conv", "x w", "b", pads=[2, 2, 0, 0]),
        node("Relu", "a", "r"),
        node("Relu", "b", "s"),
        node("Sub", "r s", "y"),
    ]
    made = model(nodes, {"w": rand(6, 6, 3, 3)}, outputs="y")
    misread("Conv", same_padding, monkeypatch)
    fused, report = fuse_model(made, passes=["duplicate-removal"], verify="region")
    assert operators(fused)["Conv"] == 2
    assert [f.check for f in report.failed] == ["reading"]


OPERATORS: dict[str, tuple[NodeProto, dict[str, np.ndarray], int]] = {
    "batchnorm 9": (batchnorm("x", "n", "y"), N, 9),
    "batchnorm 13": (batchnorm("x", "n", "y", epsilon=0.1), N, 13),
    "batchnorm 17": (batchnorm("x", "n", "y", epsilon=0.1), N, 17),
    "conv": (node("Conv", "x w b", "y", group=3, **PAD), {"w": rand(9, 2, 3, 3), "b": rand(9)}, 17),
    "transposed": (node("ConvTranspose", "x w b", "y", strides=[2, 2]), {"w": rand(6, 4, 3, 3), "b": rand(4)}, 17),
    "transposed by groups": (
        node("ConvTranspose", "x w b", "y", group=3, strides=[2, 2], output_padding=[1, 0], **PAD),
        {"w": rand(6, 4, 3, 3), "b": rand(12)},
        17,
    ),
    "transposed depthwise": (node("ConvTranspose", "x w", "y", group=6, **PAD), {"w": rand(6, 1, 3, 3)}, 17),
    "resize": (node("Resize", "x - by", "y", mode="linear"), {"by": np.array([1, 1, 2, 3], np.float32)}, 18),
    "resize, cubic": (
        node("Resize", "x - by", "y", mode="cubic", cubic_coeff_a=-0.5, coordinate_transformation_mode="align_corners"),
        {"by": np.array([1, 1, 2, 0.5], np.float32)},
        13,
    ),
    "resize, nearest": (node("Resize", "x - by", "y"), {"by": np.array([1, 1, 2, 0.5], np.float32)}, 13),
    "upsample": (node("Upsample", "x by", "y"), {"by": np.array([1, 1, 3, 2], np.float32)}, 9),
    "average": (node("AveragePool", "x", "y", kernel_shape=[3, 2], count_include_pad=1, **PAD), {}, 17),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_the_reference_operators_are_those_of_the_runtime(case: str) -> None:
    operator, parameters, opset = OPERATORS[case]
    made = model([operator], parameters, (2, 6, 7, 8), opset=opset)
    x = rand(2, 6, 7, 8)
    found = in_float64(made.graph.node[0], "y", parameters, opset, made.ir_version)({"x": x.astype(np.float64)})
    (expected,) = run(made, {"x": x})
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
