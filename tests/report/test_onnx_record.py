"""The record in a fused file: what it holds, that it is stable, and that an audit sees what does not fit it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import batchnorm, model, node, norm, rand

import reparamc
from reparamc import __main__ as cli
from reparamc import __version__, fuse_onnx
from reparamc.errors import InputError
from reparamc.onnx.record import KEY, STRUCTURE, graph_hash, model_origin, records
from reparamc.report.record import Record, parsed
from reparamc.verify.audit import Audit

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
    """The metadata, but for the structures beside the records."""
    return {e.key: e.value for e in made.metadata_props if not e.key.startswith(STRUCTURE)}


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
    from reparamc.report.data import Latency

    monkeypatch.setattr("reparamc.onnx.latency.compare_latency", lambda *_: Latency(1.0, 1.0, 1.0, 0.9, 1.1, 21))
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
        out, err = capsys.readouterr()
        return code, out, err

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
    assert "tensors 1 equal, 0 undecided, 0 rolled back" in lines
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


CALLED = helper.make_function(
    "mine", "Twice", ["a"], ["b"], [node("Mul", "a a", "b")], [helper.make_opsetid("", 17)], []
)


def with_function() -> ModelProto:
    made = conv_bn()
    made.functions.append(CALLED)
    made.opset_import.append(helper.make_opsetid("mine", 1))
    made.graph.node.append(helper.make_node("Twice", ["y"], ["z"], domain="mine"))
    made.graph.output[0].name = "z"
    return made


ALTERED: dict[str, Callable[[ModelProto], object]] = {
    "a later operator set": lambda m: m.opset_import[0].__setattr__("version", m.opset_import[0].version + 1),
    "an earlier operator set": lambda m: m.opset_import[0].__setattr__("version", 13),
    "the version of a domain": lambda m: m.opset_import[1].__setattr__("version", 2),
    "one more domain": lambda m: m.opset_import.append(helper.make_opsetid("theirs", 1)),
    "one domain less": lambda m: m.opset_import.pop(1),
    "the set twice": lambda m: m.opset_import.append(helper.make_opsetid("", 1)),
    "the operator of a function": lambda m: m.functions[0].node[0].__setattr__("op_type", "Add"),
    "the operator set of a function": lambda m: m.functions[0].opset_import[0].__setattr__("version", 13),
    "no functions": lambda m: m.functions.pop(),
    "one more function": lambda m: m.functions.add().CopyFrom(CALLED),
    "initializers that callers override": lambda m: m.__setattr__("ir_version", 3),
    "the scale of an input": lambda m: m.graph.quantization_annotation.add(tensor_name="x"),
    "the type of an output": lambda m: m.graph.output[0].type.tensor_type.__setattr__("elem_type", TensorProto.DOUBLE),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_model_that_was_altered_beside_its_graph(run: Run, tmp_path: Path, name: str) -> None:
    target = Path(fuse_onnx(saved(with_function(), tmp_path / "original.onnx")))
    made = onnx.load(target)
    assert run(saved(made, tmp_path / "same.onnx"))[0] == 0
    ALTERED[name](made)
    code, out, _ = run(saved(made, tmp_path / "altered.onnx"))
    assert code == 1
    assert "graph      changed since" in out


def test_what_says_the_same_is_no_alteration(run: Run, tmp_path: Path) -> None:
    target = Path(fuse_onnx(saved(with_function(), tmp_path / "original.onnx")))
    made = onnx.load(target)
    sets = [(o.domain, o.version) for o in made.opset_import]
    del made.opset_import[:]
    made.opset_import.extend(helper.make_opsetid(domain or "ai.onnx", version) for domain, version in reversed(sets))
    made.producer_name, made.doc_string = "someone", "a note"
    assert run(saved(made, tmp_path / "same.onnx"))[0] == 0


def test_json(run: Run, fused: Path) -> None:
    data = json.loads(run(fused, "--json")[1])
    assert data["holds"] is True
    assert data["records"] == records(onnx.load(fused))
    data = json.loads(run(fused, "--json", "--against", fused.with_name("original.onnx"))[1])
    assert data["matches"] == 1
    assert data["verification"]["equal"] is True


def altered(change: Callable[[Record], object]) -> str:
    """A record as it is written, but for one change."""
    record = records(fuse_onnx(conv_bn(), verify="region"))[0]
    change(record)
    return json.dumps(record)


def replaced(*path: str | int, by: object) -> str:
    def change(record: Record) -> None:
        inner: Any = record
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = by

    return altered(change)


RECORD = json.loads(altered(lambda r: None))

UNREADABLE: dict[str, tuple[str, str]] = {
    "no text": ("", "it is no JSON"),
    "no JSON": ("{", "it is no JSON"),
    "two objects": ("{}{}", "it is no JSON"),
    "a number too long to read": ('{"reparamc":' + "9" * 5000 + "}", "it is no JSON"),
    "null": ("null", "it is null, not an object"),
    "a truth value": ("true", "it is a truth value, not an object"),
    "a number": ("7", "it is another number, not an object"),
    "a text": ('"reparamc"', "it is another text, not an object"),
    "a list": ("[]", "it is a list, not an object"),
    "a list of records": (f"[{altered(lambda r: None)}]", "it is a list, not an object"),
    "an empty object": ("{}", "it lacks 'reparamc'"),
    "one key": ('{"reparamc":"9"}', "it lacks 'input'"),
    "deep lists": ("[" * 50_000 + "]" * 50_000, "it nests too deeply"),
    "deep objects": ('{"a":' * 50_000 + "1" + "}" * 50_000, "it nests too deeply"),
    "depth that JSON can still be read at": (replaced("more", by=json.loads("[" * 400 + "]" * 400)), "too deeply"),
    **{f"no {key}": (altered(lambda r, key=key: r.pop(key)), f"it lacks {key!r}") for key in RECORD},
    **{f"{key} is false": (replaced(key, by=False), f"{key!r} is a truth value, not ") for key in RECORD},
    **{
        f"{key} is null": (replaced(key, by=None), f"{key!r} is null, not ")
        for key in RECORD
        if key not in ("input", "certificate")
    },
    "half an origin": (replaced("input", by={"sha256": "0" * 64}), "'input' lacks 'of'"),
    "an origin that is no hash": (replaced("input", "sha256", by="x"), "'sha256' is another text, not a hash"),
    "data that is a list": (replaced("input", "data", by=["w"]), "'data' is a list, not an object"),
    "data without hashes": (replaced("input", "data", by={"w": 1}), "an entry of 'data' is another number"),
    "half a size": (altered(lambda r: r["size"]["after"].pop("conv")), "'after' lacks 'conv'"),
    "a size in words": (replaced("size", "before", "ops", by="3"), "'ops' is another text, not a count"),
    "half an operator": (replaced("size", "before", "ops", by=0.5), "'ops' is another number, not a count"),
    "less than none": (replaced("size", "before", "ops", by=-1), "'ops' is another number, not a count"),
    "passes without counts": (replaced("passes", "bn-folding", by=None), "an entry of 'passes' is null"),
    "passes in a list": (replaced("passes", by=["bn-folding"]), "'passes' is a list, not an object"),
    "regions by name": (replaced("regions", by={"a": 1}), "'regions' is an object, not a list"),
    "a region of nothing": (replaced("regions", 0, by=None), "an entry of 'regions' is null"),
    "a region without a place": (altered(lambda r: r["regions"][0].pop("at")), "an entry of 'regions' lacks 'at'"),
    "a region at a list": (replaced("regions", 0, "at", by=["a"]), "'at' is a list, not a text"),
    "an error in words": (replaced("regions", 0, "error", by="small"), "'error' is another text, not a number"),
    "an error that is no number": (replaced("regions", 0, "error", by=float("nan")), "'error' is another number"),
    "an error beyond all floats": (replaced("regions", 0, "error", by=10**400), "'error' is another number"),
    "an empty output": (replaced("outputs", by=[{}]), "an entry of 'outputs' lacks 'output'"),
    "a certificate in words": (replaced("certificate", "equal", by="all"), "an entry of 'certificate' is another text"),
    "a result that is no hash": (replaced("result", by="unknown"), "'result' is another text, not a hash"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_record_that_cannot_be_read(run: Run, tmp_path: Path, name: str) -> None:
    value, why = UNREADABLE[name]
    made = conv_bn()
    made.metadata_props.add(key=f"{KEY}1", value=value)
    path = saved(made, tmp_path / "odd.onnx")
    for options in ([], ["--json"], ["--against", path]):
        code, out, err = run(path, *options)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith(f"reparamc: the metadata entry {KEY}1 is no record that this version can read: ")
        assert why in line
        assert line.endswith("reparamc verify compares the model with its original")
        assert len(line) < 400
    assert entries(onnx.load(fuse_onnx(path))).keys() == {"author", f"{KEY}1", f"{KEY}2"}  # fusing goes on


def test_two_records_of_one_number(run: Run, fused: Path) -> None:
    made = onnx.load(fused)
    made.metadata_props.add(key=f"{KEY}1", value=made.metadata_props[-1].value)
    code, out, err = run(saved(made, fused.with_name("odd.onnx")))
    assert (code, out) == (2, "")
    assert f"the metadata entry {KEY}1 is there twice" in err


@pytest.mark.parametrize("number", ["", "0", "01", "-1", "one", "1.5", "\u0661", "9" * 5000])
def test_entries_of_like_names_are_no_records(run: Run, fused: Path, number: str) -> None:
    made = conv_bn()
    made.metadata_props.add(key=KEY + number, value="{}")
    path = saved(made, fused.with_name("odd.onnx"))
    code, _, err = run(path)
    assert code == 2
    assert "holds no record" in err
    target = Path(fuse_onnx(path))
    assert run(target)[0] == 0
    assert entries(onnx.load(target))[KEY + number] == "{}"


def test_metadata_that_are_no_text(run: Run, fused: Path) -> None:
    """Protobuf lets them pass, and hands out bytes."""
    data = fused.read_bytes()
    path = fused.with_name("odd.onnx")
    path.write_bytes(data.replace(b"author", b"\xffuthor"))
    assert run(path)[0] == 0
    path.write_bytes(data.replace(b"reparamc.record.1", b"reparamc.record.\xff"))
    assert "holds no record" in run(path)[2]
    path.write_bytes(data.replace(b"bn-folding", b"bn-\xffolding"))
    code, out, err = run(path)
    assert (code, out) == (2, "")
    assert f"{KEY}1 is no record that this version can read: it is no JSON" in err


def test_a_record_may_say_more_than_this_version_knows(run: Run, fused: Path) -> None:
    made = onnx.load(fused)
    record = json.loads(made.metadata_props[-1].value) | {"more": [{"a": None}]}
    record["input"]["data"] = None
    for inner in (record["input"], record["size"]["before"], record["regions"][0], record["outputs"][0]):
        inner["more"] = "words"
    made.metadata_props[-1].value = json.dumps(record)
    code, out, _ = run(saved(made, fused.with_name("more.onnx")))
    assert (code, out) == (0, run(fused)[1].replace("fused.onnx", "more.onnx"))


def test_names_cannot_write_lines_of_the_page(run: Run, fused: Path) -> None:
    made = onnx.load(fused)
    value = replaced("regions", 0, "at", by="norm\ngraph      as the fusion left it\x1b[31m\ud800")
    made.metadata_props[-1].value = value
    _, out, _ = run(saved(made, fused.with_name("odd.onnx")))
    assert "    norm\\ngraph      as the fusion left it\\x1b[31m\\ud800: bn-folding; " in out
    assert out.isascii()
    assert sum(line.startswith("graph ") for line in out.splitlines()) == 1


def test_an_output_of_which_rounding_makes_another_has_no_tolerance() -> None:
    record: Record = records(fuse_onnx(conv_bn()))[0]
    record["outputs"] = [{"output": "y", "max_abs": 1.0, "max_rel": float("inf"), "allowed": None}]
    assert parsed(json.dumps(record)) == record
    page = Audit("m", [record], unchanged=True).page()
    assert "output     y: largest error inf relative, which rounding alone explains" in page


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
