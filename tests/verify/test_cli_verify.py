"""`reparamc verify`: which faults it finds, what it lets pass, and what it says to what cannot be compared."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import reparamc
from reparamc import __main__ as cli
from reparamc.certificate.proof import Certificate, Window
from reparamc.equivalence import trials as trial
from reparamc.equivalence.difference import difference, ulps
from reparamc.onnx.fuse import fuse_model
from reparamc.verify import search as onnx_verify
from reparamc.verify.arrays import read_inputs, slots, write_inputs
from reparamc.verify.result import OutputCheck, Verification, check_output
from reparamc.verify.search import _Search

# Models

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "v": RNG.standard_normal((4, 3, 1, 1)).astype(np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
    **{f"n.{k}": RNG.uniform(0.5, 1.5, 4).astype(np.float32) for k in ("g", "b", "m", "v")},
}


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


Declared = Mapping[str, tuple[Sequence[int | str], int]]


def model(
    nodes: list[NodeProto],
    weights: dict[str, np.ndarray] | None = None,
    inputs: Declared | None = None,
    outputs: dict[str, int] | None = None,
) -> ModelProto:
    """Inputs by name: their sizes and type; outputs by name: their number of axes."""
    declared = inputs or {"x": (["N", 3, "H", "W"], TensorProto.FLOAT)}
    results = outputs or {"y": 4}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind, shape) for n, (shape, kind) in declared.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n, rank in results.items()],
        [numpy_helper.from_array(a, n) for n, a in (WEIGHTS if weights is None else weights).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def block(**conv: object) -> list[NodeProto]:
    """conv 3x3 with BatchNorm beside conv 1x1, added, ReLU."""
    return [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1], **conv),
        node("BatchNormalization", "c n.g n.b n.m n.v", "d"),
        node("Conv", "x v", "e"),
        node("Add", "d e", "s"),
        node("Relu", "s", "y"),
    ]


SHIFT = np.full((1, 3, 1, 1), 0.5, np.float32)
ROUGH = node("BatchNormalization", "c n.g n.b n.m n.v", "d", epsilon=1e-3)


def changed(name: str, at: tuple[int, ...], by: float) -> dict[str, np.ndarray]:
    weights = {n: a.copy() for n, a in WEIGHTS.items()}
    weights[name][at] += by
    return weights


ORIGINAL = model(block())


POOL = model(
    [node("AveragePool", "x", "y", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)],
    {},
)
ODD = model(
    [node("AveragePool", "x", "y", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1], count_include_pad=1)], {}
)
"""Equal to `POOL` at even sizes; at odd ones it divides by four what is two or one."""

WIDE = model([node("Relu", "x", "r"), node("Sqrt", "r", "y")], {})
NARROW = model([node("Abs", "x", "r"), node("Sqrt", "r", "y")], {})
"""Equal to `WIDE` where no input is negative."""

BRIGHT = model([node("Clip", "x lo hi", "y")], {"lo": np.array(-1e9, np.float32), "hi": np.array(6.0, np.float32)})
IDENTITY = model([node("Identity", "x", "y")], {})
"""Equal to `BRIGHT` but for large inputs."""


def two(first: str, second: str, order: str = "y z") -> ModelProto:
    nodes = [node("Relu", "x", first), node("Neg", "x", second)]
    return model(nodes, {}, outputs=dict.fromkeys(order.split(), 4))


TWO = two("y", "z")

FAULTS: dict[str, tuple[ModelProto, ModelProto]] = {
    "one weight": (ORIGINAL, model(block(), changed("w", (1, 2, 0, 0), 0.01))),
    "a bias": (ORIGINAL, model(block(), changed("b", (3,), 0.01))),
    "a variance": (ORIGINAL, model(block(), changed("n.v", (0,), 0.001))),
    "an epsilon": (ORIGINAL, model([block()[0], ROUGH, *block()[2:]])),
    "padding by copies": (
        ORIGINAL,
        model(
            [node("Pad", "x p", "px", mode="edge"), node("Conv", "px w b", "c"), *block()[1:]],
            {**WEIGHTS, "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        ),
    ),
    "bias before the padding": (
        model([node("Add", "x k", "a"), node("Conv", "a w", "y", pads=[1, 1, 1, 1])], {**WEIGHTS, "k": SHIFT}),
        model([node("Conv", "x w k", "y", pads=[1, 1, 1, 1])], {**WEIGHTS, "k": 0.5 * WEIGHTS["w"].sum((1, 2, 3))}),
    ),
    "outputs exchanged": (TWO, two("z", "y")),
    "odd sizes only": (POOL, ODD),
    "negative inputs only": (WIDE, NARROW),
    "large inputs only": (BRIGHT, IDENTITY),
}  # fmt: skip


# Running

verify = partial(reparamc.verify_onnx, examples=20, seconds=60)
QUICK = ["--examples", "20", "--seconds", "60"]
"""Few examples, and time enough for them on a busy machine."""


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = cli.main(["verify", *QUICK, *map(str, arguments)])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


def files(folder: Path, *models: ModelProto) -> list[Path]:
    paths = [folder / name for name in ("a.onnx", "b.onnx")]
    for m, path in zip(models, paths, strict=True):
        onnx.save(m, path)
    return paths


# Faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_saved_and_reproduced(run: Run, tmp_path: Path, fault: str) -> None:
    paths = files(tmp_path, *FAULTS[fault])
    outcome = run(*paths)
    assert outcome.code == 1, outcome.out
    saved = tmp_path / "b.failing.npz"
    assert outcome.lines[-1].startswith("verdict    differs: output ")
    assert outcome.lines[-1].endswith(f"; saved to {saved}")
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "b.onnx", "b.failing.npz"}
    again = run(*paths, "--inputs", saved, "--save", tmp_path / "again.npz")
    assert again.code == 1
    assert (tmp_path / "again.npz").read_bytes() == saved.read_bytes()
    assert run(paths[0], paths[0], "--inputs", saved).code == 0


@pytest.mark.parametrize(
    ("fault", "shape"),
    [
        ("one weight", (1, 3)),
        ("a bias", (1, 3, 1, 1)),
        ("odd sizes only", (1, 3, 1, 1)),
        ("negative inputs only", (1, 3, 1, 1)),
    ],
)
def test_the_failing_input_is_small(tmp_path: Path, fault: str, shape: tuple[int, ...]) -> None:
    original, fused = FAULTS[fault]
    path = tmp_path / "f.npz"
    assert not verify(original, fused, save=path).equal
    (x,) = read_inputs(path, slots(original))[0][1].values()
    assert x.shape[: len(shape)] == shape
    assert x.size <= 3 * 2 * 2


def test_a_size_that_only_the_original_takes() -> None:
    """The fused model reshapes to a number that holds for even widths alone."""
    original = model([node("Relu", "x", "y")], {})
    halves = {"a": np.array([0, 3, -1, 2]), "b": np.array([0, 0, 0, 0])}
    nodes = [node("Shape", "x", "s"), node("Reshape", "x a", "h"), node("Relu", "h", "r"), node("Reshape", "r s", "y")]
    result = verify(original, model(nodes, halves))
    assert result.failure is not None
    assert "refuses an input that the original takes" in result.failure.reason
    assert "x [1, 3, 1, 1]" in result.failure.inputs


# No faults


def renamed(original: ModelProto) -> ModelProto:
    """Every value under another name."""
    text = ModelProto.FromString(original.SerializeToString())
    graph = text.graph
    for thing in (*graph.input, *graph.output, *graph.initializer):
        thing.name = f"their_{thing.name}"
    for n in graph.node:
        n.input[:] = [f"their_{name}" for name in n.input]
        n.output[:] = [f"their_{name}" for name in n.output]
    return text


def test_a_fusion_passes(run: Run, tmp_path: Path) -> None:
    fused, report = fuse_model(ORIGINAL)
    assert report.changed
    outcome = run(*files(tmp_path, ORIGINAL, fused))
    assert outcome.code == 0, outcome.out
    assert outcome.lines[-1].startswith("verdict    equal within rounding, on ")
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "b.onnx"}


def test_what_is_proven_for_every_size_is_counted() -> None:
    fused, _ = fuse_model(ORIGINAL)
    result = verify(ORIGINAL, fused)
    assert result.windows == {"equal": 1, "rounded": 0, "different": 0, "undecided": 0}
    assert "tensors    1 of 1 proven equal for every input size" in result.table().splitlines()
    result = verify(ORIGINAL, model(block(), changed("w", (1, 2, 0, 0), 0.01)))
    assert result.windows is not None
    assert result.windows["different"] == 1
    assert any("is of another form" in note for note in result.notes)
    assert not result.equal


CLIPPED = model([*block()[:-1], node("Clip", "s o", "y")], {**WEIGHTS, "o": np.zeros((), np.float32)})
"""Equal to `ORIGINAL`, which no proof knows."""


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[onnx_verify.Budget]:
    """What each comparison may take."""
    given: list[onnx_verify.Budget] = []
    monkeypatch.setattr(onnx_verify._Clock, "calibrate", lambda clock, budget: given.append(budget))
    return given


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-3}, {"non_finite": True}, {"optimize": True}])
def test_inputs_are_a_second_opinion_where_all_is_proven_and_no_more_is_asked(
    budgets: list[onnx_verify.Budget], options: dict[str, Any]
) -> None:
    assert verify(ORIGINAL, fuse_model(ORIGINAL)[0], **options).windows == {
        "equal": 1,
        "rounded": 0,
        "different": 0,
        "undecided": 0,
    }
    assert budgets == [onnx_verify.EVIDENCE if options else onnx_verify.SECOND_OPINION]


def test_inputs_are_the_evidence_where_nothing_is_proven(budgets: list[onnx_verify.Budget]) -> None:
    found = verify(ORIGINAL, CLIPPED)
    assert found.equal
    assert found.windows == {"equal": 0, "rounded": 0, "different": 0, "undecided": 1}
    assert budgets == [onnx_verify.EVIDENCE]


def test_a_proof_against_which_an_input_speaks_does_not_end_the_search(
    budgets: list[onnx_verify.Budget], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_verify, "certify_onnx", lambda *_: Certificate((), 0, 0.0))
    assert not verify(*FAULTS["one weight"]).equal
    assert budgets == [onnx_verify.EVIDENCE]


def test_a_proof_that_breaks_down_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no\nidea")

    monkeypatch.setattr("reparamc.verify.search.certify_onnx", broken)
    result = verify(ORIGINAL, ORIGINAL)
    assert (result.equal, result.windows) == (True, None)
    assert "nothing is proven for every input size: no idea" in result.notes


def test_other_names_pass_and_are_said(run: Run, tmp_path: Path) -> None:
    fused, _ = fuse_model(ORIGINAL)
    outcome = run(*files(tmp_path, ORIGINAL, renamed(fused)))
    assert outcome.code == 0, outcome.out
    notes = [line for line in outcome.lines if line.startswith("note")]
    assert "inputs of other names are matched by their place: 'x' is 'their_x'" in notes[0]
    assert "'y' is 'their_y'" in notes[1]


@pytest.mark.parametrize(("kind", "largest"), [(TensorProto.FLOAT16, 0.2), (TensorProto.DOUBLE, 1e-11)])
def test_other_precisions(kind: int, largest: float) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {n: RNG.standard_normal((6, 6)).astype(dtype) for n in "ab"}
    inputs: Declared = {"x": (["N", "L", 6], kind)}
    nodes = [node("MatMul", "x a", "h"), node("MatMul", "h b", "y")]
    original = model(nodes, weights, inputs, {"y": 3})
    product = {"a": (weights["a"].astype(np.float64) @ weights["b"].astype(np.float64)).astype(dtype)}
    fused = model([node("MatMul", "x a", "y")], product, inputs, {"y": 3})
    wrong = model([node("MatMul", "x a", "y")], {"a": product["a"] * dtype.type(1.3)}, inputs, {"y": 3})
    for made in (original, fused, wrong):
        made.graph.output[0].type.tensor_type.elem_type = kind
    result = verify(original, fused)
    assert result.equal, result.table()
    (check,) = result.outputs
    assert check.allowed is not None
    assert 0 < check.max_rel <= check.allowed < largest
    assert not verify(original, wrong).equal


TOKENS = {"x": (["N", "L"], TensorProto.INT64), "mask": (["N", "L"], TensorProto.BOOL)}


def embedding(rows: int) -> ModelProto:
    table = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    nodes = [node("Gather", "t x", "e"), node("Unsqueeze", "mask a", "m"), node("Where", "m e z", "y")]
    return model(nodes, {"t": table, "a": np.array([2]), "z": np.zeros(1, np.float32)}, TOKENS, {"y": 3})


def test_indices_go_as_far_as_the_original_takes_them() -> None:
    original = embedding(20)
    assert verify(original, original).equal
    fault = ModelProto.FromString(original.SerializeToString())
    table = numpy_helper.to_array(original.graph.initializer[0]).copy()
    table[17] += 1
    fault.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "t"))
    result = verify(original, fault)
    assert not result.equal


def test_an_size_that_two_inputs_share() -> None:
    shapes = {"x": (["N", 3, "H", "W"], TensorProto.FLOAT), "u": (["N", 3, "H", "W"], TensorProto.FLOAT)}
    original = model([node("Sub", "x u", "y")], {}, shapes)
    assert verify(original, model([node("Neg", "u", "v"), node("Add", "v x", "y")], {}, shapes)).equal
    assert not verify(original, model([node("Sub", "u x", "y")], {}, shapes)).equal


def test_inputs_in_a_fixed_size_and_none_at_all() -> None:
    fixed = model([node("Relu", "x", "y")], {}, {"x": ([2, 3, 5, 5], TensorProto.FLOAT)})
    assert verify(fixed, fixed).equal
    constant = model([node("Relu", "b", "y")], None, {}, {"y": 1})
    del constant.graph.input[:]
    other = ModelProto.FromString(constant.SerializeToString())
    other.graph.initializer[2].CopyFrom(numpy_helper.from_array(WEIGHTS["b"] + 1, "b"))
    assert verify(constant, constant).compared == 1
    assert not verify(constant, other).equal


def test_not_finite_values_are_tried_where_asked_for() -> None:
    zero = {"z": np.zeros(1, np.float32)}
    original = model([node("Mul", "x z", "y")], zero)
    fused = model([node("Shape", "x", "s"), node("Expand", "z s", "y")], zero)
    assert verify(original, fused).equal
    result = verify(original, fused, non_finite=True)
    assert result.failure is not None
    assert "NaN or infinity in other places" in result.failure.reason


def test_sequences_of_tensors_are_compared() -> None:
    def split(op: str) -> ModelProto:
        made = model([node(op, "x", "r"), node("SplitToSequence", "r", "y", axis=1)], {})
        made.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))
        return made

    assert [c.output for c in verify(split("Relu"), split("Relu")).outputs] == ["y[0]", "y[1]", "y[2]"]
    assert not verify(split("Relu"), split("Abs")).equal


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise trial.NoHypothesis

    monkeypatch.setattr(trial, "search", missing)
    result = verify(ORIGINAL, ORIGINAL)
    assert result.equal
    assert ["install hypothesis" in note for note in result.notes] == [True]
    assert not verify(*FAULTS["one weight"]).equal


# Inputs and outputs that differ: one line, exit code 1

FIXED = {"x": ([1, 3, 8, 8], TensorProto.FLOAT)}
RELU = [node("Relu", "x", "y")]

INTERFACES: dict[str, tuple[ModelProto, ModelProto, str]] = {
    "output missing": (TWO, model([node("Relu", "x", "y")], {}), "lacks output 'z'"),
    "one output more": (model(RELU, {}), TWO, "one more output, 'z'"),
    "outputs in another order": (TWO, two("y", "z", "z y"), "outputs come in another order: 'y', 'z'"),
    "input missing": (
        model([node("Add", "x u", "y")], {}, FIXED | {"u": FIXED["x"]}),
        model(RELU, {}, FIXED),
        "lacks input 'u'",
    ),
    "other dtype": (
        model(RELU, {}),
        model([node("Cast", "x", "y", to=1)], {}, {"x": (["N", 3, "H", "W"], 11)}),
        "float64",
    ),
    "other rank": (model(RELU, {}), model(RELU, {}, {"x": (["N", 3, "L"], 1)}, {"y": 3}), "4 axes"),
    "fixed size": (model(RELU, {}), model(RELU, {}, FIXED), "takes input x float32 [1, 3, 8, 8]"),
    "other size": (model(RELU, {}, FIXED), model(RELU, {}, {"x": ([1, 3, 9, 8], 1)}), "[1, 3, 9, 8]"),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERFACES)
def test_other_inputs_or_outputs(run: Run, tmp_path: Path, name: str) -> None:
    original, fused, message = INTERFACES[name]
    outcome = run("-q", *files(tmp_path, original, fused))
    assert outcome.code == 1
    (line,) = outcome.lines
    assert line.startswith("differs: ")
    assert message in line


# What cannot be compared: one line on stderr, exit code 2


def text_input() -> ModelProto:
    made = model([node("StringNormalizer", "x", "y")], {}, {"x": (["N"], TensorProto.STRING)}, {"y": 1})
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    return made


def sequence_input() -> ModelProto:
    made = model([node("ConcatFromSequence", "x", "y", axis=1)], {})
    made.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None))
    return made


def no_kernel() -> ModelProto:
    made = model([helper.make_node("Nothing", ["x"], ["y"], domain="nowhere")], {})
    made.opset_import.append(helper.make_opsetid("nowhere", 1))
    return made


def impossible() -> ModelProto:
    return model([node("Reshape", "x a", "y")], {"a": np.array([7, 11, 13, 17])}, FIXED)


def random() -> ModelProto:
    return model([node("RandomNormalLike", "x", "r"), node("Add", "x r", "y")], {})


def typed(kind: str) -> ModelProto:
    """An input that is no tensor of numbers."""
    made = model(RELU, {})
    declared = made.graph.input[0].type
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    match kind:
        case "optional":
            declared.CopyFrom(helper.make_optional_type_proto(tensor))
        case "map":
            declared.CopyFrom(helper.make_map_type_proto(TensorProto.INT64, tensor))
        case "sparse":
            declared.CopyFrom(helper.make_sparse_tensor_type_proto(TensorProto.FLOAT, [1]))
        case "none":
            declared.Clear()
        case _:
            declared.tensor_type.elem_type = int(kind)
    return made


def unranked() -> ModelProto:
    made = model(RELU, {})
    made.graph.input[0].type.tensor_type.ClearField("shape")
    return made


def empty() -> ModelProto:
    return model(RELU, {}, {"x": (["N", 0], TensorProto.FLOAT)}, {"y": 2})


def not_a_number() -> ModelProto:
    return model([node("Add", "x k", "y")], {"k": np.full((1, 3, 1, 1), np.nan, np.float32)})


NOTHING = "no output holds an element that is no NaN on any input that was tried, so nothing is compared"
GOOD = model(RELU, {})
UNCOMPARABLE: dict[str, tuple[ModelProto | bytes | None, ModelProto | bytes | None, str]] = {
    "no original": (None, GOOD, "a.onnx: no such file"),
    "no fused model": (GOOD, None, "b.onnx: no such file"),
    "no ONNX": (b"text", GOOD, "a.onnx is not an ONNX file"),
    "cut": (GOOD, GOOD.SerializeToString()[:60], "b.onnx"),
    "empty": (GOOD, b"", "b.onnx is not an ONNX file"),
    "strings": (text_input(), text_input(), "holds strings"),
    "a sequence": (sequence_input(), sequence_input(), "'x' is a sequence, no tensor"),
    "an optional value": (typed("optional"), typed("optional"), "'x' is an optional value, no tensor; such models"),
    "a map": (typed("map"), typed("map"), "'x' is a map, no tensor; such models"),
    "a sparse tensor": (typed("sparse"), typed("sparse"), "'x' is a sparse tensor, no dense one; such models"),
    "no type": (typed("none"), typed("none"), "'x' is of no declared type; such models"),
    "no element type": (typed("0"), typed("0"), "'x' declares no element type; such models"),
    "an unknown element type": (typed("99"), typed("99"), "'x' declares the unknown element type 99; such models"),
    "an unknown rank": (unranked(), unranked(), "input 'x' declares no number of axes, so no values can be made up; "),
    "outputs without elements": (empty(), empty(), NOTHING),
    "outputs of NaN": (not_a_number(), not_a_number(), NOTHING),
    "unknown operator": (GOOD, no_kernel(), "ONNX Runtime cannot load"),
    "an original that does not run": (impossible(), impossible(), "cannot run the original"),
    "random": (random(), random(), "another output 'y' each time"),
}


@pytest.mark.parametrize("name", UNCOMPARABLE)
def test_what_cannot_be_compared(run: Run, tmp_path: Path, name: str) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for content, path in zip(UNCOMPARABLE[name], paths, strict=False):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, ModelProto):
            onnx.save(content, path)
    there = {p.name for p in tmp_path.iterdir()}
    outcome = run(*paths)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert UNCOMPARABLE[name][2] in line
    assert {p.name for p in tmp_path.iterdir()} == there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", "-1"], "'-1' is not a whole number"),
        (["--seconds", "0"], "not a number above 0"),
        (["--seconds", "nan"], "not a number above 0"),
        (["--rtol", "-1"], "a tolerance cannot be -1"),
        (["--atol", "nan"], "a tolerance cannot be nan"),
        (["--save", "a.onnx"], "is the input itself"),
        (["--save", "b.onnx"], "is the input itself"),
        (["--save", "none/f.npz"], "does not exist"),
        (["--inputs", "none.npz"], "none.npz: no such file"),
        (["--inputs", "a.onnx"], "cannot be read as a .npz file"),
        (["--inputs", "."], "holds no inputs"),
    ],
)
def test_bad_options(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path, GOOD, GOOD)
    outcome = run("a.onnx", "b.onnx", *options)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert message in line


# Inputs that do not fit into memory

HUGE: dict[str, list[int | str]] = {
    "2**40 elements": [1, 1, 2**20, 2**20],
    "an open batch": ["N", 1, 2**20, 2**20],
    "more bytes than there are addresses": [2**31, 3, 2**31, 2**31],
    "an size near the largest number": [2**62, 3, 4, 4],
    "the largest number": [2**63 - 1, 3, 2**63 - 1, 4],
    "beside an size of 0": [0, 3, 2**62, 2**62],
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL])
def test_an_input_that_does_not_fit_into_memory(run: Run, tmp_path: Path, name: str, kind: int) -> None:
    nodes = [node("Cast", "x", "c", to=TensorProto.FLOAT), node("Neg", "c", "y")]
    huge = model(nodes, {}, {"x": (HUGE[name], kind)})
    outcome = run(*files(tmp_path, huge, huge))
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("reparamc: input 'x' of the sizes [")
    assert "does not fit into memory" in line
    assert line.endswith("declare smaller sizes, or names for them, in both files")
    assert {p.name for p in tmp_path.iterdir()} == {"a.onnx", "b.onnx"}


def test_sizes_that_do_not_fit_into_memory_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three channels of 32 x 32 are too many here; those of 16 x 16 are not."""
    monkeypatch.setattr(trial, "_memory", lambda: trial.PEAK * 2 * 3 * 16 * 16)
    result = verify(*FAULTS["one weight"])
    assert not result.equal
    result = verify(ORIGINAL, ORIGINAL)
    assert result.equal
    assert result.compared > 10


