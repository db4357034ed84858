"""The host's own word: a region of each kind is run by the framework itself, operator by operator, in float64.

The expression that a region is read as, and that of its replacement, are compared with what the operators give. A
reader that takes an attribute for something else is wrong in both, and only the operators themselves can tell. They are
slow, so one region speaks for all of its **kind**: those made of the same operators with the same attributes, read as
expressions of the same structure. Weights and numbers of channels make no kind of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod

import numpy as np

from reparamc.algebra.arrays import values
from reparamc.algebra.equal import REGION_TOLERANCE, relative, structure
from reparamc.algebra.evaluate import TooLargeError, absolute, evaluate
from reparamc.algebra.expr import Array, Conv, Expr, Layout, Resize, Source, walk
from reparamc.algebra.infer import has_layout
from reparamc.algebra.resample import OTHER
from reparamc.algebra.samples import samples
from reparamc.algebra.text import show
from reparamc.compiler.graph import Graph
from reparamc.compiler.readings import Reading, Taps, Value
from reparamc.errors import one_line
from reparamc.report.data import FailedRegion, Refusal

LARGEST = 2**18
"""Elements of the operands together, beyond which a region is not run: some operators of ONNX's reference are slow."""
LARGEST_EXACT = 2**23
"""The same where a region has to be run at the sizes that the graph declares, which is the exception."""


@dataclass
class Reference:
    """What the host's operators said of the readings of a graph.

    Attributes:
        told: the same as ``errors`` for all graphs that are fused together: what ran in one is not run in the next.
        errors: for each kind that was run, the largest error of its reading.
        unable: a place of each kind that could not be run, and why.
        failures: what was found wrong, by this check or another; a region may be considered, and fail, several times.
    """

    graph: Graph
    readings: Mapping[Value, Reading]
    told: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    errors: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    unable: list[Refusal] = field(default_factory=list[Refusal])
    failures: dict[tuple[str, str], FailedRegion] = field(default_factory=dict[tuple[str, str], FailedRegion])
    _asked: set[Hashable] = field(default_factory=set[Hashable])

    def compare(self, members: Sequence[Value], before: Expr, after: Expr) -> tuple[float | None, float | None]:
        """The largest errors of ``before``, the expression of ``members``, and of ``after``; None where unknown.

        They are relative to the terms of ``before``. The first is that of the first region of this kind. The other is
        known for that region alone: the proof decides for all regions, weights and sizes what samples suggest, and what
        it leaves undecided is sampled then. No operator tells its `Taps`, or the weights of any other resize.
        """
        if any(isinstance(o, Taps) for v in members for o in self.readings[v].operands):
            return None, None
        if any(isinstance(e, Layout) and isinstance(e.op, Resize) and e.op.mode == OTHER for e in walk(before)):
            return None, None
        kind = self._kind(members, before)
        if kind in self._asked or kind in self.told:
            return self.told.get(kind), None
        self._asked.add(kind)
        try:
            self.told[kind], replaced = self._compare(members, before, after)
        except _UnableError as reason:
            self.unable.append(Refusal(self.graph.name(members[-1]), "host", str(reason)))
            return None, None
        self.errors[kind] = self.told[kind]
        return self.errors[kind], replaced

    def checked(
        self, members: Sequence[Value], before: Expr, after: Expr, passes: tuple[str, ...]
    ) -> FailedRegion | float | None:
        """The second of what `compare` gives; how a region failed where either is no rounding."""
        read, error = self.compare(members, before, after)
        for check, found in (("reading", read), ("rewrite", error)):
            if found is not None and not found <= REGION_TOLERANCE:
                return self.fail(members[-1], check, found, passes, show(before), show(after))
        return error

    def is_wrong(self, members: Sequence[Value], before: Expr) -> float | None:
        """The error of ``before``, the expression of ``members``, if it is no rounding."""
        error = self.compare(members, before, before)[0]
        return None if error is None or error <= REGION_TOLERANCE else error

    def fail(
        self, root: Value, check: str, error: float, passes: tuple[str, ...], before: str, after: str
    ) -> FailedRegion:
        """Note that the replacement of the region that ends in ``root`` failed a check; see `FailedRegion`."""
        finite = error if np.isfinite(error) else None
        found = FailedRegion(self.graph.name(root), check, finite, REGION_TOLERANCE, passes, before, after)
        self.failures[found.where, check] = found
        return found

    def _kind(self, members: Sequence[Value], before: Expr) -> Hashable:
        places = {v: n for n, v in enumerate(members)}
        host = tuple((self.graph.kind(v), *(places.get(o) for o in self.readings[v].operands)) for v in members)
        return host, structure(before)

    def _compare(self, members: Sequence[Value], before: Expr, after: Expr) -> tuple[float, float]:
        """As `compare`, at an odd and an even size where steps are more than one position; where only the sizes of the
        graph satisfy its operators, at those.
        """
        failure: Exception | None = None
        found = [(0.0, 0.0)]
        strided = any(max(e.stride, default=1) > 1 for e in walk(before) if isinstance(e, Conv))
        many = 2 if strided or has_layout(before) else 1
        try:
            found += [self._differences(members, before, after, *given) for given in islice(_ordinary(before), many)]
        except TooLargeError as error:
            raise _UnableError(f"{error} for the reference operators of the framework") from error
        except Exception as error:  # whatever a host's operators raise
            failure = error
        if failure is None and all(error <= REGION_TOLERANCE for error, _ in found):
            return _largest(found)
        exact: list[tuple[float, float]] = []
        for given in _exact(before):
            try:
                exact.append(self._differences(members, before, after, *given))
            except Exception as error:  # as above
                failure = error
        if failure is not None and not exact:
            raise _UnableError(f"the framework's operators do not run on sample inputs: {one_line(failure)}")
        return _largest(exact or found)

    def _differences(
        self, members: Sequence[Value], before: Expr, after: Expr, inputs: dict[Source, Array], sizes: Mapping[str, int]
    ) -> tuple[float, float]:
        given: dict[Value, Array] = {e.key: x for e, x in inputs.items()}
        for v in members:
            given[v] = self.graph.run(v, {o: given[o] for o in self.readings[v].operands}, sizes)
        expected = given[members[-1]]
        found, _ = evaluate(before, inputs, sizes)
        terms, _ = evaluate(absolute(before), {e: np.abs(x) for e, x in inputs.items()}, sizes)
        error = relative(expected, found, terms)
        if after is before:
            return error, error
        try:
            return error, relative(expected, values(evaluate(after, inputs, sizes)[0]), terms)
        except (ValueError, IndexError):  # its shapes do not fit together
            return error, float("inf")


