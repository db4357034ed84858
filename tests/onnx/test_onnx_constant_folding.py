"""Operators on constants are computed once; nothing grows, and nothing random is fixed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from expression_models import assert_close, operators, run
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_models import CONV, W3, assert_folds, assert_left, batchnorm, fuse, model, node, norm, rand

from reparamc.onnx.constants import fold_constants
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs

BIG = 64 * 64


def folded(made: ModelProto) -> ModelProto:
    """``made`` after constant folding alone, its outputs held to the original's."""
    fused, report = fuse(made, passes=["constant-folding"])
    assert report.passes["constant-folding"] == operators(made).total() - operators(fused).total()
    return fused


def test_transposed_weight() -> None:
    fused = folded(
        model([node("Transpose", "t", "g", perm=[1, 0]), node("MatMul", "x g", "y")], {"t": rand(4, 6)}, (2, 6))
    )
    assert operators(fused) == {"MatMul": 1}
    assert [tuple(t.dims) for t in fused.graph.initializer] == [(6, 4)]


def test_chain_of_operators_leaves_one_constant() -> None:
    nodes = [
        node("Transpose", "t", "a", perm=[1, 0]), node("Reshape", "a s", "b"), node("Mul", "b f", "c"),
        node("Conv", "x c", "y"),
    ]  # fmt: skip
    made = model(nodes, {"t": rand(6, 4), "s": np.array([4, 6, 1, 1]), "f": rand(4, 1, 1, 1)})
    fused = folded(made)
    assert operators(fused) == {"Conv": 1}
    assert [tuple(t.dims) for t in fused.graph.initializer] == [(4, 6, 1, 1)]


def test_shape_of_known_sizes() -> None:
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s one", "c", axis=0), node("Concat", "m c", "t", axis=0),
        node("Reshape", "x t", "y"),
    ]  # fmt: skip
    made = model(nodes, {"one": np.array([1]), "m": np.array([-1])}, (2, 6, 4, 5))
    assert operators(folded(made)) == {"Reshape": 1}


@pytest.mark.parametrize(("start", "end"), [(1, None), (0, 2), (-2, None), (1, -1)])
def test_part_of_a_shape(start: int, end: int | None) -> None:
    attributes = {"start": start} | ({} if end is None else {"end": end})
    nodes = [
        node("Shape", "x", "s", **attributes),
        node("Cast", "s", "f", to=1),
        node("ReduceSum", "f", "r"),
        node("Mul", "x r", "y"),
    ]
    assert operators(folded(model(nodes, {}, (2, 6, 4, 5))))["Shape"] == 0


def test_shape_of_unknown_sizes() -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Cast", "s", "f", to=1),
        node("ReduceSum", "f", "r"),
        node("Mul", "x r", "y"),
    ]
    assert_left(model(nodes, {}))


def picked(pick: NodeProto, *bounds: int | list[int], **attributes: int) -> ModelProto:
    """What ``pick`` takes of the shape of [N, 6, H, 4], as a factor; ``bounds`` are the constants a, b, c, d."""
    tail = [node("Cast", "p", "f", to=1), node("ReduceSum", "f", "r", keepdims=0), node("Mul", "x r", "y")]
    constants = {name: np.array(value, np.int64) for name, value in zip("abcd", bounds, strict=False)}
    return model([node("Shape", "x", "s", **attributes), pick, *tail], constants, ("N", 6, "H", 4), opset=18)


KNOWN = {
    "one": picked(node("Gather", "s a", "p"), 1),
    "several": picked(node("Gather", "s a", "p"), [3, -3]),
    "the last": picked(node("Slice", "s a b", "p"), [-1], [2**62]),
    "backwards": picked(node("Slice", "s a b - c", "p"), [-1], [-3], [-2]),
    "every other": picked(node("Slice", "s a b c d", "p"), [1], [4], [0], [2]),
    "of the rest": picked(node("Gather", "s a", "p"), 2, start=1),
}
OPEN = {
    "one": picked(node("Gather", "s a", "p"), 2),
    "several": picked(node("Gather", "s a", "p"), [1, 0]),
    "the last two": picked(node("Slice", "s a b", "p"), [-2], [2**62]),
    "backwards": picked(node("Slice", "s a b - c", "p"), [-1], [-3], [-1]),
    "of the rest": picked(node("Gather", "s a", "p"), 1, start=1),
    "of no axis": picked(node("Slice", "s a b", "p"), [], []),
    "from where is computed": picked(node("Slice", "s s b", "p"), 0, [4], end=1),
}


