"""`reparamc explain` and the other options of the command line that concern profit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import reparamc_passes
from reparamc import __main__ as cli
from reparamc import fuse_onnx
from reparamc.algebra.expr import BatchNorm, Expr
from reparamc.algebra.rewrite import Pass
from reparamc.errors import InputError
from reparamc.report.data import Counts, Latency, Refusal, Report, Rewrite
from reparamc.report.explain import explain_json, explain_text, grouped

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


def make_model() -> ModelProto:
    """A padded convolution after a norm, twice; a foldable norm; depthwise 3x3 beside dense 1x1."""
    rng = np.random.default_rng(0)
    norm = {name: rng.uniform(0.5, 1.5, 4) for name in ("gamma", "beta", "mean", "var")}
    weights = {"w": rng.standard_normal((4, 4, 3, 3)), "d": rng.standard_normal((4, 1, 3, 3))}
    weights["p"] = rng.standard_normal((4, 4, 1, 1))
    nodes = [
        helper.make_node("BatchNormalization", ["x", *norm], ["a"], "norm0"),
        helper.make_node("Conv", ["a", "w"], ["b"], "conv0", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["b"], ["c"], "act0"),
        helper.make_node("BatchNormalization", ["c", *norm], ["e"], "norm1"),
        helper.make_node("Conv", ["e", "w"], ["f"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["f"], ["g"], "act1"),
        helper.make_node("Conv", ["g", "w"], ["h"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["h", *norm], ["i"], "norm2"),
        helper.make_node("Relu", ["i"], ["j"], "act2"),
        helper.make_node("Conv", ["j", "d"], ["k"], "depthwise", pads=[1, 1, 1, 1], group=4),
        helper.make_node("Conv", ["j", "p"], ["l"], "pointwise"),
        helper.make_node("Add", ["k", "l"], ["y"], "sum"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 9, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 9, 7])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in (norm | weights).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(make_model(), path)
    return path


# Explain


def test_explain_writes_nothing_and_says_what_and_why(run: Run, model: Path) -> None:
    before = model.read_bytes()
    code, out, err = run("explain", model)
    assert (code, err) == (0, "")
    assert [p.name for p in model.parent.iterdir()] == ["in.onnx"]
    assert model.read_bytes() == before
    lines = [line.strip() for line in out.splitlines()]
    assert lines[:3] == [
        "would be replaced: 2 regions",
        "norm2: 2 operators, bn-folding 1",
        "sum: 3 operators, branch-merging 1",
    ]
    assert "that would leave 9 of 12 operators and 452 of 212 parameters" in lines
    at = next(i for i, line in enumerate(lines) if "meets the zero padding" in line)
    assert lines[at].startswith("2 ")
    assert lines[at + 1 : at + 3] == ["conv0 (bn-folding)", "conv1 (bn-folding)"]


def test_a_linear_layer_between_activations_needs_no_reason(run: Run, tmp_path: Path) -> None:
    """ONNX writes it as a product and a sum; a second sum, of another value, does need one."""
    rng = np.random.default_rng(0)
    parameters = {"w": rng.standard_normal((4, 4)), "b": rng.standard_normal(4)}
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["c"], "product"),
        helper.make_node("Add", ["c", "b"], ["d"], "bias"),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["f"], "product1"),
        helper.make_node("Add", ["f", "b"], ["g"], "bias1"),
        helper.make_node("Add", ["g", "x"], ["y"], "skip"),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4]) for name in "xy"]
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in parameters.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    code, out, _ = run("explain", path, "--json")
    assert code == 0
    assert [p["where"] for group in json.loads(out)["kept"] for p in group["places"]] == ["skip"]


def test_explain_says_what_fuse_does(run: Run, model: Path) -> None:
    for options in ([], ["--skip", "bn-folding"], ["--passes", "bn-folding"], ["--objective", "macs"]):
        report = model.with_name("report.json")
        assert run("fuse", model, "-o", model.with_name("out.onnx"), "--report", report, *options)[0] == 0
        fused = json.loads(report.read_text())
        code, out, err = run("explain", model, "--json", *options)
        assert (code, err) == (0, "")
        found = json.loads(out)
        for key in ("version", "before", "after", "passes", "rewrites"):
            assert found[key] == fused[key], options
        places = [p for group in found["kept"] for p in group["places"]]
        key = lambda p: (p["where"], p["name"], p["reason"])  # noqa: E731
        assert sorted(places, key=key) == sorted(fused["kept"], key=key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx"], "no such file"),
        (["in.onnx", "--skip", "nope"], "unknown pass 'nope'"),
        (["in.onnx", "--objective", "size"], "'size'"),
        (["in.onnx", "-o", "out.onnx"], "-o"),
        ([], "MODEL"),
    ],
)
def test_explain_bad_input(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(model.parent)
    code, out, err = run("explain", *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


def test_explain_finds_a_wrong_rewrite(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(e: Expr) -> Expr | None:
        return e.x if isinstance(e, BatchNorm) else None

    monkeypatch.setattr(reparamc_passes, "PASSES", (Pass("wrong", "bn(x) = x", "never", (forget,)),))
    code, out, err = run("explain", model)
    assert code == 0
    assert "would be replaced: 0 regions" in out
    assert "it failed its check" in out
    assert err.startswith("reparamc: warning: region ")


def kept(*reasons: str) -> list[Refusal]:
    return [Refusal(f"/op{i}", "a-pass", reason) for i, reason in enumerate(reasons)]


def report_of(refusals: list[Refusal], rewrites: int = 0) -> Report:
    made = [Rewrite(f"/r{i}", ("a", "b"), {"p": 2, "q": 1}, (), "", "", None) for i in range(rewrites)]
    return Report(Counts(7, 1, 1, 1000), Counts(5, 1, 0, 900), {"constant-folding": 0}, made, refusals)


def test_reasons_that_differ_in_a_name_or_number_are_one_kind() -> None:
    groups = grouped(
        kept(
            "second consumer at /stage3/add",
            "it is non-linear",
            "second consumer at /stage3/mul",
            "it would cost 4.1 times the multiply-adds",
            "its parameter 'a.b' is computed at run time",
            "it would cost 12 times the multiply-adds",
            "its parameter 'c' is computed at run time",
            "second consumer at /stage4/add",
        )
    )
    assert {reason: [r.where for r in group] for reason, group in groups.items()} == {
        "second consumer at ...": ["/op0", "/op2", "/op7"],
        "it would cost ... times the multiply-adds": ["/op3", "/op5"],
        "its parameter ... is computed at run time": ["/op4", "/op6"],
        "it is non-linear": ["/op1"],
    }
    assert next(iter(groups)) == "second consumer at ..."
    assert list(grouped(kept("a conv3 of stride 2", "a conv3 of stride 2"))) == ["a conv3 of stride 2"]
    assert len(grouped(kept("a conv3", "a conv1"))) == 2


def test_a_reason_with_particulars_shows_them_at_each_place() -> None:
    lines = explain_text(report_of(kept("at /a", "at /b", "plain"))).splitlines()
    assert lines[-5:] == [
        "     2  at ...",
        "        /op0 (a-pass): at /a",
        "        /op1 (a-pass): at /b",
        "     1  plain",
        "        /op2 (a-pass)",
    ]


def test_the_first_few_places_or_all() -> None:
    report = report_of(kept(*["why"] * 10), rewrites=5)
    short = explain_text(report)
    assert short.count("(a-pass)") == 3
    assert "and 7 more (--all)" in short
    assert "/r2: 2 operators, p 2, q 1" in short
    assert "and 2 more (--all)" in short
    assert "that would leave 5 of 7 operators and 900 of 1,000 parameters" in short
    full = explain_text(report, everything=True)
    assert full.count("(a-pass)") == 10
    assert full.count("2 operators") == 5
    assert "more" not in full
    assert "more" not in explain_text(report_of(kept(*["why"] * 4))), "one more line says as much as the place itself"
    assert len(json.loads(explain_json(report))["kept"][0]["places"]) == 10


def test_nothing_to_explain() -> None:
    assert explain_text(report_of([])).splitlines()[0] == "would be replaced: 0 regions"
    assert explain_text(report_of([])).splitlines()[-1] == "would stay: 0 places"


# Options of fuse


def convs(path: Path) -> list[str]:
    return [n.name for n in onnx.load(path).graph.node if n.op_type == "Conv" and "fused" not in n.name]


@pytest.mark.parametrize(("objective", "merged"), [("latency", True), ("macs", False), ("params", False)])
def test_objective(run: Run, model: Path, objective: str, merged: bool) -> None:
    output = model.with_name("out.onnx")
    assert run("fuse", model, "-o", output, "--objective", objective)[0] == 0
    assert ("pointwise" not in convs(output)) == merged
    from_python = fuse_onnx(make_model(), objective=objective)
    assert from_python.graph == onnx.load(output).graph


def test_latency_is_the_default(run: Run, model: Path) -> None:
    output = model.with_name("out.onnx")
    assert run("fuse", model, output)[0] == 0
    assert onnx.load(output).graph == fuse_onnx(make_model(), objective="latency").graph


def test_unknown_objective() -> None:
    with pytest.raises(InputError, match="unknown objective 'size'"):
        fuse_onnx(make_model(), objective="size")


def test_fuse_fx_has_objectives() -> None:
    torch = pytest.importorskip("torch")
    from reparamc import fuse_fx

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.pointwise = torch.nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.depthwise(x) + self.pointwise(x)

    net, x = Net().eval(), torch.randn(2, 4, 9, 7)
    found = {o: fuse_fx(net, x, objective=o).meta["reparamc"].after.conv for o in ("latency", "macs", "params")}
    assert found == {"latency": 1, "macs": 2, "params": 2}
    with pytest.raises(InputError, match="unknown objective"):
        fuse_fx(net, objective="size")


@pytest.mark.parametrize("faster", [True, False])
def test_only_if_faster(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    low, high = (0.7, 0.8) if faster else (0.9, 1.05)
    found = Latency(0.004, 0.003, (low + high) / 2, low, high, 21)
    monkeypatch.setattr("reparamc.onnx.latency.compare_latency", lambda original, result: found)
    output, path = model.with_name("out.onnx"), model.with_name("report.json")
    code, out, err = run("fuse", model, "-o", output, "--only-if-faster", "--report", path)
    assert (code, err) == (0, "")
    assert (output.read_bytes() == model.read_bytes()) == (not faster)
    assert ("kept       the original, unchanged" in out) == (not faster)
    assert f"({low:.3f} to {high:.3f}, 21 turns)" in out
    report = json.loads(path.read_text())
    assert (report["original_kept"], report["latency"]["high"]) == (not faster, high)
    assert "timing" in report["seconds"]


def test_help_names_the_options(run: Run) -> None:
    _, out, _ = run("fuse", "--help")
    assert "--objective" in out
    assert "--only-if-faster" in out
    _, out, _ = run("explain", "--help")
    assert "exit codes: 0 explained; 1 verification failed; 2 bad" in " ".join(out.split())
    assert "--objective" in out
