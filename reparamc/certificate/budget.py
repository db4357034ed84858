"""What a proof may cost, in units that do not depend on the machine; what would cost more is left undecided."""

from __future__ import annotations


class Exceeded(Exception):
    """A proof would cost more than it may; the message says what."""


TAP = 1024
"""A tap of a kernel costs as much as so many multiplications: each is handled in Python."""

BLOCK = 8 * TAP
"""So does a part of a linear map; see `normal_form.Block`."""

PRODUCT = 1 / 8
"""A multiplication costs so much in a product of matrices."""

LEAST = 1 << 31
"""A proof may always take so many multiplications: a second or two."""

PER_PARAMETER = 64
"""And so many more for each parameter."""

SHARE = 4
"""A window may take one of so many parts of that."""

ELEMENTS = 1 << 27
"""A window may hold so many numbers in float64 that the model does not store: a gigabyte."""


class Meter:
    """Counts multiplications, and the numbers that a window holds."""

    def __init__(self, work: float = float("inf")) -> None:
        self.total = self.left = work
        self._window = work
        self._elements = float("inf")

    def start(self) -> None:
        """Begin a window.

        Raises:
            Exceeded: nothing is left.
        """
        if self.left <= 0:
            raise Exceeded("the whole proof would take too long")
        self._window, self._elements = min(self.left, self.total / SHARE), ELEMENTS

    def spend(self, work: float, elements: float = 0) -> None:
        """Count what is about to be done.

        Raises:
            Exceeded: it is too much.
        """
        self._elements -= elements
        self._window -= work
        self.left -= work
        if self._elements < 0:
            raise Exceeded("the proof of this tensor would take too much memory")
        if self._window < 0:
            raise Exceeded("the proof of this tensor would take too long")


UNLIMITED = Meter()
