"""Small scenes made from the real digits of scikit-learn, with the truth of every pixel and box.

They take the place of ADE20K and COCO where these are not at hand: an over-fitted network shows that every part of a
recipe works. They are written in the formats of the two, and read by the same code.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Scene:
    """`image` (H, W, 3) of bytes, and for each digit its `labels`, `boxes` (x, y, width, height) and `masks` (H, W)."""

    image: np.ndarray
    labels: list[int]
    boxes: list[tuple[int, int, int, int]]
    masks: list[np.ndarray]


def compose(count: int, size: int = 64, seed: int = 0) -> list[Scene]:
    """`count` scenes of one to three digits that do not touch, coloured at random on a dark, noisy ground."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

    digits = load_digits()
    random = np.random.RandomState(seed)
    return [_scene(digits, size, random) for _ in range(count)]


def _scene(digits, size: int, random: np.random.RandomState) -> Scene:  # pyright: ignore[reportMissingParameterType]
    image = random.randint(0, 60, (size, size, 3)).astype(np.uint8)
    scene = Scene(image, [], [], [])
    taken = np.zeros((size, size), bool)
    for _ in range(random.randint(1, 4)):
        which, side = random.randint(len(digits.target)), random.choice([size // 4, size // 3, size // 2])
        x, y = random.randint(0, size - side + 1, 2)
        if taken[y : y + side, x : x + side].any():
            continue
        taken[y : y + side, x : x + side] = True
        picture = Image.fromarray((digits.images[which] * 15.9375).astype(np.uint8)).resize((side, side))
        ink = np.asarray(picture) / 255
        colour = random.randint(120, 256, 3)
        part = image[y : y + side, x : x + side]
        part[:] = (part * (1 - ink[..., None]) + colour * ink[..., None]).astype(np.uint8)
        mask = np.zeros((size, size), bool)
        mask[y : y + side, x : x + side] = ink > 0.3
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
        scene.labels.append(int(digits.target[which]))
        scene.boxes.append(tuple(int(v) for v in box))  # pyright: ignore[reportArgumentType]
        scene.masks.append(mask)
    return scene


def write_ade(scenes: list[Scene], folder: Path) -> None:
    """The layout of ADE20K: in an annotation 0 is unlabelled, here 1 is the ground and 2 to 11 are the digits."""
    for split in "training", "validation":
        images, annotations = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(scenes):
            classes = np.ones(scene.image.shape[:2], np.uint8)
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                classes[mask] = label + 2
            Image.fromarray(scene.image).save(images / f"{i:04}.png")
            Image.fromarray(classes).save(annotations / f"{i:04}.png")


def write_coco(scenes: list[Scene], folder: Path) -> None:
    """The layout of COCO: `train2017`, `val2017` and `annotations`, with uncompressed run lengths as masks."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, scene in enumerate(scenes):
        height, width = scene.image.shape[:2]
        images.append({"id": i, "file_name": f"{i:04}.png", "height": height, "width": width})
        for label, box, mask in zip(scene.labels, scene.boxes, scene.masks, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": label + 1,
                    "bbox": list(box),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": _run_lengths(mask)},
                }
            )
    categories = [{"id": i + 1, "name": str(i)} for i in range(10)]
    content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    for split in "train2017", "val2017":
        (folder / split).mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(content)
        for i, scene in enumerate(scenes):
            Image.fromarray(scene.image).save(folder / split / f"{i:04}.png")


def _run_lengths(mask: np.ndarray) -> list[int]:
    """How many pixels are off, on, off, ..., column by column."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
