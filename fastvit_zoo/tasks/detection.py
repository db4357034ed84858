"""Mask R-CNN of torchvision on a FastViT backbone, with data in the layout of COCO and evaluation by pycocotools."""

import contextlib
import io
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import reparamc
from fastvit_zoo.model import Backbone
from fastvit_zoo.tasks.fit import Steps, backbone, deploy, fit, forever
from fastvit_zoo.tasks.pyramid import Pyramid
from fastvit_zoo.tasks.scenes import compose, write_coco

# isort: split
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
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


class Coco(torch.utils.data.Dataset):
    """`train2017` or `val2017` below a folder. Raises ValueError or OSError if there are no annotated images."""

    def __init__(self, root: Path, training: bool) -> None:
        split = "train2017" if training else "val2017"
        self.file = root / "annotations" / f"instances_{split}.json"
        if not self.file.exists():
            raise FileNotFoundError(f"{self.file} does not exist: the layout is that of COCO")
        flip = [v2.RandomHorizontalFlip()] if training else []
        transform = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)])
        with contextlib.redirect_stdout(io.StringIO()):
            plain = CocoDetection(str(root / split), str(self.file), transforms=transform)
        self.coco = plain.coco
        plain.ids = [i for i in plain.ids if self.coco.getAnnIds(i)]
        self.ids = plain.ids
        if not self.ids:
            raise ValueError(f"{self.file} has no annotated images")
        keys = {"image_id", "boxes", "labels", "masks"}
        self.images = wrap_dataset_for_transforms_v2(plain, target_keys=keys)
        self.classes = max(self.coco.getCatIds()) + 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image, target = self.images[index]
        tensors = {k: v.as_subclass(Tensor) if isinstance(v, Tensor) else v for k, v in target.items()}
        return image.as_subclass(Tensor), tensors


def average_precision(network: nn.Module, dataset: Coco) -> dict[str, float]:
    """AP over the overlaps from 0.5 to 0.95 of boxes and of masks, and AP at 0.5, in percent, by pycocotools."""
    from pycocotools import coco  # pyright: ignore[reportMissingImports]
    from pycocotools import mask as run_lengths  # pyright: ignore[reportMissingImports]
    from pycocotools.cocoeval import COCOeval  # pyright: ignore[reportMissingImports]

    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for image, target in dataset:
            (found,) = network([image])
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


def detect(
    name: str, data: Path | None, output: Path, *, tiny: bool = False, checkpoint: Path | None = None, **changes: Any
) -> dict[str, float]:
    """Train a Mask R-CNN, measure both forms, and write `model.pt` and the fused `model.onnx`.

    `tiny` over-fits 8 scenes made from digits. Raises ValueError or OSError if the data or the checkpoint do not fit.
    """
    steps = replace(TINY if tiny else PAPER, **changes)
    if tiny:
        data = data or output / "scenes"
        if not data.exists():
            write_coco(compose(8, steps.size), data)
    if data is None:
        raise ValueError("no images: give --data DIR, or --recipe tiny")
    training, validation = Coco(data, True), Coco(data, False)
    torch.manual_seed(steps.seed)
    network = detector(backbone(name, checkpoint), training.classes, steps.size, tiny=tiny)

    def loss(batch: list[tuple[Tensor, dict[str, Any]]]) -> Tensor:
        images, targets = zip(*batch, strict=True)
        return sum(network(list(images), list(targets)).values(), torch.zeros(()))

    losses = fit(network, loss, forever(training, steps, collate=list), steps)
    output.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), output / "model.pt")
    image = validation[0][0][None]
    plain = fused(network, image)
    before, after = average_precision(network, validation), average_precision(plain, validation)
    error = deploy(Detections(plain).eval(), output / "model.onnx", image, ("boxes", "labels", "scores", "masks"))
    return {"loss": losses[-1], **before, **{f"{k} fused": v for k, v in after.items()}, "error in ONNX Runtime": error}
