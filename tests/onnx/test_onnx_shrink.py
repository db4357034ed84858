"""Channels that are constant or that nothing reads leave the graph, with all that belongs to them; or stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto
from onnx_models import batchnorm, fuse, model, node, norm, rand

from reparamc.certificate.onnx import certify_onnx
from reparamc.onnx.fuse import fuse_model

DEAD = [1, 3, 4]
"""Of six channels."""
SHRINK: dict[str, Any] = {"passes": ["lossless-shrink"]}


def dead(array: np.ndarray, axis: int = 0, value: float = 0.0) -> np.ndarray:
    """``array`` with one number in the place of what belongs to the dead channels."""
    array = array.copy()
    np.moveaxis(array, axis, 0)[DEAD] = value
    return array


def conv(x: str, w: str, y: str, **attributes: Any) -> NodeProto:
    return node("Conv", f"{x} {w} {w}b", y, **attributes)


FIRST = {"a": dead(rand(6, 3, 3, 3)), "ab": rand(6)}
LAST = {"z": rand(4, 6, 1, 1), "zb": rand(4)}
PADDED: dict[str, Any] = {"pads": [1, 1, 1, 1]}
START, END = conv("x", "a", "c", **PADDED), conv("r", "z", "y")
SHAPE = ("N", 3, "H", "W")


def made(*nodes: NodeProto, first: NodeProto = START, last: NodeProto = END, **parameters: Any) -> ModelProto:
    """A convolution with three dead filters, and what reads it up to another convolution."""
    given = {**FIRST, **LAST, **parameters}
    used = {name for n in (first, *nodes, last) for name in n.input}
    return model([first, *nodes, last], {k: v for k, v in given.items() if k in used}, SHAPE, opset=18)


def widths(original: ModelProto, **options: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in the result, by what it computes. All of it is proven, by itself and as a whole."""
    fused, report = fuse(original, **SHRINK, **options)
    assert report.certificate is None or not report.certificate.undecided
    whole = certify_onnx(original, fused)
    assert (whole.different, whole.undecided) == (0, 0), whole.windows
    shapes = {t.name: tuple(t.dims) for t in fused.graph.initializer}
    kernels = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    return {n.output[0]: shapes[n.input[1]] for n in fused.graph.node if n.op_type in kernels}


