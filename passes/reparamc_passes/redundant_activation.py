"""An activation leaves if it is the identity on everything that it is given.

    f(x)  =  x                 where x never leaves the interval on which f is the identity

ReLU, LeakyReLU, PReLU, ELU and CELU keep what is not negative; Clip, ReLU6 and Hardtanh keep what is between their
bounds. Values are not negative by construction if they are results of ReLU, Sigmoid, Softmax, Exp, Abs and the like,
squares, or sums, products, averages, maxima, concatenations and layouts of such values. So a second ReLU leaves, and a
ReLU after a Clip from zero, a Clip to wider bounds than the last one, and a LeakyReLU or PReLU of slope 1.

| left alone | example |
|---|---|
| its operand may leave the interval | after a convolution, a difference, a cubic resize |
| bounds or slopes that are tensors of run time, or that a caller may override | Clip of opset 11 and later |
| something writes into its result or its operand | `relu_` of a value that others read afterwards |

It comes before the other passes, which read the graph that is left, and is proven by itself.
`reparamc.compiler.ranges` finds the intervals. The slope of a PReLU is a parameter: `fuse_fx` counts on it with
``specialize=True`` only.
"""

from __future__ import annotations

from reparamc.compiler.plan import FirstPass
from reparamc.compiler.ranges import remove_redundant

REDUNDANT_ACTIVATION = FirstPass(
    name="redundant-activation",
    equation="f(x) = x",
    exact_when="x never leaves the interval on which the activation f is the identity",
    first=remove_redundant,
)
