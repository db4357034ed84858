"""`import fastvit_zoo.torchvision_operators` before torchvision makes it usable without its compiled operators.

timm and detection need torchvision. Its build for CUDA cannot load them with a PyTorch for CPUs, and then
`import torchvision` fails. Here the operators that boxes need are declared and computed by PyTorch instead: slower,
with the same results. Where the compiled ones load, nothing is changed; where torchvision is missing, neither.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

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
    overlaps = (common > threshold * (area[:, None] + area - common)).tolist()
    kept: list[int] = []
    for i in range(len(overlaps)):
        if not any(overlaps[k][i] for k in kept):
            kept.append(i)
    return order[kept]


def _roi_align(
    maps: Tensor, boxes: Tensor, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    from torchvision.ops.roi_align import _roi_align as by_torch

    return by_torch(maps, boxes, scale, height, width, sampling_ratio, aligned)


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
    library.impl("roi_align", _roi_align, "CompositeImplicitAutograd")
    _LIBRARIES.append(library)
    import torchvision
    from torchvision.ops import roi_align

    assert roi_align is not None
    torchvision.extension._has_ops = lambda: True


_provide()
