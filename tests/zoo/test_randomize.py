"""Random BatchNorms and layer scales."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from reparamc.testing import randomize_batchnorm, randomize_layer_scales


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.BatchNorm2d(64),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.BatchNorm2d(64),
    )


IMAGES = 5 + 3 * torch.randn(16, 3, 17, 13, generator=torch.Generator().manual_seed(2))


def test_import_needs_no_torch() -> None:
    program = "import sys, reparamc.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_statistics_fit_in_execution_order() -> None:
    model = randomize_batchnorm(network(), example_inputs=IMAGES).eval()
    seen: list[torch.Tensor] = []
    for norm in (model[1], model[5]):
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(IMAGES)
    for norm, x in zip((model[1], model[5]), seen, strict=True):
        std = x.std((0, 2, 3))
        assert ((norm.running_mean - x.mean((0, 2, 3))).abs() <= 0.101 * std).all()
        ratio = norm.running_var / std.square()
        assert ratio.min() > 0.79
        assert ratio.max() < 1.26
        assert ratio.std() > 0.05


def test_parameters_have_spread() -> None:
    norm = randomize_batchnorm(nn.BatchNorm2d(1000))
    assert norm.weight.abs().min() >= 0.5
    assert norm.weight.abs().max() <= 1.5
    assert 0.1 < (norm.weight < 0).float().mean() < 0.3
    assert norm.bias.std() > 0.15
    assert norm.running_mean.std() > 0.05
    assert norm.running_var.std() > 0.1
    assert norm.running_var.min() > 0.5


def test_seed_decides_and_nothing_else_changes() -> None:
    model, same, other = network(), network(), network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    randomize_layer_scales(randomize_batchnorm(model, seed=1, example_inputs=(IMAGES,)))
    assert torch.equal(torch.rand(3), expected_draw)
    assert [module.training for module in model.modules()] == modes
    assert not model[1]._forward_pre_hooks
    randomize_batchnorm(same, seed=1, example_inputs=IMAGES)
    randomize_batchnorm(other, seed=2, example_inputs=IMAGES)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(model[5].running_mean, other[5].running_mean)
    assert model[1].num_batches_tracked == 0


def test_training_mode_returns_after_an_error() -> None:
    model = network().train()
    with pytest.raises(RuntimeError):
        randomize_batchnorm(model, example_inputs=torch.zeros(1, 2, 9, 9))
    assert all(module.training for module in model.modules())
    assert not model[1]._forward_pre_hooks


def test_layers_without_input_statistics_or_parameters() -> None:
    plain = randomize_batchnorm(nn.BatchNorm1d(4, affine=False))
    assert plain.running_mean is not None
    assert plain.running_mean.any()
    assert randomize_batchnorm(nn.BatchNorm2d(4, track_running_stats=False)).bias.any()


def test_constant_channels_keep_a_finite_gain() -> None:
    norm = randomize_batchnorm(nn.BatchNorm2d(3), example_inputs=torch.full((2, 3, 4, 4), 100.0)).eval()
    with torch.no_grad():
        assert norm(torch.full((1, 3, 1, 1), 100.0)).abs().max() < 10


def test_one_norm_used_twice_is_set_once() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm)
    randomize_batchnorm(model, example_inputs=IMAGES)
    assert (norm.running_mean - 5).abs().max() < 0.5


def test_batchnorm_subclasses(timm: object) -> None:
    from timm.layers.norm_act import BatchNormAct2d

    model = nn.Sequential(BatchNormAct2d(3))
    randomize_batchnorm(model, example_inputs=IMAGES)
    assert (model[0].running_mean - 5).abs().max() < 0.5


def test_layer_scales_by_name_and_by_class() -> None:
    class LayerScale2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((500, 1, 1), 1e-5))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer_scale_1 = nn.Parameter(torch.full((500,), 1e-5))
            self.gamma = nn.Parameter(torch.full((500,), 1e-5))
            self.scale = LayerScale2d()
            self.gammas = nn.Parameter(torch.ones(500))
            self.norm = nn.LayerNorm(500)

    block = randomize_layer_scales(Block())
    for scale in (block.layer_scale_1, block.gamma, block.scale.factor):
        assert scale.std().item() == pytest.approx(0.5, abs=0.05)
    for untouched in (block.gammas, block.norm.weight):
        assert torch.equal(untouched, torch.ones(500))
