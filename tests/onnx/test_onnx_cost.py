"""What fusing costs, by counters that do not depend on the clock."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from reparamc.certificate.proof import Certificate
from reparamc.compiler import rollback
from reparamc.compiler.liveness import Liveness
from reparamc.onnx import weights
from reparamc.onnx.emit import OnnxEdit
from reparamc.onnx.fuse import fuse_model

UNUSED = (
    "onnxruntime", "onnx.reference", "rich", "hypothesis", "onnx_graphsurgeon", "scipy", "torch", "numpy.f2py",
    "reparamc.certificate.proof", "reparamc.equivalence.end_to_end", "reparamc.compiler.rollback", "numpy.ma",
    "reparamc.compiler.reference", "array_api_compat", "fractions",
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


def test_each_weight_is_multiplied_as_it_is_stored_and_made_once() -> None:
    model = blocks(3)
    weights.COUNTERS.reset()
    fuse_model(model, verify="off")
    kernels = 3 * 16 * 16 * 9 * 4
    assert weights.COUNTERS.decoded == 0
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


def test_sizes_are_inferred_once_for_the_model_and_once_for_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    infer = onnx.shape_inference.infer_shapes
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda *a, **k: asked.append(a) or infer(*a, **k))
    fuse_model(blocks(3), verify="off")
    assert len(asked) == 2


def test_without_verification_only_the_arrays_of_one_splice_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[ref[Any]] = []
    alive: list[int] = []
    add = OnnxEdit.add_initializer

    def adding(self: OnnxEdit, wanted: str, array: Any, dtype: Any) -> str:
        if array.ndim == 4:
            kernels.append(ref(array))
            alive.append(sum(kernel() is not None for kernel in kernels))
        return add(self, wanted, array, dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", adding)
    fuse_model(blocks(5), verify="off")
    assert alive == [1] * 5


@pytest.mark.parametrize(("parts", "followed"), [(2, False), (1, True)])
def test_channels_are_followed_only_if_some_may_leave(
    parts: int, followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blocks(1)
    del model.graph.output[0], model.graph.node[2]
    bounds = {"at0": [0], "at1": [8], "at2": [16], "axis": [1]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(a), n) for n, a in bounds.items())
    for i in range(parts):
        model.graph.node.append(helper.make_node("Slice", ["n0", f"at{i}", f"at{i + 1}", "axis"], [f"y{i}"]))
        model.graph.output.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, 8, 6, 5]))
    asked: list[object] = []
    follow = Liveness._follow
    monkeypatch.setattr(Liveness, "_follow", lambda self, value: asked.append(value) or follow(self, value))
    fuse_model(model, verify="off")
    assert bool(asked) == followed
