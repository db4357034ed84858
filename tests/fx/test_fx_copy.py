"""The original stays as it is; the copy is an ordinary module of the same kind."""

from typing import Any

import pytest

pytest.importorskip("torch")

import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from fx_checks import CHANNELS, Net, conv_bn, counts, images, ready, reasons, relative_error, report, run, vector
from torch import nn

from reparamc import fuse_fx
from reparamc.errors import InputError


class Residual(nn.Module):
    """A block of every kind of rewrite, that pickle can find."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.skip = conv_bn(), conv_bn(1), nn.BatchNorm2d(CHANNELS)
        self.scale = vector()
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x + self.scale * (self.a(x) + self.b(x) + self.skip(x)))
        return self.head(y.mean((2, 3)))


@pytest.fixture
def model() -> Residual:
    return ready(Residual())


@pytest.fixture
def x() -> torch.Tensor:
    return images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


def test_original_stays_bitwise_the_same(model: Residual, x: torch.Tensor) -> None:
    calls: list[int] = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    model.b[0].weight.requires_grad_(False)
    model(x).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
    grads = {k: (p.requires_grad, None if p.grad is None else p.grad.clone()) for k, p in model.named_parameters()}
    modules = {k: (id(m), m.training, len(m._forward_hooks)) for k, m in model.named_modules()}
    example, random = x.clone(), torch.get_rng_state()
    fused = fuse_fx(model, example)
    assert torch.equal(example, x)
    assert torch.equal(random, torch.get_rng_state())
    assert tensors == {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert modules == {k: (id(m), m.training, len(m._forward_hooks)) for k, m in model.named_modules()}
    for name, p in model.named_parameters():
        required, grad = grads[name]
        assert p.requires_grad == required
        assert (p.grad is None) == (grad is None)
        assert p.grad is None or grad is None or torch.equal(p.grad, grad)
    assert not storages(model) & storages(fused)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_plain_tensors_are_copied() -> None:
    model = ready(Net(lambda m, x: torch.relu(m.a(x)) * m.table, a=conv_bn()))
    model.table = torch.ones(CHANNELS, 1, 1)
    assert model.table.untyped_storage().data_ptr() not in storages(fuse_fx(model))


def test_modules_in_training_mode_on_purpose_stay_so() -> None:
    model = ready(nn.Sequential(conv_bn(), nn.Dropout(0.5)))
    model[1].train()
    fused = fuse_fx(model)
    assert counts(fused) == (1, 0)
    assert [m.training for m in fused.modules() if isinstance(m, nn.Dropout)] == [True]
    x = torch.ones(1, CHANNELS, 5, 6)
    assert relative_error(run(fuse_fx(model, x), x), run(fused, x)) > 0


def test_report_of_the_copy(model: Residual, x: torch.Tensor) -> None:
    result = report(fuse_fx(model, x))
    assert (result.before.conv, result.before.batchnorm) == (2, 3)
    assert (result.after.conv, result.after.batchnorm) == (1, 0)
    assert result.changed
    assert result.region_error is not None
    assert result.region_error < 1e-12
    assert [e.output for e in result.end_to_end] == ["output"]
    assert result.end_to_end[0].max_rel < 1e-5
    assert json.loads(result.to_json())["after"]["conv"] == 1
    assert "regions" in result.table()
    assert {"a.0.weight", "b.1.running_var", "skip.bias", "scale"} <= {p for r in result.rewrites for p in r.parameters}
    assert report(fuse_fx(model)).note == "not run end to end: no example_inputs"
    unverified = report(fuse_fx(model, x, verify=False))
    assert (unverified.region_error, unverified.end_to_end) == (None, [])


def test_state_dict(model: Residual, x: torch.Tensor) -> None:
    fused, other = fuse_fx(model), fuse_fx(ready(Residual(), 5))
    other.load_state_dict(fused.state_dict())
    assert torch.equal(run(other, x), run(fused, x))


class Shortcut(nn.Module):
    """A block whose parts are merged or not by what their BatchNorms add: two shortcuts, and two kernels in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.narrow = conv_bn(bias=False), conv_bn(bias=False), conv_bn(1, bias=False)
        self.wide, self.shortcut = conv_bn(bias=False), conv_bn(1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        y = (self.b(y) + y).relu()
        return (self.wide(self.narrow(y)) + self.shortcut(x)).relu()


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_the_copy_of_a_new_model_takes_the_weights_of_a_trained_one(last: float, x: torch.Tensor) -> None:
    """A last BatchNorm may begin with zeros, and all shifts are zero at first."""
    new, trained = Shortcut().eval(), ready(Shortcut())
    nn.init.constant_(new.get_parameter("b.1.weight"), last)
    empty, fused = fuse_fx(new, x), fuse_fx(trained, x)
    empty.load_state_dict(fused.state_dict())
    assert torch.equal(run(empty, x), run(fused, x))


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "save"])
def test_copies_of_the_copy(model: Residual, x: torch.Tensor, how: str) -> None:
    fused = fuse_fx(model, x)
    if how == "deepcopy":
        again = copy.deepcopy(fused)
        assert not storages(again) & storages(fused)
    elif how == "copy":
        again = copy.copy(fused)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert torch.equal(run(again, x), run(fused, x))
    assert not any(m.training for m in again.modules())


