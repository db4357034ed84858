"""`import fastvit_zoo.torchvision_operators` before torchvision makes it usable without its compiled operators.

timm and detection need torchvision. Its build for CUDA cannot load them with a PyTorch for CPUs, and then
`import torchvision` fails. Here the operators that boxes need are declared and computed by PyTorch instead: slower,
with the same results. Where the compiled ones load, nothing is changed; where torchvision is missing, neither.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

_LIBRARIES: list[torch.library.Library] = []
"""Operators last as long as the library that declared them."""

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The boxes that stay, best score first: boxes (N, 4) as corners, scores (N,) -> indices."""
    order = scores.argsort(descending=True, stable=True)
    low, high = boxes[order, :2], boxes[order, 2:]
    area = (high - low).prod(1)
    common = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).clamp(min=0).prod(2)
    overlaps = common > threshold * (area[:, None] + area - common)
    gone = torch.zeros(len(boxes), dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(boxes)):
        if not gone[i]:
            kept.append(i)
            gone |= overlaps[i]
    return order[kept]


def roi_align(
    maps: Tensor, boxes: Tensor, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Maps (B, C, H, W), boxes (N, 5) of an image's number and corners -> (N, C, height, width).

    The mean of `sampling_ratio` squared samples per cell; if it is not positive, of as many as a cell has pixels.
    """
    if maps.dtype != boxes.dtype:  # half precision, outside
        found = roi_align(maps.to(boxes.dtype), boxes, scale, height, width, sampling_ratio, aligned)
        return found.to(maps.dtype)
    low, high = boxes[:, 1:3] * scale, boxes[:, 3:5] * scale
    if aligned:
        low, high = low - 0.5, high - 0.5
    side = high - low if aligned else (high - low).clamp(min=1)
    samples = (side / side.new_tensor([width, height])).ceil().clamp(min=1).long()
    if sampling_ratio > 0:
        samples = torch.full_like(samples, sampling_ratio)
    result = maps.new_zeros(len(boxes), maps.shape[1], height, width)
    kinds = torch.cat([boxes[:, :1].long(), samples], 1)
    for kind in kinds.unique(dim=0):
        chosen = (kinds == kind).all(1).nonzero()[:, 0]
        image, *counts = kind.tolist()
        cells = _cells(maps[image : image + 1], low[chosen], side[chosen], (width, height), counts)
        result = result.index_copy(0, chosen, cells)
    return result


def _cells(one: Tensor, low: Tensor, side: Tensor, cells: tuple[int, int], counts: list[int]) -> Tensor:
    """Boxes of one map (1, C, H, W), all with as many samples per cell along x and y -> (N, C, height, width)."""
    positions, inside = [], []
    for axis, limit in enumerate((one.shape[3], one.shape[2])):
        count = cells[axis] * counts[axis]
        steps = (torch.arange(count, device=one.device, dtype=one.dtype) + 0.5) / count
        at = low[:, axis, None] + steps * side[:, axis, None]
        inside.append((at >= -1) & (at <= limit))
        positions.append(2 * at.clamp(0, limit - 1) / max(limit - 1, 1) - 1)
    grid = torch.stack(torch.broadcast_tensors(positions[0][:, None], positions[1][:, :, None]), dim=3)
    samples = nn.functional.grid_sample(one, grid.flatten(0, 1)[None], padding_mode="border", align_corners=True)
    samples = samples * (inside[0][:, None] & inside[1][:, :, None]).flatten(0, 1)
    means = nn.functional.avg_pool2d(samples, (counts[1], counts[0]))[0]
    return means.unflatten(1, (len(low), cells[1])).transpose(0, 1)


def _present() -> bool:
    return True


def _compiled(folder: Path) -> bool:
    for library in folder.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return True
    return False


def _provide() -> None:
    found = importlib.util.find_spec("torchvision")
    if _LIBRARIES or found is None or found.origin is None or _compiled(Path(found.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("nms", nms, "CPU")
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    _LIBRARIES.append(library)
    importlib.import_module("torchvision")

    # Not before the import, which would declare gradients of the compiled operators.
    for module in "torchvision.extension", "torchvision.ops.roi_align":
        sys.modules[module].__dict__["_has_ops"] = _present


_provide()
