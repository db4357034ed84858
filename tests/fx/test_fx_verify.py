"""Verification catches wrong rules and wrong splices, and nothing else."""

import pytest

pytest.importorskip("torch")

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fx_checks import CHANNELS, Net, compared, conv_bn, counts, images, ready, relative_error, report, run
from torch import Tensor, nn

from reparamc import fuse_fx
from reparamc.algebra.arrays import values
from reparamc.algebra.expr import BatchNorm, Conv, Expr
from reparamc.algebra.rewrite import Pass
from reparamc.certificate.proof import Certificate
from reparamc.equivalence.end_to_end import Region
from reparamc.errors import VerificationError
from reparamc.fx.emit import Emitter
from reparamc.fx.fuse import full_precision
from reparamc.fx.regions_alone import run_alone


def forgets_the_mean(e: Expr) -> Expr | None:
    if not (isinstance(e, BatchNorm) and isinstance(e.x, Conv)):
        return None
    scale = e.gamma / np.sqrt(e.var + e.eps)
    weight = e.x.weight * scale.reshape(-1, *[1] * (e.x.weight.ndim - 1))
    return dataclasses.replace(e.x, weight=weight, bias=e.x.bias_or_zero * scale + e.beta)


WRONG = (Pass("wrong-folding", "", "", (forgets_the_mean,)),)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return ready(nn.Sequential(conv_bn(), nn.ReLU(), conv_bn(1)))


@pytest.fixture
def x() -> torch.Tensor:
    return images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]


@pytest.mark.parametrize("verify", [True, "region", "full"])
def test_wrong_rule(model: nn.Module, verify: bool | str) -> None:
    with pytest.warns(RuntimeWarning, match=r"region '0\.1' and 1 more failed.*after wrong-folding"):
        fused = fuse_fx(model, pass_table=WRONG, verify=verify)
    assert [(f.where, f.check) for f in report(fused).failed] == [("0.1", "rewrite"), ("2.1", "rewrite")]
    x = images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]
    assert counts(fused) == (2, 2)
    assert torch.equal(fused(x), model(x))


def test_the_rounding_of_gpus_is_no_false_alarm(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.functional.conv2d

    def rounded(t: Tensor) -> Tensor:
        if t.dtype != torch.float32 or not torch.backends.cudnn.allow_tf32:
            return t
        return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def conv2d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return plain(rounded(x), rounded(weight), *rest)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    model = ready(nn.Sequential(conv_bn(), nn.ReLU(), conv_bn(1)))
    fused = fuse_fx(model, x, verify="full")
    assert torch.backends.cudnn.allow_tf32
    assert 1e-6 < (fused(x) - model(x)).abs().max() / model(x).abs().max() < 1e-2


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="before torch 2.9")
@pytest.mark.parametrize("setting", ["tf32", "ieee", "none"])
def test_full_precision_leaves_every_setting_as_it_was(setting: str) -> None:
    backends: Any = torch.backends
    owners = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul
    before = [owner.fp32_precision for owner in owners]
    backends.cudnn.conv.fp32_precision = setting
    changed = [owner.fp32_precision for owner in owners]
    try:
        with full_precision():
            assert {owner.fp32_precision for owner in owners} == {"ieee"}
        assert [owner.fp32_precision for owner in owners] == changed
    finally:
        backends.cudnn.conv.fp32_precision = before[0]
    assert [owner.fp32_precision for owner in owners] == before
    assert backends.cudnn.allow_tf32


def test_wrong_rule_passes_when_nothing_is_verified(model: nn.Module) -> None:
    assert counts(fuse_fx(model, pass_table=WRONG, verify=False)) == (2, 0)


def scaled(factor: float) -> Callable[[Any], Any]:
    return lambda original: lambda self, a: original(self, a * np.where(np.arange(a.size).reshape(a.shape), 1, factor))


def forgotten_bias(original: Any) -> Any:
    return lambda self, e: original(self, dataclasses.replace(e, bias=None))


def wrong_padding(original: Any) -> Any:
    return lambda self, e: original(self, dataclasses.replace(e, offset=tuple(o + 1 for o in e.offset)))


def other_size(original: Any) -> Any:
    return lambda self, e: original(self, dataclasses.replace(e, delta=tuple(d + 2 for d in e.delta)))


def not_finite(original: Any) -> Any:
    return lambda self, a: original(self, a) * float("nan")


FAULTS = {
    "one weight doubled": ("_tensor", scaled(2.0)),
    "one weight lost": ("_tensor", scaled(0.0)),
    "bias lost": ("_conv", forgotten_bias),
    "kernel shifted": ("_conv", wrong_padding),
    "other size": ("_conv", other_size),
    "not finite": ("_tensor", not_finite),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_splice(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, fault: str, dtype: torch.dtype
) -> None:
    if (fault, dtype) == ("one weight doubled", torch.bfloat16):
        pytest.skip("it is within the rounding of bfloat16")
    method, wrap = FAULTS[fault]
    monkeypatch.setattr(Emitter, method, wrap(getattr(Emitter, method)))
    with pytest.warns(RuntimeWarning, match="proven to differ"):
        certified = fuse_fx(model.to(dtype), x.to(dtype))
    assert certified.meta["reparamc"].certificate.rolled_back >= 1
    monkeypatch.setattr("reparamc.fx.host.certify_fx", lambda *_: Certificate((), 0, 0.0))
    with pytest.raises(VerificationError, match=r"region '[02]\.1' of the fused model") as raised:
        fuse_fx(model.to(dtype), x.to(dtype))
    assert raised.value.where == "0.1" or dtype == torch.bfloat16  # where a small bias of the first does not show
    assert raised.value.before
    assert "\n" not in str(raised.value)
    fuse_fx(model, x.to(dtype), verify="region")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_correct_networks_are_never_refused(dtype: torch.dtype) -> None:
    """Deep networks amplify rounding; that is no fault."""
    for seed in range(3):
        torch.manual_seed(seed)
        blocks = [nn.Sequential(conv_bn(), nn.ReLU()) for _ in range(20)]
        model = ready(nn.Sequential(*blocks, conv_bn()), seed).to(dtype)
        fused = fuse_fx(model, torch.randn(1, CHANNELS, 8, 8, dtype=dtype))
        assert counts(fused) == (21, 0)


def test_outputs_that_are_not_finite_are_compared() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = conv_bn()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.relu(self.block(x)) * 0 - 1)

    fuse_fx(ready(Log()), torch.ones(1, CHANNELS, 5, 6))


