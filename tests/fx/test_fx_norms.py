"""Normalizations take scales and shifts of their results into their weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fx_checks import Net, ready, relative_error, report
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import fuse_fx

C = 6
MAP, TOKENS = (3, C, 5, 4), (3, 5, C)


def vector() -> nn.Parameter:
    return nn.Parameter(torch.rand(C) + 0.5)


def affine(norm: Any) -> Any:
    for name in ("weight", "bias"):
        if getattr(norm, name, None) is not None:
            setattr(norm, name, vector())
    return norm


def proven(model: nn.Module, x: Tensor, ops: int) -> Any:
    """The fused copy: proven, as exact as rounding allows, with so many operators."""
    model = ready(model)
    fused = fuse_fx(model, x, verify="region")
    with torch.no_grad():
        for given in (x, x[:1]):
            assert relative_error(fused(given), model(given)) < 1e-5
    certificate = report(fused).certificate
    assert certificate is not None
    assert (certificate.undecided, operators(fused)) == ((), ops)
    return fused


def operators(fused: Any) -> int:
    """How many operators there are, but for those that check the rank of the input."""
    checks = ("dim", "eq", "_assert", "_guards_fn")
    return sum(n.op.startswith("call_") and not n.name.startswith(checks) for n in fused.graph.nodes)


NORMS: dict[str, list[tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "layer_norm": [
        (lambda: nn.LayerNorm(C), TOKENS),
        (lambda: nn.LayerNorm(C, elementwise_affine=False, eps=0.1), TOKENS),
        (lambda: nn.LayerNorm(C, bias=False), MAP[:1] + TOKENS),
        (lambda: Net(lambda m, x: F.layer_norm(x, (C,), m.g), g=vector()), TOKENS),
    ],
    "rms_norm": [(lambda: nn.RMSNorm(C), TOKENS), (lambda: Net(lambda _, x: F.rms_norm(x, [C], eps=0.1)), TOKENS)],
    "group_norm": [
        (lambda: nn.GroupNorm(2, C), MAP),
        (lambda: Net(lambda m, x: F.group_norm(x, 3, bias=m.g), g=vector()), MAP),
    ],
    "instance_norm": [
        (lambda: nn.InstanceNorm2d(C, affine=True, eps=0.1), MAP),
        (lambda: nn.InstanceNorm1d(C, affine=True), MAP[:3]),
        (lambda: Net(lambda m, x: F.instance_norm(x, None, None, m.g, m.g), g=vector()), MAP),
    ],
}
KINDS = [(name, n) for name, rows in NORMS.items() for n in range(len(rows))]


@pytest.mark.parametrize(("name", "which"), KINDS)
def test_a_scale_after_a_norm(name: str, which: int) -> None:
    make, shape = NORMS[name][which]
    last = name in ("layer_norm", "rms_norm")
    spread = (C,) if last else (C, *[1] * (len(shape) - 2))
    model = Net(lambda m, x: m.n(x) * m.s.view(spread) + 0.25, n=affine(make()), s=vector())
    proven(model, torch.randn(shape), 2 if name == "rms_norm" else 1)  # which has no bias


def test_exported() -> None:
    model = ready(Net(lambda m, x: m.n(x) * m.s, n=affine(nn.LayerNorm(C)), s=vector()))
    x = torch.randn(TOKENS)
    fused = fuse_fx(torch.export.export(model, (x,)).module(), x, verify="region")
    certificate = report(fused).certificate
    assert certificate is not None
    assert (operators(fused), certificate.undecided) == (1, ())
    assert relative_error(fused(x), model(x)) < 1e-5


def token_mixer(m: Any, x: Tensor) -> Tensor:
    n = m.norm(x)
    return x + m.scale.view(C, 1, 1) * (m.affine(n) - n)


def test_an_affine_token_mixer_is_its_norm() -> None:
    """RIFormer trains a depthwise 1x1 convolution less its operand in the place of a token mixer."""
    mixer = nn.Conv2d(C, C, 1, groups=C)
    model = Net(token_mixer, norm=affine(nn.GroupNorm(1, C)), affine=mixer, scale=vector())
    fused = proven(model, torch.randn(MAP), 2)
    assert sum(isinstance(m, nn.GroupNorm) for m in fused.modules()) == 1
    assert report(fused).after.conv == 0


def test_through_a_permutation_and_a_batchnorm() -> None:
    model = Net(lambda m, x: m.b(m.n(x).permute(0, 3, 1, 2)), n=affine(nn.LayerNorm(C)), b=nn.BatchNorm2d(C))
    proven(model, torch.randn(3, 5, 4, C), 2)


def test_norms_that_are_alike_are_one() -> None:
    model = Net(lambda m, x: m.a(x) + m.b(x), a=affine(nn.LayerNorm(C)), b=affine(nn.LayerNorm(C)))
    proven(model, torch.randn(TOKENS), 1)
    other = Net(lambda m, x: m.a(x) + m.b(x), a=affine(nn.LayerNorm(C)), b=affine(nn.LayerNorm(C, eps=0.1)))
    assert report(fuse_fx(other.eval(), torch.randn(TOKENS))).after.ops == 3


def unchanged(run: Callable[..., Any], x: Tensor, **parts: Any) -> None:
    model = ready(Net(run, **parts))
    fused = fuse_fx(model, x)
    assert report(fused).after == report(fused).before
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_what_a_norm_does_not_take() -> None:
    norm = affine(nn.LayerNorm(C))
    tokens, image = torch.randn(TOKENS), torch.randn(MAP)
    unchanged(lambda m, x: m.l(m.n(x)), tokens, n=norm, l=nn.Linear(C, C))  # a matrix
    unchanged(lambda m, x: m.n(x) * m.s, tokens, n=norm, s=nn.Parameter(torch.rand(5, 1)))  # along another axis
    unchanged(lambda m, x: m.n(x) * m.s, tokens, n=nn.LayerNorm([5, C]), s=vector())  # weights at each position
    unchanged(lambda m, x: m.d(m.n(x)), image, n=nn.GroupNorm(2, C), d=nn.Conv2d(C, C, 3, 1, 1, groups=C))
    shared = Net(lambda m, x: (lambda n: n * m.s + n.relu())(m.n(x)), n=norm, s=vector())
    assert report(fuse_fx(ready(shared), tokens)).after == report(fuse_fx(ready(shared), tokens)).before


def test_statistics_that_are_kept_are_left_alone() -> None:
    norm = nn.InstanceNorm2d(C, affine=True, track_running_stats=True)
    unchanged(lambda m, x: m.n(x) * m.s, torch.randn(MAP), n=norm, s=nn.Parameter(torch.rand(C, 1, 1)))


def test_nothing_is_said_of_norms_before_linear_layers() -> None:
    model = Net(
        lambda m, x: (lambda n: m.q(n) * m.k(n))(m.n(x)), n=nn.LayerNorm(C), q=nn.Linear(C, C), k=nn.Linear(C, C)
    )
    assert not report(fuse_fx(model.eval(), torch.randn(TOKENS))).kept


def test_a_norm_is_not_computed_twice() -> None:
    parts = {"n": affine(nn.LayerNorm(C)), "s": vector()}
    model = Net(lambda m, x: (lambda n: m.v(m.w(n)) + n * m.s)(m.n(x)), w=nn.Linear(C, C), v=nn.Linear(C, C), **parts)
    proven(model, torch.randn(TOKENS), 2)  # the norm, and one linear layer
    parts = {"n": affine(nn.GroupNorm(1, C)), "s": nn.Parameter(torch.rand(C, 1, 1))}
    pool = Net(lambda m, x: (lambda n: m.s * (F.avg_pool2d(n, 3, 1, 1) - n))(m.n(x)), **parts)
    proven(pool, torch.randn(MAP), 2)  # the norm, and one kernel for each channel


def attention(m: Any, x: Any) -> Any:
    n = m.n(x)
    return x + m.o((m.q(n) @ m.k(n).transpose(-1, -2)).softmax(-1) @ m.v(n))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_gain_and_bias_go_into_all_readers_where_parameters_count(norm: Any) -> None:
    layers = {name: nn.Linear(C, C) for name in "qkvo"}
    model = ready(Net(attention, n=affine(norm(C)), **layers))
    x = torch.randn(TOKENS)
    fused = fuse_fx(model, x, objective="params")
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-5
    found = report(fused)
    assert found.certificate is not None
    assert found.certificate.undecided == ()
    assert found.before.parameters - found.after.parameters == sum(p.numel() for p in model.n.parameters())
    assert not report(fuse_fx(model, x)).changed


def test_they_stay_where_a_reader_is_not_linear() -> None:
    parts = {"n": affine(nn.LayerNorm(C)), "q": nn.Linear(C, C)}
    model = Net(lambda m, x: (lambda n: m.q(n) * n.sigmoid())(m.n(x)), **parts)
    found = report(fuse_fx(ready(model), torch.randn(TOKENS), objective="params"))
    assert [r.reason for r in found.kept] == ["its gain and bias stay: sigmoid reads it, and is not linear"]
