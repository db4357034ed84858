"""The command line: what it writes, what it says, and what it leaves alone when something is wrong."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import reparamc_passes
from reparamc import __main__ as cli
from reparamc import __version__
from reparamc.algebra.expr import BatchNorm, Expr
from reparamc.algebra.rewrite import Pass
from reparamc.certificate.proof import Certificate
from reparamc.errors import VerificationError
from reparamc.onnx import files

# Models


def make_model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def conv_batchnorm() -> ModelProto:
    rng = np.random.default_rng(0)
    norm = {name: rng.uniform(0.5, 1.5, 4) for name in ("gamma", "beta", "mean", "var")}
    return make_model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c", *norm], ["b"], "norm"),
            helper.make_node("Relu", ["b"], ["y"], "act"),
        ],
        {"w": rng.standard_normal((4, 4, 3, 3)), **norm},
    )


def relu_only() -> ModelProto:
    return make_model([helper.make_node("Relu", ["x"], ["y"], "act", doc_string="kept")], {})


# Running


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(conv_batchnorm(), path)
    return path


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with a hash of its bytes."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# What it does


@pytest.mark.parametrize("form", [["-o"], ["--output"], []], ids=["-o", "--output", "positional"])
def test_fuses_a_file(run: Run, model: Path, form: list[str]) -> None:
    original, output = model.read_bytes(), model.with_name("out.onnx")
    outcome = run("fuse", model, *form, output)
    assert (outcome.code, outcome.err) == (0, "")
    assert kinds(output) == ["Conv", "Relu"]
    assert model.read_bytes() == original
    assert contents(model.parent).keys() == {"in.onnx", "out.onnx"}


def test_the_table_says_what_was_done(run: Run, model: Path) -> None:
    output = model.with_name("out.onnx")
    lines = run("fuse", model, "-o", output).out.splitlines()
    rows = [line.split() for line in lines]
    assert ["passes", "bn-folding", "1"] in rows
    assert ["before", "3", "1", "1", "160"] in rows
    assert ["after", "2", "1", "0", "148"] in rows
    assert ["written", str(output)] in rows
    assert any(line.startswith("regions    1 replaced") for line in lines)
    assert any(line.startswith("certified  ") for line in lines)
    assert any(line.startswith("output     y: largest error") for line in lines)


def test_quiet_prints_nothing(run: Run, model: Path) -> None:
    outcome = run("fuse", "-q", model, "-o", model.with_name("out.onnx"))
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_replaces_an_older_output(run: Run, model: Path) -> None:
    output = model.with_name("out.onnx")
    output.write_text("older")
    assert run("fuse", model, "-o", output).code == 0
    assert kinds(output) == ["Conv", "Relu"]


def test_an_output_that_is_a_link_stays_one(run: Run, model: Path) -> None:
    output, target = model.with_name("out.onnx"), model.with_name("target.onnx")
    target.write_text("older")
    output.symlink_to(target)
    assert run("fuse", model, "-o", output).code == 0
    assert output.is_symlink()
    assert kinds(target) == ["Conv", "Relu"]


def test_report(run: Run, model: Path) -> None:
    path = model.with_name("report.json")
    assert run("fuse", model, "-o", model.with_name("out.onnx"), "--report", path).code == 0
    report = json.loads(path.read_text())
    assert report["version"] == __version__
    assert report["before"] == {"ops": 3, "conv": 1, "batchnorm": 1, "parameters": 160}
    assert report["after"] == {"ops": 2, "conv": 1, "batchnorm": 0, "parameters": 148}
    assert list(report["passes"]) == [p.name for p in reparamc_passes.PASSES]
    assert {name: n for name, n in report["passes"].items() if n} == {"bn-folding": 1}
    (rewrite,) = report["rewrites"]
    assert rewrite["where"] == "norm"
    assert rewrite["operators"] == ["conv", "norm"]
    assert rewrite["parameters"] == ["w", "gamma", "beta", "mean", "var"]
    assert "batchnorm" in rewrite["before"]
    assert "batchnorm" not in rewrite["after"]
    assert 0 <= rewrite["error"] == report["region_error"] < 1e-12
    (output,) = report["end_to_end"]
    assert output["output"] == "y"
    assert output["max_rel"] <= output["tolerance"] < 1e-3
    assert {"loading", "rewriting", "verification", "saving", "in all"} <= report["seconds"].keys()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--passes", "bn-folding"], ["Conv", "Relu"]),
        (["--passes", "scale-folding, bn-folding"], ["Conv", "Relu"]),
        (["--passes", "branch-merging"], ["Conv", "BatchNormalization", "Relu"]),
        (["--skip", "bn-folding"], ["Conv", "BatchNormalization", "Relu"]),
        (["--skip", "repmixer,branch-merging"], ["Conv", "Relu"]),
    ],
)
def test_passes_are_selected(run: Run, model: Path, options: list[str], left: list[str]) -> None:
    output = model.with_name("out.onnx")
    assert run("fuse", model, "-o", output, *options).code == 0
    assert kinds(output) == left


@pytest.mark.parametrize(
    ("level", "region_checked", "model_checked"),
    [("off", False, False), ("region", True, False), ("full", True, True)],
)
def test_verification_levels(run: Run, model: Path, level: str, region_checked: bool, model_checked: bool) -> None:
    path = model.with_name("report.json")
    assert run("fuse", model, "-o", model.with_name("out.onnx"), "--verify", level, "--report", path).code == 0
    report = json.loads(path.read_text())
    assert (report["region_error"] is not None) == region_checked
    assert bool(report["end_to_end"]) == model_checked


def test_nothing_to_fuse_writes_an_equal_model(run: Run, tmp_path: Path) -> None:
    model, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(relu_only(), model)
    outcome = run("fuse", model, "-o", output)
    assert outcome.code == 0
    assert "nothing to fuse" in outcome.out
    assert onnx.load(output) == onnx.load(model)


def test_fusing_twice_changes_nothing_more(run: Run, model: Path) -> None:
    once, twice = model.with_name("once.onnx"), model.with_name("twice.onnx")
    assert run("fuse", model, "-o", once).code == 0
    outcome = run("fuse", once, "-o", twice)
    assert "nothing to fuse" in outcome.out
    assert onnx.load(twice) == onnx.load(once)


def test_passes_lists_every_pass(run: Run) -> None:
    outcome = run("passes")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    for p in reparamc_passes.PASSES:
        at = lines.index(p.name)
        assert lines[at + 1].strip() == p.equation
        assert lines[at + 2].strip() == f"exact when: {p.exact_when}"


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == f"reparamc {__version__}\n"
    for arguments in (["--help"], ["fuse", "--help"]):
        outcome = run(*arguments)
        assert outcome.code == 0
        assert "exit codes: 0 written" in " ".join(outcome.out.split())


def test_python_m(model: Path) -> None:
    output = model.with_name("out.onnx")
    command = [sys.executable, "-m", "reparamc", "fuse", model, output]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert kinds(output) == ["Conv", "Relu"]


# What it refuses: one line on stderr, exit code 2, no file written or changed


def damaged(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def truncated(m: Path) -> Path:
    return damaged(m.parent, "cut.onnx", m.read_bytes()[: m.stat().st_size // 2])


def unchecked(m: Path) -> Path:
    model = onnx.load(m)
    model.graph.node[0].input[0] = "nowhere"
    return damaged(m.parent, "unchecked.onnx", model.SerializeToString())


def short_weight(m: Path) -> Path:
    model = onnx.load(m)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return damaged(m.parent, "short.onnx", model.SerializeToString())


def without_data(m: Path) -> Path:
    path = m.with_name("external.onnx")
    onnx.save(onnx.load(m), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    m.with_name("weights.data").unlink()
    return path


def no_text(m: Path, name: bytes) -> Path:
    """The model with one name that is no UTF-8, which protobuf lets pass."""
    data = m.read_bytes()
    assert name in data
    return damaged(m.parent, "no_text.onnx", data.replace(name, b"\xff" * len(name)))


def link_to(m: Path) -> Path:
    link = m.with_name("link.onnx")
    link.symlink_to(m)
    return link


def hard_link_to(m: Path) -> Path:
    link = m.with_name("hard.onnx")
    os.link(m, link)
    return link


OUT = "out.onnx"

BAD_INPUT: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "missing": (lambda m: ["fuse", m.with_name("none.onnx"), m.with_name(OUT)], "none.onnx: no such file"),
    "folder": (lambda m: ["fuse", m.parent, m.with_name(OUT)], "is a folder"),
    "empty": (lambda m: ["fuse", damaged(m.parent, "e.onnx", b""), m.with_name(OUT)], "not an ONNX file"),
    "text": (lambda m: ["fuse", damaged(m.parent, "t.onnx", b"hello, world\n"), m.with_name(OUT)], "not an ONNX file"),
    "bytes": (lambda m: ["fuse", damaged(m.parent, "b.onnx", bytes(range(256))), m.with_name(OUT)], "not an ONNX file"),
    "truncated": (lambda m: ["fuse", truncated(m), m.with_name(OUT)], "cut.onnx"),
    "not valid": (lambda m: ["fuse", unchecked(m), m.with_name(OUT)], "which nothing computes"),
    "short weight": (lambda m: ["fuse", short_weight(m), m.with_name(OUT)], "does not pass the ONNX checker"),
    "no external data": (lambda m: ["fuse", without_data(m), m.with_name(OUT)], "weights.data"),
    "a name that is no text": (
        lambda m: ["fuse", no_text(m, b"norm"), m.with_name(OUT)],
        "no_text.onnx is damaged",
    ),
    "an operator that is no text": (lambda m: ["explain", no_text(m, b"Conv")], "is no text in UTF-8"),
    "a parameter that is no text": (lambda m: ["verify", m, no_text(m, b"gamma")], "is no text in UTF-8"),
    "an attribute that is no text": (lambda m: ["audit", no_text(m, b"pads")], "is no text in UTF-8"),
    "output in no folder": (lambda m: ["fuse", m, m.with_name("none") / OUT], "does not exist; create it first"),
    "output is a folder": (lambda m: ["fuse", m, m.parent], "is a folder"),
    "output is the input": (lambda m: ["fuse", m, "-o", m], "is the input itself"),
    "output is the input, by another path": (
        lambda m: ["fuse", m, "-o", m.parent / ".." / m.parent.name / m.name],
        "is the input itself",
    ),
    "output links to the input": (lambda m: ["fuse", m, "-o", link_to(m)], "is the input itself"),
    "output is a hard link to the input": (lambda m: ["fuse", m, "-o", hard_link_to(m)], "is the input itself"),
    "input links to the output": (lambda m: ["fuse", link_to(m), "-o", m], "is the input itself"),
    "report is the input": (lambda m: ["fuse", m, m.with_name(OUT), "--report", m], "is the input itself"),
    "report is the output": (
        lambda m: ["fuse", m, m.with_name(OUT), "--report", m.with_name(OUT)],
        "the report and the output are the same file",
    ),
    "report in no folder": (lambda m: ["fuse", m, m.with_name(OUT), "--report", m.with_name("no") / "r"], "not exist"),
    "unknown pass": (lambda m: ["fuse", m, m.with_name(OUT), "--passes", "bn-folding,nope"], "unknown pass 'nope'"),
    "a pass in both": (
        lambda m: ["fuse", m, m.with_name(OUT), "--passes", "bn-folding", "--skip", "bn-folding"],
        "the pass 'bn-folding' is both to be applied and to be left out",
    ),
    "unknown pass skipped": (lambda m: ["fuse", m, m.with_name(OUT), "--skip", "nope"], "unknown pass 'nope'"),
    "unknown option": (lambda m: ["fuse", m, m.with_name(OUT), "--frobnicate"], "--frobnicate"),
    "unknown level": (lambda m: ["fuse", m, m.with_name(OUT), "--verify", "perhaps"], "'perhaps'"),
    "unknown command": (lambda m: ["melt", m], "'melt'"),
    "no command": (lambda m: [], "COMMAND"),
    "no model": (lambda m: ["fuse"], "MODEL"),
    "no output": (lambda m: ["fuse", m], "no output: give -o OUT"),
    "two outputs": (lambda m: ["fuse", m, m.with_name(OUT), "-o", m.with_name("two.onnx")], "two outputs"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(run: Run, model: Path, arguments: Callable[[Path], list[object]], message: str) -> None:
    given = arguments(model)
    before = contents(model.parent)
    outcome = run(*given)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("reparamc")
    assert message in line
    assert contents(model.parent) == before


def edited(change: Callable[[ModelProto], object]) -> ModelProto:
    model = conv_batchnorm()
    change(model)
    return model


def constant_of(kind: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["k"], value=TensorProto(data_type=kind, dims=[1], raw_data=b"1234"))


LAST = onnx.defs.onnx_opset_version()
INVALID: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "opset of the future": (lambda m: m.opset_import[0].__setattr__("version", 999), "the model uses opset 999, and "),
    "next opset": (lambda m: m.opset_import[0].__setattr__("version", LAST + 1), f"knows those up to {LAST}; install"),
    "opset of the past": (lambda m: m.opset_import[0].__setattr__("version", 6), "opset 6; convert it to 7 or later"),
    "opset below all": (lambda m: m.opset_import[0].__setattr__("version", -1), "the model uses opset -1; convert"),
    "two opsets": (lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 11)), "opset 11 and opset 17; leave"),
    "no opset": (lambda m: m.opset_import.pop(), "must specify opset_import for ONNX"),
    "undefined value": (
        lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"),
        "Conv 'conv' reads 'nowhere', which nothing computes",
    ),
    "undefined weight": (lambda m: m.graph.node[0].input.__setitem__(1, "nowhere"), "reads 'nowhere', which nothing"),
    "undefined output": (
        lambda m: m.graph.output[0].__setattr__("name", "nowhere"),
        "output 'nowhere' is not an output",
    ),
    "circle": (lambda m: m.graph.node[0].input.__setitem__(0, "b"), "form a circle"),
    "one value from two nodes": (lambda m: m.graph.node.append(m.graph.node[0]), "single static assignment"),
    "unknown operator": (lambda m: m.graph.node[2].__setattr__("op_type", "Nope"), "No Op registered for Nope"),
    "no domain": (lambda m: m.graph.node[2].__setattr__("domain", "nope"), "No opset import for domain 'nope'"),
    "too few operands": (lambda m: m.graph.node[1].input.pop(), "has input size 4 not in range"),
    "an attribute of another type": (
        lambda m: m.graph.node[1].attribute.append(helper.make_attribute("epsilon", "x")),
        "Mismatched attribute type in 'norm : epsilon'",
    ),
    "unknown type of a weight": (
        lambda m: m.graph.initializer[0].__setattr__("data_type", 99),
        "the tensor 'w' is of the unknown element type 99",
    ),
    "unknown type of a constant": (lambda m: m.graph.node.insert(0, constant_of(99)), "of the unknown element type 99"),
    "ir of the future": (lambda m: m.__setattr__("ir_version", 999), "ir_version 999 is higher than"),
}


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("way", ["off", "region", "full", "explain"])
def test_an_invalid_model_is_refused_at_every_level(run: Run, tmp_path: Path, name: str, way: str) -> None:
    change, message = INVALID[name]
    path = damaged(tmp_path, "bad.onnx", edited(change).SerializeToString())
    before = contents(tmp_path)
    outcome = run("explain", path) if way == "explain" else run("fuse", path, tmp_path / OUT, "--verify", way)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("reparamc: the model ")
    assert message in line
    assert contents(tmp_path) == before


RUN_ALL_THE_SAME = ("next opset", "opset of the past", "two opsets")
"""By ONNX Runtime, or not: that depends on its version."""


@pytest.mark.parametrize("name", [name for name in INVALID if name not in RUN_ALL_THE_SAME])
def test_an_invalid_model_is_compared_with_nothing(run: Run, model: Path, name: str) -> None:
    fused = model.with_name("fused.onnx")
    assert run("fuse", model, fused).code == 0
    bad = damaged(model.parent, "bad.onnx", edited(INVALID[name][0]).SerializeToString())
    before = contents(model.parent)
    for arguments in (("verify", bad, model), ("verify", model, bad), ("audit", fused, "--against", bad)):
        outcome = run(*arguments)
        assert (outcome.code, outcome.out) == (2, ""), arguments
        (line,) = outcome.err.splitlines()
        assert "bad.onnx" in line
        assert contents(model.parent) == before


def test_an_operator_set_that_is_named_twice_alike_is_one(run: Run, tmp_path: Path) -> None:
    model = edited(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 17)))
    path = damaged(tmp_path, "twice.onnx", model.SerializeToString())
    assert run("fuse", path, tmp_path / OUT).code == 0
    assert kinds(tmp_path / OUT) == ["Conv", "Relu"]


@pytest.mark.parametrize("shape", [[1, 4, 2**20, 2**20], [2**31, 4, 2**31, 2**31], ["N", 4, 2**31, "W"]])
@pytest.mark.parametrize(
    ("options", "advice"),
    [([], "try --verify region"), (["--verify", "off", "--only-if-faster"], "leave out --only-if-faster")],
)
def test_a_model_whose_input_does_not_fit_into_memory(
    run: Run, tmp_path: Path, shape: list[int | str], options: list[str], advice: str
) -> None:
    huge = conv_batchnorm()
    huge.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape))
    del huge.graph.output[0].type.tensor_type.shape.dim[:]
    for _ in range(4):
        huge.graph.output[0].type.tensor_type.shape.dim.add()
    path = damaged(tmp_path, "huge.onnx", huge.SerializeToString())
    before = contents(tmp_path)
    outcome = run("fuse", path, tmp_path / OUT, *options)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("reparamc: input 'x' of the sizes [")
    assert "does not fit into memory" in line
    assert line.endswith(advice)
    assert contents(tmp_path) == before
    assert run("fuse", path, tmp_path / OUT, "--verify", "region").code == 0
    assert kinds(tmp_path / OUT) == ["Conv", "Relu"]


def test_where_the_memory_is_gone_nothing_is_written(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_left(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 3 TiB\nfor an array")

    before = contents(model.parent)
    for place, message in (
        ("reparamc.onnx.end_to_end.verify_end_to_end", "the comparison of the whole models does not fit into memory"),
        (
            "reparamc.compiler.pipeline.make_plan",
            "the memory does not suffice (Unable to allocate 3 TiB for an array); nothing",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, nothing_left)
            outcome = run("fuse", model, model.with_name(OUT))
        assert (outcome.code, outcome.out) == (2, "")
        (line,) = outcome.err.splitlines()
        assert message in line
        assert contents(model.parent) == before


def test_options_are_read_before_a_large_model_is(run: Run, tmp_path: Path) -> None:
    outcome = run("fuse", tmp_path / "none.onnx", tmp_path / OUT, "--passes", "nope")
    assert "unknown pass" in outcome.err


# When verification fails: exit code 1, nothing written


def forget_batchnorm(e: Expr) -> Expr | None:
    return e.x if isinstance(e, BatchNorm) else None


@pytest.fixture
def wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Pass("wrong", "bn(x) = x", "never", (forget_batchnorm,))
    monkeypatch.setattr(reparamc_passes, "PASSES", (wrong,))


@pytest.mark.usefixtures("wrong_pass")
@pytest.mark.parametrize("level", ["region", "full"])
def test_a_wrong_rewrite_is_caught_in_its_region_which_stays(run: Run, model: Path, level: str) -> None:
    report = model.with_name("report.json")
    outcome = run("fuse", model, model.with_name(OUT), "--verify", level, "--report", report)
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("reparamc: warning: region 'norm'")
    assert "after wrong" in line
    assert "FAILED     norm: " in outcome.out
    assert onnx.load(model.with_name(OUT)) == onnx.load(model)
    (failed,) = json.loads(report.read_text())["failed"]
    assert (failed["where"], failed["check"], failed["passes"]) == ("norm", "rewrite", ["wrong"])
    assert failed["error"] > failed["tolerance"]


@pytest.mark.usefixtures("wrong_pass")
def test_a_wrong_rewrite_that_regions_miss_is_caught_end_to_end(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reparamc.compiler.reference.Reference.compare", lambda *_: (None, None))
    before = contents(model.parent)
    outcome = run("fuse", model, model.with_name(OUT))
    assert outcome.code == 0  # the certificate sees it first, and the rest would be written
    assert " 1 rolled back, " in outcome.out
    model.with_name(OUT).unlink()
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    monkeypatch.setattr("reparamc.compiler.rollback.compare_expressions", lambda *_: 0.0)
    outcome = run("fuse", model, model.with_name(OUT))
    assert (outcome.code, outcome.out) == (1, "")
    (line,) = outcome.err.splitlines()
    assert line.startswith("reparamc: region 'norm' of the fused model")
    assert contents(model.parent) == before


def test_any_verification_error_has_its_own_exit_code(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(original: ModelProto, result: ModelProto, regions: object) -> None:
        raise VerificationError("output 'y' differs", where="y")

    monkeypatch.setattr("reparamc.onnx.end_to_end.verify_end_to_end", differs)
    outcome = run("fuse", model, model.with_name(OUT))
    assert (outcome.code, outcome.err) == (1, "reparamc: output 'y' differs\n")


# When writing fails: all or nothing


@pytest.mark.parametrize("older", [True, False], ids=["over an older file", "anew"])
@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_failing_write_leaves_nothing_after(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, step: str, older: bool
) -> None:
    output = model.with_name(OUT)
    if older:
        output.write_text("older")
    before = contents(model.parent)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(path: Path, blocks: Iterable[bytes]) -> None:
        data = b"".join(blocks)
        path.write_bytes(data[: len(data) // 2])
        full()

    with monkeypatch.context() as patch:
        if step == "replace":
            patch.setattr(os, "replace", full)
        else:
            patch.setattr(files, "_write", half)
        outcome = run("fuse", model, output)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert "out.onnx cannot be written: No space left on device" in line
    assert contents(model.parent) == before
    assert [p.name for p in model.parent.iterdir() if p.is_dir()] == []


def test_an_interrupt_leaves_nothing_after(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = contents(model.parent)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        outcome = run("fuse", model, model.with_name(OUT))
    assert (outcome.code, outcome.err) == (130, "reparamc: interrupted; nothing was written\n")
    assert contents(model.parent) == before


STREAMS: dict[str, tuple[Callable[[str], list[str]], str]] = {
    "model": (lambda m: ["fuse", m, "-o", "-"], ""),
    "table": (lambda m: ["fuse", m, f"{m}.out"], "; {m}.out is written"),
    "passes": (lambda m: ["passes"], ""),
}


@pytest.mark.parametrize(
    ("case", "where"),
    [("model", "full"), ("table", "pipe"), ("passes", "full"), ("passes", "pipe"), ("passes", "none")],
)
def test_what_cannot_be_shown(model: Path, where: str, case: str) -> None:
    arguments, more = STREAMS[case]
    command = [sys.executable, "-m", "reparamc", *arguments(str(model))]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full, os.fdopen(writer, "wb") as pipe:
        stream = {"full": full, "pipe": pipe, "none": None}[where]
        if stream is None:
            command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True, check=False)
    why = {"full": "No space left on device", "pipe": "Broken pipe", "none": "it is closed"}[where]
    assert done.returncode == 2
    line = f"reparamc: standard output cannot be written: {why}{more.format(m=model)}"
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr


def test_standard_input_that_is_closed() -> None:
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "reparamc", "fuse", "-", "-o", "-"]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "reparamc: standard input cannot be read: it is closed\n"


def test_a_signal_leaves_nothing_after(model: Path) -> None:
    """What a task manager sends while the file is written, and its temporary folder is there."""
    code = (
        "import os, signal, sys; from reparamc import __main__ as cli\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv[1:] = ['fuse', {str(model)!r}, {str(model.with_name(OUT))!r}]; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "reparamc: interrupted; nothing was written\n")
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_through_standard_input_and_output(model: Path) -> None:
    command = [sys.executable, "-m", "reparamc", "fuse", "-", "-o", "-"]
    done = subprocess.run(command, input=model.read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [n.op_type for n in ModelProto.FromString(done.stdout).graph.node] == ["Conv", "Relu"]
    assert b"bn-folding" in done.stderr


def test_nonsense_on_standard_input() -> None:
    done = subprocess.run([sys.executable, "-m", "reparamc", "fuse", "-", "-o", "-"], input=b"no", capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"standard input" in done.stderr


def test_standard_input_without_the_weights_of_the_model(model: Path) -> None:
    file = model.with_name("beside.onnx")
    onnx.save(onnx.load(model), file, save_as_external_data=True, location="w.bin", size_threshold=0)
    done = subprocess.run(
        [sys.executable, "-m", "reparamc", "explain", "-"], input=file.read_bytes(), capture_output=True
    )
    assert done.returncode == 2
    assert b"in another file and not loaded; give the path of the model" in done.stderr


def test_in_place(run: Run, model: Path) -> None:
    assert run("fuse", model, "--in-place").code == 0
    assert kinds(model) == ["Conv", "Relu"]
    assert run("fuse", model, "--in-place", "-o", model.with_name("other.onnx")).code == 2
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_without_a_record(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("fuse", model, tmp_path / OUT, "--no-record").code == 0
    assert not onnx.load(tmp_path / OUT).metadata_props


def test_a_file_in_which_nothing_folds_comes_back_byte_for_byte(run: Run, tmp_path: Path) -> None:
    """Also where it is written as no library of today would write it."""
    data = relu_only().SerializeToString()
    odd = data + b"\xfa\x0f\x03abc" + ModelProto(producer_name="again").SerializeToString()
    path = tmp_path / "odd.onnx"
    path.write_bytes(odd)
    assert run("fuse", path, tmp_path / OUT).code == 0
    assert (tmp_path / OUT).read_bytes() == odd
