"""W * x and W * x are computed once.

Equal convolutions of one value, with equal weights and biases, in different parts of the graph. They are
compared in their final form, after all other passes, number by number; the later one takes the result of
the first. `reparamc.compiler.duplicates` carries it out.
"""

from __future__ import annotations

from reparamc.algebra.rewrite import Pass

DUPLICATE_REMOVAL = Pass(
    name="duplicate-removal",
    equation="f(x), f(x) = y, y  with y = f(x)",
    exact_when="all parameters and operands are equal, and nothing writes into either result",
)