@pytest.mark.parametrize("made", KNOWN.values(), ids=KNOWN)
def test_what_is_known_of_a_shape(made: ModelProto) -> None:
    assert operators(fuse(made, passes=["constant-folding"])[0]) == {"Mul": 1}


@pytest.mark.parametrize("made", OPEN.values(), ids=OPEN)
def test_what_is_open_in_a_shape(made: ModelProto) -> None:
    assert_left(made)


def test_a_position_that_a_shape_does_not_have() -> None:
    """That is for the runtime to say."""
    nodes = [node("Shape", "x", "s"), node("Gather", "s i", "p"), node("Cast", "p", "f", to=1), node("Mul", "x f", "y")]
    made = model(nodes, {"i": np.array([7])})
    assert fold_constants(made) == []


def test_shape_that_a_wrong_value_info_tells() -> None:
    """What a file says about inner values is not what they are."""
    nodes = [node("Relu", "x", "r"), node("Shape", "r", "s"), node("Cast", "s", "f", to=1), node("Mul", "g f", "y")]
    made = model(nodes, {"g": rand(4)})
    made.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [9, 9, 9, 9]))
    fused, _ = fuse_model(made)
    assert operators(fused)["Shape"] == 1


def test_nothing_inflates() -> None:
    nodes = [
        node("Expand", "one s", "e"), node("Tile", "one2 n", "t"), node("ConstantOfShape", "s", "c"),
        node("Add", "x e", "a"), node("Add", "a t", "b"), node("Add", "b c", "y"),
    ]  # fmt: skip
    parameters = {
        "one": rand(1, 1), "one2": rand(1, 1, seed=1), "s": np.array([64, 64]), "n": np.array([64, 64]),
    }  # fmt: skip
    made = model(nodes, parameters, ("N", 64, 64))
    fused, _ = fuse(made)
    assert fused.ByteSize() <= made.ByteSize() + 200


def test_range_and_cast_do_not_inflate() -> None:
    nodes = [
        node("Range", "zero n one", "r"),
        node("Cast", "r", "f", to=11),
        node("Cast", "f", "g", to=1),
        node("Add", "x g", "y"),
    ]
    made = model(nodes, {"zero": np.array(0), "n": np.array(BIG), "one": np.array(1)}, ("N", BIG))
    fused, _ = fuse(made)
    assert fused.ByteSize() <= made.ByteSize() + 200


def test_a_weight_is_not_widened() -> None:
    half = rand(64, 64).astype(np.float16)
    made = model([node("Cast", "h", "g", to=1), node("MatMul", "x g", "y")], {"h": half}, ("N", 64))
    fused, _ = fuse(made)
    assert fused.ByteSize() <= made.ByteSize() + 200


def test_tied_weights_are_not_duplicated() -> None:
    """A table that is read as it is and transposed."""
    nodes = [
        node("MatMul", "x e", "h"), node("Relu", "h", "r"), node("Transpose", "e", "t", perm=[1, 0]),
        node("MatMul", "r t", "y"),
    ]  # fmt: skip
    assert_left(model(nodes, {"e": rand(64, 64)}, ("N", 64)))


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_nothing_random(op: str) -> None:
    nodes = [node(op, "p", "r"), node("Add", "x r", "y")]
    made = model(nodes, {"p": np.full((6, 1, 1), 0.5, np.float32)})
    fused, _ = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()


def test_nothing_random_without_operands() -> None:
    made = model([node("RandomNormal", "", "r", shape=[6, 1, 1]), node("Add", "x r", "y")], {})
    fused, _ = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()


def test_dropout_in_training_of_a_constant() -> None:
    nodes = [node("Dropout", "s r on", "d"), node("Mul", "x d", "y")]
    parameters = {"s": rand(6, 1, 1), "r": np.array(0.5, np.float32), "on": np.array(True)}
    fused, _ = fuse_model(model(nodes, parameters), verify="region")
    assert operators(fused)["Dropout"] == 1


def test_overridable_operand() -> None:
    made = model([node("Transpose", "t", "g", perm=[1, 0]), node("MatMul", "x g", "y")], {"t": rand(4, 6)}, (2, 6))
    made.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [4, 6]))
    assert_left(made)