@pytest.mark.parametrize("place", ["_made", "further_trials"])
def test_memory_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def nothing_left(*_: object) -> None:
        raise MemoryError("Unable to allocate 3 TiB\nfor an array")

    monkeypatch.setattr(trial, place, nothing_left)
    with pytest.raises(reparamc.InputError, match="does not fit into memory"):
        verify(ORIGINAL, ORIGINAL)


def test_an_open_rank_is_compared_on_given_inputs(tmp_path: Path) -> None:
    x = np.full((1, 3, 2, 2), -2.0, np.float32)
    assert verify(unranked(), unranked(), inputs={"x": x}).equal
    result = verify(GOOD, unranked())
    assert result.equal
    assert any("wider than x float32 [N, 3, H, W]" in note for note in result.notes)
    result = verify(unranked(), GOOD, inputs={"x": x})
    assert result.failure is not None
    assert result.failure.reason.endswith("where the original takes x float32 of any number of axes")


def test_strings_are_called_strings() -> None:
    text, number = text_input(), model([node("Identity", "x", "y")], {})
    for a, b, kinds in (
        (text, number, "string in the original and float32"),
        (number, text, "float32 in the original and string"),
    ):
        result = verify(a, b)
        assert result.failure is not None
        assert f"input 'x' is {kinds} in the fused model" in result.failure.reason
    found = check_output("y", difference(np.array(["a"], object), np.array(["a", "b"], object)), 0, 0)
    assert found.problem == "the original gives string [1], the fused model string [2]"


