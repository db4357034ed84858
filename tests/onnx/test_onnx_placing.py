"""Where a matrix of channels goes among resizes, poolings and means; and which of these are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx_models import batchnorm, fuse, model, node, norm, rand, reasons

from reparamc.certificate.onnx import certify_onnx
from reparamc.report.data import Report

PARAMETERS = {
    "a": rand(24, 8, 3, 3), "b": rand(24, 8, 1, 1), "m": rand(20, 48, 1, 1), "k": rand(6, 24, 1, 1), **norm("n", 20),
    "ab": rand(24), "kb": rand(6), "g": rand(5, 6), "gb": rand(5),
    "by": np.array([1, 1, 4, 4], np.float32), "half": np.array([1, 1, 0.5, 0.5], np.float32),
    "third": np.array([1, 1, 1.5, 1.5], np.float32), "size": np.array([2, 24, 16, 12]),
    "channels": np.array([1, 2, 2, 2], np.float32),
}  # fmt: skip
SMALL = node("Conv", "x a ab", "s", strides=[4, 4], pads=[1, 1, 1, 1])
LARGE = node("Conv", "x b", "l")


def made(*nodes: NodeProto, shape: Any = (2, 8, 16, 12), **more: Any) -> ModelProto:
    used = {name for n in nodes for name in n.input}
    return model(nodes, {k: v for k, v in PARAMETERS.items() if k in used}, shape, **{"opset": 18, **more})


def order(original: ModelProto) -> tuple[list[str], Report]:
    """The operators of the result, in the order of execution; everything is proven."""
    fused, report = fuse(original)
    assert report.certificate is None or not report.certificate.undecided
    return [n.op_type for n in fused.graph.node if n.op_type != "Constant"], report


RESIZES = {
    "linear": {"mode": "linear"},
    "corners": {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    "asymmetric": {"mode": "linear", "coordinate_transformation_mode": "asymmetric"},
    "one": {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "rounded": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    "cubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
}


@pytest.mark.parametrize("kind", RESIZES)
@pytest.mark.parametrize("given", ["- by", "- - size"])
def test_a_matrix_after_a_resize(kind: str, given: str) -> None:
    resize = node("Resize", f"s {given}", "r", **RESIZES[kind])
    found, report = order(made(SMALL, node("Relu", "s", "t"), node("Resize", f"t {given}", "r", **RESIZES[kind]),
                               node("Conv", "r k kb", "y")))  # fmt: skip
    assert found == ["Conv", "Relu", "Conv", "Resize"]
    assert report.passes["placing"] == 1
    assert resize.op_type == "Resize"


@pytest.mark.parametrize("shape", [(2, 8, 16, 12), ("N", 8, "H", "W")])
def test_parts_side_by_side(shape: Any) -> None:
    """As in SegFormer; the convolution that is small takes in what is after the resize."""
    nodes = [
        node("AveragePool", "x", "p", kernel_shape=[4, 4], strides=[4, 4]), node("Conv", "p a ab", "s", pads=[1] * 4),
        node("Resize", "s - by", "r", mode="linear"), LARGE, node("Concat", "r l", "c", axis=1),
        node("Conv", "c m", "d"),
        batchnorm("d", "n", "y"),
    ]  # fmt: skip
    found, report = order(made(*nodes, shape=(*shape[:2], 16, 12)))
    assert found.count("BatchNormalization") == found.count("Concat") == 0
    assert sorted(found) == ["Add", "AveragePool", "Conv", "Conv", "Resize"]
    assert report.passes["placing"] >= 1


def test_a_convolution_before_the_mean_and_a_matrix_after_it() -> None:
    nodes = [node("Conv", "x b ab", "l"), node("Conv", "l k kb", "v"), node("GlobalAveragePool", "v", "p"),
             node("Flatten", "p", "f"), node("Gemm", "f g gb", "y", transB=1)]  # fmt: skip
    found, _ = order(made(*nodes))
    assert [op for op in found if op in ("Conv", "Gemm")] == ["Conv"]
    assert found[0] == "GlobalAveragePool"


def test_the_transition_of_dense_net() -> None:
    nodes = [node("Relu", "x", "r"), node("Conv", "r h hb", "c"),
             node("AveragePool", "c", "y", kernel_shape=[2, 2], strides=[2, 2])]  # fmt: skip
    weights = {"h": rand(64, 128, 1, 1), "hb": rand(64)}
    found, _ = order(model(nodes, weights, (1, 128, 14, 14), opset=18))
    assert found == ["Relu", "AveragePool", "Conv"]


LEFT: dict[str, tuple[NodeProto, str]] = {
    "antialias": (node("Resize", "t - half", "r", mode="linear", antialias=1), "antialias"),
    "exclude outside": (node("Resize", "t - by", "r", mode="cubic", exclude_outside=1), "exclude_outside"),
    "crop": (
        node("Resize", "t roi by", "r", mode="linear", coordinate_transformation_mode="tf_crop_and_resize"),
        "tf_crop_and_resize",
    ),
    "a factor that is no whole number": (node("Resize", "t - third", "r", mode="linear"), "no whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_it_stays(name: str) -> None:
    resize, why = LEFT[name]
    PARAMETERS["roi"] = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    found, report = order(made(SMALL, node("Relu", "s", "t"), resize, node("Conv", "r k kb", "y")))
    assert found == ["Conv", "Relu", "Resize", "Conv"]
    assert any(why in reason for reason in reasons(report))


def test_a_size_of_run_time_is_left() -> None:
    nodes = [SMALL, node("Relu", "s", "t"), node("Resize", "t - - z", "r", mode="linear"), node("Conv", "r k kb", "y")]
    made_ = made(*nodes, shape=("N", 8, "H", "W"))
    made_.graph.input.append(helper.make_tensor_value_info("z", 7, (4,)))
    from reparamc.onnx.fuse import fuse_model

    report = fuse_model(made_, verify="region")[1]
    assert report.passes["placing"] == 0
    assert any("run time" in reason for reason in reasons(report))


@pytest.mark.parametrize("kind", RESIZES)
def test_what_is_added_up_to_a_border_is_resized_as_well(kind: str) -> None:
    """A factor goes into a pooling that pads, over a convolution with a bias; another bias is no longer equal."""
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    nodes = [
        node("Conv", "x b ab", "l"), node("AveragePool", "l", "p", **window),
        node("Resize", "p - by", "r", **RESIZES[kind]), node("Mul", "r f", "s"), node("Relu", "s", "y"),
    ]  # fmt: skip
    original = model(
        nodes, {"b": PARAMETERS["b"], "ab": rand(24), "by": PARAMETERS["by"], "f": rand(24, 1, 1)}, ("N", 8, "H", "W")
    )
    fused, report = fuse(original)
    assert report.passes["scale-folding"] == 1
    assert report.certificate is not None
    assert (report.certificate.equal, report.certificate.undecided) == (1, ())
    (bias,) = (t for t in fused.graph.initializer if t.name == fused.graph.node[0].input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(1.01), bias.name))
    assert certify_onnx(original, fused).equal == 0
