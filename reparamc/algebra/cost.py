"""What an expression costs, so that a splice happens only when it pays.

Besides arithmetic, an operator moves its operands and its result through memory, has a fixed price
for being launched, and has parameters that take room in the file. An `Objective` says what each of
these is worth. Sizes are unknown to the algebra, so what an expression starts from is taken to have
a nominal number of positions.
"""

from __future__ import annotations

from math import prod

from reparamc.algebra.arrays import count, is_all
from reparamc.algebra.expr import (
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
    is_negation,
    walk,
)
from reparamc.algebra.infer import channel_axes, channels
from reparamc.algebra.records import record, replace
from reparamc.errors import InputError

POSITIONS = 196.0
"""Nominal positions of a map: 14 x 14. Strides divide them; what makes a map larger starts from fewer."""

CHANNELS = 64
"""Nominal channels of a value where nothing tells their number."""


@record
class Objective:
    """What to minimize, as the prices of what an operator takes. Only their ratios matter.

    Attributes:
        node: launching one operator.
        element: reading or writing one element, weights included.
        mac: one multiply-add; an elementwise operation counts as one per element.
        parameter: one element of a stored parameter.
        transposed: how many multiply-adds of a convolution one of a transposed convolution takes as long as.
        stores_ones: whether a normalization stores a gain where that is one.
    """

    name: str
    node: float
    element: float
    mac: float
    parameter: float
    transposed: float = 1.0
    stores_ones: bool = True

    @property
    def stores(self) -> bool:
        """Whether what is stored counts more than what is computed."""
        return self.parameter > self.mac

    def cost(self, root: Expr) -> float:
        """The price of computing ``root`` from its sources; under `LATENCY` in multiply-adds."""
        known = channels(root)
        positions: dict[Expr, float] = {}
        starts = _starts(root)
        widths: dict[Expr, int] = {}
        cut: set[Expr] = set()  # values whose channels are split, which are priced as if they were whole
        total = 0.0
        for e in walk(root):
            read = min((positions[c] for c in e.children), default=starts.get(e, POSITIONS))
            positions[e] = positions_after(e, read)
            splits = isinstance(e, Layout) and e.splits_channels
            if splits or (isinstance(e, Layout | Scale | BatchNorm) and e.x in cut):
                cut.add(e)
            widths[e] = widths[e.children[0]] if e in cut else known[e] or CHANNELS
            total += self._price(e, widths[e], read)
        return total

    def price(self, conv: Conv, positions: float = POSITIONS) -> float:
        """The price of one convolution over a map of ``positions``."""
        growth = prod(conv.stride) if conv.transposed else 1 / prod(conv.stride)
        moved = positions * (conv.in_channels + conv.out_channels * growth)
        if conv.is_weightless:  # it reads no weights, and its sums are cheap
            return self._operator(0, moved)
        bias = 0 if conv.bias is None else count(conv.bias)
        if not self.stores_ones and conv.reads_taps and conv.bias is None and is_all(conv.weight, 1):
            return self._operator(0, moved)
        share = self.transposed if conv.transposed else 1.0
        return self._operator(
            share * multiply_adds(conv, positions), moved + count(conv.weight), count(conv.weight) + bias
        )

    def moving(self, channels: int, positions: float = POSITIONS) -> float:
        """The price of an operator that moves the elements of a map and computes nothing."""
        return self._operator(0, positions * channels * 2)

    def addition(self, channels: int, positions: float = POSITIONS) -> float:
        """The price of adding two maps."""
        return self._elementwise(channels, 3, positions)

    def _operator(self, macs: float, moved: float, parameters: int = 0) -> float:
        return self.node + self.mac * macs + self.element * moved + self.parameter * parameters

    def _elementwise(self, channels: int, maps: int, positions: float, parameters: int = 0) -> float:
        """The price of one operation per element, reading and writing ``maps`` maps in all."""
        return self._operator(positions * channels, positions * channels * maps, parameters)

    def _price(self, e: Expr, width: int, positions: float) -> float:
        match e:
            case Conv():
                return self.price(e, positions)
            case BatchNorm():
                return self._elementwise(width, 2, positions, 4 * count(e.gamma))
            case Scale():
                multiplied = self._elementwise(width, 2, positions, count(e.scale)) if is_multiplied(e) else 0.0
                return multiplied + self._shift(e, width, positions)
            case Sum():
                return (len(e.terms) - 1) * self.addition(width, positions)
            case Layout():
                made = positions_after(e, positions)
                return self._operator(0, ((made if isinstance(e.op, Take) else positions) + made) * width)
            case Concat() | Select():
                return self.moving(width, positions)
            case Source():
                return 0.0

    def _shift(self, e: Scale, width: int, positions: float) -> float:
        """The price of a shift; of one that needs no addition, that of its parameters alone."""
        if is_shifted(e):
            return self._elementwise(width, 2, positions, count(e.shift))
        return self.parameter * count(e.shift) if not is_all(e.shift, 0) else 0.0


