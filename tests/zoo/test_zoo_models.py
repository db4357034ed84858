"""The seven networks: size, shape, training, tracing."""

import pytest

pytest.importorskip("torch")

import torch
from torch import fx, nn

from fastvit_zoo import CheckpointError, create_model, list_models, load_checkpoint
from fastvit_zoo.blocks import Attention, ScaledResidual
from reparamc import fuse_fx
from reparamc.testing import randomize_batchnorm, randomize_layer_scales

# Parameters and entries of the state dict, in training form and deployed.
SIZES = {
    "fastvit_t8": (4_026_232, 462, 3_996_040, 156),
    "fastvit_t12": (7_553_704, 530, 7_508_840, 182),
    "fastvit_s12": (9_473_576, 530, 9_428_712, 182),
    "fastvit_sa12": (11_580_968, 504, 11_545_320, 198),
    "fastvit_sa24": (21_554_216, 884, 21_501_288, 368),
    "fastvit_sa36": (31_527_464, 1264, 31_457_256, 538),
    "fastvit_ma36": (44_068_004, 1264, 43_984_632, 538),
}


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        training, deployed = create_model(name), create_model(name, deployed=True)
    sizes = [
        size
        for model in (training, deployed)
        for size in (sum(p.numel() for p in model.parameters()), len(model.state_dict()))
    ]
    assert tuple(sizes) == SIZES[name]


def test_names() -> None:
    assert list_models() == list(SIZES)
    with pytest.raises(ValueError, match=r"unknown model 'fastvit_t9'; known models: .*t8, .*fastvit_ma36"):
        create_model("fastvit_t9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_classes": -1}, "num_classes"), ({"drop_path_rate": 1.0}, "drop_path_rate")],
)
def test_impossible_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("fastvit_t8", **arguments)  # pyright: ignore


def test_attention_needs_whole_heads() -> None:
    with pytest.raises(ValueError, match="multiple of 32 channels, got 48"):
        Attention(48)


@pytest.mark.parametrize("deployed", [False, True])
def test_output_shapes(deployed: bool) -> None:
    with torch.device("meta"):
        model = create_model("fastvit_sa12", num_classes=10, in_channels=4, deployed=deployed).eval()
        headless = create_model("fastvit_sa12", num_classes=0, deployed=deployed).eval()
        image = torch.empty(2, 4, 97, 70)
        assert model(image).shape == (2, 10)
        assert headless(image[:, :3]).shape == (2, 1024)
        maps = [tuple(each.shape) for each in model.feature_maps(image)]
    assert maps == [(2, 64, 25, 18), (2, 128, 13, 9), (2, 256, 7, 5), (2, 512, 4, 3)]


def test_initialization() -> None:
    model = create_model("fastvit_sa12")
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    small = [
        "head.weight",
        "stages.3.blocks.1.token_mixer.branch.qkv.weight",
        "stages.3.blocks.1.token_mixer.branch.proj.weight",
        "stages.0.blocks.1.ffn.branch.conv.conv.weight",
        "stages.0.blocks.1.ffn.branch.fc1.weight",
        "stages.0.blocks.1.ffn.branch.fc2.weight",
    ]
    for name in small:
        assert values[name].std().item() == pytest.approx(0.02, rel=0.05), name
    assert values["stages.2.downsample.1.conv.branches.0.conv.weight"].std() > 0.03  # PyTorch's default
    for name in ("head", "stages.3.blocks.1.token_mixer.branch.proj", "stages.0.blocks.1.ffn.branch.fc1"):
        assert not values[f"{name}.bias"].any()


@pytest.mark.parametrize(("name", "init"), [("fastvit_t8", 1e-5), ("fastvit_sa36", 1e-6)])
def test_layer_scale_init(name: str, init: float) -> None:
    for model, expected in (
        (create_model(name), init),
        (create_model("fastvit_t8", layer_scale_init=0.25), 0.25),
    ):
        scales = [p for key, p in model.named_parameters() if key.endswith("layer_scale")]
        assert len(scales) == 2 * sum(model.config.depths)
        for scale in scales:
            assert torch.equal(scale, torch.full_like(scale, expected))


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, layer_scale_init=0.5).train()
    nn.functional.cross_entropy(model(batch(4, 3, 65, 70)), torch.arange(4)).backward()
    dead = [
        key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert dead == []


def test_drop_path_schedule() -> None:
    with torch.device("meta"):
        model = create_model("fastvit_sa12", drop_path_rate=0.22)
    residuals = [(key, module) for key, module in model.named_modules() if isinstance(module, ScaledResidual)]
    by_block: dict[str, set[float]] = {}
    for key, module in residuals:
        by_block.setdefault(key.rpartition(".")[0], set()).add(module.drop_path)
    assert all(len(rates) == 1 for rates in by_block.values())
    assert [rates.pop() for rates in by_block.values()] == pytest.approx([0.02 * i for i in range(12)])
    assert len(residuals) == 12 + 2  # every feed-forward network, and the attention of the last stage


def test_drop_path_is_per_sample_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = ScaledResidual(nn.Identity(), 2, layer_scale_init=1.0, drop_path=0.25)
    x = torch.ones(4000, 2, 3, 5)
    out = block(x)
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    dropped = (out[:, 0, 0, 0] == 1).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)
    assert out.mean().item() == pytest.approx(2.0, abs=0.05)
    assert torch.equal(block.eval()(x), 2 * x)


