"""Random inputs of expressions that meet every border case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np

from reparamc.algebra.arrays import count
from reparamc.algebra.evaluate import MOST_ELEMENTS, TooLargeError, evaluate
from reparamc.algebra.expr import Array, Conv, Expr, Ints, Layout, Reshape, Scale, Source, Sum, walk
from reparamc.algebra.fitting import Sizes
from reparamc.algebra.infer import channel_axes, channels, has_layout
from reparamc.algebra.places import Places, places
from reparamc.algebra.records import entity, record, replace


@record
class Size:
    """How large the maps are: ``extra`` more than just larger than every kernel; or results of ``tiny`` elements.

    A tiny result has ``tiny`` (1, 2 or 3) elements along its first axis and the next of these numbers in turn along
    the others.
    """

    extra: int = 0
    tiny: int | None = None


ORDINARY, ODD = Size(), Size(extra=1)
SIZES = (ORDINARY, ODD, *(Size(tiny=n) for n in (1, 2, 3)))
"""Sizes to compare at; the first is enough where no position meets another."""


@entity
class Sample:
    """Inputs for expressions over the same sources.

    Attributes:
        sizes: the sizes of the symbols in shapes.
        places: where the inputs are given and values are computed; None for everywhere.
    """

    inputs: Mapping[Source, Array]
    sizes: Mapping[str, int]
    places: Places | None = None

    def value(self, e: Expr) -> Array:
        """What ``e`` is for these inputs.

        Raises:
            ValueError, IndexError: its shapes do not fit together.
        """
        return evaluate(e, self.inputs, self.sizes, self.places)[0]

    def magnitudes(self) -> Sample:
        """The magnitudes of the inputs."""
        return replace(self, inputs={e: np.abs(x) for e, x in self.inputs.items()})

    def zeros(self) -> Sample:
        """Zeros instead of the inputs."""
        return replace(self, inputs={e: np.zeros_like(x) for e, x in self.inputs.items()})


def samples(roots: Sequence[Expr], largest: int | None = None) -> Iterator[Sample]:
    """Inputs on which expressions over the same sources are compared.

    Args:
        largest: how many elements inputs may have together, which are then given everywhere, each as a batch of one;
            None: as many as is sensible; few of them are given where all would take long.

    Raises:
        ValueError: no input just larger than the kernels fits all branches, or it is too large.
    """
    rng = np.random.default_rng(0)
    seen: set[tuple[Ints, ...]] = set()
    layout = has_layout(roots[0])
    pointwise = all(e.is_pointwise for root in roots for e in walk(root) if isinstance(e, Conv))
    for size in SIZES[:1] if pointwise and not layout else SIZES:
        try:
            sample = draw(roots, size, rng, largest)
        except ValueError:
            if size.tiny is None:
                raise
            continue
        shapes = tuple(x.shape for x in sample.inputs.values())
        if shapes in seen:
            continue  # nothing is open
        if not seen and layout:
            yield sample.zeros()
        seen.add(shapes)
        yield sample


def draw(roots: Sequence[Expr], size: Size, rng: np.random.Generator, largest: int | None = None) -> Sample:
    """Random inputs of one size.

    The first expression says which sizes fit: another one that is equal to it takes them too. Every border case
    occurs: sizes exceed the span of the widest kernel by a little and differ from axis to axis. The first axis is a
    batch: of ordinary values, and at the ordinary size also of zeros, where nothing hides a shift, and of values that
    differ by six decades, among which a large weight does not always hide a small one.

    With layout operators, the sources' own shapes are used, with small numbers for their symbols, and values
    are ordinary.

    Raises:
        ValueError: no sizes fit all branches, a shape that a layout operator needs is unknown, or the inputs are too
            large.
    """
    whole = Sum(tuple(roots)) if len(roots) > 1 else roots[0]
    if has_layout(whole):
        shapes, symbols = _declared(roots[0], whole, size)
        _check(shapes, largest)
        return Sample({e: rng.standard_normal(shape) for e, shape in shapes.items()}, symbols)
    batch = 3 if size == ORDINARY and largest is None else 1
    shapes = _just_larger(roots[0], whole, size, batch)
    spatial = {e: shape[2:] for e, shape in shapes.items()}
    at = places(roots, spatial, rng) if largest is None else None
    if at is not None:
        shapes = {e: (*shape[:2], *at.shape(e)) for e, shape in shapes.items()}
    _check(shapes, largest)
    values = _of_all_sizes if batch > 1 else np.random.Generator.standard_normal
    return Sample({e: values(rng, shape) for e, shape in shapes.items()}, {}, at)


def _check(shapes: Mapping[Source, Ints], largest: int | None) -> None:
    if sum(prod(shape) for shape in shapes.values()) > (MOST_ELEMENTS if largest is None else largest):
        raise TooLargeError("its operands are too large")


def _of_all_sizes(rng: np.random.Generator, shape: Ints) -> Array:
    """Ordinary values, zeros, and values that differ by six decades, one after the other along the batch."""
    x = rng.standard_normal(shape)
    x[1], x[2] = 0.0, x[2] * 10.0 ** rng.uniform(-3, 3, shape[1:])
    return x


def _span(whole: Expr) -> int:
    """How far apart the positions are at most that one convolution reads."""
    convs = [e for e in walk(whole) if isinstance(e, Conv)]
    return max((r - min(a, 0) for e in convs for a, r in zip(e.offset, e.reach, strict=True)), default=0)


def _tiny(size: Size, least: int, place: int) -> int:
    """The size number ``place``: from ``least`` up, or tiny."""
    return least + place if size.tiny is None else (size.tiny - 1 + place) % 3 + 1


def _declared(root: Expr, whole: Expr, size: Size) -> tuple[dict[Source, Ints], dict[str, int]]:
    """The sources' own shapes, with small numbers for their symbols."""
    order = list(walk(whole))
    sources = [e for e in walk(root) if isinstance(e, Source)]
    if any(e.shape is None for e in sources):
        raise ValueError("the shape of an operand is unknown")
    if size.tiny is not None and any(isinstance(e, Conv) and e.spatial for e in order):
        raise ValueError("its kernels may not fit into so small a map")
    symbols = _channel_symbols(sources, channel_axes(whole), channels(whole))
    least = 2 + _span(whole) + size.extra
    reshapes = [e.op for e in order if isinstance(e, Layout) and isinstance(e.op, Reshape)]
    shapes = [s.shape or () for s in sources] + [s for op in reshapes for s in (op.before, op.after)]
    named = dict.fromkeys(s for shape in shapes for dim in shape for s in dim.symbols)
    symbols = Sizes(order, symbols).bind([*named], lambda _, place: _tiny(size, least, place))
    return {e: tuple(dim.at(symbols) for dim in e.shape or ()) for e in sources}, symbols


