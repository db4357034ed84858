"""What `bn_folding` and `scale_folding` share: one affine map per channel, into a convolution beside it.

A layout operator P that keeps the channel axis whole commutes with it: s P(x) + t = P(s x + t).
"""

from __future__ import annotations

import numpy as np

from reparamc.expr import BatchNorm, Conv, Expr, Layout, Scale, rebuild
from reparamc.kernel import coefficients, scale_inputs, scale_outputs
from reparamc.rewrite import Declined

OTHER_AXIS = "it acts on another axis than the convolution"


def into_producer(e: Scale | BatchNorm) -> Expr | Declined | None:
    """``s conv(x) + t`` as one convolution, through layout operators in between."""
    layouts, conv = through_layouts(e.x)
    if not isinstance(conv, Conv):
        return None
    if e.frame is not None and e.frame != (layouts[0].frame if layouts else conv.frame):
        return Declined(OTHER_AXIS)
    scale, shift = coefficients(e)
    if not _fits(scale, shift, conv.out_channels):
        return Declined("it would broadcast the convolution's single channel")
    return under(layouts, scale_outputs(conv, scale, shift))


def into_consumer(conv: Conv, kind: type[Scale] | type[BatchNorm]) -> Expr | Declined | None:
    """``conv(s x + t)`` as one convolution of x, through layout operators in between."""
    layouts, e = through_layouts(conv.x)
    if not isinstance(e, kind):
        return None
    if e.frame is not None and e.frame != (layouts[-1].frame_in if layouts else conv.frame):
        return Declined(OTHER_AXIS)
    if layouts and layouts[0].frame != conv.frame:
        return Declined(OTHER_AXIS)
    scale, shift = coefficients(e)
    if not _fits(scale, shift, conv.in_channels):
        return Declined("it would broadcast a single channel")
    if np.any(shift) and conv.reads_padding:
        return Declined("its shift meets the zero padding of the convolution behind it")
    return scale_inputs(conv, under(layouts, e.x), scale, shift)


def through_layouts(e: Expr) -> tuple[list[Layout], Expr]:
    """The chain of layout operators that ends in ``e``, last first, and what it starts from."""
    layouts: list[Layout] = []
    while isinstance(e, Layout):
        layouts.append(e)
        e = e.x
    return layouts, e


def under(layouts: list[Layout], e: Expr) -> Expr:
    """``e`` with a chain of layout operators put back on top."""
    for layout in reversed(layouts):
        e = rebuild(layout, [e])
    return e


def _fits(scale: np.ndarray, shift: np.ndarray, channels: int) -> bool:
    return all(v.ndim == 0 or v.shape[0] == channels for v in (scale, shift))
