"""Tensors that forward makes of numbers: a copy makes them too, of the same dtype and anew in each run."""

import pytest

pytest.importorskip("torch")

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from fx_checks import CHANNELS, conv_bn, ready, relative_error, report, run
from torch import Tensor, nn

from reparamc import fuse_fx

X = torch.randn(2, CHANNELS, 7, 6)


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.block, self.name = conv_bn(), name

    def forward(self, x: Tensor) -> Any:
        return (MADE | RETURNED | COMPLEX)[self.name](self, self.block(x))


MADE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "one number": lambda m, y: y * torch.tensor([1.5]),
    "a scalar": lambda m, y: y * torch.tensor(1.5),
    "another dtype": lambda m, y: y + torch.tensor([0.1], dtype=torch.float64),
    "half precision": lambda m, y: y * torch.full((1, 1), 0.7, dtype=torch.bfloat16),
    "no finite numbers": lambda m, y: y.minimum(torch.tensor([float("inf")])).maximum(torch.tensor(-float("inf"))),
    "many numbers": lambda m, y: y + torch.linspace(-1, 1, 3000).reshape(-1, 1, 1)[-CHANNELS:],
    "whole numbers": lambda m, y: y[:, torch.tensor([2, 0, 1])],
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_a_copy_computes_the_same_in_each_dtype(name: str, examples: bool) -> None:
    model = ready(Net(name)).float()
    fused = fuse_fx(model, *((X,) if examples else ()))
    assert report(fused).after.batchnorm == 0
    for copied in (fused, pickle.loads(pickle.dumps(fused))):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            expected, actual = (run(copy.deepcopy(m).to(dtype), X.to(dtype)) for m in (model, copied))
            assert actual.dtype == expected.dtype
            assert relative_error(actual.double(), expected.double()) < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", sorted(MADE.keys() - {"many numbers"}))
def test_a_copy_is_traced_and_exported(name: str) -> None:
    model = ready(Net(name)).float()
    for copied in (fused := fuse_fx(model, X), pickle.loads(pickle.dumps(fused))):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(copied, (X,))
            torch.onnx.export(copied, (X,), cast(Any, io.BytesIO()), dynamo=False)
            program = torch.export.export(copied, (X,))
        for ran in cast(list[Any], [traced, program.module()]):
            assert relative_error(ran(X), run(model, X)) < 1e-5


RETURNED: dict[str, Callable[[Any, Tensor], Any]] = {
    "alone": lambda m, y: (y, torch.tensor([1.5, 2.0])),
    "of whole numbers": lambda m, y: (y, torch.tensor([3])),
    "in a dict": lambda m, y: {"y": y, "scale": torch.tensor(1.5)},
    "a view": lambda m, y: (y, torch.ones(3)[None]),
    "cast to what it is": lambda m, y: (y, torch.tensor([1.5]).to(y.dtype)),
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", RETURNED)
def test_each_run_returns_tensors_of_its_own(name: str, examples: bool) -> None:
    model = ready(Net(name))
    fused = fuse_fx(model, *((X,) if examples else ()))
    for _ in range(2):
        expected, actual = model(X), fused(X)
        kept = [list(r.values() if isinstance(r, dict) else r)[1] for r in (expected, actual)]
        torch.testing.assert_close(kept[1], kept[0])
        kept[1].mul_(2)


COMPLEX: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "times a constant": lambda m, y: y.relu() * torch.tensor(2 + 1j),
    "plus a constant": lambda m, y: y + torch.tensor(1j),
    "plus a number": lambda m, y: y + 1j,
    "plus a buffer": lambda m, y: y + m.turn,
    "turned": lambda m, y: torch.view_as_real(y.to(torch.complex64) * torch.tensor([1j, -1j])[0]),
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_constants(name: str, examples: bool) -> None:
    model = ready(Net(name)).float()
    model.register_buffer("turn", torch.tensor(0.5 - 2j))
    fused = fuse_fx(model, *((X,) if examples else ()))
    assert report(fused).after.batchnorm == 0
    expected, actual = run(model, X), run(fused, X)
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() / expected.abs().max() < 1e-5
