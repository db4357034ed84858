"""A convolution that is cut into pieces, some of them scaled, through PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from fx_checks import CHANNELS, Net, check, report  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from reparamc import fuse_fx  # noqa: E402
from reparamc.algebra.expr import Select  # noqa: E402
from reparamc.fx.emit import Emitter  # noqa: E402


def net(run: Callable[[Any, Any], Any], **more: Any) -> Net:
    torch.manual_seed(0)
    parts = {"qkv": nn.Conv2d(CHANNELS, 12, 3, padding=1), "norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4)}
    return Net(run, **parts, **more)


def split(m: Any, x: Any) -> Any:
    q, k, v = m.qkv(x).split([4, 4, 4], 1)
    return m.norm(q), k.relu(), v


def sliced(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    return y[:, :4].relu(), m.norm(y[:, 4:8]).permute(0, 2, 3, 1), y.narrow(1, 8, 4)


def activated_in_place(m: Any, x: Any) -> Any:
    """What is written is the result of the norm: no other piece, although it is a view of the convolution then."""
    q, k, v = m.qkv(x).chunk(3, 1)
    return F.relu(m.norm(q), inplace=True), k, v.sigmoid()


def halves(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    return m.norm(y[:, :4]).relu(), y[:, 4:].relu()


def behind_a_norm(m: Any, x: Any) -> Any:
    q, k, v = m.wide(m.qkv(x)).chunk(3, 1)
    return q, m.norm(k), v.relu()


@pytest.mark.parametrize("run", [split, sliced, activated_in_place, behind_a_norm])
def test_it_goes_into_the_convolution(run: Callable[[Any, Any], Any]) -> None:
    fused = check(net(run, wide=nn.BatchNorm2d(12)))
    assert report(fused).passes["piece-folding"] == 1
    assert report(fused).after.batchnorm == 0


def test_tokens() -> None:
    def run(m: Any, x: Any) -> Any:
        q, k, v = m.linear(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        return q * m.scale, k.relu(), v

    fused = check(Net(run, linear=nn.Linear(CHANNELS, 12), scale=nn.Parameter(torch.linspace(0.5, 1.7, 4))))
    assert report(fused).passes["piece-folding"] == 1


def test_gradients_flow() -> None:
    module = net(activated_in_place).eval()
    fused = check(module)
    x = torch.randn(2, CHANNELS, 5, 5, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad([y.square().sum() for y in m(x)], x)[0] for m in (fused, module.double())]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def written_piece(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    q, k = y[:, :4], y[:, 4:]
    k += 1
    return m.norm(q), k


def written_before(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    q, k = y[:, :4], y[:, 4:]
    q.mul_(2)
    return m.norm(q), k


def written_whole(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    q, k = y[:, :4], y[:, 4:]
    z = m.norm(q)
    y.add_(1)
    return z, k


def read_twice(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    return m.norm(y[:, :4]), y[:, 3:].relu()


def overlapping(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    return m.norm(y[:, :4]), m.other(y[:, 2:6]), y[:, 6:]


def returned(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    return m.norm(y[:, :4]), y[:, 4:].relu(), y


def activated(m: Any, x: Any) -> Any:
    y = m.qkv(x)
    return m.norm(y[:, :4]), y[:, 4:], y.relu()


@pytest.mark.parametrize(
    "run", [written_piece, written_before, written_whole, read_twice, overlapping, returned, activated]
)
def test_it_stays(run: Callable[[Any, Any], Any]) -> None:
    fused = check(net(run))
    assert report(fused).passes["piece-folding"] == 0
    assert report(fused).after.batchnorm == (2 if run is overlapping else 1)


def test_a_lambda_layer() -> None:
    """q and v of one projection are normalised, k goes into a softmax."""

    def run(m: Any, x: Any) -> Any:
        q, k, v = m.qkv(x).split([4, 4, 4], 1)
        q = m.norm(q).reshape(x.shape[0], 2, 2, -1).transpose(-1, -2)
        v = m.other(v).flatten(2).transpose(-1, -2)
        content = k.flatten(2).softmax(-1) @ v
        return q @ content[:, :2].unsqueeze(1)

    fused = check(net(run))
    assert report(fused).passes["piece-folding"] == 2
    assert report(fused).after.batchnorm == 0


def test_a_wrong_piece_is_undone_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were one of them left, the convolution would be computed twice."""
    select = Emitter._select

    def wrong(self: Emitter, e: Select) -> Any:
        return select(self, replace(e, index=e.index[::-1]) if e.index[0] else e)

    monkeypatch.setattr(Emitter, "_select", wrong)
    with pytest.warns(RuntimeWarning, match="region 'getitem_1' failed"):
        found = report(fuse_fx(net(halves).eval(), torch.randn(2, CHANNELS, 5, 5)))
    assert (found.after.ops, found.after.conv, found.after.batchnorm) == (found.before.ops, 1, 1)
    assert [f.where for f in found.failed] == ["getitem_1"]
    (other, blamed) = (k.reason for k in found.kept if k.name == "certificate")
    assert "with weight" in blamed
    assert other == "it pays only together with 'getitem_1', which is undone"
