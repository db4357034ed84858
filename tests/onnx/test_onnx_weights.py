"""Weights that nothing touches go from file to file as bytes; external data stay external."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from reparamc import InputError, fuse_onnx
from reparamc.__main__ import main
from reparamc.algebra.arrays import Rounded
from reparamc.compiler import consider
from reparamc.onnx import weights
from reparamc.onnx.check import check
from reparamc.onnx.exact import OPERATORS, exactly
from reparamc.onnx.files import file_origin, load, opened, save
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.record import graph_hash
from reparamc.onnx.session import session
from reparamc.testing.onnx_models import build_onnx
from reparamc.testing.sketch import random_structure


def model(constant: bool = False) -> ModelProto:
    """conv, BatchNorm and two products with large matrices, of which no rule changes the second; also as a Constant."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(0, 0.1, (64, 8, 3, 3)),
        **{name: rng.uniform(0.5, 1.5, 64) for name in ("gamma", "beta", "mean", "var")},
        "m": rng.normal(0, 0.1, (64, 260)),
        "n": rng.normal(0, 0.1, (260, 70)),
    }
    stored = {name: numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Relu", ["f"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["t"]),
        helper.make_node("MatMul", ["t", "n"], ["y"]),
    ]
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["n"], value=stored.pop("n")))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 8, 9, 7]), ("y", [2, 70])))
    graph = helper.make_graph(nodes, "g", [x], [y], list(stored.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("constant", [False, True])
def test_a_light_model_is_the_same_from_a_file_and_from_memory(tmp_path: Path, constant: bool) -> None:
    whole, path = model(constant), tmp_path / "m.onnx"
    onnx.save(whole, path)
    with weights.holding():
        for light in (weights.light(whole), opened(path)):
            check(light)
            assert len(weights.references(light)) == 3
            assert light.ByteSize() < 5000 < weights.total(light)
            assert b"".join(map(bytes, weights.blocks(weights.pieces(light)))) == whole.SerializeToString()
            assert graph_hash(light) == graph_hash(whole)
            assert np.array_equal(
                weights.array(light.graph.initializer[0]), numpy_helper.to_array(whole.graph.initializer[0])
            )
            assert weights.fill(light) == whole


@pytest.mark.parametrize("constant", [False, True])
def test_onnx_runtime_takes_weights_where_they_are(tmp_path: Path, constant: bool) -> None:
    whole, path = model(constant), tmp_path / "m.onnx"
    onnx.save(whole, path)
    inputs = {"x": np.random.default_rng(1).normal(size=(2, 8, 9, 7)).astype(np.float32)}
    (expected,) = ReferenceEvaluator(whole).run(None, inputs)
    with weights.holding(), session(opened(path), "it") as run:
        assert np.allclose(run(inputs)["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("command", ["fuse", "verify"])
def test_weights_that_change_while_they_are_read(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = in_two_files(tmp_path), tmp_path / "o.onnx"
    read = weights.array

    def changed(tensor: TensorProto) -> np.ndarray:
        with (tmp_path / "w.bin").open("r+b") as file:
            file.write(bytes(1000))
        return read(tensor)

    if command == "verify":
        assert main(["fuse", str(path), "-o", str(other), "--quiet"]) == 0
    monkeypatch.setattr(weights, "array", changed)
    assert main([command, str(path), *["-o"] * (command == "fuse"), str(other)]) == 2
    assert "w.bin has changed while it was read" in capsys.readouterr().err
    assert other.exists() == (command == "verify")


@pytest.mark.parametrize("name", ["m.onnx", "größe ñ.onnx"])
def test_onnx_runtime_maps_what_lies_well_in_a_file(tmp_path: Path, name: str) -> None:
    arrays = [numpy_helper.from_array(np.full((64, 64), n + 1, np.float32), f"w{n}") for n in range(3)]
    nodes = [helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"x{n + 1}"]) for n in range(3)]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in ("x0", "x3"))
    whole = helper.make_model(helper.make_graph(nodes, "g", [x], [y], arrays), ir_version=9)
    with (tmp_path / name).open("wb") as file:
        data = whole.SerializeToString()
        file.write(data)
    with weights.holding():
        light = weights.for_runtime(opened(tmp_path / name))
        starts = [data.index(t.raw_data) for t in arrays]
        assert len(light.values) == sum(start % 4 > 0 for start in starts)
        with session(opened(tmp_path / name), "it") as run:
            assert np.array_equal(run({"x0": np.ones((1, 64), np.float32)})["x3"], np.full((1, 64), 6 * 64.0**3))


def test_a_file_that_was_replaced_is_not_mapped(tmp_path: Path) -> None:
    whole = external(tmp_path)
    with weights.holding():
        light = opened(tmp_path / "m.onnx")
        for location in ("a.bin", "sub/b.bin"):
            data = (tmp_path / location).read_bytes()
            (tmp_path / location).rename(tmp_path / f"{location}.old")
            (tmp_path / location).write_bytes(bytes(len(data)))
        inputs = {"x": np.ones((2, 8, 9, 7), np.float32)}
        (expected,) = ReferenceEvaluator(whole).run(None, inputs)
        with session(light, "it") as run:
            assert np.allclose(run(inputs)["y"], expected, rtol=1e-4, atol=1e-5)


def test_sessions_of_large_models_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    inputs = {"x": np.ones((2, 8, 9, 7), np.float32)}
    with weights.holding():
        with session(opened(tmp_path / "m.onnx"), "it") as run:
            expected = run(inputs)["y"]
            assert run._session is not None
        monkeypatch.setattr(weights, "FILE_LIMIT", 1000)
        with session(opened(tmp_path / "m.onnx"), "it") as run:
            for _ in range(2):
                assert np.array_equal(run(inputs)["y"], expected)
                assert run._session is None


def test_what_no_rule_reads_is_never_decoded(tmp_path: Path) -> None:
    whole, path = model(), tmp_path / "m.onnx"
    onnx.save(whole, path)
    weights.COUNTERS.reset()
    fuse_onnx(path, output=tmp_path / "out.onnx", verify=False)
    kernel = 64 * 8 * 9 * 4
    assert weights.COUNTERS.decoded <= kernel
    assert kernel <= weights.COUNTERS.made < kernel + 1000
    assert weights.COUNTERS.sessions == 0
    fused = onnx.load(tmp_path / "out.onnx")
    kept = {t.name: t for t in fused.graph.initializer}
    assert all(kept[t.name] == t for t in whole.graph.initializer if t.name in "mn")
    assert graph_hash(fused) == graph_hash(load(tmp_path / "out.onnx"))


@pytest.mark.parametrize("alpha", [1.0, 0.1])
@pytest.mark.parametrize("transposed", [0, 1])
def test_factors_are_rounded_once(alpha: float, transposed: int) -> None:
    rng = np.random.default_rng(0)
    w, s = rng.normal(0, 1, (7, 5)).astype(np.float32), rng.uniform(0.5, 1.5, 7).astype(np.float32)
    stored = {"w": w if transposed else np.ascontiguousarray(w.T), "s": s}
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["g"], alpha=alpha, transB=transposed),
        helper.make_node("Mul", ["g", "s"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, k]) for n, k in (("x", 5), ("y", 7)))
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, n) for n, a in stored.items()])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    fused, _ = fuse_model(whole, verify="off")
    (node,), (found,) = fused.graph.node, map(numpy_helper.to_array, fused.graph.initializer)
    written = next((a.f for a in whole.graph.node[0].attribute if a.name == "alpha"), 1.0)
    expected = (w.astype(np.float64) * written * s.astype(np.float64)[:, None]).astype(np.float32)
    assert np.array_equal(found if found.shape == (7, 5) else found.T, expected), node.op_type


