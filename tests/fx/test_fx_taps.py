"""Operators that take scales of their results though they are no kernels over their operands; computed weights."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fx_checks import CHANNELS, Net, check, conv_bn, counts, ready, relative_error, report
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from reparamc import fuse_fx

MODES = ("reflect", "circular", "replicate")


def proven(model: nn.Module, x: Tensor, kernels: int = 1) -> Any:
    """The fused copy: proven without a run of both, as exact as rounding allows, with no BatchNorm left."""
    model = ready(model)
    with torch.no_grad():
        fused = fuse_fx(model, x, verify="region")
        assert relative_error(fused(x), model(x)) < 1e-5
        assert relative_error(fuse_fx(model, x)(x), model(x)) < 1e-5
    certificate = report(fused).certificate
    assert certificate is not None
    assert certificate.equal
    assert not certificate.undecided
    assert (report(fused).after.conv, report(fused).after.batchnorm) == (kernels, 0)
    return fused


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_batchnorm_after_another_padding(mode: str, axes: int) -> None:
    conv: Any = getattr(nn, f"Conv{axes}d")
    norm: Any = getattr(nn, f"BatchNorm{axes}d")
    model = nn.Sequential(conv(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode, bias=axes == 2), norm(6))
    fused = proven(model, torch.randn(3, 4, *(7, 9, 8)[:axes]))
    (kept,) = (m for m in fused.modules() if isinstance(m, conv))
    assert (kept.padding_mode, kept.groups, kept.stride) == (mode, 2, (2,) * axes)


def test_a_matrix_of_channels_goes_into_it_and_a_kernel_does_not() -> None:
    first = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False)
    matrix = nn.Sequential(first, nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    proven(matrix, torch.randn(1, 4, 7, 6))
    proven(nn.Sequential(matrix, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), torch.randn(1, 4, 7, 6), kernels=2)


def test_branches_that_gather_alike_are_one() -> None:
    a, b = (conv_bn(padding_mode="circular") for _ in range(2))
    proven(Net(lambda m, x: m.a(x) + m.b(x), a=a, b=b), torch.randn(2, CHANNELS, 7, 6))
    other = conv_bn(5, padding_mode="circular")
    proven(Net(lambda m, x: m.a(x) + m.b(x), a=a, b=other), torch.randn(2, CHANNELS, 7, 6), kernels=2)


def test_its_operand_is_rewritten_by_itself() -> None:
    inner = Net(lambda m, x: m.a(x) + m.b(x), a=conv_bn(), b=conv_bn(1))
    outer = conv_bn(padding_mode="reflect")
    proven(nn.Sequential(inner, outer), torch.randn(2, CHANNELS, 7, 6), kernels=2)
    skip = Net(lambda m, x: (y := m.inner(x)) + m.outer(y), inner=inner, outer=outer)
    proven(skip, torch.randn(2, CHANNELS, 7, 6), kernels=2)


def test_a_transposed_convolution_to_a_wanted_size() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.up(x, output_size=(x.shape[2] * 2 + 2, x.shape[3] * 2 + 1)))

    fused = proven(Up(), torch.randn(2, 4, 7, 6), kernels=0)
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in fused.modules()) == 1


@pytest.mark.parametrize("biased", [True, False])
def test_a_padding_that_is_computed_at_run_time(biased: bool) -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3, bias=biased), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.conv2d(x, self.conv.weight, self.conv.bias, padding=x.shape[2] // 4))

    fused = proven(Grown(), torch.randn(2, 4, 9, 8))
    assert fused(torch.randn(1, 4, 13, 8)).shape == (1, 6, 17, 12)


def test_a_written_operand_is_not_read_late() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        x.mul_(0.5)
        return m.norm(y) + x

    model = Net(run, conv=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), norm=nn.BatchNorm2d(4))
    check(model)


def pruned(conv: nn.Module) -> nn.Module:
    return prune.random_unstructured(conv, "weight", 0.5)


def old(norm: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    def applied(conv: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(conv)

    return applied


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight norm by a hook": old(nn.utils.weight_norm),
    "spectral norm by a hook": old(nn.utils.spectral_norm),
    "pruned": pruned,
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_batchnorm_after_a_computed_weight(kind: str, mode: Any) -> None:
    conv = COMPUTED[kind](nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
    fused = proven(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()), torch.randn(3, 4, 7, 6))
    assert all(p.requires_grad for p in fused.parameters())


def test_a_weight_that_is_drawn_anew_stays() -> None:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.rand_like(weight)

    conv = nn.Conv2d(4, 6, 3)
    nn.utils.parametrize.register_parametrization(conv, "weight", Noise())
    fused = fuse_fx(ready(nn.Sequential(conv, nn.BatchNorm2d(6))), verify=False)
    assert counts(fused)[1] == 1


# Core ATen


def tail() -> nn.Sequential:
    """With every BatchNorm in a graph of core ATen, and a linear layer, which is a product there."""
    image = [nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*image, nn.Linear(8 * 20, 4), nn.BatchNorm1d(4))


def by_map(run: Callable[[Any, Tensor], Tensor], channels: int = 8, **parts: nn.Module) -> Net:
    return Net(run, conv=nn.Conv2d(4, 8, 3, padding=1), norm=nn.BatchNorm2d(channels), **parts)


CORE: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "products": (tail, 2, 0),
    "pixel shuffle": (lambda: by_map(lambda m, x: m.norm(F.pixel_shuffle(m.conv(x), 2)).relu(), 2), 1, 0),
    "pooling to a size": (lambda: by_map(lambda m, x: m.norm(F.adaptive_avg_pool2d(m.conv(x), (3, 4))).relu()), 1, 0),
    "norm of groups": (
        lambda: by_map(lambda m, x: m.norm(m.group(m.conv(x))).relu(), group=nn.GroupNorm(2, 8)), 1, 0,
    ),
    "norm of tokens": (
        lambda: by_map(
            lambda m, x: m.norm(m.tokens(m.conv(x).transpose(1, -1)).transpose(1, -1)).relu(),
            tokens=nn.LayerNorm(8),
        ), 1, 0,
    ),
    "one matrix for all examples": (
        lambda: by_map(
            lambda m, x: m.norm(m.matrix(m.conv(x).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (7, 6))),
            matrix=nn.Linear(8, 8, bias=False),
        ), 1, 0,
    ),
    "norm of images": (
        lambda: by_map(lambda m, x: m.images(m.norm(m.conv(x))), images=nn.InstanceNorm2d(8, affine=True)), 2, 1,
    ),
}  # fmt: skip
"""A model, its BatchNorms in core ATen, and how many of those are left."""


@pytest.mark.parametrize("name", CORE)
def test_core_aten_after_decompositions(name: str) -> None:
    make, before, after = CORE[name]
    model, x = ready(make()), torch.randn(2, 4, 7, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        graph = torch.export.export(model, (x,)).run_decompositions().module()
        fused = fuse_fx(graph, x, verify="region")
    assert (report(fused).before.batchnorm, report(fused).after.batchnorm) == (before, after)
    certificate = report(fused).certificate
    assert certificate is not None
    assert not certificate.undecided
    assert relative_error(fused(x), model(x)) < 1e-5


def test_a_graph_of_make_fx() -> None:
    model, x = ready(tail()), torch.randn(2, 4, 7, 6)
    graph = make_fx(model)(x).eval()
    fused = fuse_fx(graph, x, verify="region")
    assert (report(fused).before.batchnorm, report(fused).after.batchnorm) == (2, 0)
    certificate = report(fused).certificate
    assert certificate is not None
    assert (certificate.equal, certificate.undecided) == (2, ())
    assert relative_error(fused(x), model(x)) < 1e-5
    names = {str(n.target) for n in fused.graph.nodes}
    assert not any("batch_norm" in name for name in names)


def test_statistics_that_are_read_keep_a_batchnorm() -> None:
    norm = nn.BatchNorm2d(4)

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        given = (m.norm.weight, m.norm.bias, m.norm.running_mean, m.norm.running_var)
        found = torch.native_batch_norm(y, *given, False, 0.1, 1e-5)
        return found[0], found[1] + 1

    model = ready(Net(run, conv=nn.Conv2d(4, 4, 3), norm=norm))
    x = torch.randn(2, 4, 7, 6)
    fused, expected = fuse_fx(model, x)(x), model(x)
    assert relative_error(fused[0], expected[0]) < 1e-5
    assert torch.equal(fused[1], expected[1])


def test_a_weight_of_one_row_takes_the_axis_away() -> None:
    model = Net(lambda m, x: F.linear(m.body(x).flatten(2).transpose(1, 2).softmax(-1), m.row), body=conv_bn())
    model.register_buffer("row", torch.linspace(-1, 1, CHANNELS))
    fused = check(model)
    assert counts(fused) == (2, 0)  # the convolution, and the product with one row


# Ranks that nothing tells; writes that something else sees


class Frozen(nn.Module):
    """A BatchNorm as arithmetic on its buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name, least in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            self.register_buffer(name, torch.rand(6) + least)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (v.reshape(1, -1, 1, 1) for v in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


BATCHED = {
    "images": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), (2, 4, 7, 6)),
    "sequences": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 7)),
    "functional": (
        Net(lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var), conv=nn.Conv2d(4, 6, 3)).eval(),
        (2, 4, 7, 6),
    ),
    "arithmetic": (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), Frozen(), nn.ReLU()), (2, 4, 7, 6)),
}
BATCHED["functional"][0].register_buffer("mean", torch.randn(6))
BATCHED["functional"][0].register_buffer("var", torch.rand(6) + 0.5)


