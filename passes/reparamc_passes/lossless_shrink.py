"""Channels that are constant for every input, that nothing reads, or that equal another one, leave the graph.

    W f(x) + b  =  W' f(x') + (b + w f(c))        c a channel of x that is constant, w its column of W, f an activation
    W x + b     =  W' x' + b                      where the column of a channel is zero
    W f(x) + b  =  (W' + s w) f(x') + b           where a channel is s times another one, s > 0, and f(s x) = s f(x)

A channel is constant if its filter is zero, the scale of its BatchNorm is zero, or all that it is computed from is
constant. An activation makes another constant of it, which goes into the bias of what reads it. The rows that compute
the channel and the columns that read it leave, and so do the channels that only these read.

Exact if the constant does not meet zero padding: a kernel that pads takes it if it is zero. Channels that belong
together leave together, or not at all: those of a sum and of its terms (a residual stream), of a depthwise kernel, of a
product (squeeze and excitation). They are followed through concatenations, splits, shuffles, poolings, means and
resizes. What reads all channels at once (LayerNorm, softmax, an output of the model) needs all of them. One channel of
each value stays.

A channel is a multiple of another one if the factor gives its row and its bias exactly, as they are stored and float64
computes it. ReLU, LeakyReLU, PReLU with one slope, poolings and resizes pass any positive factor, other activations
only one. The columns that read the channel are added to those of the other, in float64.

It follows from the values of parameters, so that `fuse_fx` does it with ``specialize=True`` only. It comes before all
other passes, and is proven by itself. `reparamc.compiler.liveness` finds the channels, and
`reparamc.compiler.shrink` carries it out. Files of PaddleOCR, and networks pruned by their BatchNorms, need it.
"""

from __future__ import annotations

from reparamc.compiler.plan import FirstPass
from reparamc.compiler.shrink import shrink

LOSSLESS_SHRINK = FirstPass(
    name="lossless-shrink",
    equation="W f(x) + b = W' f(x') + (b + w f(c)),  c a constant channel of x, w its column of W;  "
    "W f(x) + b = (W' + s w) f(x') + b,  where a channel is s > 0 times another",
    exact_when="the channel is constant, and zero if a kernel that pads reads it; nothing reads it; or f(s x) = s f(x)",
    first=shrink,
)