def test_what_is_held_as_stored_is_folded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions that are joined need in float64 again what was rounded when they were considered alone."""
    again = 0

    def counted(stored: np.ndarray, load: Callable[[], np.ndarray]) -> Rounded:
        def loaded() -> np.ndarray:
            nonlocal again
            again += 1
            return load()

        return Rounded(stored, loaded)

    monkeypatch.setattr(consider, "Rounded", counted)
    for seed in range(60):
        whole = build_onnx(random_structure((5, seed)), symbolic=seed % 2 == 0, constants=seed % 3 == 0)
        found: list[bytes] = []
        for large in (1 << 40, -1):
            monkeypatch.setattr(consider, "LARGE", large)
            result, _ = fuse_model(whole, verify="off", described=False)
            found.append(result.SerializeToString(deterministic=True))
        assert found[0] == found[1], seed
    assert again


def external(folder: Path, *, name: str = "m.onnx") -> ModelProto:
    """`model` in ``folder``, with the weights in two files, one in a subfolder, at odd places."""
    whole = model()
    kept = ModelProto()
    kept.CopyFrom(whole)
    (folder / "sub").mkdir(exist_ok=True)
    for location, names in (("a.bin", ("w", "m")), ("sub/b.bin", ("n", "gamma"))):
        data = b"\0" * 7
        for t in kept.graph.initializer:
            if t.name in names:
                entries = {"location": location, "offset": str(len(data)), "length": str(len(t.raw_data))}
                data += t.raw_data + b"\0" * 5
                t.ClearField("raw_data")
                t.data_location = TensorProto.EXTERNAL
                for key, value in entries.items():
                    t.external_data.add(key=key, value=value)
        (folder / location).write_bytes(data)
    (folder / name).write_bytes(kept.SerializeToString())
    return whole


def test_external_data_stay_external_in_one_new_file(tmp_path: Path) -> None:
    whole = external(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert load(tmp_path / "m.onnx") == whole
    fuse_onnx(tmp_path / "m.onnx", output=tmp_path / "out.onnx")
    assert {p: p.read_bytes() for p in before} == before
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "a.bin", "sub", "out.onnx", "out.onnx.data"}
    assert (tmp_path / "out.onnx").stat().st_size < 8000
    expected, _ = fuse_model(whole)
    assert graph_hash(load(tmp_path / "out.onnx")) == graph_hash(expected)
    assert set(file_origin(tmp_path / "m.onnx").data) == {"a.bin", "sub/b.bin"}


def test_a_file_of_weights_is_never_written_over(tmp_path: Path) -> None:
    whole = external(tmp_path, name="a.onnx")
    (tmp_path / "a.bin").rename(tmp_path / "a.onnx.data")
    text = (tmp_path / "a.onnx").read_bytes()
    longer = ModelProto.FromString(text)
    for t in longer.graph.initializer:
        for entry in t.external_data:
            entry.value = "a.onnx.data" if entry.value == "a.bin" else entry.value
    (tmp_path / "a.onnx").write_bytes(longer.SerializeToString())
    with weights.holding():
        save(opened(tmp_path / "a.onnx"), tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx.1.data").exists()
    assert onnx.load(tmp_path / "a.onnx").graph.initializer[0].raw_data == whole.graph.initializer[0].raw_data


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../a.bin", "not in the folder of the model"),
        ("location", "/etc/passwd", "not in the folder of the model"),
        ("location", "link.bin", "not in the folder of the model"),
        ("location", "", "not in the folder of the model"),
        ("location", "sub", "no regular file"),
        ("location", "gone.bin", "no such file"),
        ("offset", "-1", "no number"),
        ("length", "1000000", "too short"),
        ("length", "400", "its shape needs"),
    ],
)
def test_external_data_that_are_not_there(tmp_path: Path, key: str, value: str, message: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    external(folder)
    (tmp_path / "a.bin").write_bytes(b"\0" * 10**6)
    (folder / "link.bin").symlink_to(tmp_path / "a.bin")
    broken = onnx.load(folder / "m.onnx", load_external_data=False)
    next(e for e in broken.graph.initializer[0].external_data if e.key == key).value = value
    (folder / "m.onnx").write_bytes(broken.SerializeToString())
    with pytest.raises(InputError, match=message):
        fuse_onnx(folder / "m.onnx", verify=False)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    data = model().SerializeToString()
    rng = np.random.default_rng(0)
    for _ in range(40):
        bad = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        for at in rng.integers(0, min(len(bad), 400), rng.integers(1, 4)):
            bad[at] = rng.integers(256)
        (tmp_path / "bad.onnx").write_bytes(bad)
        try:
            found = load(tmp_path / "bad.onnx")
        except InputError:
            continue
        assert found == ModelProto.FromString(bytes(bad))


CASES = {
    "Add": [(np.float32, (3, 1)), (np.float32, (2,))],
    "Sub": [(np.int64, (3,)), (np.int64, ())],
    "Mul": [(np.float64, (2, 3)), (np.float64, (3,))],
    "Div": [(np.float32, (4,)), (np.float32, (4,))],
    "Sqrt": [(np.float32, (5,))],
    "Mod": [(np.int64, (6,)), (np.int64, (6,))],
    "Concat": [(np.float32, (2, 3)), (np.float32, (4, 3))],
    "Cast": [(np.int64, (4,))],
}


@pytest.mark.parametrize("op", CASES)
def test_what_is_beyond_doubt_is_what_the_reference_has(op: str) -> None:
    rng = np.random.default_rng(0)
    operands = [(np.asarray(rng.uniform(1, 9, shape)) * rng.choice([-1, 1])).astype(kind) for kind, shape in CASES[op]]
    operands = [np.abs(a) for a in operands] if op == "Sqrt" else operands
    attributes = {"Concat": {"axis": 0}, "Cast": {"to": TensorProto.FLOAT}}.get(op, {})
    same_as_reference(helper.make_node(op, list("abcde")[: len(operands)], ["y"], **attributes), operands)


@pytest.mark.parametrize("bounds", [(0, 2, 1), (-3, 9, 2), (-1, -(2**63), -1), (1, -1, 1), (2, 0, -1)])
def test_slices_are_what_the_reference_has(bounds: tuple[int, int, int]) -> None:
    start, end, step = (np.array([n]) for n in bounds)
    x = np.arange(12.0).reshape(3, 4)
    for axis in (0, 1, -1):
        same_as_reference(helper.make_node("Slice", list("abcde"), ["y"]), [x, start, end, np.array([axis]), step])


def test_other_moves_are_what_the_reference_has() -> None:
    x = np.arange(12.0).reshape(3, 4)
    same_as_reference(helper.make_node("Gather", list("ab"), ["y"], axis=1), [x, np.array([[-1], [2]])])
    same_as_reference(helper.make_node("Expand", list("ab"), ["y"]), [x, np.array([2, 1, 4])])
    value = numpy_helper.from_array(np.array([7]))
    same_as_reference(helper.make_node("ConstantOfShape", ["a"], ["y"], value=value), [np.array([2, 3])])


def same_as_reference(node: onnx.NodeProto, operands: list[np.ndarray]) -> None:
    names = list(node.input)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, operands, strict=True)
    ]
    graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name="y")])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (expected,) = ReferenceEvaluator(whole).run(None, dict(zip(names, operands, strict=True)))
    found = exactly(node, operands)
    assert found is not None
    assert isinstance(expected, np.ndarray)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_what_may_have_several_forms_is_left_to_the_witnesses() -> None:
    one = np.ones(1, np.float32)
    assert exactly(helper.make_node("Div", ["a", "b"], ["y"]), [one, 0 * one]) is None
    assert exactly(helper.make_node("Sqrt", ["a"], ["y"]), [-one]) is None
    assert exactly(helper.make_node("Cast", ["a"], ["y"], to=TensorProto.INT8), [one * 300]) is None
    assert exactly(helper.make_node("Div", ["a", "b"], ["y"]), [np.array([-7]), np.array([2])]) is None
    assert exactly(helper.make_node("Exp", ["a"], ["y"]), [one]) is None
    assert "Exp" not in OPERATORS


def in_two_files(folder: Path) -> Path:
    """The model in a file, its weights in ``w.bin``."""
    path = folder / "m.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


@pytest.mark.parametrize("name", ["w.bin", "link"])
def test_weights_of_the_input_are_no_output(tmp_path: Path, name: str) -> None:
    path = in_two_files(tmp_path)
    (tmp_path / "link").symlink_to("w.bin")
    content, target = (tmp_path / "w.bin").read_bytes(), str(tmp_path / name)
    onnx.save(model(), tmp_path / "other.onnx")
    for command in (
        ["fuse", str(path), "-o", target],
        ["fuse", str(path), "-o", str(tmp_path / "o.onnx"), "--report", target],
        ["verify", str(path), str(tmp_path / "other.onnx"), "--save", target],
        ["refresh", str(path), "--checkpoint", str(tmp_path / "other.onnx"), "-o", target],
        ["refresh", str(tmp_path / "other.onnx"), "--checkpoint", str(path), "-o", target],
    ):
        assert main(command) == 2
    with pytest.raises(InputError, match="holds weights of the input"):
        fuse_onnx(path, output=target)
    assert (tmp_path / "w.bin").read_bytes() == content
    assert not (tmp_path / "o.onnx").exists()


def test_a_length_that_is_not_said_is_what_the_shape_needs(tmp_path: Path) -> None:
    path = in_two_files(tmp_path)
    stored = onnx.load(path, load_external_data=False)
    for t in stored.graph.initializer:
        kept = [e for e in t.external_data if e.key != "length"]
        del t.external_data[:]
        t.external_data.extend(kept)
    path.write_bytes(stored.SerializeToString())
    assert load(path) == model()


def test_no_file_of_weights_is_written_where_none_is_left(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", name], [f"c{name}"]) for name in "ab"]
    nodes += [helper.make_node("Add", ["ca", "cb"], ["y"])]
    stored = [numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), name) for name in "ab"]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2, 3, 3]) for n in "xy")
    small = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), ir_version=9)
    onnx.save(small, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "o.onnx.data").write_text("of another model")
    fuse_onnx(tmp_path / "m.onnx", output=tmp_path / "o.onnx")
    assert (tmp_path / "o.onnx.data").read_text() == "of another model"
    assert len(onnx.load(tmp_path / "o.onnx", load_external_data=False).graph.initializer) == 1