# Inputs from files


def given(kind: str, folder: Path, x: np.ndarray) -> Path:
    """``x`` as the input of `WIDE`, in one of the forms that are read."""
    if kind == "npz":
        np.savez(folder / "i.npz", x=x)
        return folder / "i.npz"
    if kind == "folder of npz":
        np.savez(folder / "0.npz", x=np.ones_like(x))
        np.savez(folder / "1.npz", x=x)
    elif kind == "folder of npy":
        np.save(folder / "x.npy", x)
    else:
        inner = folder / "test_data_set_0" if kind == "test data" else folder
        inner.mkdir(exist_ok=True)
        (inner / "input_0.pb").write_bytes(numpy_helper.from_array(x).SerializeToString())
    return folder


@pytest.mark.parametrize("kind", ["npz", "folder of npz", "folder of npy", "test data", "one set of test data"])
@pytest.mark.parametrize("negative", [True, False])
def test_given_inputs(run: Run, tmp_path: Path, kind: str, negative: bool) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    x = np.full((1, 3, 2, 2), -2.0 if negative else 2.0, np.float32)
    outcome = run(*files(tmp_path, WIDE, NARROW), "--inputs", given(kind, folder, x))
    assert outcome.code == negative, outcome.out
    assert f"compared   {2 if kind == 'folder of npz' else 1} input" in outcome.out


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"u": np.ones(1)}, "lacks 'x'; the inputs are 'x'"),
        ({"x": np.ones(1), "u": np.ones(1)}, "holds 'u', which is no input"),
        ({"x": np.ones((1, 3, 2, 2))}, "the original does not run on"),
        ({"x": np.ones((1, 3), np.float32)}, "the original does not run on"),
    ],
)
def test_inputs_that_do_not_fit(run: Run, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "i.npz", **arrays)  # type: ignore[arg-type]
    outcome = run(*files(tmp_path, WIDE, WIDE), "--inputs", tmp_path / "i.npz")
    assert outcome.code == 2
    assert message in outcome.err


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 0, 2)])
def test_given_inputs_without_elements_prove_nothing(run: Run, tmp_path: Path, shape: tuple[int, ...]) -> None:
    where = given("npz", tmp_path, np.zeros(shape, np.float32))
    outcome = run(*files(tmp_path, WIDE, IDENTITY), "--inputs", where)
    assert (outcome.code, outcome.out) == (2, "")
    assert (
        f"no output holds an element that is no NaN on {where}, so nothing is compared: the inputs are x {[*shape]}"
        in outcome.err
    )


