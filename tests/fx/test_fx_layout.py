"""Constants folded through operators that move axes, and axes whose lengths agree by chance."""

from typing import Any

import pytest

pytest.importorskip("torch")

from collections.abc import Callable

import torch
from fx_checks import (
    CHANNELS,
    Net,
    check,
    conv_bn,
    counts,
    fuse_fx,
    images,
    ready,
    reasons,
    relative_error,
    run,
    vector,
)
from torch import Tensor, nn
from torch.nn import functional as F

C = CHANNELS
CUBES = ((C, C, C, C), (2, C, 4, 6), (1, C, 3, 5))
TOKENS = ((C, C, C), (3, 5, C), (1, 2, C))


def parts() -> dict[str, nn.Module]:
    return {
        "a": conv_bn(1),
        "n": nn.BatchNorm2d(C),
        "tokens": nn.BatchNorm1d(C),
        "linear": nn.Linear(C, C),
        "conv": nn.Conv2d(C, C, 1),
    }


BEHIND_CONV: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flatten": lambda m, x: m.a(x).flatten(2),
    "tokens": lambda m, x: m.a(x).flatten(2).transpose(1, 2),
    "tokens, linear": lambda m, x: m.linear(m.a(x).flatten(2).transpose(1, 2)),
    "channels last": lambda m, x: m.linear(m.a(x).permute(0, 2, 3, 1)),
    "shape read before": lambda m, x: m.a(x).reshape(x.shape[0], C, -1),
    "shape read from the norm": lambda m, x: (y := m.a(x)).reshape(y.shape[0], y.shape[1], -1),
    "sizes multiplied": lambda m, x: (y := m.a(x)).reshape(y.size(0), y.size(1), y.size(2) * y.size(3)),
    "unpacked": lambda m, x: _unpacked(m.a(x)),
    "copy between": lambda m, x: m.a(x).permute(0, 1, 3, 2).contiguous().view(x.shape[0], C, -1),
    "module": lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1).flatten(1),
    "norm after flatten": lambda m, x: m.tokens(m.a[0](x).flatten(2)),
    "unflatten": lambda m, x: m.n(m.a[0](x).flatten(2).unflatten(2, (x.shape[2], x.shape[3]))),
}


def _unpacked(y: Tensor) -> Tensor:
    b, c, h, w = y.shape[0], y.shape[1], y.shape[2], y.shape[3]
    return y.flatten(2).transpose(1, 2).reshape(b, h * w, c)


@pytest.mark.parametrize(
    ("name", "examples"),
    [(name, given) for name in BEHIND_CONV for given in (True, False)],
)
def test_norm_of_a_conv_and_layouts_after(name: str, examples: bool) -> None:
    assert counts(check(Net(BEHIND_CONV[name], **parts()), *CUBES, examples=examples))[1] == 0


INTO_LINEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tokens": lambda m, x: m.linear(m.n(x).flatten(2).transpose(1, 2)),
    "channels last": lambda m, x: m.linear(m.n(x).permute(0, 2, 3, 1)),
    "channels last, flat": lambda m, x: m.linear(m.n(x).permute(0, 2, 3, 1).reshape(-1, C)),
    "transposed twice": lambda m, x: m.linear(m.n(x).transpose(1, 2).transpose(2, 3)),
    "conv": lambda m, x: m.conv(m.n(x).transpose(2, 3)),
}


@pytest.mark.parametrize("name", INTO_LINEAR)
def test_norm_in_front_folds_through_layouts(name: str) -> None:
    assert counts(check(Net(INTO_LINEAR[name], **parts()), *CUBES, examples=True)) == (1, 0)


WRONG_AXIS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "width": lambda m, x: m.linear(m.n(x)),
    "height": lambda m, x: m.linear(m.n(x).transpose(2, 3)),
    "rows mixed": lambda m, x: m.linear(m.n(x).reshape(-1, C)),
    "view instead of transpose": lambda m, x: m.linear(m.n(x).reshape(x.shape[0], -1, C)),
    "conv over another axis": lambda m, x: m.conv(m.n(x).transpose(1, 3)),
    "batch as channels": lambda m, x: m.conv(m.n(x).transpose(0, 1)),
    "split and merged": lambda m, x: m.linear(m.n(x).unflatten(1, (2, 2)).flatten(0, 1).flatten(2).reshape(-1, C)),
}


@pytest.mark.parametrize("name", WRONG_AXIS)
def test_norm_over_another_axis_stays(name: str) -> None:
    model = Net(WRONG_AXIS[name], **parts())
    assert counts(check(model, (C, C, C, C), (2 * C, C, C, C) if "batch" not in name else (C, C, C, C)))[1] == 1


BROADCAST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pooled plus map": lambda m, x: m.n(x.mean((2, 3), keepdim=True) + x),
    "pooled times map": lambda m, x: m.n(x.mean((2, 3), keepdim=True) * x),
    "factor times map": lambda m, x: m.g * x,
    "factor plus map": lambda m, x: m.g + x,
}


