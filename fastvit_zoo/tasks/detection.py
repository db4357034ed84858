"""Mask R-CNN of torchvision on a FastViT backbone, with data in the layout of COCO and evaluation by pycocotools."""

import contextlib
import io
import json
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import reparamc
from fastvit_zoo.model import Backbone
from fastvit_zoo.options import Options
from fastvit_zoo.tasks.fit import backbone, deploy, fit, moved, opened, place, size_of, source
from fastvit_zoo.tasks.pyramid import Pyramid
from fastvit_zoo.tasks.scenes import compose, write_coco
from fastvit_zoo.tasks.steps import Steps

# isort: split
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

PAPER = Steps(
    updates=12 * 7330, batch=16, lr=2e-4, schedule="multistep", milestones=(8 / 12, 11 / 12), warmup=500, size=800
)
TINY = Steps(updates=70, batch=4, lr=1e-3, schedule="multistep", milestones=(0.8,), size=64)

SMALL: dict[str, Any] = {
    "rpn_anchor_generator": AnchorGenerator(((12,), (20,), (32,), (48,), (64,)), ((0.5, 1.0),) * 5),
    "rpn_pre_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50,
    "box_detections_per_img": 10, "box_batch_size_per_image": 64,
    "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 1),
    "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 1),
}  # fmt: skip
"""For scenes of 64 pixels: small anchors, few proposals."""


class Named(nn.Module):
    """The five maps of a pyramid by name, as torchvision takes them."""

    def __init__(self, maps: Backbone, out_channels: int = 256) -> None:
        super().__init__()
        self.pyramid, self.out_channels = Pyramid(maps, out_channels, extra=True), out_channels

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), self.pyramid(image), strict=True))


class Detections(nn.Module):
    """One image (1, 3, H, W) -> boxes (N, 4), labels (N,), scores (N,), masks (N, 1, H, W), as exporters take it."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector([image[0]])
        return found["boxes"], found["labels"], found["scores"], found["masks"]


def detector(maps: Backbone, classes: int, size: int, *, tiny: bool = False) -> MaskRCNN:
    """A Mask R-CNN for `classes` classes, the background included, on images whose short side becomes `size`."""
    longest = size if tiny else size * 1333 // 800
    options = SMALL if tiny else {}
    return MaskRCNN(Named(maps, 64 if tiny else 256), classes, min_size=size, max_size=longest, **options)


def fused(network: MaskRCNN, image: Tensor) -> nn.Module:
    """A fused copy in eval mode; `image` (B, 3, H, W) is of the size that its backbone gets."""
    return reparamc.fuse_fx(network.eval(), ([*image],))


KEYS: dict[str, dict[str, Any]] = {
    "images": {"id": int | str, "file_name": str, "width": int, "height": int},
    "categories": {"id": int},
    "annotations": {
        "id": int | str, "image_id": int | str, "category_id": int, "bbox": list, "segmentation": object,
        "area": int | float, "iscrowd": int,
    },
}  # fmt: skip
"""What is needed of the lists in a file of annotations, and of which kind it is."""


def check_annotations(file: Path, folder: Path) -> None:
    """Raise ValueError if a file is not in the layout of COCO, or not of the images of `folder`."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    known: dict[str, dict[Any, Any]] = {}
    for part, keys in KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{file} has no list {part!r}: the layout is that of COCO")
        for entry in entries:
            if lacking := [key for key, kind in keys.items() if not isinstance(entry.get(key), kind)]:
                found = entry.get(lacking[0], "missing")
                raise ValueError(f"{file}: {lacking[0]!r} of {part!r} is {found!r}: the layout is that of COCO")
        known[part] = {entry["id"]: entry for entry in entries}
    if odd := [number for number in known["categories"] if number <= 0]:
        raise ValueError(f"{file}: the category {odd[0]!r} should be a number above 0, which is the background")
    for number, entry in known["annotations"].items():
        where, image = f"{file}: annotation {number}", known["images"].get(entry["image_id"])
        if image is None or entry["category_id"] not in known["categories"]:
            raise ValueError(f"{where} is of an image or a category that is not listed")
        box, shape = entry["bbox"], entry["segmentation"]
        if len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise ValueError(f"{where} has the box {box}: it should be left, top, width and height")
        if not _is_mask(shape, [image["height"], image["width"]]):
            raise ValueError(f"{where} has no mask of the size of its image, {image['width']} x {image['height']}")
    for image in known["images"].values():
        size = size_of(folder / image["file_name"])
        if size != (image["width"], image["height"]):
            raise ValueError(f"{folder / image['file_name']} is {size[0]} x {size[1]}, {file} says something else")


def _is_mask(shape: Any, size: list[int]) -> bool:
    """Whether it is run lengths for an image of `size`, or polygons of three corners or more."""
    if isinstance(shape, dict):
        counts = shape.get("counts")
        runs = counts if isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts) else []
        return shape.get("size") == size and (isinstance(counts, str) or sum(runs) == size[0] * size[1])
    polygons = shape if isinstance(shape, list) else []
    lists = bool(polygons) and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons)
    return lists and all(isinstance(v, int | float) for p in polygons for v in p)


