"""The same weights give the same outputs as in timm, an independent implementation."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import reparamc
from fastvit_zoo import create_model, list_models, load_checkpoint
from fastvit_zoo.model import FastViT
from reparamc.testing import randomize_batchnorm, randomize_layer_scales


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def randomized_peer(timm: ModuleType, name: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """timm's model with parameters of ordinary size, and images to try it on."""
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=20).eval()
    nn.init.normal_(peer.head.fc.weight, std=0.1)
    nn.init.zeros_(peer.head.fc.bias)  # a large constant would hide differences
    randomize_layer_scales(peer)
    randomize_batchnorm(peer, example_inputs=torch.randn(4, 3, 64, 64))
    return peer.to(dtype), torch.randn(2, 3, 65, 42, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [(name, torch.float32, 1e-4) for name in list_models()]
    + [("fastvit_t8", torch.float64, 1e-9), ("fastvit_sa12", torch.float64, 1e-9)],
)
def test_outputs_equal(timm: ModuleType, name: str, dtype: torch.dtype, tolerance: float) -> None:
    from timm.utils.model import reparameterize_model

    peer, image = randomized_peer(timm, name, dtype)
    model = loaded(name, peer, dtype)
    fused_peer = reparameterize_model(peer)
    deployed = loaded(name, fused_peer, dtype, deployed=True)
    with torch.no_grad():
        expected = peer(image)
        assert difference(model(image), expected) < tolerance
        assert difference(deployed(image), fused_peer(image)) < tolerance
        assert difference(deployed(image), expected) < tolerance
        for ours, theirs in zip(model.feature_maps(image), peer_maps(peer, image), strict=True):
            assert difference(ours, theirs) < tolerance
        # The two images must not look alike, or the comparison proves little.
        assert difference(expected[:1], expected[1:]) > 0.05


def loaded(name: str, peer: nn.Module, dtype: torch.dtype, deployed: bool = False) -> FastViT:
    """A model of the zoo with the weights of ``peer``, and no others: to draw some would take most of the time."""
    with torch.device("meta"):
        model = create_model(name, num_classes=20, deployed=deployed).to(dtype).eval()
    for tensor in model.to_empty(device="cpu").state_dict().values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    load_checkpoint(model, peer.state_dict())
    return model


def peer_maps(peer: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    return peer.forward_intermediates(image, intermediates_only=True)  # pyright: ignore[reportCallIssue]


def test_timm_creates_the_models_of_the_zoo(timm: ModuleType) -> None:
    import fastvit_zoo.timm_models  # noqa: F401  # pyright: ignore[reportUnusedImport]

    assert set(timm.list_models("fastvit_zoo_*")) == {n.replace("fastvit_", "fastvit_zoo_") for n in list_models()}
    with torch.device("meta"):
        model = timm.create_model("fastvit_zoo_t8", num_classes=7, in_chans=4).eval()
        assert model(torch.empty(2, 4, 64, 64)).shape == (2, 7)
        backbone = timm.create_model("fastvit_zoo_sa12", features_only=True, out_indices=(1, 2)).eval()
        assert backbone.feature_info.channels() == [128, 256]
        assert [m.shape[1] for m in backbone(torch.empty(1, 3, 64, 64))] == [128, 256]
    with pytest.raises(ValueError, match="no weights to download"):
        timm.create_model("fastvit_zoo_t8", pretrained=True)


def maps_agree(network: Any, maps: Callable[[Any], Sequence[torch.Tensor]]) -> None:
    """A network of another library on a backbone of the zoo is fused whole, and computes the same."""
    image = torch.randn(2, 3, 64, 64)
    fused = reparamc.fuse_fx(randomize_batchnorm(network.eval(), 0, image), image)
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for actual, expected in zip(maps(fused(image)), maps(network(image)), strict=True):
            assert difference(actual, expected) < 1e-4


def test_a_feature_extractor_of_torchvision(timm: ModuleType) -> None:
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = create_model("fastvit_digits").eval()
    nodes = {f"stages.{i}": str(i) for i in range(4)}
    maps_agree(feature_extraction.create_feature_extractor(model, nodes), lambda found: list(found.values()))


def test_a_backbone_of_transformers(timm: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    import fastvit_zoo.timm_models  # noqa: F401  # pyright: ignore[reportUnusedImport]

    config = transformers.TimmBackboneConfig(
        backbone="fastvit_zoo_t8", use_pretrained_backbone=False, out_indices=(1, 3)
    )
    backbone = transformers.AutoBackbone.from_config(config)
    assert backbone.channels == [96, 384]
    maps_agree(backbone, lambda found: found.feature_maps)


def test_an_encoder_of_segmentation_models(timm: ModuleType) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    import fastvit_zoo.timm_models  # noqa: F401  # pyright: ignore[reportUnusedImport]

    network = smp.FPN("tu-fastvit_zoo_t8", encoder_weights=None, classes=3)
    maps_agree(network, lambda found: [found])