def test_an_empty_input_of_an_output_with_elements_is_compared() -> None:
    inputs: Declared = {"x": (["N", 3], TensorProto.FLOAT)}
    total, other = (model([node(op, "x", "y")], {}, inputs, {"y": 2}) for op in ("ReduceSum", "ReduceProd"))
    x = np.zeros((0, 3), np.float32)
    assert verify(total, total, inputs={"x": x}).equal
    assert not verify(total, other, inputs={"x": x}).equal


NO_ARCHIVE = "it is no zip archive; numpy.savez writes one, with each array under the name of its input"
JUNK: dict[str, tuple[bytes, str]] = {
    "text": (b"junk", NO_ARCHIVE),
    "empty": (b"", NO_ARCHIVE),
    "pickle": (b"\x80\x04}.", NO_ARCHIVE),
    "the start of an archive": (b"PK\x03\x04 and so on", NO_ARCHIVE),
    "one array": (b"\x93NUMPY\x01\x00junk", "holds one array without a name; give a .npz file"),
}


@pytest.mark.parametrize("name", JUNK)
def test_a_file_that_is_no_archive(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "i.npz").write_bytes(JUNK[name][0])
    outcome = run(*files(tmp_path, WIDE, WIDE), "--inputs", tmp_path / "i.npz")
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert JUNK[name][1] in line


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_nobody_is_told_to_run_what_a_file_holds(run: Run, tmp_path: Path, kind: str) -> None:
    objects = np.array([{}], object)
    where = tmp_path / "i.npz"
    if kind == "npz":
        np.savez(where, x=objects)
    else:
        where = tmp_path
        np.save(tmp_path / "x.npy", objects)
    outcome = run(*files(tmp_path, WIDE, WIDE), "--inputs", where)
    assert outcome.code == 2
    assert "it holds Python objects; give arrays of numbers or strings" in outcome.err
    assert "pickle" not in outcome.err