class Coco(torch.utils.data.Dataset):
    """`train2017` or `val2017` below a folder: images (3, H, W) from 0 to 1, and their boxes, labels and masks.

    For training, only images with objects, and no crowds. Raises ValueError or OSError if there are no such images, or
    the annotations are not in the layout of COCO.
    """

    def __init__(self, root: Path, training: bool) -> None:
        split = "train2017" if training else "val2017"
        self.folder, self.file = root / split, root / "annotations" / f"instances_{split}.json"
        if not self.file.exists():
            raise FileNotFoundError(f"{self.file} does not exist: the layout is that of COCO")
        check_annotations(self.file, self.folder)
        from pycocotools import coco  # pyright: ignore[reportMissingImports]

        with contextlib.redirect_stdout(io.StringIO()):
            self.coco: Any = coco.COCO(str(self.file))
        self.ids = [i for i in sorted(self.coco.imgs) if self._objects(i) or not training]
        if not any(self._objects(i) for i in self.ids):
            raise ValueError(f"{self.file} has no annotated images")
        flip = [v2.RandomHorizontalFlip()] if training else []
        self.transform = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)])
        self.classes = max(self.coco.getCatIds()) + 1

    def __len__(self) -> int:
        return len(self.ids)

    def _objects(self, image: int) -> list[tuple[dict[str, Any], list[float]]]:
        """The annotations of an image and their boxes, as corners, that are in it and are not empty."""
        width, height = self.coco.imgs[image]["width"], self.coco.imgs[image]["height"]
        found = []
        for entry in self.coco.imgToAnns[image]:
            x, y, w, h = entry["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            if not entry["iscrowd"] and box[0] < box[2] and box[1] < box[3]:
                found.append((entry, box))
        return found

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = self.ids[index]
        entry = self.coco.imgs[image]
        picture = opened(self.folder / entry["file_name"]).convert("RGB")
        objects, canvas = self._objects(image), (entry["height"], entry["width"])
        corners = torch.tensor([box for _, box in objects]).reshape(-1, 4).float()
        masks = np.array([self.coco.annToMask(one) for one, _ in objects]).reshape(-1, *canvas)
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=canvas)  # pyright: ignore[reportCallIssue]
        pixels, target = self.transform(picture, {"boxes": boxes, "masks": tv_tensors.Mask(masks)})
        plain: dict[str, Any] = {name: value.as_subclass(Tensor) for name, value in target.items()}
        labels = torch.tensor([one["category_id"] for one, _ in objects], dtype=torch.long)
        return pixels.as_subclass(Tensor), {**plain, "labels": labels, "image_id": image}


def average_precision(network: nn.Module, dataset: Coco) -> dict[str, float]:
    """AP over the overlaps from 0.5 to 0.95 of boxes and of masks, and AP at 0.5, in percent, by pycocotools."""
    from pycocotools import coco  # pyright: ignore[reportMissingImports]
    from pycocotools import mask as run_lengths  # pyright: ignore[reportMissingImports]
    from pycocotools.cocoeval import COCOeval  # pyright: ignore[reportMissingImports]

    results: list[dict[str, Any]] = []
    device = place(network)
    with torch.no_grad():
        for image, target in (dataset[i] for i in range(len(dataset))):
            (found,) = moved(network([image.to(device)]), torch.device("cpu"))
            corners = found["boxes"].numpy()
            for i, (label, score) in enumerate(zip(found["labels"], found["scores"], strict=True)):
                x, y, right, bottom = corners[i].tolist()
                mask = np.asfortranarray((found["masks"][i, 0] > 0.5).numpy().astype(np.uint8))
                one = {"image_id": target["image_id"], "category_id": int(label), "score": float(score)}
                one |= {"bbox": [x, y, right - x, bottom - y], "segmentation": run_lengths.encode(mask)}
                results.append(one)
    figures: dict[str, float] = dict.fromkeys(("box AP", "box AP50", "mask AP", "mask AP50"), 0.0)
    if not results:
        return figures
    with contextlib.redirect_stdout(io.StringIO()):
        known: Any = coco.COCO(str(dataset.file))  # of its own, since the evaluation changes what it reads
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            evaluation = COCOeval(known, known.loadRes(results), kind)  # pyright: ignore[reportArgumentType]
            evaluation.params.imgIds = dataset.ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures[f"{name} AP"], figures[f"{name} AP50"] = (100 * float(v) for v in evaluation.stats[:2])
    return figures


def detect(name: str, data: Path | None, options: Options, *, tiny: bool = False, **changes: Any) -> dict[str, float]:
    """Train a Mask R-CNN, measure both forms, and write `model.pt` and the fused `model.onnx`.

    `tiny` over-fits 8 scenes made from digits, or `data`. Raises ValueError or OSError if the data, the checkpoint or
    the run in the output folder do not fit.
    """
    steps = replace(TINY if tiny else PAPER, **changes)
    scenes = partial(write_coco, compose(8, steps.size)) if tiny and data is None else None
    with source(data, scenes) as root:
        training, validation = Coco(root, True), Coco(root, False)
        torch.manual_seed(steps.seed)
        network = detector(backbone(name, options.checkpoint), training.classes, steps.size, tiny=tiny)

        def loss(batch: list[tuple[Tensor, dict[str, Any]]]) -> Tensor:
            images, targets = zip(*batch, strict=True)
            parts = network(list(images), list(targets)).values()
            return sum(parts, torch.zeros((), device=images[0].device))

        about = {"task": "detect", "model": name, "classes": training.classes}
        losses = fit(network, loss, training, steps, options, about=about, collate=list)
        image = validation[0][0][None]
        plain = fused(network, image.to(place(network)))
        before, after = average_precision(network, validation), average_precision(plain, validation)
    outputs = ("boxes", "labels", "scores", "masks")
    error = deploy(Detections(plain).eval(), options.output / "model.onnx", image, outputs)
    return {"loss": losses[-1], **before, **{f"{k} fused": v for k, v in after.items()}, "error in ONNX Runtime": error}
