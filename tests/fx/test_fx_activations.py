"""Activations that are the identity on what they are given, and such that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from fx_checks import Net, ready, report  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from reparamc import fuse_fx  # noqa: E402

Forward = Callable[[Any, Any], Any]


def then_pools(m: Any, y: Any) -> Any:
    return F.relu(F.avg_pool2d(F.max_pool2d(y.relu(), 2), 2))


def in_place_again(m: Any, y: Any) -> Any:
    y = F.relu(y, inplace=True)
    return F.relu(y, True) + 1


GOES: dict[str, Forward] = {
    "relu": lambda m, y: F.relu(y.relu()),
    "modules": lambda m, y: m.relu6(m.relu6(y)),
    "sigmoid": lambda m, y: m.relu(torch.sigmoid(y)),
    "softmax": lambda m, y: torch.relu(y.softmax(1)),
    "leaky": lambda m, y: F.leaky_relu(y.relu(), 0.2),
    "leaky, slope 1": lambda m, y: F.leaky_relu(y.tanh(), 1.0),
    "prelu": lambda m, y: m.prelu(y.relu()),
    "prelu, slope 1": lambda m, y: m.ones(y.tanh()),
    "square": lambda m, y: (y * y).relu(),
    "product": lambda m, y: m.relu(y.relu() * y.sigmoid()),
    "sum": lambda m, y: m.relu(y.relu() + y.sigmoid()),
    "concat": lambda m, y: torch.cat([y.relu(), y.sigmoid()], 1).relu(),
    "pools": then_pools,
    "layout": lambda m, y: y.relu().permute(0, 2, 3, 1).flatten(1).relu(),
    "hardtanh, wider": lambda m, y: F.hardtanh(F.hardtanh(y), -2.0, 1.0),
    "clamp": lambda m, y: y.relu().clamp(min=0.0),
    "mean": lambda m, y: m.relu(y.relu().mean((2, 3))),
    "resize": lambda m, y: m.relu(F.interpolate(y.relu(), scale_factor=2, mode="bilinear")),
    "in place": in_place_again,
}


def written_between(m: Any, y: Any) -> Any:
    y = y.relu()
    z = y.view(-1, 6)
    z -= 0.5
    return y.relu()


def written_later(m: Any, y: Any) -> Any:
    y = y.sigmoid()
    z = y.relu()
    z += 1
    return torch.cat([y, z], 1)


def squared(y: Any) -> Any:
    return y * y


STAYS: dict[str, Forward] = {
    "leaky": lambda m, y: F.leaky_relu(y, 0.1).relu(),
    "prelu": lambda m, y: m.prelu(y),
    "tanh": lambda m, y: y.tanh().relu(),
    "sum": lambda m, y: (y.relu() + y).relu(),
    "sum with a number": lambda m, y: (y.relu() + -1).relu(),
    "difference": lambda m, y: (y.relu() - y.sigmoid()).relu(),
    "alpha": lambda m, y: torch.add(y.relu(), y.sigmoid(), alpha=-1).relu(),
    "product": lambda m, y: (y.relu() * y.tanh()).relu(),
    "narrower": lambda m, y: F.relu6(F.relu(y)),
    "clamp below": lambda m, y: y.clamp(max=2.0).relu(),
    "cubic": lambda m, y: F.interpolate(y.relu(), scale_factor=2, mode="bicubic").relu(),
    "padded": lambda m, y: F.pad(y.relu(), (1, 1, 1, 1), value=-1.0).relu(),
    "other bits": lambda m, y: F.hardtanh(y, 0.0, 1.0).view(torch.int32).clamp(0, 1),
    "integers that overflow": lambda m, y: squared(y.long() * 0 + 3_037_000_500).relu(),
    "written": written_between,
    "written later": written_later,
}

NAMES = ("relu", "relu_", "ReLU", "ReLU6", "relu6", "leaky_relu", "prelu", "PReLU", "hardtanh", "clamp")


def _model(forward: Forward) -> Any:
    torch.manual_seed(0)
    ones = nn.PReLU(6)
    nn.init.ones_(ones.weight)
    parts = {"relu": nn.ReLU(), "relu6": nn.ReLU6(inplace=True), "prelu": nn.PReLU(6), "ones": ones}
    return ready(Net(lambda m, x: forward(m, m.c(x)), c=nn.Conv2d(3, 6, 1), **parts))


def _count(graph: Any) -> int:
    """The activations of a traced module."""
    found = (
        type(graph.get_submodule(n.target)).__name__ if n.op == "call_module" else n.target for n in graph.graph.nodes
    )
    return sum(getattr(name, "__name__", name) in NAMES for name in found)


def _fused(forward: Forward, **options: Any) -> tuple[int, Any, Any, Tensor]:
    model = _model(forward)
    x = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    fused = fuse_fx(model, x, **options)
    return _count(torch.fx.symbolic_trace(model)), fused, model, x


@pytest.mark.parametrize("name", GOES)
def test_it_goes(name: str) -> None:
    before, fused, model, x = _fused(GOES[name], specialize=name == "prelu, slope 1")
    assert _count(fused) == before - 1
    found = report(fused)
    assert found.passes["redundant-activation"] == 1
    assert found.certificate is not None
    assert found.certificate.undecided == ()
    assert not found.failed
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*STAYS, "prelu, slope 1"])
def test_it_stays(name: str) -> None:
    before, fused, model, x = _fused({**GOES, **STAYS}[name])
    assert _count(fused) == before
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()))


def test_whole_numbers() -> None:
    net = Net(lambda m, x: torch.clamp(x.relu(), min=0.0) / 2)
    fused = fuse_fx(ready(net), torch.arange(6).reshape(2, 3) - 2)
    assert fused(torch.arange(4)).dtype == torch.float32
