"""Accuracy of both forms of a classifier: on images, on corrupted images, and on data sets of some of its classes."""

# pyright: reportPrivateImportUsage=false
# timm exports its names without saying so.

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

import reparamc
from fastvit_zoo.model import create_model
from fastvit_zoo.options import device_of, run_of
from fastvit_zoo.train.data import classes, readable
from fastvit_zoo.train.validate import Agreement, compare

# isort: split
from timm.data import ImageNetInfo, create_dataset, create_transform

ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip
"""The error of AlexNet for each corruption of ImageNet-C, the mean over the severities: what mCE is relative to."""

SEVERITIES = (1, 2, 3, 4, 5)


class Corrupted:
    """A transform that corrupts the image as the network would see it; the same image always alike.

    The package draws from numpy's old state, and from generators without a seed: both are replaced for a while.
    """

    def __init__(self, kind: str, severity: int) -> None:
        self.kind, self.severity = kind, severity

    def __call__(self, image: Image.Image) -> Image.Image:
        from imagecorruptions import corrupt  # pyright: ignore[reportMissingImports]

        pixels = np.asarray(image)
        state, seed = np.random.get_state(), int(pixels.sum()) % 2**32
        generator = np.random.default_rng(seed)
        np.random.seed(seed)
        try:
            with patch.object(np.random, "default_rng", lambda *_: generator):
                made = corrupt(pixels, corruption_name=self.kind, severity=self.severity)
        finally:
            np.random.set_state(state)
        return Image.fromarray(np.asarray(made).astype(np.uint8))


class Subset(nn.Module):
    """A classifier that chooses among some of its classes: those of ImageNet-A or -R, say."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.model, self.indices = model, list(indices)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)[:, self.indices]


def names_of(checkpoint: Path) -> list[str]:
    """The classes of a checkpoint: those of the run in its folder, else the 1000 of ImageNet by their WordNet ids."""
    run = checkpoint.parent / "run.json"
    if run.exists():
        names = run_of(run).get("classes")
        if not isinstance(names, list):
            raise ValueError(f"{run} has no names of classes: it is not that of a classifier")
        return names
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_label_name(i) for i in range(info.num_classes())]


def indices_of(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Where the classes `names` are among `known`. Raises ValueError for one that is not."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the model does not know the class {unknown[0]!r}")
    return [list(known).index(name) for name in names]


def batches(
    dataset: Any, size: int, crop: float, batch: int, corruption: Corrupted | None, workers: int = 0
) -> Iterator[Any]:
    """Images and labels, resized, cropped, corrupted and normalised."""
    stages = create_transform((3, size, size), crop_pct=crop, interpolation="bicubic", separate=False)
    *before, to_tensor, normalize = stages.transforms  # pyright: ignore[reportAttributeAccessIssue]

    def transform(image: Image.Image) -> Tensor:
        for stage in (*before, *([corruption] if corruption else []), to_tensor, normalize):
            image = stage(image)
        return image  # pyright: ignore[reportReturnType]

    dataset.transform = transform
    yield from readable(torch.utils.data.DataLoader(dataset, batch, num_workers=workers))


def mean_corruption_error(errors: dict[str, list[float]]) -> float:
    """Errors in percent by corruption, one for each severity -> mCE, in percent of AlexNet's."""
    return 100 * float(np.mean([np.mean(found) / ALEXNET[kind] for kind, found in errors.items()]))


def evaluate(
    name: str, checkpoint: Path, data: Path, *, size: int = 256, crop: float = 0.9, batch: int = 64,
    corruptions: Sequence[str] = (), severities: Sequence[int] = SEVERITIES,
    device: str = "cpu", workers: int = 0,
) -> dict[str, Agreement | float]:  # fmt: skip
    """Validate both forms on a folder with a folder per class, which may be some of the classes of the model.

    With `corruptions` each of them is applied at every severity, and "mCE" and "mCE fused" are given as well. Raises
    ValueError or OSError if the data or the checkpoint do not fit.
    """
    if unknown := [kind for kind in corruptions if kind not in ALEXNET]:
        raise ValueError(f"unknown corruption {unknown[0]!r}; known corruptions: {', '.join(ALEXNET)}")
    if corruptions and size < 32:
        raise ValueError(f"--size {size} is too small: the corruptions need images of 32 pixels")
    if not 0 < crop <= 1:
        raise ValueError(f"--crop must be above 0 and at most 1, not {crop}")
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder")
    place = device_of(device)
    if workers < 0:
        raise ValueError(f"--workers must be 0 or more, not {workers}")
    if corruptions and importlib.util.find_spec("imagecorruptions") is None:
        raise ValueError("--corruptions needs another package: pip install imagecorruptions-imaug")
    known = names_of(checkpoint)
    model: nn.Module = create_model(name, num_classes=len(known), checkpoint=checkpoint).eval().to(place)
    try:
        dataset = create_dataset("", root=str(data), split="val")
    except RuntimeError as error:
        raise ValueError(f"{data}: {str(error).splitlines()[0]}") from error
    if not any(names := classes(dataset)):
        raise ValueError(f"{data} has no classes: images of each class belong in a folder of their own")
    indices = indices_of(names, known)
    fused = reparamc.fuse_fx(model, torch.randn(2, 3, size, size, device=place))

    def validate(corruption: Corrupted | None) -> Agreement:
        images = batches(dataset, size, crop, batch, corruption, workers)
        return compare(Subset(model, indices), Subset(fused, indices), images)

    results: dict[str, Agreement | float] = {"clean": validate(None)}
    errors: dict[str, dict[str, list[float]]] = {"mCE": {}, "mCE fused": {}}
    for kind in track(corruptions, "corruptions", disable=not sys.stdout.isatty(), transient=True):
        for severity in severities:
            found = validate(Corrupted(kind, severity))
            results[f"{kind} {severity}"] = found
            for form, top1 in (("mCE", found.top1), ("mCE fused", found.top1_fused)):
                errors[form].setdefault(kind, []).append(100 - top1)
    if corruptions:
        results |= {form: mean_corruption_error(found) for form, found in errors.items()}
    return results
