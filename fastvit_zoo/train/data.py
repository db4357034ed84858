"""Images to train on: folders, data sets on disk, and the digits that come with scikit-learn."""

# pyright: reportPrivateImportUsage=false
# timm exports its names without saying so.

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import fastvit_zoo.torchvision_operators  # noqa: F401
from fastvit_zoo.train.recipe import Recipe

# isort: split
from timm.data import FastCollateMixup, auto_augment, create_dataset, create_loader


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation. No bits at all, which Pillow has come to refuse, are black, as they were for the paper."""
    return auto_augment.posterize(image, bits) if bits else image.point(lambda _: 0)


auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeOriginal", "PosterizeIncreasing"), posterize)


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels: the last fifth is for validation."""

    def __init__(self, training: bool, transform: Any = None) -> None:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

        digits: Any = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))
        chosen = order[:-360] if training else order[-360:]
        self.images, self.targets = digits.images[chosen], digits.target[chosen]
        self.classes = [str(i) for i in range(10)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray((self.images[index] * 15.9375).astype(np.uint8)).convert("RGB")
        return self.transform(image) if self.transform else image, int(self.targets[index])


@dataclass(frozen=True)
class Source:
    """Where images come from: the folder `root`, read as `kind`.

    `kind` is "" for a folder per class below `root`/train and `root`/val (or validation), "digits", "hfds" for a data
    set of Hugging Face in the folder, or a name that timm reads: "torch/cifar10", ... Nothing is downloaded.
    """

    root: Path | None = None
    kind: str = ""

    def split(self, training: bool) -> Any:
        """One half of the data set. Raises ValueError if it cannot be read or has no classes."""
        if self.kind == "digits":
            return Digits(training)
        if self.root is None:
            raise ValueError("no images: give --data DIR, or --dataset digits")
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        names = ("train", "training") if training else ("validation", "val", "valid", "eval", "evaluation")
        if not self.kind and not any((self.root / name).is_dir() for name in names):
            raise ValueError(f"{self.root} has no folder {'train' if training else 'val'}")
        if self.kind not in ("", "hfds") and not self.kind.startswith(("torch/", "tfds/", "wds/")):
            raise ValueError(f"unknown data set {self.kind!r}: --dataset is digits, hfds or torch/NAME")
        try:
            kind, root = (f"hfds/{self.root}", None) if self.kind == "hfds" else (self.kind, str(self.root))
            return create_dataset(kind, root=root, split=names[0])
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"{self.root}: {str(error).splitlines()[0]}") from error

    def halves(self) -> tuple[Any, Any, list[str]]:
        """Training images, validation images and the names of the classes, which are the same for both.

        Raises ValueError otherwise.
        """
        training, validation = self.split(True), self.split(False)
        names, others = classes(training), classes(validation)
        if len(names) < 2:
            raise ValueError(f"{self.root} has no classes: images of each class belong in a folder of their own")
        if names != others:
            odd = sorted(set(names) ^ set(others))
            raise ValueError(f"{self.root}: the class {odd[0]!r} is only in one of training and validation")
        return training, validation, names


def classes(dataset: Any) -> list[str]:
    """The names of the classes of a data set of timm, torchvision or Hugging Face, in the order of their numbers."""
    numbers = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    return sorted(numbers, key=numbers.__getitem__) if numbers else list(getattr(dataset, "classes", ()))


def loaders(
    source: Source, recipe: Recipe, device: torch.device, *, workers: int = 0, distributed: bool = False
) -> tuple[Any, Any, list[str]]:
    """Batches for training, augmented and mixed by timm, batches for validation, and the names of the classes.

    Raises ValueError if there are no classes, or fewer images than a batch.
    """
    training, validation, names = source.halves()
    processes = torch.distributed.get_world_size() if distributed else 1
    needed = recipe.batch * recipe.accumulate * processes
    if len(training) < needed:
        raise ValueError(f"{len(training)} images for training are too few for an update of {needed}: lower --batch")
    mixing = recipe.mixing > 0 and (recipe.mixup > 0 or recipe.cutmix > 0)
    if mixing and recipe.batch % 2:
        raise ValueError(f"mixup pairs images: --batch {recipe.batch} is odd")
    mix = FastCollateMixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixing,
        label_smoothing=recipe.smoothing,
        num_classes=len(names),
    )
    common: dict[str, Any] = {
        "input_size": (3, recipe.size, recipe.size),
        "batch_size": recipe.batch,
        "interpolation": "bicubic",
        "num_workers": workers,
        "persistent_workers": False,  # so that a resumed run draws what an unbroken one would have
        "distributed": distributed,
        "device": device,
        "pin_memory": device.type == "cuda",
    }
    try:
        batches = create_loader(
            training,
            is_training=True,
            re_prob=recipe.erasing,
            re_mode="pixel",
            scale=(recipe.smallest, 1.0),
            hflip=recipe.flip,
            color_jitter=recipe.jitter,
            auto_augment=recipe.augment or None,
            collate_fn=mix if mixing else None,
            **common,
        )
    except AssertionError as error:
        raise ValueError(f"--augment {recipe.augment}: {error}") from error
    return batches, create_loader(validation, crop_pct=recipe.crop, **common), names


def readable(loader: Any) -> Iterator[Any]:
    """The batches of a loader. Raises ValueError if images cannot be read; timm skips a few of them, and says so."""
    try:
        yield from loader
    except RuntimeError as error:
        raise ValueError(f"images cannot be read: {str(error).strip().splitlines()[-1]}") from error