def test_constant_that_is_an_output() -> None:
    made = model([node("Neg", "t", "z"), node("Mul", "x z", "y")], {"t": rand(6, 1, 1)}, outputs="y z")
    fused, _ = fuse(made)
    assert {o.name for o in fused.graph.output} == {"y", "z"}


def test_constant_that_a_body_reads() -> None:
    info = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("e", TensorProto.FLOAT, None)
    then = helper.make_graph([node("Mul", "x s", "t")], "then", [], [info])
    otherwise = helper.make_graph([node("Identity", "x", "e")], "else", [], [other])
    choice = node("If", "flag", "y", then_branch=then, else_branch=otherwise)
    condition = [node("ReduceMax", "x", "top", keepdims=0), node("Cast", "top", "flag", to=TensorProto.BOOL)]
    made = model([node("Neg", "r", "s"), *condition, choice], {"r": rand(6, 1, 1)})
    assert operators(folded(made)) == {"ReduceMax": 1, "Cast": 1, "If": 1}


def test_operand_that_is_read_elsewhere_stays() -> None:
    nodes = [node("Neg", "r", "s"), node("Mul", "x s", "a"), node("Add", "a r", "y")]
    fused = folded(model(nodes, {"r": rand(6, 1, 1)}))
    assert {t.name for t in fused.graph.initializer} == {"r", "s"}


@pytest.mark.parametrize("a", [7, -7])
@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_whole_numbers_divide_as_the_runtime_divides(op: str, a: int) -> None:
    nodes = [node(op, "a b", "q"), node("Cast", "q", "f", to=1), node("Mul", "x f", "y")]
    assert operators(folded(model(nodes, {"a": np.array([a, -a]), "b": np.array([2, 3])}, ("N", 2)))) == {"Mul": 1}


def test_a_number_stays_a_number() -> None:
    """An index of no axes takes its axis away, an index of one axis does not."""
    nodes = [node("Squeeze", "i", "j"), node("Gather", "x j", "g", axis=1), node("Relu", "g", "y")]
    fused = folded(model(nodes, {"i": np.array([2])}, ("N", 6)))
    assert operators(fused) == {"Select": 1, "Relu": 1}
    assert [tuple(t.dims) for t in fused.graph.initializer] == [()]


def test_constants_in_nodes() -> None:
    nodes = [
        node("Constant", "", "t", value=numpy_helper.from_array(rand(6, 6))),
        node("Constant", "", "axes", value_ints=[2, 3]), node("Transpose", "t", "u", perm=[1, 0]),
        node("Unsqueeze", "u axes", "w"), node("Conv", "x w", "c"), batchnorm("c", "n", "y"),
    ]  # fmt: skip
    fused = assert_folds(model(nodes, norm("n", 6)), Conv=1)
    assert [n.op_type for n in fused.graph.node] == ["Conv"]


OLD = {
    "Softmax before opset 13": (node("Softmax", "t", "c"), 9),
    "LogSoftmax before opset 13": (node("LogSoftmax", "t", "c", axis=1), 11),
    "Hardmax before opset 13": (node("Hardmax", "t", "c"), 9),
    "Resize with align_corners": (
        node("Resize", "t - - sizes", "c", mode="linear", coordinate_transformation_mode="align_corners"),
        17,
    ),
    "cubic Resize": (
        node("Resize", "t - - sizes", "c", mode="cubic", coordinate_transformation_mode="align_corners"),
        17,
    ),
    "Softmax": (node("Softmax", "t", "c"), 13),
    "LayerNormalization": (node("LayerNormalization", "t g", "c"), 17),
    "Mod of floats": (node("Mod", "t g", "c", fmod=1), 17),
    "integer Pow": (node("Pow", "n n", "c"), 15),
    "shift": (node("BitShift", "u u", "c", direction="LEFT"), 17),
    "Round": (node("Round", "t", "c"), 17),
}