def _largest(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    before, after = (max(column, key=lambda e: (np.isnan(e), e)) for column in zip(*errors, strict=True))
    return before, after


class _UnableError(Exception):
    """Why the host's operators cannot be asked."""


def _ordinary(before: Expr) -> Iterator[tuple[dict[Source, Array], Mapping[str, int]]]:
    """Sample inputs, one of each batch, with as many axes as the operands have in the graph."""
    layout = has_layout(before)
    for sample in samples([before], largest=LARGEST):
        if layout and not any(x.any() for x in sample.inputs.values()):
            continue
        yield {e: x if layout else _in_rank(e, x) for e, x in sample.inputs.items()}, sample.sizes


def _in_rank(e: Source, x: Array) -> Array:
    """``x`` [1, channels, *sizes] with the rank of ``e``, where that is known."""
    rank = len(e.shape) if e.shape is not None else x.ndim
    return np.reshape(x, [1] * (rank - x.ndim) + list(x.shape)) if rank >= x.ndim else x[0] if rank == x.ndim - 1 else x


def _exact(before: Expr) -> Iterator[tuple[dict[Source, Array], Mapping[str, int]]]:
    """Inputs of the sizes that the graph declares, and odd and even ones that it leaves open; none of unknown rank."""
    rng = np.random.default_rng(0)
    sources = [e for e in walk(before) if isinstance(e, Source)]
    names = list(dict.fromkeys(s for e in sources for dim in e.shape or () for s in dim.symbols))
    for least in (3, 4)[: 1 + bool(names)] if all(e.shape for e in sources) else ():
        open_sizes = {s: least + n % 3 for n, s in enumerate(names)}
        shapes = {e: [d.at(open_sizes) for d in e.shape or ()] for e in sources}
        if sum(map(prod, shapes.values())) <= LARGEST_EXACT:
            yield {e: rng.standard_normal(shape) for e, shape in shapes.items()}, open_sizes
