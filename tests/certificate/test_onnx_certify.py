"""Certificates of ONNX models: what fusion makes is proven, and every fault planted in it is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_models import PAD, batchnorm, model, node, norm, rand

from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.proof import Certificate, Window
from reparamc.errors import VerificationError
from reparamc.onnx.fuse import fuse_model


def network(**options: object) -> ModelProto:
    """Two branches and a skip connection, a depthwise link with stride, groups, and a linear layer after a mean."""
    nodes = [
        node("Conv", "x w3", "c3", **PAD),
        batchnorm("c3", "n3", "b3"),
        node("Conv", "x w1", "c1"),
        batchnorm("c1", "n1", "b1"),
        batchnorm("x", "n0", "b0"),
        node("Sum", "b3 b1 b0", "s"),
        node("Relu", "s", "r"),
        node("Conv", "r wd", "cd", group=6, strides=[2, 2], dilations=[2, 1], pads=[2, 1, 2, 1]),
        batchnorm("cd", "nd", "d"),
        node("Relu", "d", "e"),
        node("Conv", "e wg bg", "cg", group=2, **PAD),
        node("Mul", "cg gain", "g"),
        node("Relu", "g", "h"),
        node("GlobalAveragePool", "h", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f wl bl", "l", transB=1),
        node("Mul", "l temper", "y"),
    ]
    parameters = {
        "w3": rand(6, 6, 3, 3), "w1": rand(6, 6, 1, 1), "wd": rand(6, 1, 3, 3), "wg": rand(4, 3, 3, 3), "bg": rand(4),
        "gain": rand(4, 1, 1), "wl": rand(5, 4), "bl": rand(5), "temper": rand(5),
        **norm("n3", 6, 1), **norm("n1", 6, 2), **norm("n0", 6, 3), **norm("nd", 6, 4),
    }  # fmt: skip
    return model(nodes, parameters, **options)  # pyright: ignore


def emitted(original: ModelProto, **options: Any) -> ModelProto:
    return fuse_model(original, verify="off", **options)[0]


def verdicts(certificate: Certificate) -> dict[str, str]:
    return {w.where: w.verdict for w in certificate.windows}


@pytest.mark.parametrize("shape", [("N", 6, "H", "W"), (2, 6, 9, 8)], ids=["open", "fixed"])
@pytest.mark.parametrize("opset", [9, 13, 17])
def test_what_fusion_makes_is_proven(shape: tuple[int | str, ...], opset: int) -> None:
    original = network(shape=shape, opset=opset)
    found = certify_onnx(original, emitted(original))
    assert found.holds
    assert verdicts(found) == dict.fromkeys(["s", "d", "g", "y"], "equal")
    assert 0 < found.units <= 1
    assert 0 < found.bound <= 2.0**-24
    assert found.congruent >= 5
    assert [w.before for w in found.windows] == [6, 2, 2, 2]
    assert [w.after for w in found.windows] == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_dtypes_are_held_to_their_own_precision(dtype: int) -> None:
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    parameters = {"w": (rand(4, 6, 3, 3) / 8).astype(kind), **{k: v.astype(kind) for k, v in norm("n", 4).items()}}
    original = model([node("Conv", "x w", "c", **PAD), batchnorm("c", "n", "y")], parameters, dtype=dtype)
    fused = emitted(original)
    found = certify_onnx(original, fused)
    assert found.holds
    change(
        fused,
        "y.weight",
        lambda w: w.__setitem__((0, 0, 0, 0), w[0, 0, 0, 0] * kind.type(1 + max(4 * np.finfo(kind).eps, 1e-12))),
    )
    assert verdicts(certify_onnx(original, fused)) == {"y": "different"}


def change(fused: ModelProto, name: str, edit: Callable[[np.ndarray], object]) -> None:
    for tensor in fused.graph.initializer:
        if tensor.name == name:
            array = np.array(numpy_helper.to_array(tensor))
            edit(array)
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            return
    raise AssertionError(f"no initializer {name}: {[t.name for t in fused.graph.initializer]}")


def producer(fused: ModelProto, output: str) -> NodeProto:
    return next(n for n in fused.graph.node if output in n.output)


def attribute(fused: ModelProto, output: str, name: str, value: object) -> None:
    found = producer(fused, output)
    kept = [a for a in found.attribute if a.name != name]
    del found.attribute[:]
    found.attribute.extend([*kept, helper.make_attribute(name, value)])


def swap(array: np.ndarray, i: object, j: object) -> None:
    array[i], array[j] = array[j].copy(), array[i].copy()  # type: ignore[index]


FAULTS: dict[str, tuple[str, str, Callable[[ModelProto], object]]] = {
    "one weight by a thousandth": ("s", "channel 2 reads channel 3 of 'x' at offset (-1, +0)", lambda m: change(
        m, "s.weight", lambda w: w.__setitem__((2, 3, 0, 1), w[2, 3, 0, 1] * 1.001))),
    "one sign": ("d", "channel 4 reads channel 4 of 'r'", lambda m: change(
        m, "d.weight", lambda w: w.__setitem__((4, 0, 1, 1), -w[4, 0, 1, 1]))),
    "one bias": ("g", "channel 1 adds", lambda m: change(m, "g.bias", lambda b: b.__setitem__(1, b[1] + 1e-3))),
    "two channels": ("y", "channel 3 reads", lambda m: change(m, "y.weight", lambda w: swap(w, 3, 4))),
    "order of groups": ("g", "reads channel", lambda m: change(
        m, "g.weight", lambda w: swap(w, slice(0, 2), slice(2, 4)))),
    "pads shifted": ("s", "at offset", lambda m: attribute(m, "s", "pads", [0, 1, 2, 1])),
    "pads left out": ("s", "elements", lambda m: attribute(m, "s", "pads", [0, 0, 0, 0])),
    "dilation": ("d", "", lambda m: attribute(m, "d", "dilations", [1, 1])),
    "stride": ("d", "elements", lambda m: attribute(m, "d", "strides", [2, 1])),
    "bias dropped": ("s", "adds", lambda m: producer(m, "s").input.pop()),
    "a parameter that nothing rewrote": ("b", "", lambda m: change(m, "stay.g", lambda g: g.__setitem__(0, 2 * g[0]))),
    "epsilon": ("b", "", lambda m: attribute(m, "b", "epsilon", 1e-2)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name: str) -> None:
    """``b`` is a BatchNorm that nothing folds."""
    original = network(shape=(1, 6, 9, 8), outputs="y b")
    original.graph.node.append(batchnorm("h", "stay", "b"))
    original.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in norm("stay", 4, 5).items())
    fused = emitted(original)
    assert certify_onnx(original, fused).holds
    where, reason, plant = FAULTS[name]
    plant(fused)
    found = certify_onnx(original, fused)
    assert not found.holds
    wrong = [w for w in found.windows if w.verdict == "different"]
    assert [w.where for w in wrong] == [where], found.windows
    assert wrong[0].units > 1
    assert reason in wrong[0].reason


def test_inputs_and_outputs_are_seen_from_outside() -> None:
    original = network()
    for plant in (
        lambda m: m.graph.output[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 7),
        lambda m: m.graph.input[0].__setattr__("name", "z"),
        lambda m: m.opset_import[0].__setattr__("version", 18),
    ):
        fused = emitted(original)
        plant(fused)
        assert certify_onnx(original, fused).different


def test_what_is_not_affine_is_equal_only_to_itself() -> None:
    nodes = [node("Conv", "x w", "c"), batchnorm("c", "n", "b"), node("LeakyRelu", "b", "y", alpha=0.1)]
    original = model(nodes, {"w": rand(4, 6, 1, 1), **norm("n", 4)})
    fused = emitted(original)
    attribute(fused, "y", "alpha", 0.2)
    found = certify_onnx(original, fused)
    assert verdicts(found) == {"b": "equal", "y": "undecided"}
    assert not found.holds


def test_another_operand_is_no_proof() -> None:
    """The wrong one is a function of the right one, so they might agree: nobody knows."""
    original = network(shape=(1, 6, 9, 8))
    fused = emitted(original)
    producer(fused, "g").input[0] = "r"
    assert verdicts(certify_onnx(original, fused))["g"] == "undecided"


def test_random_operators_are_equal_only_under_their_own_name() -> None:
    nodes = [
        node("RandomNormal", "", "r", shape=[1, 4, 1, 1], seed=1.0),
        node("Conv", "x w", "c"),
        node("Add", "c r", "y"),
    ]
    original = model(nodes, {"w": rand(4, 6, 1, 1)})
    fused = ModelProto()
    fused.CopyFrom(original)
    assert certify_onnx(original, fused).holds
    attribute(fused, "r", "seed", 2.0)
    assert verdicts(certify_onnx(original, fused)) == {"r": "undecided"}


def test_names_that_only_one_graph_has_are_no_obstacle() -> None:
    """A non-linear operator under a new name is the same function of equal operands."""
    nodes = [
        node("Conv", "x w", "c"),
        batchnorm("c", "n", "b"),
        node("Relu", "b", "r"),
        node("Conv", "r v", "y", **PAD),
    ]
    original = model(nodes, {"w": rand(4, 6, 1, 1), "v": rand(3, 4, 3, 3), **norm("n", 4)})
    fused = emitted(original)
    for old, new in (("b", "renamed_b"), ("r", "renamed_r")):
        producer(fused, old).output[0] = new
        for n in fused.graph.node:
            n.input[:] = [new if i == old else i for i in n.input]
    assert verdicts(certify_onnx(original, fused)) == {"y": "equal"}
    change(fused, "b.weight", lambda w: w.__setitem__((0, 0), 2 * w[0, 0]))
    assert not certify_onnx(original, fused).holds


def chain() -> ModelProto:
    """Kernel after kernel with a BatchNorm after each, and two heads over one mean."""
    nodes = [
        node("Conv", "x w1", "c1"),
        batchnorm("c1", "n1", "b1"),
        node("Conv", "b1 w2", "c2", strides=[2, 2], pads=[1, 1, 1, 1], group=16),
        batchnorm("c2", "n2", "b2"),
        node("Conv", "b2 w3", "c3"),
        batchnorm("c3", "n3", "b3"),
        node("GlobalAveragePool", "b3", "p"),
        node("Flatten", "p", "f"),
        *(
            made
            for i in "45"
            for made in (batchnorm("f", f"n{i}", f"b{i}"), node("Gemm", f"b{i} w{i} g{i}", f"l{i}", transB=1))
        ),
        node("Add", "l4 l5", "y"),
    ]
    parameters = {
        "w1": rand(16, 6, 1, 1), "w2": rand(16, 1, 3, 3), "w3": rand(32, 16, 1, 1), "w4": rand(5, 32),
        "w5": rand(5, 32, seed=1), "g4": rand(5), "g5": rand(5, seed=1),
        **norm("n1", 16, 1), **norm("n2", 16, 2), **norm("n3", 32, 3), **norm("n4", 32, 4), **norm("n5", 32, 5),
    }  # fmt: skip
    return model(nodes, parameters, (1, 6, 9, 8))


def test_kernels_are_compared_link_by_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever scales and shifts went over a link, no two kernels are multiplied out."""
    original = chain()
    fused = emitted(original, skip=["placing"])
    assert len([n for n in fused.graph.node if n.op_type == "BatchNormalization"]) < 5

    def fail(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("reparamc.certificate.proof._Proof._whole", fail)
        found = certify_onnx(original, fused)
        assert found.holds, found.windows
    for name in {t.name for t in fused.graph.initializer}:
        wrong = ModelProto()
        wrong.CopyFrom(fused)
        change(wrong, name, lambda a: a.reshape(-1).__setitem__(0, 1.001 * a.reshape(-1)[0] + 1e-4))
        assert not certify_onnx(original, wrong).holds, name


# Borders that a model writes itself

SIDES = {"top": np.s_[:, :, :1], "bottom": np.s_[:, :, -1:], "left": np.s_[:, :, :, :1], "right": np.s_[:, :, :, -1:]}


def bordered(regions: dict[str, Any], off: float = 0.0, **options: Any) -> tuple[ModelProto, ModelProto]:
    """s x + t with a border of t, under a kernel; and the kernel over x with a border of zeros."""
    s, t, w = (rand(*shape, seed=i).astype(float) for i, shape in enumerate(((3,), (3,), (4, 3, 3, 3))))
    nodes = [node("Mul", "x s", "m"), node("Add", "m t", "a"), node("Pad", "a amounts", "p0")]
    parameters = {"s": s.reshape(3, 1, 1), "t": t.reshape(3, 1, 1), "amounts": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    places = np.moveaxis(np.indices((2, 3, 6, 7)), 0, -1)
    for i, region in enumerate(regions.values()):
        at = places[region]
        parameters[f"at{i}"] = at
        parameters[f"what{i}"] = t[at[..., 1]] * (1 + off)
        nodes.append(node("ScatterND", f"p{i} at{i} what{i}", f"p{i + 1}", **options))
    nodes.append(node("Conv", f"p{len(regions)} w", "y"))
    wide: dict[str, Any] = {"dtype": TensorProto.DOUBLE, "shape": (2, 3, 4, 5), "opset": 18}
    merged = {"w": w * s[:, None, None], "b": w.sum(axis=(2, 3)) @ t}
    return model(nodes, {**parameters, "w": w}, **wide), model([node("Conv", "x w b", "y", **PAD)], merged, **wide)


def test_a_border_that_is_written_is_read() -> None:
    assert certify_onnx(*bordered(SIDES)).holds
    assert certify_onnx(*bordered(dict(reversed(SIDES.items())))).holds


@pytest.mark.parametrize(
    ("regions", "off", "options"),
    [
        (SIDES, 1e-6, {}),
        ({k: SIDES[k] for k in ("top", "bottom", "left")}, 0.0, {}),
        ({**SIDES, "top": np.s_[:, :, :2]}, 0.0, {}),
        ({**SIDES, "top": np.s_[:, :, 1:2]}, 0.0, {}),
        ({**SIDES, "top": np.s_[:1, :, :1]}, 0.0, {}),
        ({**SIDES, "top": np.s_[:, :, [0, 0]]}, 0.0, {}),
        ({**SIDES, "all": np.s_[:]}, 0.0, {}),
        (SIDES, 0.0, {"reduction": "add"}),
    ],
    ids=["value", "one side left", "two rows", "another row", "one image", "twice", "all", "added"],
)
def test_another_border_is_not(regions: dict[str, Any], off: float, options: dict[str, Any]) -> None:
    assert not certify_onnx(*bordered(regions, off, **options)).holds


@pytest.mark.parametrize(("number", "verdict"), [(8.0, "equal"), (8.5, "different")])
def test_functions_that_differ_are_read_in_the_place_of_their_calls(number: float, verdict: str) -> None:
    def calling(*factors: float) -> ModelProto:
        body = [helper.make_node("Constant", [], [f"k{n}"], value_float=k) for n, k in enumerate(factors)]
        names = ["a", *(f"t{n}" for n in range(len(factors) - 1)), "r"]
        body += [node("Mul", f"{names[n]} k{n}", names[n + 1]) for n in range(len(factors))]
        own = helper.make_function("own", "Scaled", ["a"], ["r"], body, [helper.make_opsetid("", 17)])
        calls = [node("Scaled", "x", "s", domain="own"), node("Relu", "s", "h"), node("Scaled", "h", "y", domain="own")]
        return model(calls, {}, domains=("own",), functions=[own])

    verdicts = {w.verdict for w in certify_onnx(calling(2.0, 4.0), calling(number)).windows}
    assert verdict in verdicts
    assert (verdicts == {"equal"}) == (verdict == "equal")


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_weights_stored_in_a_type_that_numpy_lacks(off: float) -> None:
    stored = rand(6, 6, 1, 1).astype(ml_dtypes.bfloat16)
    nodes = [node("Cast", "k", "w", to=TensorProto.FLOAT), node("Conv", "x w", "c"), node("Mul", "c two", "y")]
    made = model(nodes, {"k": stored, "two": np.array(2, np.float32)})
    fused = model([node("Conv", "x w", "y")], {"w": 2 * stored.astype(np.float32) + np.float32(off)})
    assert [w.verdict for w in certify_onnx(made, fused).windows] == ["different" if off else "equal"]


# What becomes of wrong rewrites


def test_the_shape_of_a_constant_that_shape_inference_does_not_know() -> None:
    head = [node("NonZero", "mask", "at"), node("Shape", "at", "sizes"), node("Reshape", "x sizes", "r")]
    parameters = {
        "mask": np.ones(6, np.float32),
        "a": np.array([2], np.float32),
        "b": np.array([4], np.float32),
        "ab": np.array([8], np.float32),
    }
    made = model([*head, node("Mul", "r a", "h"), node("Mul", "h b", "y")], parameters, (6,))
    fused = model([*head, node("Mul", "r ab", "y")], parameters, (6,))
    assert [w.verdict for w in certify_onnx(made, fused).windows] == ["equal"]


def test_a_shape_that_operators_make_of_constants_may_be_stored() -> None:
    head = [node("Shape", "x", "sizes"), node("Mod", "five three", "mod"), node("Reshape", "mod one", "end")]
    head += [node("Slice", "sizes zero end", "kept"), node("Concat", "kept rest", "shape", axis=0)]
    numbers = {"five": [5], "three": [3], "one": [1], "zero": [0], "rest": [12]}
    parameters = {name: np.array(n, np.int64) for name, n in numbers.items()} | {"a": np.array([2], np.float32)}
    tail = [node("Mul", "x a", "h"), node("Reshape", "h shape", "y")]
    moved = [node("Reshape", "x shape", "r"), node("Mul", "r a", "y")]
    made = model([*head, *tail], parameters, (2, 3, 4, 3))
    for target, verdict in (([2, 3, 12], "equal"), ([3, 2, 12], "undecided")):
        fused = model(moved, {"a": parameters["a"], "shape": np.array(target, np.int64)}, (2, 3, 4, 3))
        assert [w.verdict for w in certify_onnx(made, fused).windows if w.where == "y"] == [verdict]


def test_a_wrong_rewrite_is_undone_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from reparamc.onnx.emit import OnnxEdit

    add = OnnxEdit.add_initializer

    def perturbed(self: OnnxEdit, wanted: str, array: np.ndarray, dtype: np.dtype) -> str:
        return add(self, wanted, array * 1.001 if wanted == "d.weight" else array, dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", perturbed)
    original = network()
    fused, report = fuse_model(original)
    assert report.certificate is not None
    assert (report.certificate.equal, report.certificate.rolled_back) == (3, 1)
    (kept,) = (k for k in report.kept if k.name == "certificate")
    assert "with weight" in kept.reason
    (failure,) = report.failed
    assert (failure.check, failure.where) == ("certificate", kept.where)
    assert kept.reason in failure.reason
    assert "report this as a bug" in (report.warning or "")
    assert "\ncertified  3 of 3 tensors proven equal for every input size, 1 rolled back, " in report.table()
    kinds = [n.op_type for n in fused.graph.node]
    assert kinds.count("BatchNormalization") == 1
    assert certify_onnx(original, fused).holds


def test_what_no_rewrite_is_to_blame_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Certificate((Window("input", "different", reason="other arguments"),), 0, 0.0)
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: wrong)
    with pytest.raises(VerificationError, match="'input' differs from the original: other arguments"):
        fuse_model(network())


def test_without_verification_nothing_is_proven() -> None:
    assert fuse_model(network(), verify="off")[1].certificate is None
    assert fuse_model(network(), verify="region")[1].certificate is not None


@pytest.mark.parametrize(("target", "verdict"), [([0, 4, -1], "equal"), ([0, -1, 0, 0], "undecided")])
def test_a_reshape_that_refuses_other_sizes_of_zero(target: list[int], verdict: str) -> None:
    """What is left of no elements cannot be told: the original refuses a batch of 0, but takes a height of 0."""
    pool, last = node("MaxPool", "x", "p", kernel_shape=[2, 2], ceil_mode=1), np.array([0, 2, 2, -1])
    before = model([pool, node("Reshape", "p t", "y")], {"t": last}, ("N", 4, "H", "W"))
    after = model(
        [pool, node("Reshape", "p s", "a"), node("Reshape", "a t", "y")], {"s": np.array(target), "t": last},
        ("N", 4, "H", "W"),
    )  # fmt: skip
    assert [w.verdict for w in certify_onnx(before, after).windows] == [verdict]


@pytest.mark.parametrize(
    ("said", "verdicts"),
    [
        ({"pads": [0] * 4, "count_include_pad": 0, "dilations": [1, 1]}, []),
        ({"pads": [0, 0, 1, 0]}, ["undecided"]),
        ({"ceil_mode": 1}, ["undecided"]),
        ({"pads": [0] * 4, "auto_pad": b"SAME_UPPER"}, ["undecided"]),
    ],
)
def test_attributes_that_say_the_default(said: dict[str, Any], verdicts: list[str]) -> None:
    """The map may be smaller than the window: then the pooling is equal to itself alone."""
    pool = {"kernel_shape": [3, 2], "strides": [3, 2]}
    nodes = [node("AveragePool", "x", "y", **pool, **more) for more in (said, {})]
    before, after = (model([n], {}, ("N", 4, 6, "W"), opset=19) for n in nodes)
    assert [w.verdict for w in certify_onnx(before, after).windows] == verdicts


@pytest.mark.parametrize(("measured", "verdict"), [("x", "equal"), ("z", "undecided")])
def test_a_reshape_to_the_shape_that_it_has(measured: str, verdict: str) -> None:
    nodes = [node("Neg", "x", "n"), node("Transpose", "x", "z", perm=[0, 1, 3, 2])]
    before = model([*nodes, node("Shape", measured, "s"), node("Reshape", "n s", "y")], {}, ("N", 4, "H", "W"))
    after = model([*nodes, node("Neg", "x", "y")], {}, ("N", 4, "H", "W"))
    assert [w.verdict for w in certify_onnx(before, after).windows] == [verdict]


NUMBERS = {"zero": 0, "one": 1, "minus": -1, "end": 2**62}
SINGLE = {"at": [0], "first": [1], "three": [3], "four": [4]}
SHAPES = {
    "gathered": [node("Gather", "s zero", "n"), node("Unsqueeze", "n at", "b")],
    "sliced": [node("Slice", "s at first", "b")],
    "multiplied": [node("Gather", "s at", "o"), node("Mul", "o first", "b")],
    "divided": [node("Gather", "s at", "o"), node("Mul", "o three", "p3"), node("Div", "p3 three", "b")],
    "of another axis": [node("Gather", "s one", "n"), node("Unsqueeze", "n at", "b")],
}


@pytest.mark.parametrize("how", SHAPES)
@pytest.mark.parametrize("off", [0.0, 0.5])
def test_a_reshape_to_sizes_that_are_told_when_it_runs(how: str, off: float) -> None:
    """As in attention: what is left of the elements is the number of heads, and the batch is measured."""
    rest, target = node("Unsqueeze", "minus at", "r"), node("Concat", "b three r four", "t", axis=0)
    measured = [node("Shape", "x", "s"), rest]
    sizes = {n: np.array(a, np.int64) for n, a in (NUMBERS | SINGLE).items()}
    head = [node("MatMul", "x w", "m"), node("Reshape", "m t", "h"), node("Transpose", "h", "p", perm=[0, 2, 1, 3])]
    last = node("Softmax", "q", "y")
    weights = {"w": rand(8, 8), "k": np.array(2, np.float32), **sizes}
    before = model(
        [*measured, *SHAPES["gathered"], target, *head, node("Mul", "p k", "q"), last], weights, (None, 3, 8)
    )
    folded = [node("MatMul", "x w", "d"), node("Reshape", "d t", "e"), node("Transpose", "e", "q", perm=[0, 2, 1, 3])]
    after = model(
        [*measured, *SHAPES[how], target, *folded, last], {"w": 2 * rand(8, 8) + np.float32(off), **sizes}, (None, 3, 8)
    )
    verdicts = {w.verdict for w in certify_onnx(before, after).windows}
    assert (verdicts == {"equal"}) == (how != "of another axis" and not off), verdicts


def test_sizes_that_follow_from_a_reshape_of_what_is_left() -> None:
    """Inference makes up a size of the reshape, and of all that is made of it; the parts of a split tell theirs."""
    start = [node("Unsqueeze", "minus at", "r"), node("Shape", "x", "s"), node("Slice", "s at first", "b")]
    start += [node("Concat", "b three r", "t", axis=0), node("Reshape", "x t", "h")]
    middle = [node("Split", "h parts", "u v", axis=2), node("Concat", "u v", "c", axis=2), node("Add", "c h", "a")]
    sizes = {n: np.array(a, np.int64) for n, a in (NUMBERS | SINGLE | {"parts": [4, 12], "to": [0, -1]}).items()}
    tail = [node("Reshape", "a to", "f"), node("Gemm", "f w", "g"), node("Mul", "g k", "y")]
    weights = {"w": rand(48, 5), "k": np.array(2, np.float32), **sizes}
    before = model([*start, *middle, *tail], weights, (None, 6, 8))
    after = model([*start, *middle, tail[0], node("Gemm", "f w", "y")], {"w": 2 * rand(48, 5), **sizes}, (None, 6, 8))
    assert {w.verdict for w in certify_onnx(before, after).windows} == {"equal"}


@pytest.mark.parametrize("number", [0.0, 1.5])
def test_a_bias_that_an_exporter_spells_by_type_and_size(number: float) -> None:
    """The number takes its type from an activation, and is stretched to the channels of the weight."""
    spelled = [node("CastLike", "number x", "like"), node("Shape", "w", "all"), node("Slice", "all at first", "one")]
    spelled += [node("Expand", "like one", "b"), node("Conv", "x w b", "c"), batchnorm("c", "n", "y")]
    sizes = {n: np.array(a, np.int64) for n, a in SINGLE.items()}
    made = model(spelled, {"w": rand(6, 6, 1, 1), "number": np.array(number, np.float32), **sizes, **norm("n", 6, 1)})
    fused, report = fuse_model(made)
    assert [n.op_type for n in fused.graph.node] == ["Conv"]
    assert report.certificate is not None
    assert not report.certificate.undecided
