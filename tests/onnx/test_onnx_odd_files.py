"""Files that are odd but run, which are fused, and files that do not run, which are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from expression_models import operators, run
from onnx import ModelProto, TensorProto, helper
from onnx_models import CONV, W3, N, batchnorm, conv_bn, model, node, rand

from reparamc.errors import InputError
from reparamc.onnx.files import load
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs

Change = Callable[[ModelProto], None]


def backwards(made: ModelProto) -> None:
    nodes = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend(nodes[::-1])


def without_shape(made: ModelProto) -> None:
    made.graph.output[0].type.tensor_type.ClearField("shape")


def without_type(made: ModelProto) -> None:
    made.graph.output[0].ClearField("type")


def old(made: ModelProto) -> None:
    """Before IR version 4 every initializer should be listed as an input as well."""
    made.ir_version = 3


def twice(made: ModelProto) -> None:
    made.graph.initializer.append(made.graph.initializer[0])


ODD: dict[str, tuple[Change, str]] = {
    "not in order": (backwards, "not in execution order"),
    "an output without shape": (without_shape, "'shape' of 'type' is required"),
    "an output without type": (without_type, "'type' of 'value_info' is required"),
    "an initializer that is no input": (old, "in initializer but not in graph input"),
    "an initializer twice": (twice, "initializer name is not unique"),
}


@pytest.mark.parametrize("level", ["off", "region", "full"])
@pytest.mark.parametrize("case", ODD)
def test_what_only_the_checker_objects_to(case: str, level: str) -> None:
    change, remark = ODD[case]
    made = conv_bn()
    change(made)
    fused, report = fuse_model(made, verify=level)
    assert operators(fused) == {"Conv": 1}
    assert remark in (report.warning or "")
    feeds = random_inputs(made, 0, 7)
    np.testing.assert_allclose(run(fused, feeds)[0], run(made, feeds)[0], atol=1e-4)


@pytest.mark.parametrize("case", ODD)
def test_it_comes_back_as_it_is_where_nothing_folds(case: str) -> None:
    change, remark = ODD[case]
    made = model([CONV, node("Relu", "c", "y")], {"w": W3})
    change(made)
    left, report = fuse_model(made)
    assert left.SerializeToString() == made.SerializeToString()
    assert remark in (report.warning or "")


def test_bodies_that_are_not_in_order() -> None:
    inner = [batchnorm("a", "n", "t"), node("Conv", "x w", "a", pads=[1] * 4)]
    info = helper.make_tensor_value_info("t", TensorProto.FLOAT, [None] * 4)
    other = helper.make_graph([node("Neg", "x", "t")], "other", [], [info])
    choice = node("If", "flag", "y", then_branch=helper.make_graph(inner, "then", [], [info]), else_branch=other)
    flags = [node("Cast", "top", "flag", to=TensorProto.BOOL), node("ReduceMax", "x", "top", keepdims=0)]
    fused, report = fuse_model(model([*flags, choice], {"w": W3, **N}))
    assert report.passes["bn-folding"] == 1
    assert report.before.batchnorm == 1
    assert report.after.batchnorm == 0
    assert [n.op_type for n in fused.graph.node] == ["ReduceMax", "Cast", "If"]


def reads(name: str) -> Change:
    def change(made: ModelProto) -> None:
        made.graph.node[0].input[0] = name

    return change


def weight_of(*shape: int) -> Change:
    def change(made: ModelProto) -> None:
        made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(rand(*shape), "w"))

    return change


def foreign_attribute(made: ModelProto) -> None:
    made.graph.node[1].attribute.append(helper.make_attribute("colour", 1))


def two_inputs(made: ModelProto) -> None:
    made.graph.input.append(made.graph.input[0])


def unknown_operator(made: ModelProto) -> None:
    made.graph.node[0].op_type = "Convolve"


def no_operator_set(made: ModelProto) -> None:
    del made.opset_import[:]


def lost_output(made: ModelProto) -> None:
    made.graph.output[0].name = "gone"


def two_weights(made: ModelProto) -> None:
    made.graph.initializer.append(onnx.numpy_helper.from_array(2 * W3, "w"))


BROKEN: dict[str, tuple[Change, str]] = {
    "dangling": (reads("nowhere"), "Conv 'conv' reads 'nowhere', which nothing computes"),
    "a circle": (reads("y"), "form a circle"),
    "of itself": (reads("c"), "form a circle"),
    "a weight of another rank": (weight_of(6, 6, 9), "checker"),
    "an attribute that is none": (foreign_attribute, "Unrecognized attribute: colour"),
    "two weights of one name": (two_weights, "two initializers 'w', of different values"),
    "an input twice": (two_inputs, "single static assignment"),
    "an operator that is none": (unknown_operator, "No Op registered for Convolve"),
    "no operator set": (no_operator_set, "opset_import"),
    "an output that nothing computes": (lost_output, "gone"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_nobody_takes(case: str) -> None:
    change, message = BROKEN[case]
    made = conv_bn()
    change(made)
    for level in ("off", "full"):
        with pytest.raises(InputError, match=message) as refused:
            fuse_model(made, verify=level)
        assert "\n" not in str(refused.value)


def test_what_the_checker_objects_to_is_not_rewritten() -> None:
    """An operator of another domain by whose name ONNX Runtime knows a fused one is no business of the checker."""
    made = conv_bn()
    without_shape(made)
    made.graph.node[1].attribute.append(helper.make_attribute("spatial", 1))  # gone since opset 9
    with pytest.raises(InputError):
        fuse_model(made, verify="off")


OUTSIDE = {
    "above": lambda folder: ("../weights", folder.parent / "weights"),
    "by its whole path": lambda folder: (str(folder.parent / "weights"), folder.parent / "weights"),
    "a link": lambda folder: ("link", folder.parent / "weights"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_weights_in_a_file_elsewhere(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(conv_bn(), folder / "m.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    location, path = OUTSIDE[case](folder)
    (folder / "weights").rename(path)
    if case == "a link":
        (folder / "link").symlink_to(path)
    made = onnx.load(folder / "m.onnx", load_external_data=False)
    for tensor in made.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(InputError) as refused:
        load(folder / "m.onnx")
    assert "\n" not in str(refused.value)


def function_of(calls: int, *, weights: int) -> ModelProto:
    """Calls of a function in a row whose results nothing but a convolution reads; each call has that many nodes."""
    inner = [node("Mul", "a s", "p0"), *(node("Relu", f"p{i}", f"p{i + 1}") for i in range(weights))]
    inner.append(node("Identity", f"p{weights}", "r"))
    own = helper.make_function("own", "Gate", ["a", "s"], ["r"], inner, [helper.make_opsetid("", 17)])
    nodes = [node("Conv", "x w", "t0", pads=[1] * 4)]
    for i in range(calls):
        nodes.append(helper.make_node("Gate", [f"t{i}", "k"], [f"t{i + 1}"], domain="own"))
    nodes.append(node("Relu", f"t{calls}", "y"))
    made = model(nodes, {"w": W3, "k": rand(6, 1, 1)}, functions=[own], domains=["own"])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", 6, "h", "w"]))
    return made


@pytest.mark.parametrize("calls", [1, 2])
def test_a_function_that_stays_has_a_reason(calls: int) -> None:
    made = function_of(calls, weights=12)
    fused, report = fuse_model(made)
    if report.changed:
        assert fused.ByteSize() <= made.ByteSize()
    else:
        assert any("the file would grow" in kept.reason and kept.where == "own.Gate" for kept in report.kept)


def test_counts_include_functions() -> None:
    _, report = fuse_model(function_of(2, weights=12), skip=["scale-folding", "bn-folding"])
    assert report.before.ops == 1 + 2 + 1 + 13


def test_the_function_that_pays_is_inlined_alone() -> None:
    made = function_of(2, weights=12)
    block = [node("Conv", "a k", "c", pads=[1] * 4), node("BatchNormalization", "c g b m v", "r")]
    own = helper.make_function("own", "Block", list("akgbmv"), ["r"], block, [helper.make_opsetid("", 17)])
    made.functions.append(own)
    made.graph.node.append(helper.make_node("Block", ["y", "v", *(f"n.{k}" for k in "gbmv")], ["z"], domain="own"))
    made.graph.initializer.extend(conv_bn().graph.initializer[1:])
    made.graph.initializer.append(onnx.numpy_helper.from_array(rand(6, 6, 3, 3, seed=1), "v"))
    made.graph.output[0].name = "z"
    fused, report = fuse_model(made)
    assert report.after.batchnorm == 0
    assert [f.name for f in fused.functions] == ["Gate"]
    assert any(kept.where == "own.Gate" for kept in report.kept)


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_resizes_by_what_is_no_number(scale: float) -> None:
    """No runtime takes them; the rest of the file is fused all the same."""
    nodes = [CONV, batchnorm("c", "n", "y"), node("Resize", "y - by", "z")]
    made = model(nodes, {"w": W3, **N, "by": np.array([1, 1, scale, 2], np.float32)}, outputs="z")
    fused, _ = fuse_model(made, verify="off")
    assert operators(fused) == {"Conv": 1, "Resize": 1}
