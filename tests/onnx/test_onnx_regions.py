"""Whole models in their deployed dtype: which region is wrong, and what cannot be told from the outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnx_models import PAD, batchnorm, model, node, norm, rand

from reparamc.certificate.proof import Certificate
from reparamc.equivalence.end_to_end import Region
from reparamc.errors import VerificationError
from reparamc.onnx.emit import OnnxEdit
from reparamc.onnx.end_to_end import verify_end_to_end
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.regions_alone import run_alone
from reparamc.onnx.session import random_inputs

BLOCKS = 4


def chain(steepness: float, last: tuple[NodeProto, ...] = (), outputs: str = "y") -> ModelProto:
    """Convolutions and BatchNorms between sines; steep ones make another result of each rounding."""
    nodes: list[NodeProto] = []
    weights: dict[str, np.ndarray] = {"s": np.array([steepness], np.float32)}
    x = "x"
    for i in range(BLOCKS):
        nodes += [node("Conv", f"{x} w{i}", f"c{i}", **PAD), batchnorm(f"c{i}", f"n{i}", f"b{i}", name=f"norm{i}")]
        nodes += [node("Tanh", f"b{i}", f"t{i}"), node("Mul", f"t{i} s", f"m{i}"), node("Sin", f"m{i}", f"r{i}")]
        weights |= {f"w{i}": rand(6, 6, 3, 3, seed=i), **norm(f"n{i}", 6)}
        x = f"r{i}"
    return model([*nodes, *(last or (node("Identity", x, "y"),))], weights, (1, 6, 8, 8), outputs=outputs)


def faulty(monkeypatch: pytest.MonkeyPatch, block: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let the bias emitted for one block be another one."""
    add = OnnxEdit.add_initializer

    def wrong(self: OnnxEdit, wanted: str, array: np.ndarray, dtype: np.dtype) -> str:
        return add(self, wanted, change(array) if wanted == f"b{block}.bias" else array, dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", wrong)


def one_channel(a: np.ndarray) -> np.ndarray:
    return a + np.where(np.arange(a.size) == 2, 1e-2, 0)


@pytest.fixture(autouse=True)
def no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof would find what is planted here first, and undo it."""
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))


CALM, CHAOTIC = 1.0, 3e3


def test_a_chaotic_model_is_judged_by_its_regions() -> None:
    fused, report = fuse_model(chain(CHAOTIC))
    assert operators(fused)["BatchNormalization"] == 0
    (output,) = [e for e in report.end_to_end if not e.alone]
    assert output.tolerance is None
    assert output.max_rel > 0.5  # as unlike as any two results
    alone = [e for e in report.end_to_end if e.alone]
    assert [e.output for e in alone][:BLOCKS] == [f"norm{i}" for i in range(BLOCKS)]
    assert all(e.tolerance is not None and e.max_rel <= e.tolerance < 1e-3 for e in alone)
    assert "which rounding alone explains" in report.table()
    assert "run alone on the original's values" in report.table()


def test_a_calm_model_is_judged_by_its_outputs() -> None:
    _, report = fuse_model(chain(CALM))
    (output,) = report.end_to_end
    assert output.tolerance is not None
    assert output.max_rel <= output.tolerance < 1e-2


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("steepness", [CALM, CHAOTIC])
def test_the_region_that_is_wrong_is_named(steepness: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, block, one_channel)
    with pytest.raises(VerificationError, match=rf"region 'norm{block}' of the fused model") as raised:
        fuse_model(chain(steepness))
    error = raised.value
    assert error.where == f"norm{block}"
    assert "\n" not in str(error)
    assert error.before != error.after
    assert "conv" in error.after.lower()


def test_values_that_are_no_numbers_are_found_in_a_chaotic_model(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, 1, lambda a: a * np.nan)
    with pytest.raises(VerificationError, match="region 'norm1'"):
        fuse_model(chain(CHAOTIC))


def test_without_regions_a_chaotic_model_is_held_to_the_ceiling() -> None:
    """So it is the comparison of regions that lets it pass."""
    made = chain(CHAOTIC)
    fused, _ = fuse_model(made, verify="region")
    with pytest.raises(VerificationError, match="output 'y'"):
        verify_end_to_end(made, fused)


def near_tie(weight: np.ndarray) -> ModelProto:
    """The place of the larger of two channels that are equal but for rounding."""
    weight = np.concatenate([weight, weight])
    nodes = [node("Conv", "x w", "c"), batchnorm("c", "n", "b", name="norm"), node("Tanh", "b", "t")]
    nodes += [node("ArgMax", "t", "y", axis=1, keepdims=0)]
    parameters = {"w": weight, **{k: np.concatenate([v[:1], v[:1]]) for k, v in norm("n", 6).items()}}
    return model(nodes, parameters, (1, 6, 8, 8))


def test_the_place_of_a_maximum_may_flip_between_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    made = near_tie(rand(1, 6, 1, 1))
    faulty_bias = lambda a: a * np.array([1, 1 + 1e-7])  # noqa: E731  what rounding may do
    add = OnnxEdit.add_initializer
    monkeypatch.setattr(
        OnnxEdit,
        "add_initializer",
        lambda self, wanted, array, dtype: add(self, wanted, faulty_bias(array) if "bias" in wanted else array, dtype),
    )
    _, report = fuse_model(made)
    output, region = report.end_to_end
    assert output.max_rel > 0.05  # another place for many positions
    assert region.alone


def test_another_place_for_no_reason_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    made = near_tie(rand(1, 6, 1, 1))
    add = OnnxEdit.add_initializer
    monkeypatch.setattr(
        OnnxEdit,
        "add_initializer",
        lambda self, wanted, array, dtype: (
            add(self, wanted, array + 0.01 * ("bias" in wanted) * np.arange(2), dtype)
            if "bias" in wanted
            else add(self, wanted, array, dtype)
        ),
    )
    with pytest.raises(VerificationError, match="region 'norm'"):
        fuse_model(made)


def test_both_models_are_cut_where_regions_end() -> None:
    """Also where a root is an output, or is read by the body of a branch."""
    made = chain(CALM, (node("Identity", "r3", "y"),), outputs="y b1")
    fused, _ = fuse_model(made, verify="off")
    inputs = random_inputs(made)
    regions = [Region(f"b{i}", (f"r{i - 1}" if i else "x",), f"norm{i}", "", "", -3) for i in range(BLOCKS)]
    seen = run_alone(made, fused, regions, inputs)
    assert seen is not None
    for name in ("y", *(f"b{i}" for i in range(BLOCKS))):
        assert seen.expected[name].shape == seen.actual[name].shape
        np.testing.assert_allclose(seen.actual[name], seen.expected[name], rtol=1e-4, atol=1e-5)
    wrong = ModelProto()
    wrong.CopyFrom(fused)
    (weight,) = [t for t in wrong.graph.initializer if t.name == "b1.bias"]
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) + 1).astype(np.float32).tobytes()
    found = run_alone(made, wrong, regions, inputs)
    assert found is not None
    for name in ("b0", "b2", "b3", "y"):  # those after do not see it
        np.testing.assert_array_equal(found.actual[name], seen.actual[name])
    assert np.abs(found.actual["b1"] - seen.actual["b1"]).min() > 0.5


def test_a_model_that_cannot_be_cut_is_told() -> None:
    made = chain(CALM)
    assert run_alone(made, made, [], {}) is None
    region = Region("b0", ("x",), "norm0", "", "")
    assert run_alone(made, made, [region], {"x": np.zeros((1, 5, 8, 8), np.float32)}) is None


DISCRETE: dict[str, tuple[NodeProto, ...]] = {
    "QuantizeLinear": (node("QuantizeLinear", "s scale zero", "q"), node("DequantizeLinear", "q scale zero", "d")),
    "Round": (node("Round", "s", "d"),),
    "Floor": (node("Floor", "s", "d"),),
    "Cast": (
        node("Div", "s scale", "r"),
        node("Cast", "r", "i", to=TensorProto.INT32),
        node("Cast", "i", "d", to=TensorProto.FLOAT),
    ),
    "Sign": (node("Sign", "s", "d"),),
    "Greater": (node("Greater", "s nothing", "g"), node("Where", "g t nothing", "d")),
    "ArgMax": (node("ArgMax", "s", "k", axis=1), node("Cast", "k", "i", to=TensorProto.FLOAT), node("Mul", "i t", "d")),
    "TopK": (
        node("Reshape", "s rows", "r"),
        node("TopK", "r count", "v k", axis=-1),
        node("Cast", "k", "i", to=TensorProto.FLOAT),
        node("Reshape", "i map", "d"),
    ),
    "NonZero": (
        node("Greater", "s nothing", "g"),
        node("NonZero", "g", "k"),
        node("Transpose", "k", "places", perm=[1, 0]),
        node("GatherND", "t places", "d"),
    ),
}


def stepped(kind: str) -> ModelProto:
    """A convolution and a BatchNorm before a step between discrete values, and after it where that makes a map."""
    nodes = [node("Conv", "x w0", "c0", **PAD), batchnorm("c0", "n0", "b0", name="norm0"), node("Tanh", "b0", "t")]
    nodes += [node("Mul", "t many", "m"), node("Sin", "m", "s"), *DISCRETE[kind]]
    if kind == "NonZero":
        nodes += [node("Identity", "d", "y")]
    else:
        nodes += [node("Conv", "d w1", "c1", **PAD), batchnorm("c1", "n1", "y", name="norm1")]
    weights = {f"w{i}": rand(6, 6, 3, 3, seed=i) for i in range(2)} | norm("n0", 6) | norm("n1", 6)
    weights |= {"scale": np.float32(0.25), "zero": np.int8(0), "many": np.float32(3e4), "nothing": np.float32(0.5)}
    weights |= {"rows": np.array([0, 6, -1]), "count": np.array([16]), "map": np.array([0, 6, 4, 4])}
    used = {name for n in nodes for name in n.input}
    return model(nodes, {k: v for k, v in weights.items() if k in used}, (3, 6, 24, 24), opset=17)


def rounded_otherwise(monkeypatch: pytest.MonkeyPatch, factor: float = 4.0) -> None:
    """Let every emitted parameter be off by a few roundings."""
    add, rng = OnnxEdit.add_initializer, np.random.default_rng(0)

    def other(self: OnnxEdit, wanted: str, array: np.ndarray, dtype: np.dtype) -> str:
        return add(self, wanted, array * (1 + factor * 2.0**-24 * rng.uniform(-1, 1, array.shape)), dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", other)


@pytest.mark.parametrize("kind", DISCRETE)
def test_a_tie_that_is_broken_otherwise_is_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_otherwise(monkeypatch)
    _, report = fuse_model(stepped(kind))
    output, *regions = report.end_to_end
    assert output.max_rel > 1e-3  # so it was flipped
    assert output.tolerance is None
    assert [r.alone for r in regions] == [True] * (1 if kind == "NonZero" else 2)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("kind", DISCRETE)
def test_a_wrong_region_is_found_beside_a_step(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if (kind, block) == ("NonZero", 1):
        return  # nothing is folded there
    add = OnnxEdit.add_initializer

    def wrong(self: OnnxEdit, wanted: str, array: np.ndarray, dtype: np.dtype) -> str:
        if wanted == ("b0.weight", "y.weight")[block]:
            array = array * (1 + 1e-3 * (np.arange(6) == 4)).reshape(6, 1, 1, 1)
        return add(self, wanted, array, dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", wrong)
    with pytest.raises(VerificationError, match=f"region 'norm{block}'"):
        fuse_model(stepped(kind))


@pytest.mark.parametrize("large", [1e2, 1e4, 1e6])
def test_an_original_that_cancels_is_worse_than_the_result(large: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of a million less a mean of a million: float32 keeps nothing of what is between them."""
    weights = {"w": rand(6, 6, 3, 3), "bias": np.full(6, large, np.float32), **norm("n", 6)}
    weights["n.m"] = weights["n.m"] + np.float32(large)
    made = model([node("Conv", "x w bias", "c", **PAD), batchnorm("c", "n", "y", name="norm")], weights, (1, 6, 24, 24))
    _, report = fuse_model(made)
    assert report.after.batchnorm == 0
    add = OnnxEdit.add_initializer
    monkeypatch.setattr(
        OnnxEdit,
        "add_initializer",
        lambda self, name, a, dtype: add(
            self, name, np.where(np.arange(a.size).reshape(a.shape) == 40, 2 * a, a), dtype
        ),
    )
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    with pytest.raises(VerificationError, match=r"'norm'|'y'"):  # one weight is doubled
        fuse_model(made)


def test_regions_in_float64_are_run_by_the_operators_of_the_original() -> None:
    """Weights and shapes stored as initializers or as nodes; a default of an input is what the caller gives."""
    w, v, bias = rand(6, 6, 3, 3), rand(6, 2, 2, 2), rand(6, seed=3)
    stored = node("Constant", "", "v", value=numpy_helper.from_array(v))
    made = model(
        [
            stored, node("Conv", "x w bias", "c", **PAD), batchnorm("c", "n", "b", name="norm"),
            node("Relu", "b", "r"), node("ConvTranspose", "r v", "t", group=3, strides=[2, 2]),
            node("Mul", "t two", "y"),
        ],
        {"w": w, "bias": bias, "two": np.full((1, 1, 1, 1), 2, np.float32), **norm("n", 6)}, (1, 6, 9, 8),
    )  # fmt: skip
    first, second = Region("b", ("x",), "norm", "", ""), Region("y", ("r",), "y", "", "")
    inputs = random_inputs(made)
    seen = run_alone(made, made, [first, second], inputs)
    assert seen is not None
    assert seen.exact is not None
    for region in (first, second):
        found = seen.exact(region)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, seen.expected[region.root], rtol=1e-4, atol=1e-5)
        assert np.abs(found - seen.expected[region.root]).max() > 1e-9  # not the value in float32
