"""From the training form of every variant to ONNX Runtime: counts, numbers, and the fusions of the runtime."""

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import onnx
import onnxruntime
import torch

from fastvit_zoo import create_model
from fastvit_zoo.onnx_export import export_onnx
from reparamc.onnx.fuse import fuse_model
from reparamc.testing import randomize_batchnorm, randomize_layer_scales

# Operators (without Constant and Identity) and convolutions at most.
LIMITS = {
    "fastvit_t8": (154, 52),
    "fastvit_t12": (174, 60),
    "fastvit_s12": (174, 60),
    "fastvit_sa12": (241, 59),
    "fastvit_sa24": (427, 105),
    "fastvit_sa36": (613, 151),
    "fastvit_ma36": (613, 151),
}
LARGER = ("fastvit_sa24", "fastvit_sa36", "fastvit_ma36")
"""SA12 with more blocks, or wider ones; `benchmarks/structure.py` has them."""
IMAGES = 3


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node if n.op_type not in ("Constant", "Identity"))


def session(file: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def logits(runtime: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    one_by_one = [np.asarray(runtime.run(None, {"image": images[i : i + 1]})[0]) for i in range(len(images))]
    return np.concatenate(one_by_one).astype(np.float64)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", [n for n in LIMITS if n not in LARGER])
def test_variant(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=100)
    randomize_batchnorm(randomize_layer_scales(model), example_inputs=torch.randn(2, 3, 64, 64))
    torch.nn.init.normal_(model.get_submodule("head").get_parameter("weight"), std=0.1)
    files = {"original": tmp_path / "original.onnx", "fused": tmp_path / "fused.onnx"}
    export_onnx(model, files["original"], size=64)
    original = onnx.load(files["original"])
    verify = "region" if name in ("fastvit_t8", "fastvit_sa12") else "off"  # the others are of the same blocks
    fused, report = fuse_model(original, verify=verify)
    onnx.save(fused, files["fused"])

    found = operators(fused)
    assert found.total() <= LIMITS[name][0]
    assert found["Conv"] <= LIMITS[name][1]
    assert found["BatchNormalization"] == 0
    assert (report.after.ops, report.after.conv, report.after.batchnorm) == (found.total(), found["Conv"], 0)

    images = np.random.default_rng(0).standard_normal((IMAGES, 3, 64, 64), dtype=np.float32)
    outputs, gelus = [], []
    for kind, file in files.items():
        outputs.append(logits(session(file), images))
        optimized = tmp_path / f"{kind}.optimized.onnx"
        assert difference(logits(session(file, optimized), images[:1]), outputs[-1][:1]) < 1e-3
        kinds = Counter(n.op_type for n in onnx.load(optimized, load_external_data=False).graph.node)
        gelus.append(kinds["Gelu"] + kinds["BiasGelu"] + kinds["FastGelu"])
    # Two images must not look alike, or the comparison proves little.
    assert difference(outputs[0][:1], outputs[0][1:2]) > 0.01
    assert difference(outputs[1], outputs[0]) < 1e-3
    assert gelus[1] == gelus[0] > 0
    with torch.no_grad():
        exact = model.double().eval()(torch.from_numpy(images).double()).numpy()
    errors = [np.sqrt(np.square(o - exact).mean()) for o in outputs]
    assert errors[1] <= 2 * errors[0]