TARGETS = {"onnxruntime": 1.5, "openvino": 1.4}
"""`Objective.transposed` of runtimes, as measured by ``python benchmarks/targets.py``."""

LATENCY = Objective("latency", node=20_000.0, element=4.0, mac=1.0, parameter=0.0, transposed=TARGETS["onnxruntime"])
"""Time. Round figures for a CPU or a phone, where a multiply-add is cheap beside an element read from memory."""

MACS = Objective("macs", node=20_000e-9, element=4e-9, mac=1.0, parameter=0.0)
"""Multiply-adds. The others break ties: smaller than any difference in multiply-adds, larger than rounding."""

PARAMS = Objective("params", node=20_000e-12, element=4e-12, mac=1e-12, parameter=1.0)
"""Stored parameters. The others break ties, in the proportions of `LATENCY`."""

OBJECTIVES = {o.name: o for o in (LATENCY, MACS, PARAMS)}


def objective_of(name: str) -> Objective:
    """The objective ``name``; ``latency@openvino`` is the latency on that one of `TARGETS`.

    Raises:
        InputError: there is no such objective.
    """
    plain, _, target = str(name).partition("@")
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if plain == LATENCY.name and target in TARGETS:
        return replace(LATENCY, name=name, transposed=TARGETS[target])
    known = f"{', '.join(OBJECTIVES)}, and latency@ with one of {', '.join(TARGETS)}"
    raise InputError(f"unknown objective {name!r}; the objectives are {known}")


def positions_after(e: Expr, positions: float = POSITIONS) -> float:
    """The positions of the result of ``e`` over a map of ``positions``."""
    if isinstance(e, Conv):
        return positions * prod(e.stride) if e.transposed else positions / prod(e.stride)
    if not isinstance(e, Layout):
        return positions
    match e:
        case Layout(op=Resize() as op):
            return positions * float(op.growth)
        case Layout(op=Spread(block=block, back=True)):
            return positions / block**2
        case Layout(op=Spread(block=block)):
            return min(positions * block**2, POSITIONS)
        case Layout(op=(Mean() | Take()) as op) if e.axis_in is not None and e.axis_in > -op.rank:
            along = op.rank - 1 - (e.axis_in + op.rank > 0)  # neither the batch nor the channels
            gone = len(op.axes) if isinstance(op, Mean) else min(op.axis, 1)
            return max(positions ** (1 - gone / along), 1.0) if along > 0 else positions
        case _:
            return positions


def _starts(root: Expr) -> dict[Expr, float]:
    """The positions of what an expression starts from, where it resizes: as many as are known, or so that they fit."""
    order = list(walk(root))
    if not any(isinstance(e.op, Resize) if isinstance(e, Layout) else is_spreading(e) for e in order):
        return {}
    axes = channel_axes(root)
    known = {e: _area(e, axes[e]) for e in order if isinstance(e, Source)}
    if all(area is not None for area in known.values()):
        return {e: float(area) for e, area in known.items() if area is not None}
    wanted: dict[Expr, float] = {root: POSITIONS}
    for e in reversed(order):
        for child in e.children:
            wanted[child] = max(wanted.get(child, 0.0), wanted[e] / positions_after(e, POSITIONS) * POSITIONS)
    return wanted


def is_spreading(e: Expr) -> bool:
    """Whether ``e`` is a transposed convolution whose result is larger than its operand."""
    return isinstance(e, Conv) and e.transposed and prod(e.stride) > 1


def _area(e: Source, axis: int | None) -> int | None:
    """The positions of a source with channels along ``axis``, the first axis a batch; None where it is open."""
    if e.shape is None or len(e.shape) < 2:
        return None
    axis = axis or 1 - len(e.shape)
    sizes = [d.known for a, d in enumerate(e.shape) if a and a - len(e.shape) != axis]
    return None if None in sizes else prod(n for n in sizes if n is not None)


def multiply_adds(conv: Conv, positions: float = POSITIONS) -> float:
    """The multiply-adds of one convolution over a map of ``positions``."""
    return positions / (1 if conv.transposed else prod(conv.stride)) * count(conv.weight)


def is_multiplied(e: Scale) -> bool:
    """Whether ``e`` needs a multiplication. A factor of -1 does not: sums subtract instead."""
    return not is_all(e.scale, 1) and not is_negation(e)


def is_shifted(e: Scale) -> bool:
    """Whether ``e`` needs an addition. The bias of a linear layer does not: it is part of the product."""
    is_bias = isinstance(e.x, Conv) and e.x.spatial == 0 and e.x.bias is None and is_all(e.scale, 1)
    return not is_all(e.shift, 0) and not is_bias
