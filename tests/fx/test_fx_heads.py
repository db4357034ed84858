"""1/sqrt(d) after channels that have been split into heads, through PyTorch: into the projection of the queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from fx_checks import Net, check, reasons, report  # noqa: E402
from torch import nn  # noqa: E402

from reparamc import fuse_fx  # noqa: E402

WIDTH, HEADS = 8, 2
TOKENS = ((2, 5, WIDTH), (1, 7, WIDTH))
Run = Callable[[Any, Any], Any]


def attention(q: Any, k: Any, v: Any) -> Any:
    """From queries that are scaled already."""
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def in_heads(y: Any, x: Any) -> Any:
    b, n, c = x.shape
    return y.reshape(b, n, HEADS, c // HEADS).transpose(1, 2)


def together(m: Any, x: Any) -> Any:
    b, n, c = x.shape
    return m.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)


def apart(m: Any, x: Any) -> Any:
    return m.out(attention(in_heads(m.q(x), x) * 0.5, in_heads(m.k(x), x), in_heads(m.v(x), x)))


def unbound(m: Any, x: Any) -> Any:
    q, k, v = together(m, x).unbind(0)
    return m.out(attention(q * 0.5, k, v))


def unbound_by_function(m: Any, x: Any) -> Any:
    q, k, v = torch.unbind(together(m, x))
    return m.out(attention(q / 2.0, k, v))


def indexed(m: Any, x: Any) -> Any:
    qkv = together(m, x)
    return m.out(attention(qkv[0] * 0.5, qkv[1], qkv[2]))


def selected(m: Any, x: Any) -> Any:
    qkv = together(m, x)
    return m.out(attention(qkv.select(0, 0) * 0.5, qkv.select(0, 1), torch.select(qkv, 0, -1)))


def both_scaled(m: Any, x: Any) -> Any:
    q, k, v = together(m, x).unbind(0)
    return m.out(attention(q * 0.7, k * 0.7, v))


def within_heads(m: Any, x: Any) -> Any:
    b, n, c = x.shape
    qkv = m.qkv(x).reshape(b, n, HEADS, 3, c // HEADS)
    q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
    return m.out(attention(q * 0.5, k, v))


def chunked(m: Any, x: Any) -> Any:
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return m.out(attention(in_heads(q, x) * 0.5, in_heads(k, x), in_heads(v, x)))


def of_each_head(m: Any, x: Any) -> Any:
    q, k, v = together(m, x).unbind(0)
    return m.out(attention(q * m.temperature, k, v))


def along_two_axes(m: Any, x: Any) -> Any:
    q, k, v = together(m, x).unbind(0)
    return m.out(attention(q * m.temperature, k * m.channels, v))


def net(run: Run) -> Net:
    torch.manual_seed(0)
    parts: dict[str, Any] = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    temperature = nn.Parameter(torch.tensor([0.5, 1.5]).reshape(HEADS, 1, 1))
    channels = nn.Parameter(torch.tensor([0.5, 1.5, -1.0, 2.0]))
    return Net(run, qkv=nn.Linear(WIDTH, 3 * WIDTH), temperature=temperature, channels=channels, **parts)


ALL = [
    *(apart, unbound, unbound_by_function, indexed, selected, both_scaled, within_heads, chunked, of_each_head),
    along_two_axes,
]


@pytest.mark.parametrize("run", ALL)
def test_it_goes_into_the_projection(run: Run) -> None:
    fused = check(net(run), *TOKENS, examples=True)
    left = [n.name for n in fused.graph.nodes if n.name.startswith(("mul", "truediv"))]
    assert not left, reasons(fused)
    certificate = report(fused).certificate
    assert certificate is not None
    assert certificate.equal
    assert not certificate.undecided


@pytest.mark.parametrize("run", ALL)
def test_through_torch_export(run: Run) -> None:
    model, x = net(run).eval(), torch.randn(TOKENS[0], generator=torch.Generator().manual_seed(0))
    fused = fuse_fx(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module(), x)
    assert not [n.name for n in fused.graph.nodes if n.name.startswith(("mul", "div"))], reasons(fused)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_queries_that_are_read_unscaled_as_well() -> None:
    def run(m: Any, x: Any) -> Any:
        q, k, v = together(m, x).unbind(0)
        return m.out(attention(q * 0.5, k, v)), q.relu()

    fused = check(net(run), *TOKENS, examples=True)
    assert not report(fused).changed


def test_queries_that_are_written() -> None:
    def run(m: Any, x: Any) -> Any:
        q, k, v = together(m, x).unbind(0)
        k += 1
        return m.out(attention(q * 0.5, k, v))

    check(net(run), *TOKENS, examples=True)


def test_the_scale_of_the_scores_stays() -> None:
    """Runtimes multiply with a factor for nothing, and know attention by it."""

    def run(m: Any, x: Any) -> Any:
        q, k, v = together(m, x).unbind(0)
        return ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v

    fused = check(net(run), *TOKENS, examples=True)
    assert not report(fused).changed
