"""Bodies of If, Loop and Scan, and local functions, are graphs like any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from expression_models import operators, run
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx_models import BN, CONV, W1, W3, N, batchnorm, conv_bn, fuse, model, node, norm

from reparamc.onnx import weights
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs

LEVELS = ("off", "region", "full")


def info(name: str, kind: int = TensorProto.FLOAT, rank: int = 4) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [None] * rank)


def body(name: str, nodes: Sequence[NodeProto], result: str, inputs: Sequence[ValueInfoProto] = ()) -> GraphProto:
    return helper.make_graph(list(nodes), name, list(inputs), [info(result)])


def kinds(model: ModelProto) -> Counter[str]:
    """The operators of all graphs in ``model``."""
    found: Counter[str] = Counter()
    stack = [model.graph]
    while stack:
        for inner in stack.pop().node:
            found[inner.op_type] += 1
            stack += [a.g for a in inner.attribute if a.HasField("g")]
    return found


def fused(made: ModelProto) -> ModelProto:
    """``made``, fused at every level, its outputs held to the original's."""
    result = made
    for level in LEVELS:
        result, report = fuse_model(made, verify=level)
        assert not report.failed
        for seed in range(3):
            feeds = random_inputs(made, seed, 5 + seed)
            for a, b in zip(run(made, feeds), run(result, feeds), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    return result


def choosing(then: Sequence[NodeProto], other: Sequence[NodeProto], constants: dict[str, np.ndarray]) -> ModelProto:
    branches = {"then_branch": body("then", then, "t"), "else_branch": body("else", other, "e")}
    nodes = [
        node("ReduceMax", "x", "top", keepdims=0), node("Greater", "top two", "flag"),
        node("If", "flag", "y", **branches),
    ]  # fmt: skip
    made = model(nodes, {"two": np.array(2, np.float32), **constants})
    made.graph.output[0].CopyFrom(info("y"))
    return made


def test_branches_with_weights_from_outside() -> None:
    first = [node("Conv", "x w", "a", pads=[1] * 4), batchnorm("a", "n", "t")]
    second = [node("Conv", "x u", "a2"), batchnorm("a2", "n", "e")]
    result = fused(choosing(first, second, {"w": W3, "u": W1, **N}))
    assert kinds(result) == {"ReduceMax": 1, "Greater": 1, "If": 1, "Conv": 2}
    assert [t.name for t in result.graph.initializer] == ["two"]


def test_a_weight_that_the_main_graph_reads_as_well() -> None:
    made = choosing(
        [node("Conv", "x w", "a", pads=[1] * 4), batchnorm("a", "n", "t")], [node("Neg", "x", "e")], {"w": W3, **N}
    )
    made.graph.node.append(node("Conv", "x w", "z"))
    made.graph.output.append(info("z"))
    result = fused(made)
    assert "BatchNormalization" not in kinds(result)
    assert "w" in {t.name for t in result.graph.initializer}


def test_branches_that_use_the_same_names() -> None:
    def branch(result: str) -> list[NodeProto]:
        return [node("Conv", "x w", "a", pads=[1] * 4), batchnorm("a", "n", "b"), node("Relu", "b", result)]

    assert kinds(fused(choosing(branch("t"), branch("e"), {"w": W3, **N})))["BatchNormalization"] == 0


def test_a_branch_in_a_branch() -> None:
    inner = {
        "then_branch": body("t2", [node("Conv", "x w", "p", pads=[1] * 4), batchnorm("p", "n", "q")], "q"),
        "else_branch": body("e2", [node("Neg", "x", "r")], "r"),
    }
    made = choosing([node("If", "flag", "t", **inner)], [node("Abs", "x", "e")], {"w": W3, **N})
    assert kinds(fused(made))["BatchNormalization"] == 0


def test_the_body_of_a_loop() -> None:
    inputs = [
        info("i", TensorProto.INT64, 0),
        info("c", TensorProto.BOOL, 0),
        helper.make_tensor_value_info("v", TensorProto.FLOAT, ["N", 6, "H", "W"]),
    ]
    steps = [
        node("Conv", "v w", "a", pads=[1] * 4),
        batchnorm("a", "n", "b"),
        node("Tanh", "b", "o"),
        node("Identity", "c", "go"),
    ]
    inner = helper.make_graph(steps, "body", inputs, [info("go", TensorProto.BOOL, 0), info("o")])
    nodes = [node("Loop", "times - x", "y", body=inner)]
    made = model(nodes, {"times": np.array(2), "w": W3, **N})
    made.graph.output[0].CopyFrom(info("y"))
    assert kinds(fused(made)) == {"Loop": 1, "Conv": 1, "Tanh": 1, "Identity": 1}


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("computed", [True, False])
def test_a_constant_condition(taken: bool, computed: bool) -> None:
    branches = {
        "then_branch": body("then", [node("Conv", "x w", "c", pads=[1] * 4)], "c"),
        "else_branch": body("else", [node("Conv", "x u", "c", pads=[0] * 4)], "c"),
    }
    first = [node("Not", "flag", "f")] if computed else [node("Identity", "flag", "f")]
    nodes = [*first, node("If", "f", "a", **branches), batchnorm("a", "n", "y")]
    made = model(nodes, {"flag": np.array(taken != computed), "w": W3, "u": W1, **N})
    made.graph.output[0].CopyFrom(info("y"))
    result = fused(made)
    assert kinds(result) == {"Conv": 1}
    assert len(result.graph.initializer) == 2


def test_a_constant_condition_keeps_what_its_branch_stores() -> None:
    then = body("then", [node("Mul", "x s", "k"), node("Relu", "k", "t")], "t")
    then.initializer.append(numpy_helper.from_array(np.full((6, 1, 1), 2, np.float32), "s"))
    other = body("else", [node("Neg", "x", "e")], "e")
    nodes = [
        node("Abs", "x", "m"),
        node("If", "flag", "i", then_branch=then, else_branch=other),
        node("Add", "i m", "y"),
    ]
    made = model(nodes, {"flag": np.array(True)})
    made.graph.output[0].CopyFrom(info("y"))
    assert kinds(fused(made))["If"] == 0


def block() -> ModelProto:
    """Two calls of one function, Conv and BatchNorm of its operands."""
    inner = [node("Conv", "a k", "c", pads=[1] * 4), node("BatchNormalization", "c g b m v", "r")]
    own = helper.make_function("own", "Block", list("akgbmv"), ["r"], inner, [helper.make_opsetid("", 17)])
    calls = [
        helper.make_node("Block", ["x", "w", *(f"n.{k}" for k in "gbmv")], ["p"], domain="own"),
        helper.make_node("Block", ["p", "u", *(f"o.{k}" for k in "gbmv")], ["y"], domain="own"),
    ]
    made = model(calls, {"w": W3, "u": W3 * 2, **N, **norm("o", 6, seed=1)}, functions=[own], domains=["own"])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", 6, "h", "w"]))
    return made


def test_a_function_called_with_constants() -> None:
    made = block()
    result = fused(made)
    assert operators(result) == {"Conv": 2}
    assert result.ByteSize() < made.ByteSize()


def test_a_function_in_which_nothing_folds_stays() -> None:
    own = helper.make_function("own", "Act", ["a"], ["r"], [node("Relu", "a", "r")], [helper.make_opsetid("", 17)])
    made = conv_bn(functions=[own], domains=["own"])
    made.graph.node.append(helper.make_node("Act", ["y"], ["z"], domain="own"))
    made.graph.output[0].name = "z"
    result = fused(made)
    assert [n.op_type for n in result.graph.node] == ["Conv", "Act"]
    assert result.functions == made.functions


def test_other_files_take_no_detour() -> None:
    made = model([CONV, BN, node("Relu", "y", "z")], {"w": W3, **N}, outputs="z")
    assert kinds(fused(made)) == {"Conv": 1, "Relu": 1}


def test_a_function_with_weights_of_its_own() -> None:
    """It folds once, for both calls, which do not agree on sizes."""
    stored = {"k": W3, **N}
    inner = [helper.make_node("Constant", [], [n], value=numpy_helper.from_array(a, "")) for n, a in stored.items()]
    inner += [node("Conv", "a k", "c"), batchnorm("c", "n", "d"), node("Relu", "d", "r")]
    own = helper.make_function("own", "Stage", ["a"], ["r"], inner, [helper.make_opsetid("", 17)])
    calls = [helper.make_node("Stage", [x], [y], domain="own") for x, y in (("x", "h"), ("h", "y"))]
    made = model(calls, {}, (2, 6, 9, 8), functions=[own], domains=["own"])
    fused, report = fuse(made)
    assert report.passes["bn-folding"] == 1
    assert [n.op_type for n in fused.functions[0].node if n.op_type != "Constant"] == ["Conv", "Relu"]
    assert fused.ByteSize() <= made.ByteSize()
    assert not report.kept


@pytest.mark.parametrize(
    "test",
    [
        test_branches_with_weights_from_outside,
        test_a_branch_in_a_branch,
        test_the_body_of_a_loop,
        test_a_function_with_weights_of_its_own,
    ],
)
def test_large_weights_lie_inside(test: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE", 64)
    test()
