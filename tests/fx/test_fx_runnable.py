"""Modules that are run for a comparison: what they return is compared leaf by leaf, and they stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fx_checks import compared
from torch import Tensor, nn

from reparamc.errors import VerificationError
from reparamc.fx.fuse import fuse_fx
from reparamc.fx.runnable import run


@dataclass
class Found:
    boxes: Tensor
    scores: Any = None


class Two(NamedTuple):
    first: Tensor
    second: Tensor


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor, Tensor], Any], wrong: float = 0.0) -> None:
        super().__init__()
        self.make, self.wrong = make, wrong

    def forward(self, x: Tensor) -> Any:
        return self.make(x, x * 2 + self.wrong)


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: [{"a": a}, ({"b": (b,)},)],
    "dataclass": lambda a, b: Found(a, [b]),
    "named tuple": lambda a, b: Two(a, b),
    "object": lambda a, b: SimpleNamespace(a=a, inner=SimpleNamespace(b=b)),
    "Python number": lambda a, b: (a, float(b.sum())),
    "sparse": lambda a, b: (a, b.to_sparse()),
    "text": lambda a, b: (a, f"{float(b[0, 0]):.3f}"),
    "another dtype": lambda a, b: (a, b if float(b[0, 0]) == float(2 * a[0, 0]) else b.double() - 1e-3),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_leaf_is_compared(name: str) -> None:
    x, make = torch.randn(3, 5), CONTAINERS[name]
    assert {e.max_abs for e in compared(Returns(make), Returns(make), x, resize=False)} == {0.0}
    with pytest.raises(VerificationError):
        compared(Returns(make), Returns(make, 1e-3), x, resize=False)


def test_another_dtype_is_a_difference() -> None:
    with pytest.raises(VerificationError, match=r"of float64, that of the original of float32"):
        compared(Returns(lambda a, b: b), Returns(lambda a, b: b.double()), torch.randn(2, 3))


class Stateful(nn.Module):
    """Everything that a forward may leave behind."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.calls, self.history, self.memory = 0, [0], {"a": 1}
        self.norm = nn.BatchNorm1d(3).train()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        self.memory["x"] = self.calls
        self.last = x
        self.seen += x.sum(0)
        return self.norm(x) + self.calls + len(self.history) + torch.rand(())


def test_state_and_random_numbers_are_as_before() -> None:
    model, x = Stateful(), torch.randn(4, 3)
    state, given, random = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    first, second = run(model, (x,), {}), run(model, (x,), {})
    np.testing.assert_array_equal(first["output"], second["output"])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert (model.calls, model.history, model.memory) == (0, [0], {"a": 1})
    assert not hasattr(model, "last")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)


def test_a_forward_that_raises_leaves_nothing_after() -> None:
    model = Stateful()
    with pytest.raises(RuntimeError):
        run(model, (torch.randn(4, 2),), {})
    assert (model.calls, model.history) == (0, [0])
    assert not model.seen.any()


def test_whole_modules_are_copied_at_most_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    copied: list[str] = []

    def counted(self: nn.Sequential, memo: dict[int, Any]) -> nn.Sequential:
        copied.append("one")
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    monkeypatch.setattr(nn.Sequential, "__deepcopy__", counted, raising=False)
    fuse_fx(model, torch.randn(1, 3, 8, 8))
    assert 1 <= len(copied) <= 3
