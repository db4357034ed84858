"""Sizes and constants that are vast: what is linear beside them folds, and nothing so large is ever made."""

import resource
from collections import Counter

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx_models import BN, CONV, W3, N, batchnorm, conv_bn, fuse, model, node, rand

from reparamc.equivalence.trials import TooLarge
from reparamc.errors import InputError
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import fits

D = {"w": W3, **N}
BILLION = np.array([10**9])
ONE = np.ones(1, np.float32)
MORE = 2**30
"""Bytes that the process may take beyond what it has."""

VAST: dict[str, tuple[list[NodeProto], dict[str, np.ndarray]]] = {
    "ConstantOfShape": ([node("ConstantOfShape", "size", "vast")], {}),
    "Expand": ([node("Expand", "one size", "vast")], {}),
    "Tile": ([node("Tile", "one size", "vast")], {}),
    "Pad": ([node("Pad", "one pads", "vast")], {"pads": np.array([10**9, 0])}),
    "Range": ([node("Range", "zero size_ step", "vast")],
              {"zero": np.array(0), "size_": np.array(10**9), "step": np.array(1)}),
    "OneHot": ([node("OneHot", "zero size on", "vast")], {"zero": np.array([0]), "on": np.array([0, 1], np.float32)}),
    "EyeLike": ([node("ConstantOfShape", "square", "zeros"), node("EyeLike", "zeros", "vast")],
                {"square": np.array([40000, 40000])}),
    "Resize": ([node("Resize", "map - by", "vast", mode="linear")],
               {"map": np.ones((1, 1, 8, 8), np.float32), "by": np.array([1, 1, 1e4, 1e4], np.float32)}),
    "an outer product": ([node("Mul", "row column", "vast")],
                         {"row": np.ones((1, 40000), np.float32), "column": np.ones((40000, 1), np.float32)}),
    "doublings": ([node("Concat", f"{f'v{i}' if i else 'one'} {f'v{i}' if i else 'one'}", f"v{i + 1}", axis=0)
                   for i in range(30)] + [node("Identity", "v30", "vast")], {}),
}  # fmt: skip


def with_constant(kind: str, where: str) -> ModelProto:
    """A convolution and a BatchNorm, plus the maximum of a vast constant: in the main graph, a body, or a function."""
    nodes, stored = VAST[kind]
    nodes = [*nodes, node("Cast", "vast", "floats", to=1), node("ReduceMax", "floats", "most", keepdims=0)]
    nodes += [CONV, batchnorm("c", "n", "d"), node("Add", "d most", "y")]
    stored = {name: a for name, a in {"size": BILLION, "one": ONE, **stored, **D}.items()
              if any(name in n.input for n in nodes)}  # fmt: skip
    tensors = [numpy_helper.from_array(a, name) for name, a in stored.items()]
    made = conv_bn()
    x, y = made.graph.input[0], made.graph.output[0]
    opsets = list(made.opset_import)
    if where == "main graph":
        graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    elif where == "both bodies":
        body = helper.make_graph(nodes, "b", [], [y], tensors)
        on = helper.make_tensor_value_info("on?", helper.np_dtype_to_tensor_dtype(np.dtype(bool)), [])
        choice = helper.make_node("If", ["on?"], ["z"], then_branch=body, else_branch=body)
        graph = helper.make_graph([choice], "g", [x, on], [helper.make_empty_tensor_value_info("z")])
    else:
        constants = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors]
        made.functions.append(helper.make_function("own", "F", ["x"], ["y"], [*constants, *nodes], opsets))
        opsets.append(helper.make_opsetid("own", 1))
        graph = helper.make_graph([helper.make_node("F", ["x"], ["y"], domain="own")], "g", [x], [y])
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=made.functions)


@pytest.mark.parametrize("step", [2**63 - 1, 2**40])
def test_a_vast_step(step: int) -> None:
    """ONNX's shape inference adds it to a place: the process ends there."""
    numbers = {"start": 1, "end": 2**63 - 1, "axis": 0, "step": step}
    stored = {name: np.array([n]) for name, n in numbers.items()}
    shape = [node("Shape", "d", "s"), node("Slice", "s start end axis step", "t"), node("ConstantOfShape", "t", "z")]
    fused, _ = fuse_model(model([CONV, batchnorm("c", "n", "d"), *shape], {**D, **stored}, outputs="d z"))
    assert operators(fused)["Conv"] == 1
    assert "BatchNormalization" not in operators(fused)