class Sided(nn.Module):
    """Its copy is wrong for sizes, or batches, other than the example's."""

    def __init__(self, **wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        if self.wrong.get("batch", x.shape[0]) != x.shape[0]:
            y = torch.cat([y[:-1], y[:1]])
        if self.wrong.get("side", x.shape[-1] % 2) != x.shape[-1] % 2:
            y = torch.roll(y, 1, -1)
        if self.wrong.get("length", x.shape[1] % 2) != x.shape[1] % 2:
            y = y.flip(1)
        return y


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        ((1, 3, 8, 8), {"batch": 1}),
        ((1, 3, 8, 8), {"side": 0}),
        ((2, 3, 225, 225), {"side": 1}),
        ((2, 6, 8), {"length": 0}),
        ((1, 8), {"batch": 1}),
    ],
)
def test_a_copy_that_is_wrong_at_other_sizes_alone(shape: tuple[int, ...], wrong: dict[str, int]) -> None:
    x = torch.randn(shape)
    with pytest.raises(VerificationError, match="differs"):
        compared(Sided().eval(), Sided(**wrong).eval(), x)
    assert compared(Sided().eval(), Sided(**wrong).eval(), x, resize=False)


class Picky(nn.Module):
    """Takes the sizes that it was made for, and three indices."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        if self.sizes and tuple(x.shape) != self.sizes:
            raise ValueError("another size")
        assert int(index.max()) < 3
        return x[:, index[0]]


def test_a_model_that_takes_no_other_size_is_compared_at_its_own() -> None:
    x, index = torch.randn(2, 3, 8, 8), torch.tensor([[0, 2]])
    for model in (Picky(2, 3, 8, 8), Picky()):
        (found,) = compared(model.eval(), model, x, index)
        assert found.max_abs == 0


class Cancelling(nn.Module):
    """A bias that a BatchNorm takes away again: float32 keeps little of what is between them."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        nn.init.constant_(self.conv.bias, large)  # type: ignore[arg-type]
        nn.init.constant_(self.norm.running_mean, large)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.float())).relu()


@pytest.mark.parametrize("large", [1e2, 1e4, 1e6])
def test_an_original_that_cancels_is_worse_than_the_result(large: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Cancelling(large).eval(), torch.randn(2, CHANNELS, 24, 24)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    torch.testing.assert_close(
        fused(x), model.double().conv(x.double()).sub(large).relu().float(), rtol=1e-3, atol=1e-4
    )
    monkeypatch.setattr("reparamc.fx.host.certify_fx", lambda *_: Certificate((), 0, 0.0))
    tensor = Emitter._tensor

    def doubled(self: Emitter, a: Any) -> Any:
        a = values(a)
        return tensor(self, np.where(np.arange(a.size).reshape(a.shape) == 20, 2 * a, a))

    monkeypatch.setattr(Emitter, "_tensor", doubled)
    with pytest.raises(VerificationError, match=r"'norm'|'output'"):  # one weight is doubled
        fuse_fx(model.float(), x)


def test_regions_in_float64_are_run_by_the_operators_of_the_original() -> None:
    model, x = Cancelling(1e6).eval(), torch.randn(2, CHANNELS, 9, 8)
    traced, region = torch.fx.symbolic_trace(model), Region("norm", ("float_1",), "norm", "", "")
    seen = run_alone(traced, traced, [region], {"norm": "norm"}, [x])
    assert seen is not None
    assert seen.exact is not None
    found = seen.exact(region)
    assert traced.get_buffer("norm.running_mean").dtype == torch.float32
    wide = model.double()
    np.testing.assert_allclose(found, wide.norm(wide.conv(x.double())).detach().numpy(), rtol=1e-9, atol=1e-9)


CHOSEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer": lambda m, y: y[:, m.index],
    "negative positions": lambda m, y: y[:, m.index - CHANNELS].relu(),
    "numbers": lambda m, y: y[:, [2, 0, 1]],
    "a mask": lambda m, y: y[:, torch.tensor([True, False, True, True])],
    "the last axis": lambda m, y: y[..., m.index],
    "twice": lambda m, y: y[:, m.index][:, [1, 1]].relu(),
    "a row of another axis": lambda m, y: y[:, m.index, 0],
    "two axes": lambda m, y: y[:, m.index, m.index],
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_channels_that_an_index_chooses_are_proven(name: str, examples: bool) -> None:
    model, x = ready(Net(lambda m, y: CHOSEN[name](m, m.a(y)), a=conv_bn())), torch.randn(2, CHANNELS, 7, 6)
    model.float().register_buffer("index", torch.tensor([3, 0, 0]))
    fused = fuse_fx(model, *((x,) if examples else ()), verify="region")
    assert relative_error(run(fused, x), run(model, x)) < 1e-5
    certificate = report(fused).certificate
    assert certificate is not None
    assert (counts(fused), certificate.undecided, certificate.rolled_back) == ((1, 0), (), 0)