def test_a_damaged_archive(run: Run, tmp_path: Path) -> None:
    where = given("npz", tmp_path, np.zeros((1, 3, 2, 2), np.float32))
    data = where.read_bytes()
    for at in range(0, len(data), 7):
        where.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        outcome = run(*files(tmp_path, WIDE, WIDE), "--inputs", where)
        assert outcome.code in (0, 2)
        assert len(outcome.err.splitlines()) == (outcome.code == 2)


@pytest.mark.parametrize("shape", [(2**40, 2**20), (2**62, 2**62), (2**64,)])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_file_that_promises_more_than_memory_holds(
    run: Run, tmp_path: Path, shape: tuple[int, ...], kind: str
) -> None:
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f4", "fortran_order": False, "shape": shape})
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "i.npz", "w") as archive:
            archive.writestr("x.npy", data.getvalue())
    else:
        (tmp_path / "x.npy").write_bytes(data.getvalue())
    where = tmp_path / "i.npz" if kind == "npz" else tmp_path
    outcome = run(*files(tmp_path, WIDE, WIDE), "--inputs", where)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert str(where) in line
    assert "cannot be read" in line


def test_every_dtype_and_name_comes_back(tmp_path: Path) -> None:
    kinds = [TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.BOOL, TensorProto.STRING]
    names = ["file", "a/b", "x.npy", "..", "s"]
    wanted = [
        slot
        for kind, name in zip(kinds, names, strict=True)
        for slot in slots(model([node("Identity", name, "y")], {}, {name: ([2], kind)}))
    ]
    arrays = {
        s.name: np.array(["a", "bc"], object) if s.dtype.kind == "O" else np.array([0, 1]).astype(s.dtype)
        for s in wanted
    }
    write_inputs(tmp_path / "i.npz", arrays)
    ((_, back),) = read_inputs(tmp_path / "i.npz", wanted)
    for name, x in arrays.items():
        assert back[name].dtype == x.dtype
        assert back[name].tolist() == x.tolist()


