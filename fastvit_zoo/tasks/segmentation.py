"""Semantic FPN on a FastViT backbone, with readers for folders in the layout of ADE20K, and its mean IoU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import reparamc
from fastvit_zoo.model import Backbone
from fastvit_zoo.tasks.fit import Steps, backbone, deploy, fit, forever
from fastvit_zoo.tasks.pyramid import Pyramid
from fastvit_zoo.tasks.scenes import compose, write_ade

# isort: split
from torchvision import tv_tensors
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

PAPER = Steps(updates=40_000, batch=32, lr=2e-4, size=512)
TINY = Steps(updates=300, batch=8, lr=4e-3, size=64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNLABELLED = 255


class SemanticFPN(nn.Module):
    """Images (B, 3, H, W) -> scores of classes (B, classes, H, W), for sizes that 32 divides.

    A feature pyramid of `channels`, and on each of its levels convolutions of `width` with bilinear upsampling until
    all have stride 4; their sum is classified.
    """

    def __init__(self, maps: Backbone, classes: int, channels: int = 256, width: int = 128) -> None:
        super().__init__()
        self.pyramid = Pyramid(maps, channels)
        self.levels = nn.ModuleList(self._level(channels, width, halvings) for halvings in range(4))
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1))

    @staticmethod
    def _level(channels: int, width: int, halvings: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i in range(max(halvings, 1)):
            layers.append(Conv2dNormActivation(channels if i == 0 else width, width, 3))
            if halvings:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        return nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        pyramid = self.pyramid(image)
        total = self.levels[0](pyramid[0])
        for level, one in zip(self.levels[1:], pyramid[1:], strict=True):
            total = total + level(one)
        return F.interpolate(self.classify(total), scale_factor=4.0, mode="bilinear", align_corners=False)


class Folders(torch.utils.data.Dataset):
    """`images`/SPLIT and `annotations`/SPLIT below a folder; in an annotation 0 is unlabelled and class i is i + 1.

    Raises ValueError if there are no images or an image has no annotation.
    """

    def __init__(self, root: Path, training: bool, size: int, *, augment: bool = True) -> None:
        split = "training" if training else "validation"
        folder = root / "images" / split
        self.images = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not self.images:
            raise ValueError(f"{folder} has no images")
        self.annotations = [root / "annotations" / split / f"{p.stem}.png" for p in self.images]
        if missing := [p for p in self.annotations if not p.exists()]:
            raise ValueError(f"{missing[0]} is missing: every image has an annotation of its name")
        scale: list[v2.Transform] = [v2.Resize(size), v2.CenterCrop(size)]
        if training and augment:
            scale = [
                v2.RandomResize(size // 2, 2 * size),
                v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: 0, "others": 0}),
                v2.RandomHorizontalFlip(),
                v2.RandomPhotometricDistort(),
            ]
        self.transform = v2.Compose([*scale, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = np.array(Image.open(self.images[index]).convert("RGB")).transpose(2, 0, 1)
        classes = np.array(Image.open(self.annotations[index]))
        picture, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(classes))
        labels = mask.long() - 1
        return picture.as_subclass(Tensor), labels.masked_fill(labels < 0, UNLABELLED).as_subclass(Tensor)


def mean_iou(network: nn.Module, dataset: Any, classes: int) -> float:
    """The mean over the classes that occur of intersection by union, in percent."""
    pairs = torch.zeros(classes, classes)
    with torch.no_grad():
        for image, labels in torch.utils.data.DataLoader(dataset, 1):
            found, known = network(image).argmax(1), labels != UNLABELLED
            indices = labels[known] * classes + found[known]
            pairs += torch.bincount(indices, minlength=classes**2).reshape(classes, classes)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return 100 * (pairs.diagonal() / union)[union > 0].mean().item()


def segment(
    name: str, data: Path | None, output: Path, *, tiny: bool = False, classes: int = 150,
    checkpoint: Path | None = None, **changes: Any,
) -> dict[str, float]:  # fmt: skip
    """Train a Semantic FPN, measure both forms, and write `model.pt` and the fused `model.onnx`.

    `tiny` over-fits 16 scenes made from digits. Raises ValueError or OSError if the data or the checkpoint do not fit.
    """
    steps = replace(TINY if tiny else PAPER, **changes)
    if tiny:
        classes, data = 11, data or output / "scenes"
        if not data.exists():
            write_ade(compose(16, steps.size), data)
    if data is None:
        raise ValueError("no images: give --data DIR, or --recipe tiny")
    training = Folders(data, True, steps.size, augment=not tiny)
    validation = Folders(data, False, steps.size)
    widths = (64, 32) if tiny else (256, 128)
    network = SemanticFPN(backbone(name, checkpoint), classes, *widths)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch[0]), batch[1], ignore_index=UNLABELLED)

    losses = fit(network, loss, forever(training, steps), steps)
    output.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), output / "model.pt")
    images = torch.stack([validation[i][0] for i in range(2)])
    fused = reparamc.fuse_fx(network, images)
    return {
        "loss": losses[-1],
        "mIoU": mean_iou(network, validation, classes),
        "mIoU fused": mean_iou(fused, validation, classes),
        "error in ONNX Runtime": deploy(fused, output / "model.onnx", images[:1], ("scores",)),
    }
