"""Channels that are constant or that nothing reads leave a torch module, with all that belongs to them; or stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from fx_checks import Net, ready, relative_error, report, run  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from reparamc import fuse_fx  # noqa: E402

DEAD = [1, 3, 4]
"""Of six channels."""


def net(forward: Callable[[Any, Any], Any], **parts: nn.Module) -> Net:
    torch.manual_seed(0)
    first = {"a": nn.Conv2d(4, 6, 3, padding=1), "n": nn.BatchNorm2d(6), "z": nn.Conv2d(6, 4, 1)}
    model = ready(Net(forward, **first, **parts))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight[DEAD], part.bias[DEAD] = 0, -1
    return model


def widths(model: nn.Module, shape: tuple[int, ...] = (2, 4, 9, 7), level: str = "full") -> list[tuple[int, ...]]:
    """The shapes of the weights of convolutions and linear layers in the result, all of which is proven."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fused = fuse_fx(model, x, verify=level, specialize=True)
    assert relative_error(run(fused, x[:1]), run(model, x[:1])) < 1e-5
    found = report(fused)
    assert not found.failed
    assert level == "off" or found.certificate is None or not found.certificate.undecided
    return [tuple(m.weight.shape) for m in fused.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def excited(m: Any, x: Any) -> Any:
    y = m.n(m.a(x))
    return m.z(y.relu() * torch.sigmoid(m.s(F.adaptive_avg_pool2d(y.relu(), 1))))


def halves(m: Any, x: Any) -> Any:
    a, b = m.n(m.a(x)).relu().split([2, 4], 1)
    return m.z(torch.cat([b.sigmoid(), a], 1))


def headed(m: Any, x: Any) -> Any:
    return m.head(torch.flatten(m.n(m.a(x)).relu_().mean((2, 3), keepdim=True), 1))


def residual(m: Any, x: Any) -> Any:
    y = m.n(m.a(x)).relu()
    return m.z(F.relu(m.m(m.w(y)) + y, inplace=True))


WAYS: dict[str, tuple[Callable[[Any, Any], Any], dict[str, Any], list[tuple[int, ...]]]] = {
    "relu": (lambda m, x: m.z(m.n(m.a(x)).relu()), {}, [(3, 4, 3, 3), (4, 3, 1, 1)]),
    "gelu": (lambda m, x: m.z(F.gelu(m.n(m.a(x)))), {}, [(3, 4, 3, 3), (4, 3, 1, 1)]),
    "resize": (
        lambda m, x: m.z(F.interpolate(m.p(m.n(m.a(x)).relu()), scale_factor=2, mode="bilinear")),
        {"p": nn.MaxPool2d(3, 2, 1)}, [(3, 4, 3, 3), (4, 3, 1, 1)],
    ),
    "excitation": (excited, {"s": nn.Conv2d(6, 6, 1)}, [(3, 4, 3, 3), (4, 3, 1, 1), (3, 3, 1, 1)]),
    "split": (halves, {}, [(3, 4, 3, 3), (4, 3, 1, 1)]),
    "linear": (headed, {"head": nn.Linear(6, 5)}, [(3, 4, 3, 3), (4, 6, 1, 1), (5, 3)]),
    "residual": (
        residual, {"w": nn.Conv2d(6, 6, 3, padding=1), "m": nn.BatchNorm2d(6)},
        [(3, 4, 3, 3), (4, 3, 1, 1), (3, 3, 3, 3)],
    ),
    "depthwise": (
        lambda m, x: m.z(m.d(m.n(m.a(x)).relu()).relu()), {"d": nn.Conv2d(6, 6, 3, groups=6)},
        [(3, 4, 3, 3), (4, 3, 1, 1), (3, 1, 3, 3)],
    ),
    "softmax over channels": (lambda m, x: m.z(m.n(m.a(x)).softmax(1)), {}, [(6, 4, 3, 3), (4, 6, 1, 1)]),
    "a size is read": (lambda m, x: m.z((y := m.n(m.a(x)).relu()) / y.size(1)), {}, [(6, 4, 3, 3), (4, 6, 1, 1)]),
    "a function of the caller's": (
        lambda m, x: m.z(torch.fft.fft(m.n(m.a(x)).relu(), dim=1).real), {}, [(6, 4, 3, 3), (4, 6, 1, 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_dead_channels_leave_or_stay(name: str) -> None:
    forward, parts, expected = WAYS[name]
    assert sorted(widths(net(forward, **parts))) == sorted(s for s in expected if name != "linear" or s[0] != 4)


@pytest.mark.parametrize("level", ["off", "region"])
def test_at_every_level(level: str) -> None:
    forward, parts, expected = WAYS["residual"]
    assert sorted(widths(net(forward, **parts), level=level)) == sorted(expected)


def test_an_exported_graph_is_left() -> None:
    """It records the sizes of all its values."""
    model = net(WAYS["relu"][0])
    x = torch.randn(2, 4, 9, 7)
    exported = torch.export.export(model, (x,)).module()
    fused = fuse_fx(exported, x)
    assert report(fused).passes["lossless-shrink"] == 0


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.Sigmoid()])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_equal_channels_are_one(activation: nn.Module, factor: float) -> None:
    """Up to a positive factor, which a ReLU passes, and a sigmoid does not."""
    first = nn.Conv2d(4, 6, 3)
    model = Net(lambda m, x: m.z(m.f(m.a(x))), a=first, f=activation, z=nn.Conv2d(6, 4, 3, padding=1))
    with torch.no_grad():
        for p in first.parameters():
            p[[1, 3, 4]] = factor * p[[0, 2, 5]]
    width = 6 if factor != 1 and isinstance(activation, nn.Sigmoid) else 3
    assert sorted(widths(ready(model))) == sorted([(width, 4, 3, 3), (4, width, 3, 3)])


def test_a_slope_of_each_channel_keeps_them() -> None:
    first, slopes = nn.Conv2d(4, 6, 3), nn.PReLU(6)
    model = Net(lambda m, x: m.z(m.f(m.a(x))), a=first, f=slopes, z=nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        for p in first.parameters():
            p[[1, 3, 4]] = p[[0, 2, 5]]
        slopes.weight.copy_(torch.arange(6) / 5)
    assert sorted(widths(ready(model))) == [(4, 6, 3, 3), (6, 4, 3, 3)]