# Figures


def test_given_tolerances_are_those_of_allclose(run: Run, tmp_path: Path) -> None:
    original = model([node("Identity", "x", "y")], {})
    fused = model([node("Add", "x t", "y")], {"t": np.array(0.01, np.float32)})
    paths = files(tmp_path, original, fused)
    assert run(*paths, "--atol", "0.011", "--examples", "3").code == 0
    assert run(*paths, "--atol", "0.009").code == 1
    assert run(*paths, "--rtol", "0.011").code == 1
    scaled = model([node("Mul", "x t", "y")], {"t": np.array(1.01, np.float32)})
    assert verify(original, scaled, rtol=0.011, examples=3).equal
    assert not verify(original, scaled, rtol=0.009).equal


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ulps_count_representable_numbers(dtype: type[np.floating]) -> None:
    x = np.array([1.0, -3.5, 0.0, 1e-3], dtype)
    assert ulps(x, x) == 0
    for steps in (1, 5):
        y = x
        for _ in range(steps):
            y = np.nextafter(y, dtype(np.inf))
        assert ulps(x, y) == ulps(y, x) == steps
    assert ulps(np.array([0.0], dtype), np.array([-0.0], dtype)) == 0
    tiny = np.finfo(dtype).smallest_subnormal
    assert ulps(np.array([tiny]), np.array([-tiny])) == 2
    largest = np.finfo(dtype).max
    bits = np.finfo(dtype).bits
    ends = ulps(np.array([largest]), np.array([-largest]))
    assert ends == 2 * int(np.array([largest]).view(f"i{bits // 8}")[0])