@pytest.mark.parametrize("kind", BATCHED)
def test_a_convolution_without_examples_is_given_a_batch(kind: str) -> None:
    model, shape = ready(BATCHED[kind][0]), BATCHED[kind][1]
    x = torch.randn(shape)
    for given in (None, x):
        fused = fuse_fx(model, given, verify="full" if given is not None else "region")
        assert report(fused).after.conv == 1
        assert report(fused).after.batchnorm == 0
        assert not any(str(n.target).endswith(("add", "mul")) for n in fused.graph.nodes)
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-5
        with pytest.raises(AssertionError, match=f"must have {len(shape)} axes"):
            fused(x[0])


@pytest.mark.parametrize("kind", ["input", "view", "private"])
def test_what_is_added_in_place_folds(kind: str) -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = x if kind == "input" else F.relu(x)
        first = y[:, :2] if kind == "view" else x
        y += m.body(y)
        return F.relu(y), first

    fused = check(Net(run, body=conv_bn()))
    assert counts(fused) == (1, 0)
    assert any(n.target is operator.iadd for n in fused.graph.nodes) == (kind != "private")


def test_the_structure_of_the_copy_does_not_depend_on_a_shift_of_zero() -> None:
    for body in (conv_bn(bias=False), conv_bn(padding_mode="reflect", bias=False)):
        fresh = nn.Sequential(body, nn.ReLU()).eval()
        empty = fuse_fx(fresh)
        trained = fuse_fx(ready(fresh))
        empty.load_state_dict(trained.state_dict())
        x = torch.randn(2, CHANNELS, 7, 6)
        with torch.no_grad():
            assert torch.equal(empty(x), trained(x))


