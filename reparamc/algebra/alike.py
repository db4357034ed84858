"""Channels that are a positive multiple of another one, at every position and for every input.

A factor counts if it gives every number that is stored for the channel exactly, as float64 computes it. So factors of
one and powers of two count, and others where nothing was rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from reparamc.algebra.arrays import glanced, values
from reparamc.algebra.channels import Index, is_separate
from reparamc.algebra.expr import Array, BatchNorm, Concat, Conv, Expr, Scale, Select, Sum
from reparamc.algebra.kernels import coefficients
from reparamc.algebra.records import entity


@entity
class Alike:
    """For each channel of a value the one in the graph that it is a multiple of, by number, and the factor."""

    of: Index
    factor: Array

    @staticmethod
    def alone(start: int, width: int) -> Alike:
        return Alike(np.arange(start, start + width), np.ones(width))

    def within(self) -> Alike:
        """The same by the first such channel of the value itself, counted from 0."""
        _, first, group = np.unique(self.of, return_index=True, return_inverse=True)
        of = first[group.ravel()]
        factor = self.factor / self.factor[of]
        exact = factor * self.factor[of] == self.factor
        return Alike(np.where(exact, of, np.arange(len(of))), np.where(exact, factor, 1.0))


def alike_after(e: Expr, start: int, operands: Sequence[Alike]) -> Alike:
    """The channels of ``e``, which have the numbers from ``start`` on, from those of its operands."""
    match e:
        case Concat():
            # Those of one value, put there twice, are alike: of two values the certificate cannot tell.
            apart = np.repeat([e.terms.index(t) for t in e.terms], e.sizes)
            of, factor = (np.concatenate(a) for a in zip(*((x.of, x.factor) for x in operands), strict=True))
            return multiples(start, np.stack([apart, of], 1), [factor[:, None]])
        case Select():
            return Alike(operands[0].of[[*e.index]], operands[0].factor[[*e.index]])
        case Conv() if not is_separate(e):
            return multiples(start, None, [_rows(e), values(e.bias_or_zero)[:, None]])
        case Conv():
            x = np.repeat(np.arange(e.in_channels), e.out_channels // e.in_channels)
            of, factor = operands[0].of[x], operands[0].factor[x, None]
            return multiples(start, of[:, None], [_rows(e) * factor, values(e.bias_or_zero)[:, None]])
        case Scale() | BatchNorm():
            x = operands[0]
            with np.errstate(all="ignore"):
                scale, shift = (np.broadcast_to(values(v), len(x.of)) for v in coefficients(e))
                return multiples(start, x.of[:, None], [(scale * x.factor)[:, None], shift[:, None]])
        case _:
            return multiples(
                start, np.stack([x.of for x in operands], 1),
                [np.stack([x.factor for x in operands], 1) if isinstance(e, Sum) else operands[0].factor[:, None]],
            )  # fmt: skip


def repeats(e: Expr) -> bool:
    """Whether a dense kernel has rows that are multiples of one another."""
    if not isinstance(e, Conv) or is_separate(e) or e.groups > 1:
        return False
    return bool(np.any(np.diff(np.sort(alike_after(e, 0, []).of)) == 0))


def _rows(conv: Conv) -> Array:
    return np.reshape(glanced(conv.weight), (conv.out_channels, -1))


def multiples(start: int, of: Index | None, parts: Sequence[Array]) -> Alike:
    """Channels that are computed by the same function of the channels ``of`` [channel, operand], but for a factor.

    Args:
        parts: what is stored for each channel: [channel, number].
    """
    found = Alike.alone(start, len(parts[0]))
    for group in _candidates(of, parts):
        first = dict[bytes, int]()
        rows = np.concatenate([np.asarray(p[group], np.float64) for p in parts], 1)
        for row, at in enumerate(group.tolist()):
            filled = np.flatnonzero(rows[row])
            if not len(filled) or not np.isfinite(rows[row]).all():
                continue  # what is zero is known
            other = first.setdefault((rows[row] / abs(rows[row, filled[0]]) + 0.0).tobytes(), row)
            factor = rows[row, filled[0]] / rows[other, filled[0]]
            if other != row and np.array_equal(factor * rows[other], rows[row]):
                found.of[at], found.factor[at] = start + group[other], factor
    return found


SAMPLED = 8
"""Numbers of each channel that are compared first."""


def _candidates(of: Index | None, parts: Sequence[Array]) -> Iterator[Index]:
    """Groups of channels that may be multiples of one another."""
    if len(parts[0]) < 2 or (of is not None and len(np.unique(of, axis=0)) == len(of)):
        return
    sampled = [p[:, np.unique(np.linspace(0, p.shape[1] - 1, SAMPLED, dtype=int))] for p in parts if p.shape[1]]
    numbers = np.concatenate(sampled, 1, dtype=np.float64)
    lead = np.abs(np.take_along_axis(numbers, (numbers != 0).argmax(1)[:, None], 1))
    with np.errstate(all="ignore"):
        units = np.where(lead > 0, numbers / lead, 0.0)
    keys = units if of is None else np.concatenate([units, of], 1)
    _, group, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    for at in np.flatnonzero(size > 1):
        yield np.flatnonzero(group.ravel() == at)