def test_ulps_skip_what_is_not_finite_and_whole_numbers() -> None:
    a = np.array([np.nan, np.inf, 1], np.float32)
    assert ulps(a, a) == 0
    assert ulps(np.array([1]), np.array([2])) is None
    assert ulps(np.array([np.nan]), np.array([np.nan])) == 0


X = np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)


@pytest.mark.parametrize(
    ("expected", "actual", "problem"),
    [
        (X, X, ""),
        (X, X * np.float32(1 + 1e-6), ""),
        (X, X + np.float32(0.01), "differs by 0.0025 relative"),
        (X, X[:1], "float32 [1, 2]"),
        (X, X.astype(np.float64), "float64 [2, 2]"),
        (X, np.where(X > 3, np.nan, X).astype(np.float32), "0 NaN and 0 infinite in the original, 1 NaN"),
        (np.where(X > 3, np.inf, X).astype(np.float32), X, "0 NaN and 1 infinite in the original"),
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), "differs by 0.25 of its entries"),
        (np.array([True]), np.array([False]), "of its entries"),
    ],
)
def test_check_output(expected: np.ndarray, actual: np.ndarray, problem: str) -> None:
    found = check_output("y", difference(expected, actual), 1e-7, 1e-7)
    assert bool(found.problem) == bool(problem)
    assert problem in found.problem


def test_errors_are_said_in_units_of_rounding() -> None:
    found = check_output("y", difference(X, X * np.float32(1 + 4e-6)), noise=2e-6, epsilon=1e-7)
    assert found.in_noise == pytest.approx(2, rel=0.1)
    assert found.max_abs == pytest.approx(1.6e-5, rel=0.1)


def test_constants_that_cancel_are_no_fault() -> None:
    """On zeros the original leaves the rounding of its constants, and the fused model nothing."""
    third = {"a": np.array(1 / 3, np.float32), "b": np.array(-1 / 3 + 2e-8, np.float32)}
    original = model([node("Add", "x a", "p"), node("Add", "p b", "y")], third)
    fused = model([node("Add", "x a", "y")], {"a": np.array(0, np.float32)})
    assert verify(original, fused).failure is None


def sensitive(k: float) -> ModelProto:
    """sin(k x): at large inputs rounding decides the output, at small ones it does not; if k is large, at all."""
    return model([node("Mul", "x k", "m"), node("Sin", "m", "y")], {"k": np.array(k, np.float32)})


def test_where_rounding_decides_nothing_is_compared() -> None:
    result = verify(sensitive(1e4), sensitive(1e4 + 0.002))
    assert result.equal
    assert result.set_aside > 0
    assert result.compared > 0
    assert verify(sensitive(1e4), sensitive(1e4)).set_aside == 0
    with pytest.raises(reparamc.InputError, match="rounding alone changes"):
        reparamc.verify_onnx(sensitive(1e12), sensitive(2e12), seconds=1e-9)  # time for the first input only


def test_one_sensitive_input_excuses_no_other(tmp_path: Path) -> None:
    """Noise is that of the inputs at hand: what passes where rounding decides is a fault elsewhere."""
    original = sensitive(1e4)
    nodes = [node("Mul", "x k", "m"), node("Sin", "m", "s"), node("Mul", "s t", "y")]
    wrong = model(nodes, {"k": np.array(1e4, np.float32), "t": np.array(1.05, np.float32)})
    for name, value in (("0.npz", 1000.0), ("1.npz", 1e-4)):
        write_inputs(tmp_path / name, {"x": np.full((1, 3, 2, 2), value, np.float32)})
    assert verify(original, wrong, inputs=tmp_path / "0.npz").equal
    result = verify(original, wrong, inputs=tmp_path)
    assert result.failure is not None
    assert "1.npz" in result.failure.inputs


def test_json(run: Run, tmp_path: Path) -> None:
    paths = files(tmp_path, *FAULTS["one weight"])
    outcome = run(*paths, "--json")
    data = json.loads(outcome.out)
    assert (outcome.code, data["equal"]) == (1, False)
    assert data["failure"]["saved"] == str(tmp_path / "b.failing.npz")
    (entry,) = data["outputs"]
    assert entry["output"] == "y"
    assert entry["max_rel"] > entry["allowed"]
    assert entry["in_noise"] > 1
    assert entry["ulps"] > 100
    equal = json.loads(run(paths[0], paths[0], "--json").out)
    assert equal["equal"] is True
    assert equal["outputs"][0]["max_abs"] == 0


def test_the_same_seed_gives_the_same_answer() -> None:
    first, second = (verify(*FAULTS["odd sizes only"], seed=5) for _ in range(2))
    assert (first.failure, first.outputs, first.compared) == (second.failure, second.outputs, second.compared)


def test_a_failing_input_that_cannot_be_saved_is_still_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise reparamc.InputError("no space")

    monkeypatch.setattr("reparamc.verify.search.write_inputs", full)
    outcome = run(*files(tmp_path, *FAULTS["one weight"]))
    assert outcome.code == 1
    assert "note       the failing input could not be saved: no space" in outcome.lines
    assert "saved to" not in outcome.lines[-1]


def branch(*end: NodeProto, **biases: np.ndarray) -> ModelProto:
    """A bottleneck that adds little to its input, or ends otherwise."""
    weights = {k: WEIGHTS[k] for k in ("v", "b")} | {"u": np.full((3, 4, 1, 1), 1e-3, np.float32)} | biases
    end = end or (node("Relu", "c", "r"), node("Conv", "r u", "s"), node("Add", "s x", "y"))
    return model([node("Conv", "x v b", "c"), *end], weights)