def test_drop_path_acts_only_in_training() -> None:
    image = batch(2, 3, 64, 64)
    model = create_model("fastvit_t8", drop_path_rate=0.9, layer_scale_init=1.0).train()
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_symbolic_trace(name: str, deployed: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = randomize_layer_scales(create_model(name, num_classes=7, deployed=deployed))
    model = randomize_batchnorm(model, example_inputs=batch(4, 3, 64, 64)).train(training)
    traced = fx.symbolic_trace(model)
    image = batch(2, 3, 65, 97)
    with torch.no_grad():
        assert torch.equal(traced(image), model(image))
    targets = {str(node.target) for node in traced.graph.nodes}
    assert not any("dropout" in target or "new_ones" in target for target in targets)
    leaves = [type(traced.get_submodule(str(n.target))) for n in traced.graph.nodes if n.op == "call_module"]
    norms = {"fastvit_t8": (70, 10), "fastvit_sa12": (74, 14)}[name]
    assert leaves.count(nn.BatchNorm2d) == norms[deployed]


def test_symbolic_trace_keeps_drop_path_while_training() -> None:
    model = create_model("fastvit_sa12", drop_path_rate=0.5)
    for training, expected in ((True, 13), (False, 0)):
        nodes = fx.symbolic_trace(model.train(training)).graph.nodes
        assert sum(node.target is nn.functional.dropout for node in nodes) == expected


# As a backbone


@pytest.mark.parametrize("deployed", [False, True])
def test_backbone_gives_the_maps_of_the_stages(deployed: bool) -> None:
    torch.manual_seed(0)
    whole = create_model("fastvit_sa12", deployed=deployed).eval()
    randomize_batchnorm(randomize_layer_scales(whole))
    for wanted in [(0, 1, 2, 3), (1, 3), (2,), (-1, 0)]:
        backbone = create_model("fastvit_sa12", deployed=deployed, features_only=True, out_indices=wanted).eval()
        load_checkpoint(backbone, whole.state_dict())
        image = batch(2, 3, 97, 70)
        with torch.no_grad():
            maps, expected = backbone(image), whole.feature_maps(image)
        assert len(maps) == len(backbone.feature_info) == len(wanted)
        for found, i in zip(maps, wanted, strict=True):
            assert torch.equal(found, expected[i])
        assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
        assert [-(-97 // n) for n in backbone.feature_info.reduction()] == [m.shape[2] for m in maps]
        assert all(backbone.get_submodule(name) for name in backbone.feature_info.module_name())


def test_backbone_refuses_stages_that_do_not_exist() -> None:
    for wanted in [(), (4,), (-5,)]:
        with pytest.raises(ValueError, match="out_indices are stages from 0 to 3"):
            create_model("fastvit_t8", features_only=True, out_indices=wanted)


def test_backbone_takes_no_weights_of_another_variant() -> None:
    backbone = create_model("fastvit_t8", features_only=True, out_indices=(0,))
    with pytest.raises(CheckpointError, match="of another shape"):
        load_checkpoint(backbone, create_model("fastvit_t12").state_dict())


def test_backbone_is_fused() -> None:
    torch.manual_seed(0)
    backbone = randomize_batchnorm(
        randomize_layer_scales(create_model("fastvit_t8", features_only=True, out_indices=(1, 3)).eval())
    )
    image = batch(1, 3, 65, 64)
    fused = fuse_fx(backbone, image)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        for found, expected in zip(fused(image), backbone(image), strict=True):
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("pool", "shape"), [("avg", (1, 768)), ("max", (1, 768)), ("", (1, 768, 3, 2))])
def test_global_pool(pool: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model("fastvit_t8", num_classes=0, global_pool=pool, in_chans=2).eval()
        assert model(torch.empty(1, 2, 96, 64)).shape == shape


def test_impossible_pools() -> None:
    with pytest.raises(ValueError, match="global_pool is one of 'avg', 'max', '', not 'mean'"):
        create_model("fastvit_t8", global_pool="mean")
    with pytest.raises(ValueError, match="a classifier needs pooling"):
        create_model("fastvit_t8", global_pool="")
