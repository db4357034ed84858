"""The record in a fused file: what it holds, that it is stable, and that an audit sees what does not fit it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from onnx_models import batchnorm, model, node, norm, rand

import reparamc
from reparamc import __version__, cli, fuse_onnx
from reparamc.errors import InputError
from reparamc.onnx_record import KEY, graph_hash, model_origin, records
from reparamc.record import Audit, Record

SHAPE = (1, 6, 8, 8)
CONV = {"w": rand(6, 6, 3, 3)}


def conv_bn(blocks: int = 1, dead_end: bool = False) -> ModelProto:
    """Blocks of convolution, BatchNorm and ReLU; the user's own entry is among the metadata."""
    nodes, weights = [], {}
    for at in range(blocks):
        nodes += [
            node("Conv", f"{f'r{at - 1}' if at else 'x'} w{at}", f"c{at}", name=f"conv{at}", pads=[1, 1, 1, 1]),
            batchnorm(f"c{at}", f"n{at}", f"b{at}", name=f"norm{at}"),
            node("Relu", f"b{at}", f"r{at}" if at + 1 < blocks else "y", name=f"act{at}"),
        ]
        weights |= {f"w{at}": rand(6, 6, 3, 3, seed=at), **norm(f"n{at}", 6)}
    made = model(nodes, weights, SHAPE)
    made.metadata_props.add(key="author", value="me")
    return made


