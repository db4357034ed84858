"""Random BatchNorms and layer scales."""

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from reparamc.errors import InputTypeError

pytest.importorskip("torch")

import torch
from torch import nn

from reparamc.testing import randomize_batchnorm, randomize_layer_scales


def network() -> Any:
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
    model: Any = randomize_batchnorm(network(), example_inputs=IMAGES).eval()
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
    norm: Any = randomize_batchnorm(nn.BatchNorm2d(1000))
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
    norm: Any = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm)
    randomize_batchnorm(model, example_inputs=IMAGES)
    assert (norm.running_mean - 5).abs().max() < 0.5


def test_batchnorm_subclasses(timm: object) -> None:
    from timm.layers.norm_act import BatchNormAct2d

    model: Any = nn.Sequential(BatchNormAct2d(3))
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


# ONNX


def onnx_network() -> onnx.ModelProto:
    """conv, BatchNorm, relu, a BatchNorm beside a shared one used twice; fresh parameters are stored once."""
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    weight = np.random.default_rng(0).standard_normal((3, 3, 3, 3)).astype(np.float32)
    tensors = [numpy_helper.from_array(a, n) for n, a in {"w": weight, "one": ones, "zero": zeros, "g": ones}.items()]
    fresh, shared = ["one", "zero", "zero", "one"], ["g", "zero", "zero", "one"]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *fresh], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("BatchNormalization", ["r", *shared], ["s"]),
        helper.make_node("BatchNormalization", ["s", *shared], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "net", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outputs(model: onnx.ModelProto, *names: str) -> list[np.ndarray]:
    """Values inside ``model``, on the images."""
    values: Any = ReferenceEvaluator(model).run(None, {"x": IMAGES.numpy()}, intermediate=True)
    return [values[name] for name in names]


def test_onnx_statistics_fit_what_each_layer_sees() -> None:
    original = onnx_network()
    before = original.SerializeToString()
    model = randomize_batchnorm(original, 3, IMAGES)
    assert original.SerializeToString() == before
    onnx.checker.check_model(model, full_check=True)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    norms = [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    assert list(norms[1].input[1:]) == list(norms[2].input[1:]), "one layer, used twice"
    assert not set(norms[0].input[1:]) & set(norms[1].input[1:])
    assert set(arrays) == {"w", *norms[0].input[1:], *norms[1].input[1:]}
    for norm, x in zip(norms[:2], outputs(model, "c", "r"), strict=True):
        scale, bias, mean, var = (arrays[n] for n in norm.input[1:])
        assert (abs(mean - x.mean((0, 2, 3))) <= 0.101 * x.std((0, 2, 3))).all()
        assert (abs(var / x.var((0, 2, 3)) - 1) < 0.26).all()
        assert 0.5 <= abs(scale).min() <= abs(scale).max() <= 1.5
        assert bias.std() > 0.01
    assert randomize_batchnorm(original, 3, {"x": IMAGES.numpy()}).SerializeToString() == model.SerializeToString()
    assert randomize_batchnorm(original, 4, IMAGES).SerializeToString() != model.SerializeToString()


def test_onnx_without_inputs_and_with_computed_parameters() -> None:
    model = onnx_network()
    model.graph.node[3].input[1] = "computed"
    model.graph.node.insert(0, helper.make_node("Neg", ["g"], ["computed"]))
    random = randomize_batchnorm(model)
    arrays = {t.name: numpy_helper.to_array(t) for t in random.graph.initializer}
    assert list(random.graph.node[4].input) == list(model.graph.node[4].input)
    assert 0 < abs(arrays[random.graph.node[2].input[3]]).max() <= 0.1
    onnx.checker.check_model(random, full_check=True)


def test_what_has_no_batchnorm_is_refused() -> None:
    with pytest.raises(InputTypeError, match="not str"):
        randomize_batchnorm("model.onnx")  # pyright: ignore[reportArgumentType]