@pytest.mark.parametrize("name", BROADCAST)
def test_operands_of_equal_rank_and_different_sizes(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = BROADCAST[name](m, torch.relu(m.a(x)))
        return m.linear(y.reshape(-1, C)) + m.linear(y.flatten(2).reshape(-1, C))

    check(Net(forward, g=vector(1, C, 1, 1), **parts()), (2, C, C, C), (1, C, 1, C))


# Tokens


@pytest.mark.parametrize("examples", [False, True])
def test_norm_over_tokens_stays(examples: bool) -> None:
    after = Net(lambda m, x: m.tokens(m.linear(x)), **parts())
    before = Net(lambda m, x: m.linear(m.tokens(x)), **parts())
    for model in (after, before):
        assert counts(check(model, (C, C, C), (2, C, C), examples=examples)) == (1, 1)


def test_norm_over_features_folds_when_the_rank_is_known() -> None:
    for forward in (lambda m, x: m.tokens(m.linear(x)), lambda m, x: m.linear(m.tokens(x))):
        model = Net(forward, **parts())
        assert counts(check(model, (C, C), (3, C), examples=True)) == (1, 0)
        check(model, (C, C), examples=False)


def test_copy_made_for_vectors_is_used_on_vectors_only() -> None:
    """An example of rank 2 decides; without one nothing is assumed."""
    model = ready(Net(lambda m, x: m.tokens(m.linear(x)), **parts())).double()
    x = images((C, C, C))[0]
    assert relative_error(run(fuse_fx(model), x), run(model, x)) < 1e-12


TOKEN_NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transposed": lambda m, x: m.tokens(m.linear(x).transpose(1, 2)).transpose(1, 2),
    "flattened": lambda m, x: m.tokens(m.linear(x).flatten(0, 1)),
    "flattened and back": lambda m, x: m.tokens(m.linear(x).flatten(0, 1)).reshape(x.shape[0], x.shape[1], C),
    "before": lambda m, x: m.linear(m.tokens(x.transpose(1, 2)).transpose(1, 2)),
}


@pytest.mark.parametrize("name", TOKEN_NORMS)
def test_norm_of_features_through_layouts(name: str) -> None:
    assert counts(check(Net(TOKEN_NORMS[name], **parts()), *TOKENS, examples=True)) == (1, 0)


# Layer scale


def _tokens(x: Tensor) -> Tensor:
    return torch.relu(x).flatten(2).transpose(1, 2)


SCALES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "on tokens": lambda m, x: m.g * m.linear(_tokens(x)),
    "then reshaped": lambda m, x: (m.linear(_tokens(x)) * m.g).transpose(1, 2).reshape(x.shape),
    "after reshape": lambda m, x: m.linear(_tokens(x)).transpose(1, 2).reshape(x.shape) * m.map,
    "after unflatten": lambda m, x: m.linear(_tokens(x)).transpose(1, 2).unflatten(2, x.shape[2:]) * m.map,
    "residual": lambda m, x: x + m.map * m.linear(_tokens(x)).transpose(1, 2).unflatten(2, x.shape[2:]),
}


@pytest.mark.parametrize("name", SCALES)
def test_layer_scale(name: str) -> None:
    model = Net(SCALES[name], **parts(), g=vector(C), map=vector(C, 1, 1))
    fused = check(model, *CUBES)
    assert not [n for n in fused.graph.nodes if n.op == "get_attr"], fused.code


@pytest.mark.parametrize("name", ["on tokens", "then reshaped"])
def test_layer_scale_without_examples(name: str) -> None:
    """The rank is open, so nothing is proven: the fold is made only where nobody asks for a proof."""
    model = Net(SCALES[name], **parts(), g=vector(C))
    fused = check(model, *CUBES, examples=False, verify="off")
    assert not [n for n in fused.graph.nodes if n.op == "get_attr"], fused.code
    (kept,) = check(model, *CUBES, examples=False).meta["reparamc"].kept
    assert "the rank of" in kept.reason
    assert "give example_inputs" in kept.reason


def test_layer_scale_over_another_axis_stays() -> None:
    """(C, 1) on [N, L, C] runs over the tokens."""
    model = Net(lambda m, x: m.linear(x) * m.g, **parts(), g=vector(C, 1))
    fused = check(model, (C, C, C), (2, C, C))
    assert [n for n in fused.graph.nodes if n.op == "get_attr"]


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(CHANNELS, 6, 1), nn.Conv2d(12, CHANNELS, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.last(torch.cat([z, self.first(x), z], 1))


def test_what_reads_a_concatenation_tells_the_channels_of_its_parts() -> None:
    model, given = ready(Beside()), images((2, CHANNELS, 5, 6), (2, 3, 5, 6), dtype=torch.float32)
    fused = fuse_fx(model, tuple(given))
    assert "the number of its channels is unknown" not in reasons(fused)
    assert relative_error(run(fused, *given), run(model, *given)) < 1e-5
