"""Semantic FPN on a FastViT backbone, with readers for folders in the layout of ADE20K, and its mean IoU."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import reparamc
from fastvit_zoo.model import Backbone
from fastvit_zoo.options import Options
from fastvit_zoo.tasks.fit import backbone, deploy, fit, opened, place, source
from fastvit_zoo.tasks.pyramid import Pyramid
from fastvit_zoo.tasks.scenes import compose, write_ade
from fastvit_zoo.tasks.steps import Steps

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

    With `augment` crops of `size` pixels; else the whole image, its short side about `size` and both sides multiples of
    32, with the labels as they are. Raises ValueError if there are no images, an image has no annotation, or the two
    are of different sizes; when an image is read, if an annotation has more than `classes`.
    """

    def __init__(self, root: Path, training: bool, size: int, classes: int, *, augment: bool = False) -> None:
        split = "training" if training else "validation"
        folder = root / "images" / split
        self.size, self.classes = size, classes
        self.images = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not self.images:
            raise ValueError(f"{folder} has no images: the layout is that of ADE20K")
        self.annotations = [root / "annotations" / split / f"{p.stem}.png" for p in self.images]
        if missing := [p for p in self.annotations if not p.exists()]:
            raise ValueError(f"{missing[0]} is missing: every image has an annotation of its name")
        for pair in zip(self.images, self.annotations, strict=True):
            with Image.open(pair[0]) as image, Image.open(pair[1]) as annotation:
                if image.size != annotation.size or annotation.mode not in ("L", "P", "I", "I;16"):
                    what = f"{annotation.size}, {annotation.mode}"
                    raise ValueError(f"{pair[1]} ({what}) is no map of classes for an image of {image.size}")
        scale = [
            v2.RandomResize(size // 2, 2 * size),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Mask: 0, "others": 0}),
            v2.RandomHorizontalFlip(),
            v2.RandomPhotometricDistort(),
        ]
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.crop = v2.Compose([*scale, *finish]) if augment else None
        self.finish = v2.Compose(finish)

    def __len__(self) -> int:
        return len(self.images)

    def annotation(self, index: int) -> Tensor:
        """The classes of an image (H, W), from 1. Raises ValueError if there are more than it should have."""
        classes = torch.from_numpy(np.array(opened(self.annotations[index])).astype(np.int64))
        if (most := int(classes.max())) > self.classes:
            raise ValueError(f"{self.annotations[index]} has the class {most}: --classes {self.classes} is too few")
        return classes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, classes = np.array(opened(self.images[index]).convert("RGB")).transpose(2, 0, 1), self.annotation(index)
        if self.crop is not None:
            image, classes = self.crop(tv_tensors.Image(pixels), tv_tensors.Mask(classes))
        else:
            short = min(pixels.shape[1:])
            sides = [max(32, round(side * self.size / short / 32) * 32) for side in pixels.shape[1:]]
            image = self.finish(v2.functional.resize(tv_tensors.Image(pixels), sides))
        labels = classes.as_subclass(Tensor) - 1
        return image.as_subclass(Tensor), labels.masked_fill(labels < 0, UNLABELLED)


def mean_iou(network: nn.Module, dataset: Any, classes: int) -> float:
    """The mean over the classes that occur of intersection by union, in percent."""
    pairs, device = torch.zeros(classes, classes), place(network)
    with torch.no_grad():
        for image, labels in torch.utils.data.DataLoader(dataset, 1):
            scores = F.interpolate(network(image.to(device)), labels.shape[1:], mode="bilinear", align_corners=False)
            found, known = scores.argmax(1).cpu(), labels != UNLABELLED
            indices = labels[known] * classes + found[known]
            pairs += torch.bincount(indices, minlength=classes**2).reshape(classes, classes)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return 100 * (pairs.diagonal() / union)[union > 0].mean().item()


def segment(
    name: str, data: Path | None, options: Options, *, tiny: bool = False, classes: int | None = None, **changes: Any
) -> dict[str, float]:
    """Train a Semantic FPN for `classes` classes, measure both forms, and write `model.pt` and the fused `model.onnx`.

    `tiny` over-fits 16 scenes made from digits, or `data`. Raises ValueError or OSError if the data, the checkpoint or
    the run in the output folder do not fit.
    """
    steps = replace(TINY if tiny else PAPER, **changes)
    if steps.size % 32:
        raise ValueError(f"--size must be a multiple of 32, not {steps.size}")
    if classes is None:
        classes = 11 if tiny else 150
    if classes < 2:
        raise ValueError(f"--classes must be 2 or more, not {classes}")
    scenes = partial(write_ade, compose(16, steps.size)) if tiny and data is None else None
    with source(data, scenes) as root:
        training = Folders(root, True, steps.size, classes, augment=not tiny)
        validation = Folders(root, False, steps.size, classes)
        for index in range(len(validation)):
            validation.annotation(index)  # before hours of training
        torch.manual_seed(steps.seed)
        network = SemanticFPN(backbone(name, options.checkpoint), classes, *((64, 32) if tiny else (256, 128)))

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(network(batch[0]), batch[1], ignore_index=UNLABELLED)

        about = {"task": "segment", "model": name, "classes": classes}
        losses = fit(network, loss, training, steps, options, about=about)
        image = validation[0][0][None]
        fused = reparamc.fuse_fx(network, image.repeat(2, 1, 1, 1).to(place(network)))
        found = {"mIoU": network, "mIoU fused": fused}
        figures = {name: mean_iou(form, validation, classes) for name, form in found.items()}
    return {
        "loss": losses[-1],
        **figures,
        "error in ONNX Runtime": deploy(fused, options.output / "model.onnx", image, ("scores",)),
    }