def test_fusing_twice_changes_nothing(model: Residual, x: torch.Tensor) -> None:
    fused = fuse_fx(model, x)
    again = fuse_fx(fused, x)
    assert not report(again).changed
    assert report(again).before == report(again).after == report(fused).after
    assert torch.equal(run(again, x), run(fused, x))
    assert [n.target for n in again.graph.nodes] == [n.target for n in fused.graph.nodes]


def test_untouched_modules_keep_their_names_and_types(model: Residual) -> None:
    fused = fuse_fx(model)
    assert type(fused.head) is nn.Linear
    assert torch.equal(fused.head.weight, model.head.weight)
    assert type(fused).__name__ == "Residual"


def test_training_goes_on(model: Residual, x: torch.Tensor) -> None:
    fused = fuse_fx(model).train()
    assert all(p.requires_grad for p in fused.parameters())
    optimizer = torch.optim.SGD(fused.parameters(), 0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = fused(x).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fused.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradients_of_the_input_are_those_of_the_original(model: Residual, x: torch.Tensor) -> None:
    fused = fuse_fx(model.double())
    grads = []
    for network in (model, fused):
        leaf = x.double().requires_grad_()
        network(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert relative_error(grads[1], grads[0]) < 1e-12


def test_frozen_parameters_stay_frozen(model: Residual) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    fused = fuse_fx(model)
    assert {name for name, p in fused.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_parameters_made_without_gradients_can_be_trained(model: Residual, x: torch.Tensor) -> None:
    with torch.no_grad():
        fused = fuse_fx(model, x)
    fused(x).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 6e-3), (torch.bfloat16, 5e-2), (torch.float64, 1e-12)])
def test_dtypes(model: Residual, x: torch.Tensor, dtype: torch.dtype, bound: float) -> None:
    model = model.to(dtype)
    fused = fuse_fx(model, x.to(dtype))
    assert {p.dtype for p in fused.parameters()} == {dtype}
    exact = run(copy.deepcopy(model).double(), x.to(dtype).double())
    assert relative_error(run(fused, x.to(dtype)).double(), exact) < bound


