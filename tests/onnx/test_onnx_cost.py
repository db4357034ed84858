"""What fusing costs, by counters that do not depend on the clock."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from reparamc.certificate.proof import Certificate
from reparamc.compiler import rollback
from reparamc.onnx import weights
from reparamc.onnx.fuse import fuse_model

UNUSED = (
    "onnxruntime", "onnx.reference", "rich", "hypothesis", "onnx_graphsurgeon", "scipy", "torch", "numpy.f2py",
    "reparamc.certificate.proof", "reparamc.equivalence.end_to_end",
)  # fmt: skip


def blocks(count: int) -> ModelProto:
    """conv + BatchNorm + ReLU, so many times."""
    rng, nodes, stored = np.random.default_rng(0), [], []
    for at in range(count):
        arrays = {"w": rng.normal(0, 0.1, (16, 16, 3, 3)), **{n: rng.uniform(0.5, 1.5, 16) for n in "gbmv"}}
        stored += [numpy_helper.from_array(a.astype(np.float32), f"{n}{at}") for n, a in arrays.items()]
        nodes.append(helper.make_node("Conv", [f"x{at}", f"w{at}"], [f"c{at}"], pads=[1] * 4))
        norm = [f"{n}{at}" for n in "gbmv"]
        nodes.append(helper.make_node("BatchNormalization", [f"c{at}", *norm], [f"n{at}"]))
        nodes.append(helper.make_node("Relu", [f"n{at}"], [f"x{at + 1}"]))
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16, 6, 5]) for n in ("x0", f"x{count}"))
    graph = helper.make_graph(nodes, "g", [given], [made], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_without_verification_nothing_is_imported_for_it(tmp_path: Path) -> None:
    onnx.save(blocks(1), tmp_path / "in.onnx")
    code = f"""
import sys
from reparamc.__main__ import main
assert main(["fuse", "in.onnx", "-o", "out.onnx", "--verify", "off"]) == 0
print(sorted({set(UNUSED)!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_each_weight_is_decoded_once_and_made_once() -> None:
    model = blocks(3)
    weights.COUNTERS.reset()
    fuse_model(model, verify="off")
    kernels = 3 * 16 * 16 * 9 * 4
    assert weights.COUNTERS.decoded == kernels
    assert weights.COUNTERS.made == kernels + 3 * 16 * 4
    assert weights.COUNTERS.sessions == 0


def test_verification_takes_four_sessions() -> None:
    """What ONNX Runtime makes of both models, and both models on the same inputs."""
    weights.COUNTERS.reset()
    _, report = fuse_model(blocks(3))
    assert report.end_to_end
    assert weights.COUNTERS.sessions <= 4


def test_one_region_of_each_kind_is_run_and_what_the_proof_leaves_open_is_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampled: list[int] = []
    compare = rollback.compare_expressions
    monkeypatch.setattr(rollback, "compare_expressions", lambda *a: sampled.append(1) or compare(*a))
    _, report = fuse_model(blocks(4), verify="region")
    assert (len(report.rewrites), len(sampled)) == (4, 0)
    assert [r.error is None for r in report.rewrites] == [False, True, True, True]
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    _, report = fuse_model(blocks(4), verify="region")
    assert (len(report.rewrites), len(sampled)) == (4, 4)
    assert all(r.error is not None and r.error < 1e-12 for r in report.rewrites)