MOVED = WEIGHTS["b"] * np.array([1, 1, 1.02, 1], np.float32)


def test_a_tensor_that_alone_differs_is_a_difference(run: Run, tmp_path: Path) -> None:
    original, fused = branch(), branch(b=MOVED)
    assert all(not c.problem for c in verify(original, fused).outputs)  # the inputs do not tell
    outcome = run(*files(tmp_path, original, fused))
    assert outcome.code == 1
    assert outcome.lines[-1].startswith("verdict    differs: tensor 'c' computes another function: channel 2 adds ")
    assert outcome.lines[-1].endswith(" of its largest value, and all others are proven equal")


def test_a_tensor_that_differs_without_reaching_an_output_is_a_doubt(run: Run, tmp_path: Path) -> None:
    softmax = node("Softmax", "c", "y", axis=1)  # which takes away what is added to all channels
    outcome = run(*files(tmp_path, branch(softmax), branch(softmax, b=WEIGHTS["b"] + np.float32(0.5))))
    assert outcome.code == 3
    assert "not certain: no difference found on " in outcome.lines[-1]
    assert "but tensor 'c' computes another function: channel " in outcome.lines[-1]


def folded_in_float32(name: str) -> ModelProto:
    """`ORIGINAL` as other tools fold its BatchNorm; the convolution is called ``name``."""
    factor = WEIGHTS["n.g"] / np.sqrt(WEIGHTS["n.v"] + np.float32(1e-5))
    weights = WEIGHTS | {"f": WEIGHTS["w"] * factor[:, None, None, None]}
    weights["k"] = (WEIGHTS["b"] - WEIGHTS["n.m"]) * factor + WEIGHTS["n.b"]
    conv, _, *rest = block()
    conv = node("Conv", "x f k", name, pads=[1, 1, 1, 1])
    rest[1] = node("Add", f"{name} e", "s")
    return model([conv, *rest], weights)


@pytest.mark.parametrize("name", ["c", "d"])
def test_other_tools_fold_in_float32_and_keep_either_name(name: str) -> None:
    result = verify(ORIGINAL, folded_in_float32(name))
    assert result.windows is not None
    assert result.windows["equal"] + result.windows["rounded"] == sum(result.windows.values())
    assert result.verdict.startswith("equal within rounding, on ")


def test_a_tensor_that_another_makes_up_for_is_a_doubt() -> None:
    original, fused = (
        branch(),
        branch(v=2 * WEIGHTS["v"], b=2 * WEIGHTS["b"], u=np.full((3, 4, 1, 1), 5e-4, np.float32)),
    )
    found = verify(original, fused)
    assert (found.failure, found.equal) == (None, False)
    assert found.verdict.startswith("not certain: no difference found on ")


@pytest.mark.parametrize("place", [0, 1])
def test_one_model_from_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in files(tmp_path, *FAULTS["one weight"])]
    data = io.BytesIO(Path(paths[place]).read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data))
    paths[place] = "-"
    outcome = run(*paths)
    assert outcome.code == 1
    assert outcome.lines[-1].endswith("fused.failing.npz" if place else "b.failing.npz")
    outcome = run("-", "-")
    assert (outcome.code, outcome.err) == (2, "reparamc: only one of the two models can come from standard input\n")


def test_an_output_of_nan_is_not_compared(run: Run, tmp_path: Path) -> None:
    def silent(op: str) -> ModelProto:
        nodes = [node("Relu", "x", "y"), node("Add", "x k", "a"), node(op, "a", "z")]
        return model(nodes, {"k": np.full((1, 3, 1, 1), np.nan, np.float32)}, outputs={"y": 4, "z": 4})

    outcome = run(*files(tmp_path, silent("Abs"), silent("Sigmoid")))
    assert outcome.code == 3
    assert outcome.lines[-1].endswith("but output 'z' is empty or all NaN on every input that was tried")


def _searched(windows: list[Window], noise: float) -> Verification:
    """The verdict on a proof with these windows, and an error of ``noise`` roundings that is allowed."""
    result = Verification("a", "b", compared=3, outputs=[OutputCheck("y", 1.0, noise * 1e-6, 1, 1e-6, 1.0, "")])
    proof = Certificate(tuple(windows), 0, 0.0)
    result.windows = {verdict: proof.count(verdict) for verdict in ("equal", "different", "undecided")}
    _Search(None, result, None, 0, None)._weigh(proof, [])  # pyright: ignore
    return result


EQUAL, OPEN = Window("a", "equal", before=2), Window("c", "undecided")
OTHER = Window("b", "different", 1000.0, 1.0, "channel 0 adds 1", 2, 1, 1000.0)


@pytest.mark.parametrize(("window", "noise"), [(OTHER, 1), (OPEN, 60)])
def test_a_proof_that_is_not_whole_leaves_a_doubt(window: Window, noise: float) -> None:
    found = _searched([EQUAL, window, OPEN], noise)
    assert (found.failure, found.equal) == (None, False)
    assert found.verdict.startswith("not certain: no difference found on 3 inputs, but ")


def test_a_verdict_says_how_much_is_proven() -> None:
    assert _searched([EQUAL, OPEN], 2).verdict == "no difference found on 3 inputs; 1 of 2 tensors proven"
    assert _searched([EQUAL], 60).verdict == "equal within rounding, on 3 inputs"
    assert Verification("a", "b", compared=3).verdict == "no difference found on 3 inputs; nothing is proven"
