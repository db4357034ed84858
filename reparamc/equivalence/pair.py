"""Two models on the same inputs: what both make of them, and what rounding does to the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from reparamc.equivalence.difference import Difference, Outputs, differences, noise_of, nudged
from reparamc.equivalence.runnable import Tree, mapped
from reparamc.errors import InputError

PERTURBATIONS = 3
"""Roundings of the input. The worst one decides: another may be absorbed by a saturated layer."""


class RefusedError(Exception):
    """The original does not run on these inputs; the cause is what it raised."""


class BrokenError(Exception):
    """The result does not run on inputs that the original takes; the cause is what it raised."""


def perturbed(inputs: Tree, seed: int) -> Tree:
    """``inputs`` with every floating entry of an array moved by one rounding, up or down."""
    rng = np.random.default_rng(seed)
    return mapped(lambda array: nudged(array, rng), inputs)


@dataclass(frozen=True)
class Pair:
    """Two models, as functions from inputs to outputs by name.

    Attributes:
        by_name: whether outputs belong together by their names, or else by their places.
        seed: of the perturbations.
        perturb: inputs moved by one rounding, by a seed.
    """

    original: Callable[[Any], Outputs]
    result: Callable[[Any], Outputs]
    by_name: bool = True
    seed: int = 0
    perturb: Callable[[Any, int], Any] = perturbed

    def compare(self, inputs: Any, expected: Outputs | None = None) -> Comparison:
        """Both models on ``inputs``; ``expected`` is what the original makes of them, where that is known.

        Raises:
            RefusedError: the original does not run.
            BrokenError: the result does not.
            InputError: an output cannot be compared.
        """
        if expected is None:
            expected = _run(self.original, inputs, RefusedError)
        actual = _run(self.result, inputs, BrokenError)
        return Comparison(self, inputs, expected, actual, differences(expected, actual, by_name=self.by_name))


def _run(model: Callable[[Any], Outputs], inputs: Any, failure: type[Exception]) -> Outputs:
    try:
        return model(inputs)
    except InputError:
        raise
    except Exception as error:  # whatever a model or its runtime raises
        raise failure from error


@dataclass
class Comparison:
    """What two models make of the same inputs.

    Attributes:
        found: how far each output of the result lies from that of the original; None where the structures differ.
    """

    pair: Pair
    inputs: Any
    expected: Outputs
    actual: Outputs
    found: dict[str, Difference] | None
    _responses: list[Outputs] = field(default_factory=list)

    def responses(self, times: int = PERTURBATIONS) -> list[Outputs]:
        """What the original makes of ``times`` perturbed inputs; it is run when it is first asked."""
        for n in range(len(self._responses), times):
            self._responses.append(self.pair.original(self.pair.perturb(self.inputs, self.pair.seed + n)))
        return self._responses[:times]

    def noise(self, name: str, times: int = PERTURBATIONS) -> float:
        """The largest relative change of an output among `responses`, where it is a finite number."""
        return noise_of(self.expected[name], [r[name] for r in self.responses(times) if name in r])