def saved(made: ModelProto, path: Path) -> Path:
    onnx.save(made, path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entries(made: ModelProto) -> dict[str, str]:
    return {e.key: e.value for e in made.metadata_props}


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """``fused.onnx``, with its original beside it."""
    source = saved(conv_bn(), tmp_path / "original.onnx")
    return Path(fuse_onnx(source, output=tmp_path / "fused.onnx"))


# What is written


def test_a_file_says_what_it_was_made_from(fused: Path) -> None:
    made = onnx.load(fused)
    assert entries(made).keys() == {"author", f"{KEY}1"}
    assert entries(made)["author"] == "me"
    (record,) = records(made)
    assert record["reparamc"] == __version__
    assert record["input"] == {"sha256": sha256(fused.with_name("original.onnx")), "of": "file"}
    assert (record["objective"], record["verified"]) == ("latency", "full")
    assert record["passes"] == {"bn-folding": 1}
    (region,) = record["regions"]
    assert (region["at"], region["passes"]) == ("norm0", {"bn-folding": 1})
    assert 0 <= region["error"] < 1e-12
    (output,) = record["outputs"]
    assert output["output"] == "y"
    assert 0 <= output["max_rel"] <= output["allowed"]
    assert record["certificate"] == {"equal": 1, "undecided": 0, "rolled back": 0}
    assert record["size"]["before"]["ops"] == 3
    assert record["size"]["after"]["ops"] == 2
    assert record["result"] == graph_hash(made)


def test_the_command_line_writes_the_same(fused: Path) -> None:
    output = fused.with_name("cli.onnx")
    assert cli.main(["fuse", "-q", str(fused.with_name("original.onnx")), "-o", str(output)]) == 0
    assert output.read_bytes() == fused.read_bytes()


def test_a_model_in_memory_says_so() -> None:
    made = conv_bn()
    (record,) = records(fuse_onnx(made))
    assert record["input"] == {
        "sha256": hashlib.sha256(made.SerializeToString()).hexdigest(),
        "of": "serialized ModelProto",
    }
    assert entries(made) == {"author": "me"}


def test_weights_in_other_files_have_their_own_hash(tmp_path: Path) -> None:
    source = tmp_path / "original.onnx"
    onnx.save(conv_bn(), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    target = Path(fuse_onnx(source))
    (record,) = records(onnx.load(target))
    assert record["input"]["data"] == {"weights.bin": sha256(tmp_path / "weights.bin")}
    assert reparamc.audit(target, source, examples=3).holds
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[3] ^= 1
    (tmp_path / "weights.bin").write_bytes(bytes(data))
    assert reparamc.audit(target, source, examples=3).matches == 0


def test_fusing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = saved(conv_bn(3), tmp_path / "original.onnx")
    first, second = (Path(fuse_onnx(source, output=tmp_path / name)).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert first == second


def test_where_nothing_was_done_nothing_is_said(fused: Path) -> None:
    again = Path(fuse_onnx(fused))
    assert onnx.load(again) == onnx.load(fused)
    plain = model([node("Relu", "x", "y")], {}, SHAPE)
    assert fuse_onnx(plain) == plain


def test_an_original_that_is_kept_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reparamc import onnx_fuse
    from reparamc.report import Latency

    monkeypatch.setattr(onnx_fuse, "compare_latency", lambda *_: Latency(1.0, 1.0, 1.0, 0.9, 1.1, 21))
    made = conv_bn()
    assert fuse_onnx(made, only_if_faster=True) == made
    source = saved(made, tmp_path / "original.onnx")
    assert Path(fuse_onnx(source, only_if_faster=True)).read_bytes() == source.read_bytes()


def test_a_second_fusion_adds_a_record(tmp_path: Path) -> None:
    source = saved(conv_bn(2), tmp_path / "original.onnx")
    once = Path(fuse_onnx(source, output=tmp_path / "once.onnx", objective="macs"))
    more = onnx.load(once)
    more.graph.node.extend([node("Neg", "y", "z"), node("Mul", "z two", "u")])  # someone goes on building
    more.graph.initializer.append(numpy_helper.from_array(np.full((1, 6, 1, 1), 2, np.float32), "two"))
    more.graph.node.extend([node("Conv", "u w", "v", name="last"), batchnorm("v", "m", "o", name="end")])
    more.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in {**CONV, **norm("m", 6)}.items())
    more.graph.output[0].name = "o"
    del more.graph.output[0].type.tensor_type.shape.dim[:]
    for _ in range(4):
        more.graph.output[0].type.tensor_type.shape.dim.add()
    twice = Path(fuse_onnx(saved(more, tmp_path / "more.onnx"), output=tmp_path / "twice.onnx"))
    first, second = records(onnx.load(twice))
    assert first == records(onnx.load(once))[0]
    assert first["objective"] == "macs"
    assert second["input"]["sha256"] == sha256(tmp_path / "more.onnx")
    audit = reparamc.audit(twice)
    assert audit.holds
    assert "fusion 2 of 2" in audit.page()


def test_a_record_grows_with_the_regions_alone(tmp_path: Path) -> None:
    def length(blocks: int) -> int:
        return len(entries(fuse_onnx(conv_bn(blocks), verify="region"))[f"{KEY}1"])

    one, few, many = length(1), length(5), length(9)
    assert many - few <= 1.2 * (few - one)
    assert (many - one) / 8 < 100


# The audit


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["audit", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


Run = Callable[..., tuple[int, str, str]]


def test_the_page(run: Run, fused: Path) -> None:
    code, out, err = run(fused)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "fusion 1 of 1" in lines
    assert f"by reparamc {__version__}, for latency" in lines
    assert f"made from {sha256(fused.with_name('original.onnx'))} (SHA-256 of the file)" in lines
    assert "verified every replacement in float64, and both models end to end" in lines
    assert "windows 1 equal, 0 undecided, 0 rolled back" in lines
    assert "passes bn-folding 1" in lines
    assert any(line.startswith("norm0: bn-folding; ") for line in lines)
    assert "graph as the fusion left it" in lines


def test_the_page_lists_the_first_regions_and_all_on_demand(run: Run, tmp_path: Path) -> None:
    target = fuse_onnx(saved(conv_bn(12), tmp_path / "original.onnx"), verify="off")
    short, long = run(target)[1], run(target, "--all")[1]
    assert "    and 2 more; --all lists them" in short.splitlines()
    assert "norm11: bn-folding; not verified" in long
    assert "norm11" not in short


def test_against_the_original(run: Run, fused: Path) -> None:
    code, out, _ = run(fused, "--against", fused.with_name("original.onnx"))
    assert code == 0
    assert "what fusion 1 was made from" in out
    assert "compared   equal within rounding" in out


def test_against_the_same_model_in_other_bytes(run: Run, fused: Path) -> None:
    """Equal in what it computes, and still not the file that was fused."""
    other = conv_bn()
    other.doc_string = "a copy"
    code, out, _ = run(fused, "--against", saved(other, fused.with_name("other.onnx")))
    assert code == 1
    assert "other.onnx is not what was fused: its hash is" in out
    assert "compared   equal within rounding" in out


def test_against_another_original(run: Run, fused: Path) -> None:
    other = conv_bn()
    weight = numpy_helper.to_array(other.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] += 0.1
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, other.graph.initializer[0].name))
    code, out, _ = run(fused, "--against", saved(other, fused.with_name("other.onnx")))
    assert code == 1
    assert "compared   differs: output 'y'" in out
    assert {p.name for p in fused.parent.iterdir()} == {"original.onnx", "fused.onnx", "other.onnx"}


def test_a_model_fused_in_memory_is_known_by_its_serialization(tmp_path: Path) -> None:
    made = conv_bn()
    target = saved(fuse_onnx(made), tmp_path / "fused.onnx")
    audit = reparamc.audit(target, saved(made, tmp_path / "original.onnx"), examples=3)
    assert (audit.holds, audit.matches) == (True, 1)


def test_a_graph_that_was_changed_since(run: Run, fused: Path) -> None:
    made = onnx.load(fused)
    weight = numpy_helper.to_array(made.graph.initializer[0]).copy()
    weight.reshape(-1)[0] += 1e-6
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, made.graph.initializer[0].name))
    code, out, _ = run(saved(made, fused.with_name("changed.onnx")))
    assert code == 1
    assert "problem    the graph was changed after the fusion" in out