def test_default_dtype_is_not_used(model: Residual, x: torch.Tensor) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        fused = fuse_fx(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in fused.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_half_precision_are_no_false_alarm(dtype: torch.dtype) -> None:
    model = ready(Net(lambda m, x: (y := m.a(x), y > 0, y.argmax(1)), a=conv_bn())).to(dtype)
    fuse_fx(model, images((2, CHANNELS, 32, 32), dtype=dtype)[0])


def test_overflow_of_float16_is_refused() -> None:
    model = ready(conv_bn())
    with torch.no_grad():
        model[0].weight.fill_(30.0)
        model[1].running_var.fill_(1e-7)
        model[1].eps = 0.0
        model[1].weight.fill_(1.0)
    model = model.half()
    model[1].float()  # statistics below the range of float16
    model[1].running_var.fill_(1e-7)
    model[1].half()
    fused = fuse_fx(model)
    assert counts(fused) == (1, 1)
    assert "float16" in reasons(fused)


def test_underflow_of_float16_is_refused() -> None:
    model = ready(conv_bn(bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        model[1].weight.fill_(1e-3)
    fused = fuse_fx(model.half())
    assert counts(fused) == (1, 1)
    assert "below the range of float16" in reasons(fused)


def test_mixed_dtypes_stay() -> None:
    model = ready(conv_bn())
    model[0].double()
    fused = fuse_fx(model)
    assert counts(fused) == (1, 1)
    assert "different dtypes" in reasons(fused)


@pytest.mark.parametrize("kernels", [(3, 1), (1, 3)])
def test_channels_last(kernels: tuple[int, int], x: torch.Tensor) -> None:
    model = ready(Net(lambda m, x: m.a(x) + m.b(x), a=conv_bn(kernels[0]), b=conv_bn(kernels[1])))
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    fused = fuse_fx(model, x)
    (weight,) = [p for p in fused.parameters() if p.ndim == 4]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert run(fused, x).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_in_three_dimensions() -> None:
    model: Any = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)).eval()
    model = model.to(memory_format=torch.channels_last_3d)
    (weight,) = [p for p in fuse_fx(ready(model)).parameters() if p.ndim == 5]
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_parameters_without_data_are_refused() -> None:
    with pytest.raises(InputError, match="meta"):
        fuse_fx(ready(conv_bn()).to("meta"))
    with pytest.raises(InputError, match="initiali"):
        fuse_fx(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval())


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_parameters_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).to(torch.complex64).eval()
    x = torch.ones(1, 3, 5, 5, dtype=torch.complex64)
    assert torch.equal(run(fuse_fx(model, x), x), run(model, x))


def test_onnx_export_of_the_copy(model: Residual, x: torch.Tensor, tmp_path: Path) -> None:
    fused = fuse_fx(model, x)
    torch.onnx.export(fused, (x,), str(tmp_path / "model.onnx"), dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = run(model, x).numpy()
    assert np.abs(np.asarray(actual) - expected).max() < 1e-5 * np.abs(expected).max()


def test_torch_export_of_the_copy(model: Residual, x: torch.Tensor) -> None:
    exported = torch.export.export(fuse_fx(model, x), (x,))
    assert relative_error(run(exported.module(), x), run(model, x)) < 1e-5


def test_nothing_to_fuse(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).eval()
    fused = fuse_fx(model, x)
    assert not report(fused).changed
    assert torch.equal(run(fused, x), run(model, x))
    assert "nothing to fuse" in report(fused).table()


def test_a_feature_extractor_of_torchvision_stays_in_eval_mode(timm: object) -> None:
    """Its own copies are in training mode, which chooses another graph."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    body = ready(nn.Sequential(conv_bn(), nn.ReLU(), conv_bn(1)))
    extractor = extraction.create_feature_extractor(body, {"0": "a", "2": "b"})
    (x,) = images((2, CHANNELS, 7, 9), dtype=torch.float32)
    fused = fuse_fx(extractor, x)
    assert counts(fused) == (2, 0)
    with torch.no_grad():
        assert relative_error(fused(x), extractor(x)) < 1e-5
    assert not extractor.training


class Single(nn.Module):
    """A module of which there can be one alone."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Single":
        raise RuntimeError("there is one of me")


def test_a_module_that_refuses_to_be_copied_is_named() -> None:
    with pytest.raises(InputError, match=r"^'1.0', a Single, cannot be copied: there is one of me; .*deepcopy"):
        fuse_fx(nn.Sequential(nn.ReLU(), nn.Sequential(Single())).eval(), torch.ones(1))