GELU = [
    node("Div", "c two", "d"), node("Erf", "d", "e"), node("Add", "e one", "f"), node("Mul", "c f", "g"),
    node("Mul", "g half", "r"),
]  # fmt: skip
NUMBERS = {name: np.array(n, np.float32) for name, n in {"two": 1.41421356, "one": 1.0, "half": 0.5}.items()}
HALVED = np.array([1, 1, 2, 2], np.float32)
THROUGH: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "relu": ([node("Relu", "c", "r")], {}),
    "clip": ([node("Clip", "c one two", "r")], NUMBERS),
    "gelu": (GELU, NUMBERS),
    "max pool": ([node("MaxPool", "c", "r", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {}),
    "average": ([node("Relu", "c", "p"), node("AveragePool", "p", "r", kernel_shape=[2, 2], ceil_mode=1)], {}),
    "resize": ([node("Relu", "c", "p"), node("Resize", "p - s", "r", mode="linear")], {"s": HALVED}),
    "norm": ([batchnorm("c", "n", "n"), node("Sigmoid", "n", "r")], norm("n", 6)),
    "means": ([node("Relu", "c", "p"), node("GlobalAveragePool", "p", "r")], {}),
    "depthwise": (
        [node("Relu", "c", "p"), node("Conv", "p d db", "r", group=6)], {"d": rand(6, 1, 2, 2), "db": rand(6)},
    ),
    "excitation": (
        [node("GlobalAveragePool", "c", "m"), conv("m", "s", "t"), node("HardSigmoid", "t", "u"),
         node("Mul", "c u", "r")],
        {"ab": dead(rand(6)), "s": rand(6, 6, 1, 1), "sb": rand(6)},
    ),
    "split": (
        [node("Relu", "c", "p"), node("Split", "p parts", "p1 p2", axis=1), node("Tanh", "p2", "q"),
         node("Concat", "q p1", "r", axis=1)],
        {"parts": np.array([2, 4])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THROUGH)
def test_dead_filters_leave(name: str) -> None:
    nodes, parameters = THROUGH[name]
    found = widths(made(*nodes, **parameters))
    assert found["c"] == (3, 3, 3, 3)
    assert found["y"] == (4, 3, 1, 1)


def test_a_matrix_after_the_mean() -> None:
    last = node("Gemm", "f z zb", "y", transB=1)
    nodes = [node("Relu", "c", "r"), node("GlobalAveragePool", "r", "m"), node("Flatten", "m", "f")]
    assert widths(made(*nodes, last=last, z=rand(4, 6)))["y"] == (4, 3)


@pytest.mark.parametrize("beta", [-1.0, 1.0])
def test_a_constant_meets_a_border_only_if_it_is_zero(beta: float) -> None:
    """What a ReLU makes zero is zero beyond the border as well."""
    parameters: dict[str, Any] = {**norm("n", 6), "a": rand(6, 3, 3, 3), "z": rand(4, 6, 3, 3)}
    parameters |= {"n.g": dead(parameters["n.g"]), "n.b": dead(parameters["n.b"], value=beta)}
    nodes = [batchnorm("c", "n", "n"), node("Relu", "n", "r")]
    padded = widths(made(*nodes, last=conv("r", "z", "y", **PADDED), **parameters))
    assert padded["c"][0] == (3 if beta < 0 else 6)
    assert widths(made(*nodes, last=conv("r", "z", "y"), **parameters))["c"][0] == 3


def test_what_nothing_reads_leaves() -> None:
    parameters: dict[str, Any] = {"a": rand(6, 3, 3, 3), "z": dead(rand(4, 6, 1, 1), axis=1)}
    assert widths(made(node("Elu", "c", "r"), **parameters)) == {"c": (3, 3, 3, 3), "y": (4, 3, 1, 1)}


def test_what_a_selection_leaves_out_leaves() -> None:
    nodes = [node("Elu", "c", "e"), node("Gather", "e some", "r", axis=1)]
    parameters: dict[str, Any] = {"a": rand(6, 3, 3, 3), "some": np.array([4, 0]), "z": rand(4, 2, 1, 1)}
    assert widths(made(*nodes, **parameters)) == {"c": (2, 3, 3, 3), "y": (4, 2, 1, 1)}


def test_a_selection_of_images_is_none_of_channels() -> None:
    """As many as there are channels."""
    given: dict[str, Any] = {"a": rand(3, 3, 1), "ab": rand(3), "some": np.array([1, 0]), "by": rand(1, 1, 1)}
    nodes = [conv("x", "a", "c", pads=[1, 1]), node("Gather", "c some", "r", axis=0), node("Div", "r by", "y")]
    fused, _ = fuse(model(nodes, given, (3, 3, "L"), opset=18), verify="off", **SHRINK)
    assert [t.dims[0] for t in fused.graph.initializer if t.name == "a"] == [3]


def test_what_only_that_read_leaves_as_well() -> None:
    """Of a convolution in between, the rows leave that nothing reads, and the columns that only these read."""
    middle = rand(6, 6, 1, 1)
    middle[[0, 2, 5]] = dead(middle[[0, 2, 5]], axis=1)
    nodes = [node("Elu", "c", "e"), conv("e", "w", "v"), node("Elu", "v", "r")]
    parameters: dict[str, Any] = {
        "a": rand(6, 3, 3, 3),
        "w": middle,
        "wb": rand(6),
        "z": dead(rand(4, 6, 1, 1), axis=1),
    }
    assert widths(made(*nodes, **parameters)) == {"c": (3, 3, 3, 3), "v": (3, 3, 1, 1), "y": (4, 3, 1, 1)}


@pytest.mark.parametrize("whole", [True, False])
def test_a_residual_stream_leaves_together_or_not_at_all(whole: bool) -> None:
    second = rand(6, 6, 3, 3)
    nodes = [
        node("Relu", "c", "p"), node("Conv", "p w wb", "v", **PADDED), node("Add", "p v", "s"), node("Relu", "s", "r"),
    ]  # fmt: skip
    parameters: dict[str, Any] = {
        "ab": dead(rand(6), value=-1.0),
        "w": dead(second) if whole else second,
        "wb": dead(rand(6)),
    }
    found = widths(made(*nodes, **parameters))
    assert found == {"c": (n := 3 if whole else 6, 3, 3, 3), "v": (n, n, 3, 3), "y": (4, n, 1, 1)}


def test_one_channel_stays() -> None:
    found = widths(made(node("Relu", "c", "r"), a=np.zeros((6, 3, 3, 3), np.float32)))
    assert found == {"c": (1, 3, 3, 3), "y": (4, 1, 1, 1)}


LEFT: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "softmax over channels": ([node("Softmax", "c", "r", axis=1)], {}),
    "a size is read": (
        [node("Shape", "c", "h", start=1, end=2), node("Cast", "h", "k", to=1), node("Mul", "c k", "r")], {},
    ),
    "each group reads several": ([node("Conv", "c g gb", "r", group=2)], {"g": rand(6, 3, 1, 1), "gb": rand(6)}),
    "a factor of each channel": ([node("PRelu", "c p", "r")], {"p": rand(6, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_it_stays(name: str) -> None:
    nodes, parameters = LEFT[name]
    assert widths(made(*nodes, **parameters))["c"] == (6, 3, 3, 3)


def test_an_output_keeps_all_channels() -> None:
    nodes = [START, node("Relu", "c", "r"), END]
    assert widths(model(nodes, {**FIRST, **LAST}, SHAPE, outputs="y r"))["c"] == (6, 3, 3, 3)


def test_the_rest_goes_on_with_what_is_left() -> None:
    nodes = [conv("x", "a", "c"), batchnorm("c", "n", "n"), node("Relu", "n", "r"), END]
    gamma = {**norm("n", 6), "n.g": dead(norm("n", 6)["n.g"])}
    fused, report = fuse(model(nodes, {**FIRST, **LAST, **gamma}, SHAPE))
    assert (report.passes["lossless-shrink"], report.passes["bn-folding"]) == (9 - 3, 1)
    assert report.after.parameters == 3 * 27 + 3 + 4 * 3 + 4 < report.before.parameters
    assert [len(n.input) for n in fused.graph.node] == [3, 1, 3]
    assert set(report.provenance) <= {t.name for t in fused.graph.initializer}


def doubled(array: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """``array`` with rows 1, 3 and 4 that are multiples of rows 0, 2 and 5."""
    array = array.copy()
    array[[1, 3, 4]] = np.float32(factor) * array[[0, 2, 5]]
    return array


def multiples(factor: Any = 1.0, **parameters: Any) -> dict[str, Any]:
    return {"a": doubled(rand(6, 3, 3, 3), factor), "ab": doubled(rand(6), factor), **parameters}


EQUAL: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "sigmoid": ([node("Sigmoid", "c", "r")], {}),
    "clip": ([node("Clip", "c one two", "r")], NUMBERS),
    "max pool": THROUGH["max pool"],
    "square": ([node("Mul", "c c", "p"), node("Tanh", "p", "r")], {}),
    "norm": (THROUGH["norm"][0], {name: doubled(v) for name, v in norm("n", 6).items()}),
    "depthwise": (THROUGH["depthwise"][0], {"d": doubled(rand(6, 1, 2, 2)), "db": doubled(rand(6))}),
    "another value beside": (
        [node("Elu", "c", "e"), conv("x", "s", "t", **PADDED), node("Concat", "t e", "r", axis=1)],
        {"s": rand(2, 3, 3, 3), "sb": rand(2), "z": rand(4, 8, 1, 1)},
    ),
    "the value twice": (
        [node("Elu", "c", "e"), node("Concat", "e e", "r", axis=1)], {"z": rand(4, 12, 1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_equal_channels_are_one(name: str) -> None:
    nodes, parameters = EQUAL[name]
    found = widths(made(*nodes, **multiples(**parameters)))
    assert found["c"] == (3, 3, 3, 3)
    assert found["y"][1] in (3, 5, 6)


HOMOGENEOUS: dict[str, list[NodeProto]] = {
    "relu": [node("Relu", "c", "r")],
    "leaky": [node("LeakyRelu", "c", "r", alpha=0.2)],
    "prelu": [node("PRelu", "c half", "r")],
    "pooled": [node("Relu", "c", "p"), node("AveragePool", "p", "r", kernel_shape=[3, 3], pads=[1, 1, 1, 1])],
}


@pytest.mark.parametrize("factor", [2.0, 0.125])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_a_positive_factor_passes_what_is_homogeneous(name: str, factor: float) -> None:
    for last in (conv("r", "z", "y"), conv("r", "k", "y", **PADDED)):
        found = widths(made(*HOMOGENEOUS[name], last=last, **multiples(factor, **NUMBERS, k=rand(4, 6, 3, 3),
                                                                     kb=rand(4))))  # fmt: skip
        assert (found["c"][0], found["y"][1]) == (3, 3)


NOT_ALIKE: dict[str, tuple[list[NodeProto], dict[str, Any]]] = {
    "a factor before a sigmoid": ([node("Sigmoid", "c", "r")], multiples(2.0)),
    "a negative factor": ([node("Relu", "c", "r")], multiples(-1.0)),
    "a factor that rounds": ([node("Relu", "c", "r")], multiples(1.1)),
    "another bias": ([node("Relu", "c", "r")], multiples(ab=rand(6))),
    "another shift of the norm": ([batchnorm("c", "n", "m"), node("Relu", "m", "r")], multiples(**norm("n", 6))),
    "a slope of each channel": ([node("PRelu", "c p", "r")], multiples(p=rand(6, 1, 1))),
    "a reader of all channels": ([node("Softmax", "c", "r", axis=1)], multiples()),
    "other kernels of a depthwise one": (THROUGH["depthwise"][0], multiples(**THROUGH["depthwise"][1])),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_channels_that_are_not_alike_stay(name: str) -> None:
    nodes, parameters = NOT_ALIKE[name]
    assert widths(made(*nodes, **parameters))["c"] == (6, 3, 3, 3)


def test_a_number_in_the_last_place_keeps_channels_apart() -> None:
    parameters = multiples()
    parameters["a"][4, 2, 2, 2] = np.nextafter(parameters["a"][4, 2, 2, 2], np.float32(9))
    assert widths(made(node("Relu", "c", "r"), **parameters))["c"] == (4, 3, 3, 3)


@pytest.mark.parametrize(("places", "left"), [((9, 20), 4), ((20, 9), 6)])
def test_kernels_that_are_mostly_zero(places: tuple[int, int], left: int) -> None:
    """Rows 0 and 1, and 2 and 3, have their one number at the same place or not."""
    kernel = np.zeros((6, 27), np.float32)
    kernel[[0, 2], places[0]] = kernel[[1, 3], 9] = 1.5
    kernel[4:] = rand(2, 27)
    kernel[2:4] *= 2
    parts = {"a": kernel.reshape(6, 3, 3, 3), "ab": np.array([0, 0, 1, 1, 0, 0], np.float32)}
    assert widths(made(node("Sigmoid", "c", "r"), **parts))["c"] == (left, 3, 3, 3)


@pytest.mark.parametrize("level", ["off", "full"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_zero_times_what_is_not_finite_is_not_zero(number: float, level: str) -> None:
    """Nothing reads the channel, and still it makes all others NaN."""
    a, z = rand(6, 3, 3, 3), rand(4, 6, 1, 1)
    a[3], z[:, 3] = number, 0
    original = made(node("Relu", "c", "r"), a=a, z=z)
    _, report = fuse_model(original, verify=level)
    assert report.passes["lossless-shrink"] == 0
    assert not report.failed


def test_a_value_added_to_itself_keeps_its_multiples() -> None:
    assert widths(made(node("Add", "c c", "r"), **multiples(2.0)))["y"] == (4, 3, 1, 1)


def test_all_channels_of_a_kernel_over_one_are_multiples() -> None:
    """Also those that stay apart, because the factor between them would round."""
    kernel = np.array([-1.3886062, -2.025559, 1.3886062, 2.025559, 2.025559, -4.1658187], np.float32)
    parts = {"a": kernel.reshape(6, 1, 1, 1), "z": rand(4, 6, 3, 3), "zb": rand(4)}
    nodes = [node("Conv", "x a", "c"), conv("c", "z", "y", **PADDED), node("Sigmoid", "c", "u"), conv("u", "s", "v")]
    found = widths(model(nodes, {**parts, "s": rand(2, 6, 1, 1), "sb": rand(2)}, ("N", 1, "H", "W"), outputs="y v"))
    assert found["c"] == (5, 1, 1, 1)


@pytest.mark.parametrize("is_read", [True, False])
def test_what_follows_a_constant_is_known(is_read: bool) -> None:
    """A value whose only channel is constant cannot leave; what is made of it can."""
    nodes = [node("Conv", "x a ab", "c"), conv("c", "s", "t"), node("Tanh", "t", "r"), conv("r", "z", "y")]
    parts = {"a": np.zeros((1, 3, 3, 3), np.float32), "ab": rand(1), "s": rand(6, 1, 1, 1), "sb": rand(6)}
    outputs = "y c" if is_read else "y"
    assert widths(model(nodes, {**LAST, **parts}, SHAPE, outputs=outputs))["t"][0] == 1


def test_multiples_of_what_is_computed_from_no_elements() -> None:
    parts = {"none": rand(2, 0), "one": rand(0, 1), "three": np.array([[0.5, -2.0, -4.0]], np.float32), "m": rand(3, 3)}
    nodes = [node("MatMul", "x none", "a"), node("MatMul", "a one", "b"), node("MatMul", "b three", "c")]
    original = model([*nodes, node("MatMul", "c m", "y")], parts, (2, "N", 3, 2))
    _, report = fuse(original, **SHRINK, verify="region")
    assert report.failed == []


@given(st.data())
@settings(max_examples=20, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
def test_blocks_with_equal_channels(data: st.DataObject) -> None:
    """Any chain of layers, with any rows that are multiples of others: proven equal, and as small as by hand."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    nodes, parameters, x, read = [], {}, "x", 3
    depth, kept = data.draw(st.integers(1, 3)), []
    for layer in range(depth):
        kind = data.draw(st.sampled_from(["Relu", "Relu", "LeakyRelu", "Sigmoid"]))
        of = data.draw(st.lists(st.integers(0, 4), min_size=5, max_size=5))
        factors = [data.draw(st.sampled_from([1.0, 1.0, 0.5, 4.0])) for _ in of]
        w, bias = rng.standard_normal((5, read, 3, 3))[of], rng.standard_normal(5)[of]
        by = np.array(factors)
        parameters |= {f"w{layer}": (w * by[:, None, None, None]).astype(np.float32)}
        parameters |= {f"w{layer}b": (bias * by).astype(np.float32)}
        nodes += [conv(x, f"w{layer}", f"c{layer}", **(PADDED if data.draw(st.booleans()) else {}))]
        nodes += [node(kind, f"c{layer}", f"r{layer}")]
        x, read = f"r{layer}", 5
        kept.append(len(set(of) if kind != "Sigmoid" else set(zip(of, factors, strict=True))))
    nodes.append(node("Conv", f"{x} last", "y"))
    parameters["last"] = rand(2, 5, 1, 1)
    found = widths(model(nodes, parameters, ("N", 3, 9, 9)))
    assert [found[f"c{layer}"][0] for layer in range(depth)] == kept


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_blocks_with_dead_channels(data: st.DataObject) -> None:
    """Any chain of layers, with any channels of any of them zeroed: as small as by hand, and proven equal."""
    seed, depth = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(seed)
    nodes, parameters, x, read = [], {}, "x", 3
    kept, bias_of_dead = [3], data.draw(st.sampled_from([-1.0, 1.0]))
    for layer in range(depth):
        alive = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
        w, bias = rng.standard_normal((5, read, 3, 3)), rng.standard_normal(5)
        w[~np.array(alive)] = 0
        padded = data.draw(st.booleans())
        bias[~np.array(alive)] = bias_of_dead
        parameters |= {f"w{layer}": w.astype(np.float32), f"w{layer}b": bias.astype(np.float32)}
        nodes += [conv(x, f"w{layer}", f"c{layer}", **(PADDED if layer and padded else {}))]
        nodes += [node(data.draw(st.sampled_from(["Relu", "Relu", "Sigmoid"])), f"c{layer}", f"r{layer}")]
        x, read = f"r{layer}", 5
        kept.append(max(sum(alive), 1))
    nodes.append(node("Conv", f"{x} last", "y"))
    parameters["last"] = rand(2, 5, 1, 1)
    found = widths(model(nodes, parameters, SHAPE))
    assert found["y"][1] >= kept[-1] or min(kept) == 1  # what reads nothing but numbers is one as well
    if bias_of_dead < 0 and all(n.op_type != "Sigmoid" for n in nodes):
        assert [found[f"c{layer}"][0] for layer in range(depth)] == kept[1:] or min(kept) == 1


def test_parts_of_one_value_beside_it() -> None:
    """What is cut from a value is not taken for a part of it, where both are put side by side."""
    nodes = [START, node("Relu", "c", "p"), node("Add", "p c", "s"), node("Slice", "s one six one", "t"),
             node("Concat", "t s", "r", axis=1), END]  # fmt: skip
    given = {**multiples(), **LAST, "z": rand(4, 11, 1, 1), "one": np.array([1]), "six": np.array([6])}
    assert widths(model(nodes, given, SHAPE, opset=18))["c"] == (4, 3, 3, 3)