def _just_larger(root: Expr, whole: Expr, size: Size, batch: int) -> dict[Source, Ints]:
    """Shapes [batch, channels, *sizes] that are just larger than the kernels, or give results that are tiny."""
    channels_of, spatial = channels(whole), -1 - (channel_axes(whole)[whole] or -1)
    least = 2 + _span(whole) + size.extra
    wanted = [_tiny(size, least, axis) for axis in range(spatial)]
    for e in walk(whole):
        if isinstance(e, Scale) and e.axis is not None and -e.axis <= spatial:
            wanted[e.axis] = max(count(e.scale), count(e.shift))  # it acts on a spatial axis
    sizes = _sizes(root, wanted)
    return {
        e: (batch, channels_of[e] or 3, *(low + size.extra % (high - low + 1) for low, high in sizes[e]))
        for e in walk(root)
        if isinstance(e, Source)
    }


def _channel_symbols(
    sources: Sequence[Source], axis_of: Mapping[Expr, int | None], channels_of: Mapping[Expr, int | None]
) -> dict[str, int]:
    """Sizes of the symbols of channels, as the operators around them fix them."""
    found: dict[str, int] = {}
    for e in sources:
        axis, count = axis_of[e], channels_of[e]
        if e.shape is not None and axis is not None and count is not None and -axis <= len(e.shape):
            symbols = e.shape[axis].symbols
            if len(symbols) == 1:
                found[symbols[0]] = count
    return found


SEARCHED = 64
"""Sizes tried for a result before its branches are said to agree in size for no input."""


def _sizes(root: Expr, wanted: list[int]) -> dict[Expr, list[tuple[int, int]]]:
    """For every node the range of sizes, per axis, that gives the root a size of ``wanted`` or little more."""
    order = list(walk(root))
    found: dict[Expr, list[tuple[int, int]]] = {e: [] for e in order}
    for axis, least in enumerate(wanted):
        tried = (_sizes_along(order, axis, len(wanted), n) for n in range(least, least + SEARCHED))
        ranges = next((r for r in tried if r is not None), None)
        if ranges is None:
            raise ValueError("its branches agree in size for no input")
        for e in order:
            found[e].append(ranges[e])
    return found


def _sizes_along(order: Sequence[Expr], axis: int, axes: int, size: int) -> dict[Expr, tuple[int, int]] | None:
    """The same along one axis, for one size of the root; None when nothing gives it."""
    found = {order[-1]: (size, size)}
    for e in reversed(order):
        for child in e.children:
            low, high = _read(e, axis, axes, found[e])
            if child in found:
                low, high = max(low, found[child][0]), min(high, found[child][1])
            if low > high or high < 1:
                return None
            found[child] = max(low, 1), high
    return found


def _read(e: Expr, axis: int, axes: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """The sizes of an operand for which ``e`` has one of these, from the first to the last."""
    low, high = sizes
    if not isinstance(e, Conv) or e.spatial != axes:
        return sizes
    s, d = e.stride[axis], e.delta[axis]
    if e.transposed:
        return -((1 + d - low) // s) + 1, (high - 1 - d) // s + 1
    return s * (low - 1) + 1 + d, s * high + d
