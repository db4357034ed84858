"""Weights named by the authors, by timm and by the zoo, and the errors about those that do not fit."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from fastvit_zoo import CheckpointError, FastViT, create_model, load_checkpoint

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def published_names(model: FastViT) -> Iterator[str]:
    """The names in the authors' files, spelt out independently of the translation, in the zoo's order."""
    fused, attention = model.deployed, model.config.attention

    def norm(prefix: str) -> list[str]:
        return [f"{prefix}.{entry}" for entry in BN]

    def conv_norm(prefix: str) -> list[str]:
        return [f"{prefix}.conv.weight", *norm(f"{prefix}.bn")]

    def biased(prefix: str) -> list[str]:
        return [f"{prefix}.weight", f"{prefix}.bias"]

    def mobile_one(prefix: str, scale: bool, skip: bool) -> list[str]:
        if fused:
            return biased(f"{prefix}.reparam_conv")
        names = conv_norm(f"{prefix}.rbr_conv.0")
        if scale:
            names += conv_norm(f"{prefix}.rbr_scale")
        if skip:
            names += norm(f"{prefix}.rbr_skip")
        return names

    yield from mobile_one("patch_embed.0", scale=True, skip=False)
    yield from mobile_one("patch_embed.1", scale=True, skip=False)
    yield from mobile_one("patch_embed.2", scale=False, skip=True)
    for stage, depth in enumerate(model.config.depths):
        index = 2 * stage
        if stage > 0:
            embedding = f"network.{index - 1}.proj"
            if fused:
                yield from biased(f"{embedding}.0.lkb_reparam")
            else:
                yield from conv_norm(f"{embedding}.0.lkb_origin")
                yield from conv_norm(f"{embedding}.0.small_conv")
            yield from mobile_one(f"{embedding}.1", scale=False, skip=True)
        attends = attention and stage == 3
        if attends:
            yield from biased("network.6.reparam_conv" if fused else "network.6.pe")
            index = 7
        for block in (f"network.{index}.{j}" for j in range(depth)):
            if attends:
                yield f"{block}.layer_scale_1"
                yield from norm(f"{block}.norm")
                yield f"{block}.token_mixer.qkv.weight"
                yield from biased(f"{block}.token_mixer.proj")
            elif fused:
                yield from biased(f"{block}.token_mixer.reparam_conv")
            else:
                yield f"{block}.token_mixer.layer_scale"
                yield from mobile_one(f"{block}.token_mixer.mixer", scale=True, skip=True)
                yield from norm(f"{block}.token_mixer.norm.rbr_skip")
            yield f"{block}.layer_scale_2" if attends else f"{block}.layer_scale"
            yield from conv_norm(f"{block}.convffn.conv")
            yield from biased(f"{block}.convffn.fc1")
            yield from biased(f"{block}.convffn.fc2")
    yield from mobile_one("conv_exp", scale=True, skip=False)
    yield from biased("conv_exp.se.reduce")
    yield from biased("conv_exp.se.expand")
    yield from biased("head")


def published(model: FastViT) -> dict[str, Tensor]:
    """The model's weights as the authors' files name them."""
    return dict(zip(published_names(model), model.state_dict().values(), strict=True))


def empty(name: str, *, deployed: bool = False, num_classes: int = 5) -> FastViT:
    """A model without the time-consuming initialisation, all zero."""
    with torch.device("meta"):
        model = create_model(name, deployed=deployed, num_classes=num_classes)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()
    return model


def distinct(name: str, *, deployed: bool = False, num_classes: int = 5) -> FastViT:
    """A model no two tensors of which are equal."""
    model = empty(name, deployed=deployed, num_classes=num_classes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(1e6 * torch.rand(tensor.shape, generator=generator))
    return model


def assert_same_weights(actual: FastViT, expected: FastViT) -> None:
    weights = actual.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_s12", "fastvit_sa12"])
def test_published_names(name: str, deployed: bool) -> None:
    original = distinct(name, deployed=deployed)
    model = empty(name, deployed=deployed)
    load_checkpoint(model, published(original))
    assert_same_weights(model, original)


@pytest.mark.parametrize("deployed", [False, True])
def test_own_names(deployed: bool) -> None:
    original = distinct("fastvit_sa12", deployed=deployed)
    model = empty("fastvit_sa12", deployed=deployed)
    load_checkpoint(model, original.state_dict())
    assert_same_weights(model, original)


@pytest.mark.parametrize("container", [None, "state_dict", "state_dict_ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_files(tmp_path: Path, container: str | None, prefix: str) -> None:
    original = distinct("fastvit_t8")
    weights = {prefix + name: tensor for name, tensor in published(original).items()}
    file = tmp_path / "weights.pth.tar"
    torch.save({container: weights, "epoch": 300} if container else weights, file)
    assert_same_weights(create_model("fastvit_t8", num_classes=5, checkpoint=file), original)


def test_averaged_weights_come_first() -> None:
    averaged = distinct("fastvit_t8")
    plain = {name: torch.zeros_like(tensor) for name, tensor in published(averaged).items()}
    model = empty("fastvit_t8")
    load_checkpoint(model, {"state_dict": plain, "state_dict_ema": published(averaged)})
    assert_same_weights(model, averaged)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    original = distinct("fastvit_t8")
    file = tmp_path / "weights.safetensors"
    safetensors.save_file(published(original), file)
    assert_same_weights(create_model("fastvit_t8", num_classes=5, checkpoint=file), original)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not a safetensors file"):
        create_model("fastvit_t8", num_classes=5, checkpoint=file)


def test_without_classifier() -> None:
    original = distinct("fastvit_t8", num_classes=9)
    headless = empty("fastvit_t8", num_classes=0)
    load_checkpoint(headless, published(original))
    assert_same_weights(original, headless)

    other = empty("fastvit_t8", num_classes=4)
    assert other.head is not None
    message = "classifier has 9 classes but the model's has 4: create the model with num_classes=9"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_checkpoint(other, published(original))
    load_checkpoint(other, published(original), classifier=False)
    assert not other.head.weight.any()
    other.head = original.head
    assert_same_weights(other, original)


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        (
            True,
            "the checkpoint is fused but the model is in training form: create the model with deployed=True",
        ),
        (False, "of the training form but the model is deployed: create the model with deployed=False"),
    ],
)
def test_wrong_form(fused: bool, message: str) -> None:
    weights = published(distinct("fastvit_t8", deployed=fused))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_checkpoint(empty("fastvit_t8", deployed=not fused), weights)


def test_misfits_are_named_and_nothing_is_loaded() -> None:
    weights = published(distinct("fastvit_t8"))
    del weights["network.4.1.convffn.fc2.bias"]
    weights["norm0.weight"] = torch.zeros(48)
    weights["network.0.0.layer_scale"] = torch.zeros(48)
    model = empty("fastvit_t8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, weights)
    assert str(caught.value) == (
        "the checkpoint does not fit the model: missing (1): stages.2.blocks.1.ffn.branch.fc2.bias; "
        "unexpected (1): norm0.weight; "
        "of another shape (1): network.0.0.layer_scale is (48,) but must be (48, 1, 1)"
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_wrong_variant_names_only_the_first_few() -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(empty("fastvit_sa12"), published(distinct("fastvit_s12")))
    message = str(caught.value)
    assert "missing (" in message
    assert ": stages.3.position.conv.weight, stages.3.position.conv.bias, " in message
    assert "; unexpected (" in message
    assert len(message) < 600
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"layer1.weight": torch.zeros(1)},
            "not a FastViT checkpoint: no stem among the names layer1.weight",
        ),
        ({"epoch": 3, "best": 0.5}, "not a checkpoint of named tensors: epoch, best hold something else"),
        ({"sparse": torch.eye(2).to_sparse()}, "not a checkpoint of named tensors: sparse hold something else"),
        ({"complex": torch.zeros(1) * 1j}, "not a checkpoint of named tensors: complex hold something else"),
        ({}, "not a FastViT checkpoint"),
        ([torch.zeros(1)], "weights.pt: holds a list where named tensors were expected"),
        (Path("code"), "weights.pt: not a torch.save file of plain tensors; other contents are refused"),
    ],
)
def test_other_contents(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        create_model("fastvit_t8", checkpoint=file)


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"weights": torch.zeros(1000)}, file)
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_text("no weights here" if damage == "text" else "")
    with pytest.raises(CheckpointError, match=re.escape(str(file))) as caught:
        create_model("fastvit_t8", checkpoint=file)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(FileNotFoundError):
            create_model("fastvit_t8", checkpoint=tmp_path / name)