RESIZES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nearest-exact": lambda x, y: F.interpolate(y, scale_factor=2, mode="nearest-exact"),
    "area": lambda x, y: F.interpolate(y, size=(3, 5), mode="area"),
    "to the size of another": lambda x, y: F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=True),
    "by one and a half": lambda x, y: F.interpolate(y, scale_factor=1.5),
    "antialias": lambda x, y: F.interpolate(y, scale_factor=0.7, mode="bicubic", antialias=True),
    "computed anew": lambda x, y: F.interpolate(y, scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
    "aten": lambda x, y: torch.ops.aten.upsample_bilinear2d.vec(y, None, True, [2.0, 3.0]),
    "aten, to a size": lambda x, y: torch.ops.aten.upsample_bicubic2d.default(y, [9, 5], False, 1.5, None),
}


@pytest.mark.parametrize("name", RESIZES)
def test_batchnorm_after_any_resize(name: str) -> None:
    resize = RESIZES[name]
    model = Net(
        lambda m, x: m.norm(resize(x, m.conv(x))).relu(),
        conv=nn.Conv2d(4, 4, 3, stride=2, padding=1), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    proven(model, torch.randn(2, CHANNELS, 9, 8))


def shuffled_by_hand(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


@pytest.mark.parametrize("shuffle", [nn.PixelShuffle(2), lambda y: F.pixel_shuffle(y, 2), shuffled_by_hand])
@pytest.mark.parametrize("factor", [False, True])
def test_batchnorm_after_a_pixel_shuffle(shuffle: Any, factor: bool) -> None:
    parts: dict[str, Any] = {"shuffle": shuffle} if isinstance(shuffle, nn.Module) else {}
    norm = nn.BatchNorm2d(2)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(shuffle(m.conv(x)))
        return (y * m.factor if factor else y).relu()

    parts |= {"factor": nn.Parameter(torch.tensor([0.5, 3.0]).reshape(2, 1, 1))} if factor else {}
    proven(Net(forward, conv=nn.Conv2d(4, 8, 3, padding=1), norm=norm, **parts), torch.randn(2, CHANNELS, 9, 8))


def test_a_norm_of_positions_does_not_pass_a_pixel_unshuffle() -> None:
    model = ready(
        Net(lambda m, x: m.norm(F.pixel_unshuffle(m.conv(x), 2)), conv=nn.Conv2d(4, 2, 1), norm=nn.BatchNorm2d(8))
    )
    fused, x = fuse_fx(model, torch.randn(2, CHANNELS, 4, 6)), torch.randn(1, CHANNELS, 6, 4)
    assert report(fused).after.batchnorm == 1
    assert relative_error(fused(x), model(x)) < 1e-5


def test_resizes_of_several_kinds_stay_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return F.interpolate(y, size=(5, 4), mode="area") + F.interpolate(y, size=(5, 4), mode="nearest-exact")

    model = ready(Net(forward, conv=nn.Conv2d(4, 4, 3)))
    fused, x = fuse_fx(model, torch.randn(2, CHANNELS, 9, 8)), torch.randn(1, CHANNELS, 8, 11)
    assert relative_error(fused(x), model(x)) < 1e-5


@pytest.mark.parametrize("size", [(3, 4), 9])
def test_batchnorm_after_a_pooling_to_a_size(size: Any) -> None:
    parts: dict[str, Any] = {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4), "pool": nn.AdaptiveAvgPool2d(size)}
    proven(Net(lambda m, x: m.norm(m.pool(m.conv(x))).relu(), **parts), torch.randn(2, CHANNELS, 9, 8))


def test_factors_that_are_whole_numbers() -> None:
    for factor in (torch.tensor([1, 2, 0, 3]).reshape(4, 1, 1), torch.tensor(3), torch.tensor([True, False] * 2)):
        shaped = factor.reshape(-1, 1, 1) if factor.ndim == 1 else factor
        model = Net(lambda m, x: m.norm(m.conv(x) * m.factor), conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))
        model.register_buffer("factor", shaped)
        proven(model, torch.randn(2, CHANNELS, 9, 8))
