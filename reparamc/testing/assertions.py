"""`assert_equivalent`: two models compute the same, or an AssertionError says where and by how much they do not."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from reparamc.algebra.dtypes import epsilon_of
from reparamc.equivalence.difference import Difference, ulps
from reparamc.equivalence.difference import tolerance as explained
from reparamc.equivalence.pair import BrokenError, Comparison, Pair, RefusedError
from reparamc.equivalence.runnable import Domain, NoArrayError, Runnable, Tree, leaves
from reparamc.errors import InputError, one_line
from reparamc.testing.inputs import arrays_of, runnable_of


def assert_equivalent(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    tolerance: float | None = None,
    examples: int = 8,
    check_dtype: bool = True,
    seed: int = 0,
) -> None:
    """Raise AssertionError unless ``b`` computes what ``a`` computes, on every one of several inputs.

    Compared are the structure of the results, shapes, dtypes, the places of NaN and infinities, and all values.
    Lists and tuples count as the same. Both sides are left as they are, and so is the global random state: random
    operators draw the same numbers on both sides.

    Args:
        a, b: torch modules (in the mode they are in), ONNX models or their paths, or functions of arrays or tensors, in
            any combination. Arguments go by name where both sides know the same names, otherwise by position.
            Outputs of an ONNX model are compared in order.
        inputs: one tensor or array, a tuple of positional arguments, a mapping from names, a list of these, or a
            strategy of hypothesis (in a test that hypothesis runs, draw there and pass what was drawn). None: what
            `inputs_for` finds out from ``a``, or else ``b``.
        tolerance: largest difference allowed, relative to the largest finite magnitude in that output of ``a``. None:
            what rounding explains, by the response of ``a`` to perturbations of the input at rounding level.
        examples: how many inputs are tried where they are derived or drawn.
        check_dtype: whether outputs must be of the same dtype.
        seed: of derived inputs and of perturbations.

    Raises:
        AssertionError: they differ, or ``b`` fails where ``a`` runs.
        InputError: ``a`` fails, no inputs can be derived, or the tolerance is negative.
    """
    check_tolerance(tolerance)
    torch = sys.modules.get("torch")
    given = inputs if isinstance(inputs, list) else [inputs]
    tensors = torch is not None and any(
        isinstance(v, torch.nn.Module | torch.Tensor) for v in (a, b, *(leaf for i in given for _, leaf in leaves(i)))
    )
    pair = _Pair(runnable_of(a, tensors), runnable_of(b, tensors), tolerance, check_dtype, seed)
    if hasattr(inputs, "example") and hasattr(inputs, "filter"):
        _on_strategy(pair, inputs, examples)
        return
    if inputs is None:
        given = list(_domain(pair.a, pair.b).some(examples, seed))
    if not given:
        raise InputError("an empty list of inputs compares nothing")
    for number, one in enumerate(given, 1):
        pair.compare(one, f" (number {number} of {len(given)})" if len(given) > 1 else "")


def check_tolerance(tolerance: float | None) -> None:
    """Raise InputError unless ``tolerance`` is None or a number from 0."""
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"a tolerance cannot be {tolerance:g}: give 0 or more, or None for what rounding explains")


def _domain(*sides: Runnable) -> Domain:
    """What inputs the first side takes that tells."""
    failure = InputError("neither of two functions tells what inputs it takes; give inputs")
    for side in sides:
        try:
            if (domain := side.domain(None)) is not None:
                return domain
        except InputError as error:
            failure = error
    raise failure


def _on_strategy(pair: _Pair, strategy: Any, examples: int) -> None:
    from hypothesis import HealthCheck, given, settings

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=cast(Any, [*HealthCheck]),
    )
    @given(strategy)
    def same(inputs: Any) -> None:
        pair.compare(inputs, "")

    same()


@dataclass(frozen=True)
class _Pair:
    a: Runnable
    b: Runnable
    tolerance: float | None
    check_dtype: bool
    seed: int

    def compare(self, inputs: Tree, which: str) -> None:
        inputs = arrays_of(inputs)
        head = [f"  a          {self.a.kind}", f"  b          {self.b.kind}", f"  inputs     {_sizes(inputs)}{which}"]
        flat = self.a.flat or self.b.flat
        pair = Pair(lambda x: self._called("a", x), lambda x: self._called("b", x), not flat, self.seed)
        try:
            compared = pair.compare(inputs)
        except RefusedError as error:
            why = one_line(error.__cause__ or error)
            raise InputError(f"a, {self.a.kind}, does not run on {_sizes(inputs)}: {why}") from error.__cause__
        except BrokenError as error:
            why = f"  error      {one_line(error.__cause__ or error)}"
            raise AssertionError("\n".join(["b does not run where a does", *head, why])) from error.__cause__
        if compared.found is None:
            sides = ("a", compared.expected), ("b", compared.actual)
            lines = [f"  {side} returns  {len(v)}: {', '.join(v)}" for side, v in sides]
            raise AssertionError("\n".join(["b returns another structure than a", *head, *lines]))
        for name, d in compared.found.items():
            lines = _kinds(d, self.check_dtype)
            if not lines and not d.equal:
                lines = _values(d, self._allowed(compared, name, d), self.tolerance is None)
            if lines:
                output = f"  output     {_described(name, d.expected)}"
                raise AssertionError("\n".join(["b differs from a", *head, output, *lines]))

    def _allowed(self, compared: Comparison, name: str, d: Difference) -> float:
        if self.tolerance is not None or not d.rounds:
            return self.tolerance or 0.0
        epsilon = max([self.a.epsilon, epsilon_of(d.expected.dtype), *_epsilons(compared.inputs)])
        return explained(compared.noise(name), epsilon)

    def _called(self, side: str, inputs: Tree) -> dict[str, Any]:
        """The results of a side: by name if it knows those of the inputs, else in the order of the one that does."""
        runnable = self.a if side == "a" else self.b
        try:
            args, kwargs = self._arguments(runnable.names, inputs)
            return dict(runnable(args, kwargs))
        except NoArrayError as error:
            raise InputError(f"{side}, {runnable.kind}, returns {error}") from error

    def _arguments(self, names: tuple[str, ...] | None, inputs: Tree) -> tuple[Sequence[Tree], Mapping[str, Tree]]:
        if isinstance(inputs, Mapping):
            if names is None or set(inputs) <= set(names):
                return (), inputs
            for order in (self.a.names, self.b.names):
                if order and set(inputs) <= set(order):
                    return [inputs[n] for n in order if n in inputs], {}
            raise InputError(f"no side has inputs named {', '.join(map(repr, inputs))}")
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        first = self.a.names
        if first and names and first != names and set(first) == set(names) and len(args) <= len(first):
            return (), dict(zip(first, args, strict=False))
        return args, {}


# What differs


def _kinds(d: Difference, check_dtype: bool) -> list[str]:
    """How two values differ before any arithmetic: in shape, in dtype, or as plain Python values."""
    if d.same_shape:
        wrong = check_dtype and not d.same_dtype
        return [f"  dtype      a has {d.expected.dtype}, b has {d.actual.dtype}"] if wrong else []
    if d.arrays:
        return [f"  shape      a has {list(d.expected.shape)}, b has {list(d.actual.shape)}"]
    return [f"  value      a has {_short(d.expected)}, b has {_short(d.actual)}"]


def _values(d: Difference, allowed: float, by_rounding: bool) -> list[str]:
    """Where and by how much two arrays of one shape differ; nothing if they do not."""
    if d.rounds and d.within(allowed):
        return []
    a, b, at, gaps = d.expected, d.actual, d.worst, d.gaps()
    if not d.rounds:
        return [f"  first at   {list(at)}: a has {a[at]}, b has {b[at]}", _spread(gaps > 0)]
    if not d.same_kind:
        return [
            f"  NaN, inf   a has {np.isnan(a).sum()} NaN and {np.isinf(a).sum()} infinities, "
            f"b has {np.isnan(b).sum()} and {np.isinf(b).sum()}",
            f"  first at   {list(at)}: a has {a[at]}, b has {b[at]}",
            _spread(np.isinf(gaps)),
        ]
    last = ulps(a[(*at, None)], b[(*at, None)].astype(a.dtype))
    counted = "" if last is None else f", {last:,} ULP"
    times = d.max_rel / allowed if allowed else float("inf")
    reason = "what rounding explains" if by_rounding else "the tolerance given"
    return [
        f"  worst at   {list(at)}: a has {a[at]:.9g}, b has {b[at]:.9g}",
        f"  difference {d.max_abs:.3g} absolute, {d.max_rel:.3g} of the largest value of a{counted}",
        f"  allowed    {allowed:.3g} of the largest value: it is {times:.3g} times {reason}",
        _spread(gaps > allowed * d.size),
    ]


def _spread(wrong: np.ndarray) -> str:
    """How many elements are wrong, and how many of them are at the border of a map."""
    line = f"  wrong      {int(wrong.sum())} of {wrong.size} elements"
    axes = [axis for axis in range(2, wrong.ndim) if wrong.shape[axis] > 2]
    if not axes:
        return line
    inner = tuple(slice(1, -1) if axis in axes else slice(None) for axis in range(wrong.ndim))
    inside = int(wrong[inner].sum())
    border = int(wrong.sum()) - inside
    return f"{line}: {border} at the border of axes {', '.join(map(str, axes))}, {inside} in the interior"


def _epsilons(inputs: Tree) -> list[float]:
    return [epsilon_of(v.dtype) for _, v in leaves(inputs) if isinstance(v, np.ndarray)]


# Words


def _sizes(inputs: Tree) -> str:
    named = (
        inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs if isinstance(inputs, tuple) else [inputs])
    )
    parts = []
    for name, tree in named:
        values = ", ".join(_described("", v).strip() for _, v in leaves(tree))
        parts.append(f"{name} {values}" if isinstance(name, str) else values)
    return "; ".join(parts)


def _described(name: str, value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{name} {value.dtype}{list(value.shape)}"
    return f"{name} {_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
