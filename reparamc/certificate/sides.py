"""What a proof asks of each of the two graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from reparamc.certificate.narrowing import Separate
from reparamc.certificate.normal_form import Array, Value
from reparamc.certificate.ranges import Bound


class Opened(NamedTuple):
    """An operator as an unknown function and an affine map of what that gives.

    Attributes:
        kind: all that decides what the function is, but for its operands.
        operands: what it reads, in order.
        leaf: what it gives, as a source of that name; raises Unrepresentable where its rank is unknown.
        finish: the affine map.
    """

    kind: Hashable
    operands: Sequence[str]
    leaf: Callable[[str], Value]
    finish: Callable[[Value], Value]


class Form(NamedTuple):
    """All that decides what an operator computes, but for its operands and the numbers of its parameters.

    Operators of one form can be put side by side: each has its own channels, one operator after another.
    """

    kind: Hashable
    dtype: np.dtype
    """Of its result and its parameters."""
    shapes: tuple[tuple[int, ...], ...]
    """Of its parameters."""


class Side(Protocol):
    """One of the two graphs. Tensors have names; `operands` are those that a caller or an operator gives."""

    @property
    def order(self) -> Sequence[str]:
        """What operators compute, in execution order, constants left out."""
        ...

    @property
    def constants(self) -> Collection[str]:
        """The tensors that no input reaches."""
        ...

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that no input reaches; None for all others."""
        ...

    def is_input(self, name: str) -> bool:
        """Whether no operator computes ``name``."""
        ...

    def operands(self, name: str) -> Sequence[str]:
        """What the operator of ``name`` reads, in order."""
        ...

    def kind(self, name: str) -> Hashable:
        """All that decides what the operator of ``name`` computes, but for its operands; None for an input."""
        ...

    def value(self, name: str, of: Callable[[str], Value]) -> Value:
        """``name`` as an affine map of its operands.

        Raises:
            Unrepresentable: it is none, or none that is known.
        """
        ...

    def form(self, name: str) -> Form | None:
        """The form of the operator of ``name``; None if it cannot be put beside others of its form."""
        ...

    def beside(self, members: Sequence[Mapping[str, str]]) -> Side:
        """This graph with operators of one form side by side in the place of those of the first of ``members``.

        Args:
            members: each gives its own tensor for each that the first computes.
        """
        ...

    def opened(self, name: str) -> Opened | None:
        """The operator of ``name``, which is none that is known, as one that ends in a known matrix of channels."""
        ...

    def sizes_told(self, name: str) -> Hashable:
        """The sizes that ``name`` holds, as sizes of the original; None if it is none, or unknown."""
        ...

    def unread(self, met: Collection[str]) -> Sequence[str]:
        """The results of operators that give none of ``met``, and might refuse to run."""
        ...

    def mixes(self, name: str) -> bool:
        """Whether the operator of ``name`` applies a kernel or a matrix."""
        ...

    def narrowed(self, name: str) -> None:
        """Take note that ``name`` has fewer channels than the original: nothing is told of its sizes."""
        ...

    def separate(self, name: str) -> Separate | None:
        """The operator of ``name`` as one that does the same to each channel of its operands; None if it is none."""
        ...

    def bound(self, name: str) -> Bound:
        """What is known of the sizes of the elements of ``name``, by its operator alone."""
        ...

    def leaf(self, name: str, known_as: str) -> Value:
        """``name`` as a source that both graphs call ``known_as``; raises Unrepresentable where its rank is unknown."""
        ...
