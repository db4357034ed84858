"""f(x) = K * x + b: the kernel of any operator is its impulse response, if it is affine and the same everywhere.

For trees of linear operators that no rule knows (slices and slice assignments, paddings with values,
reshapes, einsums, cumulative sums, ...), and for those whose rules refuse one by one what is exact as a
whole: a BatchNorm whose border value stands where the next convolution would read zeros. b is f(0), K
what f makes of a one in one place; that K * x + b is f is tested on random inputs of several sizes, up to
the borders (`reparamc.algebra.probe`). The drivers carry it out, after all other passes, where it pays.
"""

from __future__ import annotations

from reparamc.algebra.rewrite import Pass

IMPULSE_RESPONSE = Pass(
    name="impulse-response",
    equation="f(x) = K*x + b,  b = f(0),  K = f(impulse) - b",
    exact_when="f consists of operators that are linear by kind, and K*x + b gives what f gives, borders included",
)
