"""Faults in placing matrices of channels among resizes, poolings and means (the pass placing, readers of Resize)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from fault_models import F, net, nn, node, numbers, onnx_model, torch
from onnx import ModelProto
from planting import Fault, Make, fault, given, result

from reparamc.algebra.expr import Layout, Resize
from reparamc.compiler.readings import Reading

PLACING = "reparamc_passes.placing:"
TENSORS = {
    "w": numbers(8, 4, 1, 1), "b": numbers(8), "m": numbers(6, 16, 1, 1), "c": numbers(6),
    "by": np.array([1, 1, 2, 2], np.float32), "far": numbers(64, 128, 1, 1), "farb": numbers(64),
}  # fmt: skip
PARTS = [
    node("Conv", "x w b", "l"), node("AveragePool", "l", "s", kernel_shape=[2, 2], strides=[2, 2]),
    node("Relu", "s", "r"), node("Resize", "r - by", "t", mode="linear"), node("Concat", "t l", "k", axis=1),
    node("Conv", "k m c", "y"),
]  # fmt: skip


def parts() -> ModelProto:
    """A map and the same one pooled and resized, side by side, and a matrix of both."""
    return onnx_model(PARTS, TENSORS, ("N", 4, 16, 12))


def pooled(pads: int) -> Callable[[], ModelProto]:
    """A matrix, and a pooling of what it makes, which divides by its whole window."""
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [pads] * 4, "count_include_pad": 1}
    nodes = [node("Conv", "x far farb", "l"), node("AveragePool", "l", "y", **window)]
    return lambda: onnx_model(nodes, TENSORS, ("N", 128, 13, 12))


def parts_of_torch() -> tuple[Any, tuple[Any, ...]]:
    def run(x: Any, w: Any, m: Any) -> Any:
        y = w(x)
        small = F.interpolate(w(F.avg_pool2d(x, 2)), scale_factor=2, mode="bilinear")
        return m(torch.cat([small, y], 1))

    return net(run, nn.Conv2d(4, 8, 1), nn.Conv2d(16, 6, 1), shapes=((2, 4, 8, 6),))


def pooled_by_torch() -> tuple[Any, tuple[Any, ...]]:
    return net(lambda x, w: F.avg_pool2d(w(x), 3, 2, 1), nn.Conv2d(128, 64, 1), shapes=((2, 128, 13, 12),))


def resize_with(**other: Any) -> Make:
    """For a reader: the resize is another one."""

    def changed(found: Any) -> Any:
        e = found.template if isinstance(found, Reading) else None
        if not isinstance(e, Layout) or not isinstance(e.op, Resize):
            return found
        return Reading(replace(e, op=replace(e.op, native=None, **other)))

    return result(changed)


def doubled(**how: Any) -> Callable[[], ModelProto]:
    options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} | how
    nodes = [node("Resize", "x - by", "u", **options), node("Conv", "u k", "y", pads=[1] * 4)]
    return lambda: onnx_model(nodes, {"by": TENSORS["by"], "k": numbers(6, 32, 3, 3)}, ("N", 32, 6, 5))


def doubled_by_torch() -> tuple[Any, tuple[Any, ...]]:
    conv = nn.Conv2d(32, 6, 3, padding=1)
    return net(lambda x, w: w(F.interpolate(x, scale_factor=2)), conv, shapes=((2, 32, 6, 5),))


def turned(conv: Any) -> Any:
    return None if conv is None else replace(conv, weight=conv.weight[:, :, ::-1])


def focus(shape: tuple[Any, ...] = (2, 4, 8, 6), end: int = 2**62) -> Callable[[], ModelProto]:
    """Every second row, and the rows between, side by side before a kernel."""
    tensors = {"k": numbers(6, 8, 3, 3), "end": np.array([end])}
    tensors |= {name: np.array([n]) for name, n in zip(("zero", "one", "two"), range(3), strict=True)}
    parts = [node("Slice", f"x {start} end two two", start[0]) for start in ("zero", "one")]
    return lambda: onnx_model([*parts, node("Concat", "z o", "c", axis=1), node("Conv", "c k", "y", pads=[1] * 4)],
                              tensors, shape)  # fmt: skip


def focus_of_torch() -> tuple[Any, tuple[Any, ...]]:
    def run(x: Any, w: Any) -> Any:
        return w(torch.cat([x[..., ::2, :], x[..., 1::2, :]], 1))

    return net(run, nn.Conv2d(8, 6, 3, padding=1), shapes=((2, 4, 8, 6),))


def in_blocks() -> ModelProto:
    nodes = [node("SpaceToDepth", "x", "c", blocksize=2), node("Conv", "c k", "y")]
    return onnx_model(nodes, {"k": numbers(6, 16, 1, 1)}, (2, 4, 8, 6))


def in_blocks_of_torch() -> tuple[Any, tuple[Any, ...]]:
    return net(lambda x, w: w(F.pixel_unshuffle(x, 2)), nn.Conv2d(16, 6, 1), shapes=((2, 4, 8, 6),))


def spread_with(**other: Any) -> Make:
    """For a reader: the channels of a position are elsewhere."""

    def changed(found: Any) -> Any:
        e = found.template if isinstance(found, Reading) else None
        return Reading(replace(e, op=replace(e.op, **other))) if isinstance(e, Layout) else found

    return result(changed)


SHUFFLED = """
%x = source c=8 axis=-3
%0 = conv %x 8->12 k=3x3 s=1 p=1 bias
%1 = spread %0 2 of 4 axis=-3->?
%2 = conv %1 3->3 k=1x1 s=1 p=0 bias
"""

BLOCKS = "reparamc_passes.space_to_depth:"
IN_BLOCKS: list[Fault] = [
    fault(
        "the columns of another slice", f"{BLOCKS}_cuts",
        result(lambda cuts: [(cut, rows) for (cut, _), (_, rows) in zip(cuts, cuts[::-1], strict=True)]),
        onnx=focus(), fx=focus_of_torch,
    ),
    fault(
        "values that a slice leaves out at the end", "reparamc.algebra.kernels:cannot_compose",
        lambda original: lambda outer, inner: None if inner.is_weightless else original(outer, inner),
        onnx=focus((2, 4, 7, 6), end=-1),
    ),
    fault(
        "a matrix for each block in the other order", f"{BLOCKS}_each",
        given(lambda a, op: (a, replace(op, outer=not op.outer))), text=SHUFFLED,
    ),
    fault(
        "the channels of a block side by side", "reparamc.onnx.operators:_read_space_to_depth",
        spread_with(outer=False), onnx=in_blocks,
    ),
    fault(
        "the channels of a block apart", "reparamc.fx.readers:_read_pixel_shuffle", spread_with(outer=True),
        fx=in_blocks_of_torch,
    ),
    fault(
        "slices along another axis", "reparamc.compiler.readings:cropped",
        given(lambda x, channels, sizes, cuts: (x, channels, sizes[::-1], {1 - a: cut for a, cut in cuts.items()})),
        onnx=focus((2, 4, 6, 6)), fx=focus_of_torch,
    ),
]  # fmt: skip

PLACED: list[Fault] = [
    *IN_BLOCKS,
    fault(
        "the taps of a transposed kernel in reverse", "reparamc_passes.upsampling:_transposed", result(turned),
        onnx=doubled(), fx=doubled_by_torch,
    ),
    fault(
        "any nearest resize taken for a repetition", "reparamc_passes.upsampling:_times",
        lambda original: lambda x, axis: (2, 2) if isinstance(x, Layout) and isinstance(x.op, Resize) else None,
        onnx=doubled(coordinate_transformation_mode="align_corners"),
    ),
    fault(
        "the bias of a matrix in each of its parts", f"{PLACING}columns",
        given(lambda e, runs, x, bias: (e, runs, x, e.bias)), onnx=parts, fx=parts_of_torch,
    ),
    fault(
        "columns of another part", f"{PLACING}columns",
        given(lambda e, runs, x, bias: (e, [(8 - at, n) for at, n in runs], x, bias)), onnx=parts, fx=parts_of_torch,
    ),
    fault(
        "a bias before a pooling that reads zeros", f"{PLACING}_passes",
        lambda original: lambda e, chain: e.is_pointwise and not e.is_weightless,
        onnx=pooled(1), fx=pooled_by_torch,
    ),
    fault(
        "a resize from the corners", "reparamc.onnx.operators:_read_resize", resize_with(place="align_corners"),
        onnx=parts,
    ),
    fault("the nearest position", "reparamc.onnx.operators:_read_resize", resize_with(mode="nearest"), onnx=parts),
    fault(
        "a resize from the corners", "reparamc.fx.readers:_read_interpolate", resize_with(place="align_corners"),
        fx=parts_of_torch,
    ),
]  # fmt: skip
