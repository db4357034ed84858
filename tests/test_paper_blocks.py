"""Blocks of papers, from torch and from ONNX: each becomes exactly one operator, equal to the block in float64."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("torch")

import torch
from paper_blocks import CASES, PARTLY, Case
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.fx.calls import lookup
from reparamc.onnx.fuse import fuse_model
from reparamc.testing import randomize_batchnorm

FX_NAMES = {"Conv": ("Conv2d", "conv2d"), "Linear": ("Linear", "linear")}
FX_NAMES["ConvTranspose"] = ("ConvTranspose2d", "conv_transpose2d")
ONNX_NAMES = {"Conv": ("Conv",), "Linear": ("Gemm", "MatMul"), "ConvTranspose": ("ConvTranspose",)}
FX_TOLERANCE, ONNX_TOLERANCE = 1e-10, 1e-5

# The exporter says so of every F.pad, also when it folds nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")
all_cases = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items()])


def fx_operators(module: fx.GraphModule) -> Counter[str]:
    """The calls of a traced module by kind, without nn.Identity and what asserts the rank of the input."""
    kinds: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op == "call_module":
            kinds[type(lookup(module, str(node.target))).__name__] += 1
        elif node.op in ("call_function", "call_method"):
            kinds[getattr(node.target, "__name__", str(node.target))] += 1
    return Counter({kind: n for kind, n in kinds.items() if kind not in ("Identity", "dim", "eq", "_assert")})


def onnx_operators(model: onnx.ModelProto) -> Counter[str]:
    """The operators of the main graph by kind, without Constant and Identity."""
    return Counter(n.op_type for n in model.graph.node if n.op_type not in ("Constant", "Identity"))


def assert_one(kinds: Counter[str], allowed: tuple[str, ...]) -> None:
    assert kinds.total() == 1, f"{kinds.total()} operators: {dict(kinds)}"
    assert set(kinds) <= set(allowed), dict(kinds)


def assert_equal(
    block: nn.Module, run: Callable[[Tensor], np.ndarray], inputs: Sequence[Tensor], tolerance: float
) -> None:
    """``run`` gives what ``block`` does in float64, relative to the largest value. ``block`` is made float64."""
    reference = block.double()
    for x in inputs:
        with torch.no_grad():
            expected = reference(x).numpy()
        actual = run(x)
        assert actual.shape == expected.shape
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{error:.1e} at {tuple(x.shape)}"


def run_torch(module: nn.Module) -> Callable[[Tensor], np.ndarray]:
    def run(x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return module(x.clone()).numpy()

    return run


def run_onnx(model: onnx.ModelProto) -> Callable[[Tensor], np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(None, {"x": x.float().numpy()})[0])


def export(case: Case, block: nn.Module) -> onnx.ModelProto:
    """``block`` as an ONNX model in training form; all axes but the channels are dynamic, unless the case is fixed."""
    x = case.inputs()[0].float()
    axes = {i: f"axis{i}" for i in range(x.ndim) if i != case.channel_axis + 1 and not case.fixed}
    file: Any = io.BytesIO()
    torch.onnx.export(
        block, (x,), file, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        opset_version=17, input_names=["x"], output_names=["y"], dynamic_axes={"x": axes, "y": axes},
    )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


@all_cases
def test_fx(case: Case) -> None:
    block = case.module().double()
    fused = fuse_fx(block, case.inputs()[0])
    certificate = fused.meta["reparamc"].certificate
    assert certificate is None or certificate.undecided == ()
    assert_equal(block, run_torch(fused), case.inputs(), FX_TOLERANCE)
    assert_one(fx_operators(fused), FX_NAMES[case.operator])


@all_cases
def test_onnx(case: Case) -> None:
    block = case.module()
    fused, report = fuse_model(export(case, block))
    assert report.certificate is None or report.certificate.undecided == ()
    inputs = case.inputs()[:1] if case.fixed else case.inputs()
    assert_equal(block, run_onnx(fused), inputs, ONNX_TOLERANCE)
    assert_one(onnx_operators(fused), ONNX_NAMES[case.operator])


@pytest.mark.parametrize("name", PARTLY)
def test_what_is_linear_in_a_block(name: str) -> None:
    """Of a block that is not linear as a whole."""
    build, shape, (of_onnx, of_torch) = PARTLY[name]
    torch.manual_seed(3)
    x = torch.randn(shape, dtype=torch.float64)
    block = randomize_batchnorm(build(), 5, x.float()).eval()
    file: Any = io.BytesIO()
    torch.onnx.export(block, (x.float(),), file, dynamo=False, input_names=["x"], output_names=["y"])
    model, report = fuse_model(onnx.load_from_string(file.getvalue()))
    assert report.certificate is not None
    assert report.certificate.undecided == ()
    assert_equal(block, run_onnx(model), [x], ONNX_TOLERANCE)
    assert sum(onnx_operators(model)[kind] for kind in ("Conv", "Gemm", "MatMul")) == of_onnx
    fused = fuse_fx(block, x)
    assert fused.meta["reparamc"].certificate.undecided == ()
    assert_equal(block, run_torch(fused), [x], FX_TOLERANCE)
    found = fx_operators(fused)
    assert sum(found[kind] for kind in ("Conv2d", "Linear")) == of_torch
    assert found["cat"] == found["split"] == 0


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "name", ["repvgg", "dbb, plain", "repmixer", "expandnet, padded", "orepa, products", "lora, conv", "transposed"]
)
def test_onnx_of_the_newer_exporter(name: str, optimize: bool) -> None:
    """As it writes by default, and without its own folding, which makes zeros of the shape of the weight as biases."""
    pytest.importorskip("onnxscript")
    case = CASES[name]
    block = case.module()
    x = case.inputs()[0].float()
    dynamic = {i: torch.export.Dim.DYNAMIC for i in range(x.ndim) if i != case.channel_axis + 1}
    program = torch.onnx.export(
        block, (x,), dynamo=True, optimize=optimize, verbose=False, input_names=["x"], dynamic_shapes=(dynamic,)
    )
    assert program is not None
    fused, _ = fuse_model(program.model_proto)
    assert_equal(block, run_onnx(fused), case.inputs(), ONNX_TOLERANCE)
    assert_one(onnx_operators(fused), ONNX_NAMES[case.operator])


@all_cases
def test_every_parameter_counts(case: Case) -> None:
    """No wrong treatment of a parameter or a statistic can hide: each changes the result visibly."""
    block = case.module().double()
    x = case.inputs()[0]
    with torch.no_grad():
        before = block(x)
        for name, tensor in block.state_dict().items():
            if not tensor.is_floating_point():
                continue
            kept = tensor.clone()
            tensor.mul_(1.25)
            change = (block(x) - before).abs().max() / before.abs().max()
            tensor.copy_(kept)
            if re.search(r"(sobel_.|laplacian)\.point\.bias", name):
                assert change < 1e-13, f"{name}: the masks sum to zero, and the border continues the bias"
            else:
                assert change > 1e-4, name


@pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CASES.items() if c.operator == "Conv"])
def test_the_block_is_a_convolution(case: Case) -> None:
    """What the other tests ask for exists: a kernel fitted to results at one size gives those at all sizes."""
    block = case.module().double()
    kernel, padding, stride = case.window
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(80, case.channels, 8, 10, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = block(x).flatten(2).transpose(1, 2).flatten(0, 1)
        patches = F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)
        fitted = torch.linalg.lstsq(torch.cat([patches, torch.ones_like(patches[:, :1])], 1), y).solution
        weight, bias = fitted[:-1].T.reshape(-1, case.channels, kernel, kernel), fitted[-1]
    assert_equal(block, lambda x: F.conv2d(x, weight, bias, stride, padding).numpy(), case.inputs(), FX_TOLERANCE)


def test_the_comparison_can_fail() -> None:
    case = CASES["repvgg"]
    block = case.module().double()
    wrong = case.module().double()
    with torch.no_grad():
        wrong.dense[0].weight[0, 0, 0, 0] += 1e-6  # pyright: ignore
    assert_equal(block, run_torch(case.module().double()), case.inputs(), FX_TOLERANCE)
    with pytest.raises(AssertionError, match=r"e-\d\d at \(2, 5, 7, 6\)"):
        assert_equal(block, run_torch(wrong), case.inputs(), FX_TOLERANCE)
    with pytest.raises(AssertionError, match="2 operators"):
        assert_one(Counter(Conv=2), ("Conv",))
    with pytest.raises(AssertionError, match="Relu"):
        assert_one(Counter(Relu=1), ("Conv",))
