"""How often a fusion copies a model and runs it, by counters that do not depend on the clock."""

import pytest

pytest.importorskip("torch")

import weakref
from collections import Counter, OrderedDict
from typing import Any

import torch
from fx_checks import ready
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from reparamc import fuse_fx

WIDE, BLOCKS = 96, 4
WEIGHT = WIDE * WIDE * 9 * 4
"""Bytes of each weight; nothing else is as large."""


class Made(TorchDispatchMode):
    """How many storages torch makes beside those of ``model``, by size in bytes, and how many bytes are there at most.

    Those over arrays of NumPy are not its own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in model.state_dict().values()}
        self.times = Counter[int]()
        self.most = self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if type(t) is Tensor and not t.is_meta and func is not torch.ops.aten.lift_fresh.default:
                self._note(t.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.times[size] += 1
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kinds = [(nn.Conv2d(WIDE, WIDE, 3, padding=1), nn.BatchNorm2d(WIDE), nn.ReLU()) for _ in range(BLOCKS)]
        self.blocks = nn.Sequential(*(nn.Sequential(*kind) for kind in kinds))

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x)


class Steered(Wide):
    def forward(self, x: Tensor, double: bool = False) -> Any:
        return self.blocks(x) * 2 if double else self.blocks(x)


class Ordered(Wide):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=self.blocks(x))


class Branching(Wide):
    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x if x.shape[-1] > 3 else -x)
        return x


@pytest.mark.parametrize("verify", ["off", "full"])
@pytest.mark.parametrize("kind", [Wide, Steered, Ordered, Branching])
def test_a_model_is_copied_three_times(kind: type[Wide], verify: str) -> None:
    """The copy that is edited, what is folded in float64, and the result; one region of each kind is run, too."""
    model, x = ready(kind()), torch.randn(2, WIDE, 6, 6)
    with Made(model) as made:
        fuse_fx(model, x, verify=verify)
    of_kinds = 2 if verify == "full" else 0
    assert made.times[WEIGHT] <= 2 * BLOCKS + of_kinds
    assert made.times[2 * WEIGHT] <= BLOCKS + of_kinds
    assert made.most <= (2 * BLOCKS + 6) * WEIGHT


class Runs(TorchDispatchMode):
    """The convolutions of float32 with each of so many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[0].dtype == torch.float32:
            self.of[args[0].numel()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("verify", "times"), [("off", 2), ("full", 3)])
@pytest.mark.parametrize("kind", [Wide, Steered, Ordered, Branching])
def test_an_example_is_run_by_each_form_once(kind: type[Wide], verify: str, times: int) -> None:
    model, x = ready(kind()), torch.randn(2, WIDE, 6, 6)
    with Runs() as runs:
        fuse_fx(model, x, verify=verify)
    by_python = kind is not Wide  # then all parts together are run once more
    assert runs.of[x.numel()] <= (times + by_python) * BLOCKS
