"""Whole networks: the seven of the zoo, and five of timm."""

import pytest

pytest.importorskip("torch")

import copy
from types import ModuleType
from typing import Any

import torch
from fx_checks import counts, relative_error, report, run
from torch import fx, nn

from fastvit_zoo import create_model, list_models
from reparamc import fuse_fx
from reparamc.testing import randomize_batchnorm, randomize_layer_scales

ZOO = {
    "fastvit_t8": 52,
    "fastvit_t12": 60,
    "fastvit_s12": 60,
    "fastvit_sa12": 59,
    "fastvit_sa24": 105,
    "fastvit_sa36": 151,
    "fastvit_ma36": 151,
}
LARGER = ("fastvit_sa24", "fastvit_sa36")
"""SA12 with more blocks, or wider ones: only operators are counted."""
TIMM = {"fastvit_t8": 52, "fastvit_sa12": 59, "mobileone_s0": 43, "repvgg_a0": 22, "repvit_m0_9": 103}


def randomized(model: nn.Module) -> nn.Module:
    """Parameters of ordinary size, and statistics that fit them."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return randomize_batchnorm(randomize_layer_scales(model.eval()), example_inputs=images)


def batch(number: int, height: int, width: int) -> torch.Tensor:
    """Images in float64 that float32 can hold."""
    generator = torch.Generator().manual_seed(height)
    return torch.randn(number, 3, height, width, generator=generator).double()


def convolutions(fused: fx.GraphModule) -> tuple[int, int]:
    after = report(fused).after
    assert counts(fused)[1] == after.batchnorm
    return after.conv, after.batchnorm


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def check(model: Any, expected: int) -> None:
    """Counts, equality in float64 without examples, and with them in float32 no more than twice the rounding."""
    double = copy.deepcopy(model).double()
    images = [batch(3, 48, 41), batch(1, 33, 40)]
    exact = [run(double, x) for x in images]
    # Two images must not look alike, or the comparison proves little.
    assert relative_error(exact[0][:1], exact[0][1:2]) > 0.01
    fused = fuse_fx(double, verify=False)
    assert convolutions(fused) == (expected, 0)
    for x, wanted in zip(images, exact, strict=True):
        assert relative_error(run(fused, x), wanted) < 1e-9

    single = fuse_fx(model, images[1].float())
    assert convolutions(single) == (expected, 0)
    errors = [
        torch.cat([(run(network, x.float()) - wanted).flatten() for x, wanted in zip(images, exact, strict=True)])
        for network in (model, single)
    ]
    assert rms(errors[1]) <= 2 * rms(errors[0])


def check_quickly(model: Any, expected: int) -> None:
    """Counts, and equality to float32; for networks of the same blocks as another that is checked."""
    fused = fuse_fx(model, verify=False)
    assert convolutions(fused) == (expected, 0)
    for x in (batch(2, 48, 41).float(), batch(1, 33, 40).float()):
        assert relative_error(run(fused, x), run(model, x)) < 1e-4


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    if name in LARGER:
        assert convolutions(fuse_fx(create_model(name).eval(), verify=False)) == (ZOO[name], 0)
        return
    torch.manual_seed(0)
    model = randomized(create_model(name, num_classes=40))
    nn.init.normal_(model.get_parameter("head.weight"), std=0.1)
    (check if name == "fastvit_sa12" else check_quickly)(model, ZOO[name])


def test_all_variants_are_tested() -> None:
    assert list_models() == list(ZOO)


@pytest.mark.parametrize("name", TIMM)
def test_timm(timm: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=40)
    for name_of, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "head" in name_of:
            nn.init.normal_(layer.weight, std=0.1)
    (check_quickly if name == "fastvit_sa12" else check)(randomized(model), TIMM[name])


def test_zoo_in_half_precision() -> None:
    torch.manual_seed(0)
    model = randomized(create_model("fastvit_t8", num_classes=40)).to(torch.bfloat16)
    x = batch(2, 64, 57).to(torch.bfloat16)
    fused = fuse_fx(model, x)
    assert convolutions(fused) == (52, 0)
    exact = run(copy.deepcopy(model).double(), x.double())
    assert rms(run(fused, x).double() - exact) <= 2 * rms(run(model, x).double() - exact)