@pytest.mark.parametrize("kind", VAST)
def test_a_vast_constant(kind: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for where, times in (("main graph", 1), ("both bodies", 2), ("function", 1)):
        _, report = fuse_model(with_constant(kind, where), verify="region")
        would_grow = kind == "doublings" and where == "function"  # what is small is folded, and then stored
        assert report.passes["bn-folding"] == (0 if would_grow else times), where
    with pytest.raises(TooLarge, match="would have"):
        fuse_model(with_constant(kind, "both bodies"), verify="full")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MORE


LARGE = 2**30
FAR: dict[str, list[NodeProto]] = {
    "strides": [node("Conv", "x w", "c", strides=[LARGE, LARGE]), BN],
    "dilations": [node("Conv", "x w", "c", dilations=[LARGE, LARGE], pads=[LARGE] * 4), BN],
    "pads": [node("Conv", "x w", "c", pads=[LARGE] * 4), BN],
    "strides of a transposed one": [node("ConvTranspose", "x w", "c", strides=[LARGE, LARGE]), BN],
    "a pooling": [node("AveragePool", "x", "p", kernel_shape=[LARGE, 2]), node("Conv", "p w", "c"), BN],
    "a padding": [node("Pad", "x far", "p"), node("Conv", "p w", "c"), BN],
    "a slice": [CONV, batchnorm("c", "n", "d"), node("Slice", "d at end axis at", "y")],
    "a resize": [CONV, batchnorm("c", "n", "d"), node("Resize", "d - by", "y")],
    "an expansion": [node("GlobalAveragePool", "x", "p"), node("Expand", "p wide", "q"), node("Conv", "q w", "c"), BN],
}


@pytest.mark.parametrize("name", FAR)
def test_a_far_reach(name: str) -> None:
    stored = {
        "far": np.array([0, 0, LARGE, 0, 0, 0, LARGE, 0]), "at": np.array([LARGE]), "end": np.array([2**62]),
        "axis": np.array([2]), "by": np.array([1, 1, 1e6, 1e6], np.float32), "wide": np.array([1, 1, LARGE, 1]),
    }  # fmt: skip
    made = conv_bn()
    del made.graph.node[:], made.graph.value_info[:]
    made.graph.node.extend(FAR[name])
    read = {n for step in FAR[name] for n in step.input}
    made.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in stored.items() if n in read)
    made.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("y"))
    fused, report = fuse_model(made, verify="region")
    assert operators(fused)["BatchNormalization"] == 0, report.kept


def test_what_is_made_of_a_weight_takes_no_more_room() -> None:
    """Two transposes of a large weight would take twice its room; two halves of it do not."""
    large = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    both = [node("Transpose", "v", "r", perm=[1, 0]), node("Mul", "v v", "s"), node("MatMul", "x r", "a"),
            node("MatMul", "a s", "y")]  # fmt: skip
    fused, _ = fuse(model(both, {"v": large}, (2, 64)), verify="off", skip=["sequence-merging", "impulse-response"])
    assert sum(len(t.raw_data) for t in fused.graph.initializer) <= large.nbytes
    halves = [node("Split", "v", "r s", axis=1), node("MatMul", "x r", "a"), node("MatMul", "x s", "b"),
              node("Concat", "b a", "y", axis=1)]  # fmt: skip
    fused, _ = fuse(model(halves, {"v": large}, (2, 64)), verify="off", passes=["constant-folding"])
    assert operators(fused) == Counter(MatMul=2, Concat=1)


def test_a_graph_of_nothing() -> None:
    x = helper.make_tensor_value_info("x", 1, ["N", 3])
    passing = helper.make_model(helper.make_graph([], "g", [x], [x]), opset_imports=[helper.make_opsetid("", 17)])
    fused, report = fuse_model(passing)
    assert not report.changed
    assert fused.SerializeToString() == passing.SerializeToString()
    with pytest.raises(InputError, match="no operators and no outputs"):
        fuse_model(helper.make_model(helper.make_graph([], "g", [x], [])))
    with pytest.raises(InputError, match="has no graph"):
        fuse_model(ModelProto())


def test_channels_that_no_machine_has() -> None:
    """As a damaged file declares them: a convolution reads two of them, an activation all."""
    nodes = [
        node("Slice", "x a e one", "s"), node("Mul", "s k", "m"), node("Conv", "m w", "c"),
        node("Relu", "x", "r"), node("Mul", "r half", "h"),
    ]  # fmt: skip
    integers = {"a": np.array([0]), "e": np.array([2]), "one": np.array([1])}
    parameters = {"w": rand(3, 2, 1, 1), "k": rand(2, 1, 1), "half": np.array(0.5, np.float32), **integers}
    made = model(nodes, parameters, ("N", 2**60, "H", "W"), outputs="c h")
    fuse_model(made, verify="off")


def test_a_mode_that_is_no_text() -> None:
    resize = node("Resize", "x - s", "r")
    resize.attribute.append(helper.make_attribute("mode", b"near\xcd"))
    made = model([resize, node("Conv", "r w", "y")], {"s": np.ones(4, np.float32), "w": rand(3, 4, 1, 1)})
    fuse_model(made, verify="off")


def test_whether_sizes_fit_beside_a_vast_range() -> None:
    numbers = {"zero": np.array(0), "many": np.array(3 * 10**7), "step": np.array(1)}
    nodes = [node("Range", "zero many step", "v"), node("Slice", "x from to", "s"), node("Concat", "x s", "y", axis=0)]
    joined = model(nodes, {**numbers, "from": np.array([0]), "to": np.array([1])})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fits(joined, {"x": np.zeros((1, 6, 2, 2), np.float32)})
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MORE