@pytest.mark.parametrize("name", OLD)
def test_a_constant_is_what_the_runtime_computes(name: str) -> None:
    """Or it is not computed at all; without any check, and to the last bit."""
    operator, opset = OLD[name]
    constants = {
        "t": rand(1, 2, 4, 5), "sizes": np.array([1, 2, 3, 7]), "g": rand(5, seed=1),
        "n": np.array([[1, 3], [2, 0]]), "u": np.arange(6, dtype=np.uint8),
    }  # fmt: skip
    used = {key: value for key, value in constants.items() if key in operator.input}
    tail = [node("Cast", "c", "f", to=1), node("Flatten", "f", "r", axis=0), node("MatMul", "x r", "y")]
    made = model([operator, *tail], used, (3, 1), opset=opset)
    fused, _ = fuse_model(made, passes=["constant-folding"], verify="off")
    feeds = {"x": rand(3, 1)}
    np.testing.assert_array_equal(run(made, feeds)[0], run(fused, feeds)[0])
    if opset >= 13 and not operator.op_type.startswith("Resize"):
        assert operators(fused) == {"MatMul": 1}


def test_what_only_one_source_computes_stays() -> None:
    """The reference evaluator knows no FusedConv, and ONNX Runtime no convolution of doubles."""
    weight, image = rand(2, 1, 3, 3).astype(np.float64), rand(1, 1, 5, 5).astype(np.float64)
    nodes = [node("Conv", "i w", "d"), node("Cast", "d", "c", to=1), node("Mul", "x c", "y")]
    made = model(nodes, {"i": image, "w": weight}, (1, 2, 3, 3))
    assert fold_constants(made) == []


def test_a_cast_like_that_is_not_folded_stays_one() -> None:
    made = model([node("Relu", "x", "r"), node("CastLike", "r x", "c"), node("Relu", "c", "y")], {})
    before = made.SerializeToString()
    assert fold_constants(made) == []
    assert made.SerializeToString() == before


def test_operator_without_a_reference_stays() -> None:
    call = helper.make_node("QuickGelu", ["s"], ["d"], domain="com.microsoft")
    made = model([call, node("Mul", "x d", "y")], {"s": rand(6, 1, 1)}, domains=["com.microsoft"])
    assert_left(made)


def test_ir_version_3() -> None:
    made = model(
        [node("Transpose", "t", "g", perm=[1, 0]), node("MatMul", "x g", "y")],
        {"t": rand(4, 6)},
        (2, 6),
        opset=8,
        ir_version=3,
    )
    made.graph.input.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [4, 6]))
    fused = folded(made)
    assert {v.name for v in fused.graph.input} == {"x", "g"}


def test_in_place_count() -> None:
    made = model([node("Neg", "t", "g"), node("Mul", "x g", "y")], {"t": rand(6, 1, 1)})
    expected = run(made, {"x": np.ones((1, 6, 2, 2), np.float32)})[0]
    assert len(fold_constants(made)) == 1
    assert fold_constants(made) == []
    np.testing.assert_array_equal(run(made, {"x": np.ones((1, 6, 2, 2), np.float32)})[0], expected)


@pytest.mark.parametrize("level", ["off", "region", "full"])
def test_a_constant_that_the_runtime_refuses_is_not_folded(level: str) -> None:
    """ONNX Runtime takes a vector of one for the limit of a Range unless it is an initializer."""
    limit = node("Slice", "sizes one two zero", "limit")
    nodes = [limit, node("Range", "from limit step", "r"), CONV, batchnorm("c", "n", "d"), node("Add", "d r", "y")]
    constants = {"sizes": np.array([2.0, 1, 6], np.float32), "one": [1], "two": [2], "zero": [0]}
    made = model(nodes, constants | {"w": W3, "from": np.float32(0), "step": np.float32(1)} | norm("n", 6))
    fused, report = fuse_model(made, verify=level)
    assert report.passes["bn-folding"] or level == "region"  # the certificate undoes what inference refuses
    assert operators(fused) == operators(made) - Counter(BatchNormalization=report.passes["bn-folding"])
    feeds = random_inputs(made, 0, 5)
    assert_close(run(made, feeds)[0], run(fused, feeds)[0], 1e-5)


@pytest.mark.parametrize("level", ["off", "full"])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 2.0**70, -(2.0**40) * 2**30])
def test_what_processors_cast_otherwise_stays(number: float, kind: int, level: str) -> None:
    nodes = [
        node("Div", "k one", "q"),
        node("Cast", "q", "i", to=kind),
        node("Cast", "i", "f", to=1),
        node("Add", "x f", "y"),
    ]
    numbers = {"k": np.full((2, 2), number, np.float32), "one": np.array(0.75, np.float32)}
    fused, _ = fuse_model(model(nodes, numbers, ("N", 2, 2, 2)), verify=level)
    assert operators(fused)["Cast"] == 2
