"""Channels that are a positive multiple of another one, at every position and for every input.

A factor counts if it gives every number that is stored for the channel exactly, as float64 computes it. So factors of
one and powers of two count, and others where nothing was rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reparamc.algebra.arrays import glanced, values
from reparamc.algebra.channels import Index, is_separate, uses
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
            return multiples(start, None, [_rows(e), glanced(e.bias_or_zero)[:, None]])
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


def frees_channels(e: Expr) -> bool:
    """Whether the parameters of ``e`` let channels go.

    They make a known channel of any operand, or do not read a channel of it; or a dense kernel has rows that are
    multiples of others.
    """
    match e:
        case Conv():
            weight = glanced(e.weight)  # held, so that it is read once for all that is asked
            if not weight.all() and not ((read := uses(e)).any(2).all() and read.any(1).all()):
                return True
            dense = e.groups == 1 and not is_separate(e)
            return dense and len(set(alike_after(e, 0, []).of.tolist())) < len(weight)
        case Scale():
            return not glanced(e.scale).all()
        case BatchNorm():
            return not glanced(e.gamma).all()
        case _:
            return False


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
    if len(parts[0]) < 2 or (of is not None and len(set(rows_as_bytes(of))) == len(of)):
        return
    if of is None and parts[0].shape[1] > 1:  # mostly, two numbers of each channel tell all apart
        a, b = np.asarray(parts[0][:, 0], np.float64), np.asarray(parts[0][:, -1], np.float64)
        with np.errstate(all="ignore"):
            if a.all() and len(set((b / np.abs(a)).tolist())) == len(a):
                return
    sampled = [p[:, :: max(1, (p.shape[1] - 1) // (SAMPLED - 1))] for p in parts if p.shape[1]]
    numbers = np.concatenate(sampled, 1, dtype=np.float64)
    lead = np.abs(np.take_along_axis(numbers, (numbers != 0).argmax(1)[:, None], 1))
    with np.errstate(all="ignore"):
        units = np.where(lead > 0, numbers / lead, 0.0) + 0.0
    first = np.zeros(lead.shape)  # of those that are mostly zero: where their numbers begin
    empty = np.flatnonzero(lead == 0)
    first[empty, 0] = np.concatenate([p[empty] != 0 for p in parts], 1).argmax(1)
    keys = rows_as_bytes(np.concatenate([units, first] if of is None else [units, first, of], 1))
    if len(set(keys)) < len(keys):
        groups: dict[bytes, list[int]] = {}
        for at, key in enumerate(keys):
            groups.setdefault(key, []).append(at)
        yield from (np.array(group) for group in groups.values() if len(group) > 1)


def rows_as_bytes(table: npt.NDArray[Any]) -> list[bytes]:
    """The rows of ``table``, to compare and look up: NumPy takes much longer to sort them."""
    rows: Any = np.ascontiguousarray(table)
    return rows.view(f"V{table.shape[1] * table.itemsize}").ravel().tolist()
