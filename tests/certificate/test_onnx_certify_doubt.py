"""What the certificate must not take for equal: graphs that compute different functions, if only at some input size.

The runtime is the witness: it computes another thing from each of the two, or refuses one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from expression_models import run
from faults_in_onnx import ONNX_VALUES
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import model, node, rand
from planting import Fault, planted

from reparamc.certificate.onnx import certify_onnx
from reparamc.onnx.fuse import fuse_model

IMAGE = ("N", 3, "H", "W")
X = {"x": rand(1, 3, 4, 4)}


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def outcome(of: ModelProto, feeds: dict[str, np.ndarray]) -> list[Any]:
    """The outputs; none where the runtime refuses."""
    try:
        return [
            (a.shape, a.tolist()) for a in run(of, {v.name: feeds[v.name] for v in of.graph.input if v.name in feeds})
        ]
    except Exception:
        return []


def default(value: float | None) -> ModelProto:
    parameters = {} if value is None else {"s": np.array([value], np.float32)}
    return model([node("Mul", "x s", "y")], parameters, IMAGE, inputs={"s": (1,)})


def twice_out(twice: bool) -> ModelProto:
    made = model([node("Relu", "x", "y")], {}, IMAGE)
    if twice:
        made.graph.output.append(made.graph.output[0])
    return made


def overloaded(which: str) -> ModelProto:
    functions = []
    for overload, op in (("one", "Relu"), ("two", "Neg")):
        made = helper.make_function("d", "F", ["a"], ["b"], [node(op, "a", "b")], [helper.make_opsetid("", 17)])
        made.overload = overload
        functions.append(made)
    call = node("F", "x", "y", domain="d")
    call.overload = which
    return model([call], {}, IMAGE, domains=("d",), functions=functions, ir_version=10)


def sparse(value: float) -> ModelProto:
    def branch() -> Any:
        return helper.make_graph([node("Add", "x s", "o")], "b", [], [helper.make_empty_tensor_value_info("o")])

    nodes = [node("If", "c", "y", then_branch=branch(), else_branch=branch())]
    made = model(nodes, {"c": np.array(True)}, (2, 3))
    tensor = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([value], np.float32), "s"), numpy_helper.from_array(whole(1), "at"), [3]
    )
    made.graph.sparse_initializer.append(tensor)
    return made


def reshaped(stored: bool) -> ModelProto:
    """To sizes that the caller gives, or to those that are stored."""
    parameters = {"k": whole(6, 4, 5)} if stored else {}
    nodes = [node("Reshape", "x k" if stored else "x s", "t"), node("Relu", "t", "y")]
    made = model(nodes, parameters, (2, 3, 4, 5), inputs={"s": (3,)})
    made.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    return made


def like(hint: str) -> ModelProto:
    """A reshape to the sizes of ``v``; or to stored ones, in a file that says of a ``v`` that it has these."""
    nodes = [node("Relu", "x", "v"), node("Shape", "v", "s"), node("Reshape", "z s", "y")]
    if not hint:
        return model(nodes, {}, IMAGE, inputs={"z": ("A", "B")})
    parameters = {"s": whole(1, 3, 4, 4)}
    if hint == "initializer":
        parameters["v"] = rand(1, 3, 4, 4)
    made = model(nodes[2:], parameters, IMAGE, inputs={"z": ("A", "B")})
    if hint == "stale":
        made.graph.value_info.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, (1, 3, 4, 4)))
    return made


def sum_of_two(split: bool) -> ModelProto:
    """A kernel after a sum, or before it: not the same where one term is repeated."""
    apart = [node("Conv", "x w", "a", pads=[1] * 4), node("Conv", "z w", "b", pads=[1] * 4), node("Add", "a b", "y")]
    at_once = [node("Add", "x z", "s"), node("Conv", "s w", "y", pads=[1] * 4)]
    return model(apart if split else at_once, {"w": rand(3, 3, 3, 3)}, IMAGE, inputs={"z": ("N", 3, "P", "Q")})


def cropped(split: bool) -> ModelProto:
    """The same over what a kernel leaves of one of two inputs of one size: one element of three."""
    first = node("Conv", "x w", "c")
    apart = [node("Conv", "c w", "a", pads=[1] * 4), node("Conv", "z w", "b", pads=[1] * 4), node("Add", "a b", "y")]
    at_once = [node("Add", "c z", "s"), node("Conv", "s w", "y", pads=[1] * 4)]
    return model([first, *(apart if split else at_once)], {"w": rand(3, 3, 3, 3)}, IMAGE, inputs={"z": IMAGE})


def stacked(at_once: bool) -> ModelProto:
    """A kernel over two inputs: of the sum of its halves, one may be repeated."""
    w = rand(4, 6, 3, 3)
    whole = [node("Concat", "x z", "s", axis=1), node("Conv", "s w", "y", pads=[1] * 4)]
    apart = [node("Conv", "x v", "a", pads=[1] * 4), node("Conv", "z u", "b", pads=[1] * 4), node("Add", "a b", "y")]
    parameters = {"w": w} if at_once else {"v": w[:, :3], "u": w[:, 3:]}
    return model(whole if at_once else apart, parameters, IMAGE, inputs={"z": ("N", 3, "P", "Q")})


def strided(merged: bool) -> ModelProto:
    """Branches whose sizes agree at even sizes; at 3, one element of the second is repeated."""
    large, small = rand(3, 3, 3, 3), rand(3, 3, 2, 2)
    if merged:
        large[:, :, 1:, 1:] += small
        return model([node("Conv", "x w", "y", strides=[2, 2], pads=[1, 1, 0, 0])], {"w": large}, IMAGE)
    nodes = [
        node("Conv", "x w", "a", strides=[2, 2], pads=[1] * 4),
        node("Conv", "x v", "b", strides=[2, 2]),
        node("Add", "a b", "y"),
    ]
    return model(nodes, {"w": large, "v": small}, IMAGE)


def nothing(axis: int) -> ModelProto:
    f, n = f"f{axis}", f"n{axis}"
    nodes = [node("Flatten", "x", f, axis=axis), node("Neg", f, n), node("Add", f"{f} {n}", "y")]
    return model(nodes, {}, IMAGE)


def cast(off: float) -> ModelProto:
    """A weight in float32, and half the precision after it."""
    nodes = [node("Mul", "x w", f"a{off}"), node("Floor", f"a{off}", f"b{off}"), node("Cast", f"b{off}", "y", to=10)]
    return model(nodes, {"w": np.array([1 - off], np.float32)}, IMAGE)


def largest(off: float) -> ModelProto:
    """A weight in float64, and no precision after it."""
    nodes = [node("Mul", "x w", f"a{off}"), node("ArgMax", f"a{off}", "y", axis=0)]
    return model(nodes, {"w": np.array([1, 1 + off])}, (2,), dtype=TensorProto.DOUBLE)


def named(op: str) -> ModelProto:
    """A tensor that is called as the proof calls those of one graph alone."""
    nodes = [node("Tanh", "x", "-"), node("Neg", "-", "y")]
    if op != "Tanh":
        nodes[:1] = [node(op, "x", "a"), nodes[0]]
    nodes[-1].input[0] = "a" if op != "Tanh" else "original a"
    nodes[-2].output[0] = "original a"
    return model(nodes, {}, IMAGE)


def empty(stride: int) -> ModelProto:
    """No channels at all, over sizes that shape inference numbers alike in both graphs."""
    nodes = [
        node("MaxPool", "x", f"p{stride}", kernel_shape=[2, 2], strides=[stride, stride]),
        node("Slice", f"p{stride} zero zero one", "y"),
    ]
    return model(nodes, {"zero": whole(0), "one": whole(1)}, IMAGE)


def pooled(as_kernel: bool, shape: Any = IMAGE) -> ModelProto:
    """A window of which a part hangs over maps of one element: the runtime still has a position there."""
    if as_kernel:
        weight = np.full((3, 1, 2, 2), 0.25, np.float32)
        return model([node("Conv", "x w", "y", group=3, strides=[2, 2])], {"w": weight}, shape)
    return model([node("AveragePool", "x", "y", kernel_shape=[2, 2], strides=[2, 2])], {}, shape)


def backwards(bounds: tuple[int, int, int]) -> ModelProto:
    """A slice of channels: that of a range which is out of reach is empty, says the standard."""
    parameters = {name: whole(n) for name, n in zip(("start", "end", "step"), bounds, strict=True)}
    return model([node("Slice", "x start end one step", "y")], {"one": whole(1), **parameters}, (1, 3, 4, 4))


def declared(op: str, kernel: list[int] | None) -> ModelProto:
    """A kernel of 3x3 that its node may say to be another."""
    return model([node(op, "x w", "y", **({"kernel_shape": kernel} if kernel else {}))], {"w": rand(3, 3, 3, 3)}, IMAGE)


DOUBTFUL: dict[str, tuple[Callable[[Any], ModelProto], Any, Any, dict[str, np.ndarray]]] = {
    "another default of an input": (default, 1.0, 2.0, X),
    "an input without its default": (default, 1.0, None, X),
    "an output named once more": (twice_out, True, False, X),
    "another overload of a function": (overloaded, "one", "two", X),
    "a sparse constant that a body reads": (sparse, 1.0, 2.0, {"x": rand(2, 3)}),
    "a shape that the caller gives": (reshaped, False, True, {"x": rand(2, 3, 4, 5), "s": whole(2, 12, 5)}),
    "a shape of what is a constant elsewhere": (like, "", "initializer", {"x": rand(1, 3, 8, 8), "z": rand(3, 64)}),
    "a shape of what is no more": (like, "", "stale", {"x": rand(1, 3, 8, 8), "z": rand(3, 64)}),
    "a term repeated under a kernel": (sum_of_two, False, True, {"x": rand(1, 3, 5, 5), "z": rand(1, 3, 1, 1)}),
    "a term repeated under a kernel, for its crop": (
        cropped, False, True, {"x": rand(1, 3, 3, 3), "z": rand(1, 3, 3, 3)},
    ),
    "a term repeated that is stacked": (stacked, False, True, {"x": rand(1, 3, 5, 5), "z": rand(1, 3, 1, 1)}),
    "a term repeated at one size": (strided, False, True, {"x": rand(1, 3, 3, 3)}),
    "a weight before a cast": (cast, 0.0, 1e-4, {"x": np.ones((1, 3, 1, 1), np.float32)}),
    "a weight before a choice": (largest, 0.0, 1e-8, {"x": np.ones(2)}),
    "a name that the proof gives": (named, "Sin", "Tanh", X),
    "the sizes of no channels": (empty, 1, 2, X),
    "the sizes of what vanishes": (nothing, 0, 2, X),
    "a window that is larger than its map": (pooled, False, True, {"x": rand(1, 3, 1, 1)}),
    "a window that is larger than all maps": (
        lambda as_kernel: pooled(as_kernel, (1, 3, 1, 1)), False, True, {"x": rand(1, 3, 1, 1)},
    ),
    "a reversal up to the largest number": (backwards, (-1, 2**63 - 1, -1), (0, 0, 1), X),
    "a reversal up to the largest number of 32 bits": (backwards, (-1, 2**31 - 1, -1), (0, 0, 1), X),
    "a kernel of two sizes": (partial(declared, "Conv"), [1, 1], None, X),
    "a transposed kernel of two sizes": (partial(declared, "ConvTranspose"), [1, 1], None, X),
    "a reversal from before the start": (backwards, (-9, -10, -1), (0, 0, 1), X),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL)
def test_graphs_that_may_differ_are_not_proven_equal(name: str) -> None:
    build, a, b, feeds = DOUBTFUL[name]
    original, result = build(a), build(b)
    assert outcome(original, feeds) != outcome(result, feeds)
    assert not certify_onnx(original, result).holds
    assert certify_onnx(original, build(a)).different == 0


@pytest.mark.parametrize("size", ["H", 8])
@pytest.mark.parametrize(("stride", "border"), [(1, 0), (2, 1), (3, 1)])
def test_a_window_that_fits_every_map_is_read(size: int | str, stride: int, border: int) -> None:
    """With a stride of 1 nothing is rounded; with a border of one element, the least map has three."""
    amounts = whole(0, 0, border, border, 0, 0, border, border)
    parameters = {"amounts": amounts, "w": np.full((3, 1, 3, 3), 1 / 9)}
    steps = {"strides": [stride, stride]}
    made = [
        model([node("Pad", "x amounts", "b"), last], parameters, (1, 3, size, size), dtype=TensorProto.DOUBLE)
        for last in (
            node("AveragePool", "b", "y", kernel_shape=[3, 3], **steps),
            node("Conv", "b w", "y", group=3, **steps),
        )
    ]
    assert certify_onnx(made[0], made[1]).holds


def test_what_is_stacked_has_one_size() -> None:
    """However the sizes of the two inputs are called: a concatenation repeats nothing."""
    assert certify_onnx(stacked(True), stacked(False)).holds


def old(op: str, attributes: dict[str, Any], parameters: dict[str, np.ndarray], opset: int) -> ModelProto:
    body = helper.make_graph(
        [helper.make_node(op, ["x", *parameters], ["y"], **attributes)],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 4, 4))],
        [numpy_helper.from_array(a, name) for name, a in parameters.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)


def test_what_old_operator_sets_meant_otherwise_is_not_read() -> None:
    """Their attributes name the axis of a broadcast, and the mode of a BatchNormalization."""
    parts = {name: rand(4, seed=i) ** 2 for i, name in enumerate("gbmv")}
    pairs = [
        [old("Add", {"broadcast": 1, "axis": axis}, {"b": rand(4)}, 6) for axis in (1, 3)],
        [old("BatchNormalization", {"is_test": mode}, parts, 6) for mode in (0, 1)],
        [old("Pad", {"paddings": [0, 0, n, 0, 0, 0, 1 - n, 0]}, {}, 1) for n in (0, 1)],
    ]
    for original, result in pairs:
        assert not certify_onnx(original, result).holds


def test_a_stride_along_one_position_is_no_difference() -> None:
    """Of 6 columns either slice leaves the fourth."""
    slices = [
        model(
            [node("Slice", "x three four three step", "y")],
            {"three": whole(3), "four": whole(4), "step": whole(step)},
            (1, 3, 5, 6),
        )
        for step in (1, 3)
    ]
    assert certify_onnx(slices[0], slices[1]).different == 0


def times_size(pick: Any) -> ModelProto:
    """A map of the sizes N, 3, H, 4 times what ``pick`` takes of its shape, or times a number."""
    constants = {"one": np.array(1), "two": np.array(2), "last": whole(-1), "end": whole(2**62), "back": whole(-1)}
    nodes = [node("Relu", "x", "r"), node("Shape", "r", "s")]
    if isinstance(pick, int):
        constants["f"], nodes = np.array(pick, np.float32), nodes[:1]
    else:
        nodes += [pick, node("Cast", "p", "f", to=TensorProto.FLOAT)]
    nodes.append(node("Mul", "r f", "y"))
    used = {name: a for name, a in constants.items() if any(name in n.input for n in nodes)}
    return model(nodes, used, ("N", 3, "H", 4))


PICKED = [(node("Gather", "s one", "p"), 3), (node("Slice", "s last end", "p"), 4)]


@pytest.mark.parametrize(("pick", "number"), PICKED)
def test_an_size_beside_open_ones(pick: Any, number: int) -> None:
    original, result = times_size(pick), times_size(number)
    assert outcome(original, {"x": rand(2, 3, 5, 4)}) == outcome(result, {"x": rand(2, 3, 5, 4)})
    assert certify_onnx(original, result).holds
    assert not certify_onnx(original, times_size(number + 1)).holds


OPEN = [node("Gather", "s two", "p"), node("Slice", "s last end - back", "p")]


@pytest.mark.parametrize("pick", OPEN)
def test_an_open_size_is_no_number(pick: Any) -> None:
    """Or may be read otherwise by another implementation: in reverse."""
    for number in (3, 4, 5):
        assert not certify_onnx(times_size(pick), times_size(number)).holds


@pytest.mark.parametrize("wrong", ONNX_VALUES, ids=lambda f: f.name)
def test_what_the_rewriter_knows_is_not_believed(wrong: Fault) -> None:
    """While it reads types, constants and attributes wrongly, what it emits is not proven."""
    assert wrong.onnx is not None
    original = wrong.onnx()
    with planted(wrong.changes):
        emitted = fuse_model(original, verify="off")[0]
        found = certify_onnx(original, emitted)
    assert not found.holds
    assert certify_onnx(original, fuse_model(original, verify="off")[0]).holds


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 3), (2, 2)])
@pytest.mark.parametrize("op", ["Relu", "Sigmoid"])
def test_one_value_that_is_added_several_times(op: str, before: int, after: int) -> None:
    """Also where neither graph has a name for it that the other knows."""
    made = [
        model([node(op, "x", name), node("Sum", " ".join([name] * times), "y")], {}, ("N", 3))
        for name, times in (("s", before), ("t", after))
    ]
    assert certify_onnx(made[0], made[1]).holds == (before == after)


@pytest.mark.parametrize("before", ["Concat", "Sum"])
@pytest.mark.parametrize("after", ["Identity", "Neg", "Relu"])
def test_an_output_loses_no_channel(before: str, after: str) -> None:
    """Within a graph a tensor may have fewer channels than it had, for what reads it says what is left of it."""
    axis = {"axis": 1} if before == "Concat" else {}
    made = [
        model([node("Relu", "x", name), last], {}, ("N", 3))
        for name, last in (("t", node(before, "t t", "y", **axis)), ("u", node(after, "u", "y")))
    ]
    made[1].graph.output[0].CopyFrom(made[0].graph.output[0])
    assert not certify_onnx(made[0], made[1]).holds


def measured(target: str) -> ModelProto:
    """Its output has the size that ``x``, reshaped, has along one axis; a vector has taken the last axis away."""
    nodes = [node("Reshape", "x t", "r"), node("MatMul", "r v", "z"), node("Shape", "r", "s")]
    nodes += [node("Gather", f"s {target}", "g", axis=0), node("Reshape", "r g", "y")]
    orders = {"first": whole(0, 1, 2, 3), "second": whole(1, 0, 2, 3)}
    made = model(nodes, {"v": rand(5), **orders}, ("n",), outputs="y z", inputs={"t": (4,)})
    made.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    return made


def test_a_vector_takes_an_axis_away_from_a_product() -> None:
    before, after = measured("first"), measured("second")
    feeds = {"x": rand(120), "t": whole(2, 3, 4, 5)}
    assert outcome(before, feeds) != outcome(after, feeds)
    assert "equal" not in {w.verdict for w in certify_onnx(before, after).windows if w.where == "y"}
    assert certify_onnx(before, after).windows


@pytest.mark.parametrize("allowzero", [0, 1])
def test_a_size_that_a_reshape_copies_where_it_is_zero(allowzero: int) -> None:
    def reading(source: str) -> ModelProto:
        nodes = [node("Shape", "z", "s"), node("Concat", "s three", "t", axis=0)]
        nodes += [node("Reshape", "x t", "r", allowzero=allowzero), node("Shape", "r", "q")]
        nodes += [node("Gather", f"{source} zero", "g", axis=0), node("Mul", "g one", "y")]
        numbers = {"three": whole(3), "zero": np.array(0), "one": np.array(1)}
        return model(nodes, numbers, ("a", 3), outputs="y r", inputs={"z": ("s",)})

    before, after = reading("q"), reading("s")
    feeds = {"x": rand(2, 3), "z": rand(0)}
    proven = all(w.verdict == "equal" for w in certify_onnx(before, after).windows)
    assert not proven or outcome(before, feeds) == outcome(after, feeds)
    assert proven == bool(allowzero)


def test_a_size_that_may_be_zero_divides_nothing() -> None:
    def sized(nodes: list[Any]) -> ModelProto:
        head = [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Gather", "s one", "w")]
        return model([*head, *nodes], {"zero": np.array(0), "one": np.array(1)}, ("A", "B"), outputs="y w n")

    before = sized([node("Identity", "w", "y")])
    after = sized([node("Mul", "n w", "p"), node("Div", "p n", "y")])
    assert outcome(after, {"x": rand(0, 3)}) == [] != outcome(before, {"x": rand(0, 3)})
    assert {w.verdict for w in certify_onnx(before, after).windows} == {"undecided"}


@pytest.mark.parametrize("symbol", ["z[0]", "original unk__0", "unk__0"])
def test_a_symbol_that_reads_like_a_size_without_a_name_is_another(symbol: str) -> None:
    def reading(source: str) -> ModelProto:
        nodes = [node("NonZero", "m", "found"), node("Transpose", "found", "f", perm=[1, 0])]
        nodes += [
            node("Shape", source, "s"),
            node("Expand", "one s", "e"),
            node("ReduceSum", "e axes", "y", keepdims=0),
        ]
        numbers = {"one": np.ones((1,), np.float32), "axes": whole(0)}
        inputs = {"z": (None, 2), "m": ("k", 2)}
        return model(nodes, numbers, (symbol, 2), outputs="y f", inputs=inputs)

    feeds = {"x": rand(2, 2), "z": rand(3, 2), "m": np.ones((2, 2), np.float32)}
    assert [outcome(reading(name), feeds)[0][1] for name in "zfx"] == [[3.0, 3.0], [4.0, 4.0], [2.0, 2.0]]
    for before in "zfx":
        for after in "zfx":
            assert certify_onnx(reading(before), reading(after)).holds == (before == after)
