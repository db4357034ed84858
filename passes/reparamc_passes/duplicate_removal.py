"""Equal convolutions of one value are computed once.

    f(x), f(x)  =  y, y        y = f(x)

The same operators over the same value, with equal weights and biases, in different parts of the graph: weights
shared between heads, modules called twice on one value. They are compared in their final form, after all other
passes, number by number; the later one takes the result of the first. `reparamc.compiler.duplicates` carries it
out.

| left alone | example |
|---|---|
| any parameter differs, or the dtype | two initialisations |
| something writes into the result | torch: `y += 1` after one of them |
| there is no convolution or linear layer in it | two equal scales |
"""

from __future__ import annotations

from reparamc.compiler.duplicates import remove_duplicates
from reparamc.compiler.plan import GraphPass

DUPLICATE_REMOVAL = GraphPass(
    name="duplicate-removal",
    equation="f(x), f(x) = y, y  with y = f(x)",
    exact_when="all parameters and operands are equal, and nothing writes into either result",
    run=remove_duplicates,
)
