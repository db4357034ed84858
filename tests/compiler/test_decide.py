"""Values that several regions share, through PyTorch: what acts on each channel goes into all its readers, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from reparamc import fuse_fx  # noqa: E402
from reparamc.testing import randomize_batchnorm  # noqa: E402


class Readers(nn.Module):
    """BatchNorm, a layer scale, a ReLU and kernels, put together by a function."""

    def __init__(self, forward: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 1)
        self.norm, self.flat_norm = nn.BatchNorm2d(6), nn.BatchNorm1d(6)
        self.q, self.k, self.v = (nn.Conv2d(6, 4, 1, bias=bias) for bias in (True, False, True))
        self.inside, self.padded = nn.Conv2d(6, 5, 3), nn.Conv2d(6, 5, 3, padding=1)
        self.wide_q, self.wide_k = nn.Conv2d(6, 40, 1), nn.Conv2d(6, 40, 1)
        self.heads = nn.ModuleList(nn.Linear(6, width) for width in (3, 4, 4))
        self.scale = nn.Parameter(torch.linspace(-0.5, 1.5, 6).reshape(6, 1, 1))
        self.build = forward

    def forward(self, x: Any) -> Any:
        return self.build(self, x)

    def enter(self, x: Any) -> Any:
        """From here on the channels are known, and nothing before is linear."""
        return F.silu(self.stem(x))


def left(forward: Callable[[Any, Any], Any], *shape: int) -> Counter[str]:
    """The layers and functions that are left, results having been compared at two sizes."""
    torch.manual_seed(0)
    module = randomize_batchnorm(Readers(forward), 1).double().eval()
    x = torch.randn(shape or (2, 6, 7, 5), dtype=torch.float64)
    fused = fuse_fx(module, x)
    with torch.no_grad():
        for inputs in (x, torch.randn(3, *x.shape[1:], dtype=torch.float64)):
            for a, b in zip(module(inputs), fused(inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    modules = dict(fused.named_modules())
    names = [
        type(modules[str(n.target)]).__name__ if n.op == "call_module" else getattr(n.target, "__name__", n.target)
        for n in fused.graph.nodes
        if n.op.startswith("call_")
    ]
    return Counter(str(name) for name in names)


def projections(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    return m.q(b), m.k(b), m.v(b)


def tokens(m: Any, x: Any) -> Any:
    b = m.flat_norm(x)
    return [head(b) for head in m.heads]


def scaled_projections(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x) * m.scale)
    return m.q(b), m.k(b)


def gated(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    return (m.q(b) * m.k(b).sigmoid(),)


def no_shift(m: Any, x: Any) -> Any:
    b = m.enter(x) * m.scale
    return m.inside(b), m.padded(b)


def flattened(m: Any, x: Any) -> Any:
    t = m.norm(m.enter(x)).flatten(2).transpose(1, 2)
    return tuple(head(t) for head in m.heads)


def averaged(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    p = F.avg_pool2d(b, 2)
    return m.inside(b), m.wide_q(p), m.wide_k(p)


FOLDED: dict[Callable[[Any, Any], Any], dict[str, int]] = {
    projections: {"Conv2d": 4},
    tokens: {"Linear": 3},
    scaled_projections: {"Conv2d": 3},
    no_shift: {"Conv2d": 3},
    flattened: {"Conv2d": 1, "flatten": 1, "permute": 1, "Linear": 3},
    averaged: {"Conv2d": 4, "avg_pool2d": 1},
}
CHECKS = ("silu", "dim", "eq", "_assert")
"""What is left besides layers: the activation before, and the checks of the rank that a norm makes."""


@pytest.mark.parametrize("forward", FOLDED)
def test_every_reader_takes_it_in(forward: Callable[[Any, Any], Any]) -> None:
    shape = (5, 6) if forward is tokens else ()
    found = left(forward, *shape)
    assert {name: count for name, count in found.items() if name not in CHECKS} == FOLDED[forward]


def test_readers_that_meet_again() -> None:
    found = left(gated)
    assert found["Conv2d"] == 3
    assert found["BatchNorm2d"] == 0


def padded_and_not(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    return m.inside(b), m.padded(b)


def activated(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    return m.q(b), F.relu(b)


def returned(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    return m.q(b), b, m.k(b)


def pooled(m: Any, x: Any) -> Any:
    b = m.norm(m.enter(x))
    return m.q(b), F.max_pool2d(b, 2)


@pytest.mark.parametrize("forward", [padded_and_not, activated, returned, pooled])
def test_one_reader_that_cannot_keeps_it_for_all(forward: Callable[[Any, Any], Any]) -> None:
    assert left(forward)["BatchNorm2d"] == 1


def test_a_written_value_is_no_shared_one() -> None:
    """What one reader changes in place is not what the other one reads."""

    def written(m: Any, x: Any) -> Any:
        b = m.norm(m.enter(x))
        q = m.q(b)
        b.mul_(2)
        return q, m.k(b)

    left(written)


@pytest.mark.parametrize("batch", [1, 2])
def test_samples_of_a_batch_stay_apart(batch: int) -> None:
    """With one sample its mean over the batch is the sample itself; another batch may follow the example."""
    module = Readers(lambda m, x: m.padded(x - x.mean(0, keepdim=True))).double().eval()
    fused = fuse_fx(module, torch.randn(batch, 6, 7, 5, dtype=torch.float64), verify="off")
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), fused(x), rtol=1e-10, atol=1e-11)