def test_json(run: Run, fused: Path) -> None:
    data = json.loads(run(fused, "--json")[1])
    assert data["holds"] is True
    assert data["records"] == records(onnx.load(fused))
    data = json.loads(run(fused, "--json", "--against", fused.with_name("original.onnx"))[1])
    assert data["matches"] == 1
    assert data["verification"]["equal"] is True


@pytest.mark.parametrize("value", ["{", "[]", "{}", "null", '{"reparamc":"9"}'])
def test_a_record_that_cannot_be_read(run: Run, fused: Path, value: str) -> None:
    made = conv_bn()
    made.metadata_props.add(key=f"{KEY}1", value=value)
    path = saved(made, fused.with_name("odd.onnx"))
    code, out, err = run(path)
    assert (code, out) == (2, "")
    assert err.splitlines() == [f"reparamc: the metadata {KEY}1 is no record that this version can read"]
    assert entries(onnx.load(fuse_onnx(path))).keys() == {"author", f"{KEY}1", f"{KEY}2"}  # fusing goes on


def test_no_record(run: Run, fused: Path) -> None:
    code, out, err = run(fused.with_name("original.onnx"))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "original.onnx holds no record" in line
    assert "reparamc verify" in line


def test_an_audit_of_nothing(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "none.onnx")[0] == 2
    with pytest.raises(InputError, match="no such file"):
        reparamc.audit(tmp_path / "none.onnx")


def test_every_way_in_which_an_audit_fails_is_told() -> None:
    record: Record = records(fuse_onnx(conv_bn()))[0]
    audit = Audit("m", [record], unchanged=False, against="o", problems=["it is another"])
    assert not audit.holds
    page = audit.page()
    assert "graph      changed since" in page
    assert "against    o: nothing that was fused here" in page
    assert "problem    it is another" in page


def test_the_hash_of_a_graph_sees_every_part() -> None:
    made = conv_bn()
    reference = graph_hash(made)
    for change in (
        lambda g: g.node[0].attribute[0].ints.__setitem__(0, 0),
        lambda g: g.initializer[0].dims.__setitem__(0, 5),
        lambda g: g.input[0].__setattr__("name", "u"),
        lambda g: g.output[0].__setattr__("name", "v"),
        lambda g: g.node.pop(),
    ):
        other = ModelProto.FromString(made.SerializeToString())
        change(other.graph)
        assert graph_hash(other) != reference
    other = ModelProto.FromString(made.SerializeToString())
    other.metadata_props.add(key="a", value="b")
    assert graph_hash(other) == reference
    assert model_origin(other) != model_origin(made)
