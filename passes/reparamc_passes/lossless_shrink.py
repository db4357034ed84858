"""Channels that are constant for every input, or that nothing reads, leave the graph.

    W f(x) + b  =  W' f(x') + (b + w f(c))        c a channel of x that is constant, w its column of W, f an activation
    W x + b     =  W' x' + b                      where the column of a channel is zero

A channel is constant if its filter is zero, the scale of its BatchNorm is zero, or all that it is computed from is
constant. An activation makes another constant of it, which goes into the bias of what reads it. The rows that compute
the channel and the columns that read it leave, and so do the channels that only these read.

Exact if the constant does not meet zero padding: a kernel that pads takes it if it is zero. Channels that belong
together leave together, or not at all: those of a sum and of its terms (a residual stream), of a depthwise kernel, of a
product (squeeze and excitation). They are followed through concatenations, splits, shuffles, poolings, means and
resizes. What reads all channels at once (LayerNorm, softmax, an output of the model) needs all of them. One channel of
each value stays.

It follows from the values of parameters, so that `fuse_fx` does it with ``specialize=True`` only. It comes before all
other passes, and is proven by itself. `reparamc.compiler.liveness` finds the channels, and
`reparamc.compiler.shrink` carries it out. Files of PaddleOCR, and networks pruned by their BatchNorms, need it.
"""

from __future__ import annotations

from reparamc.compiler.plan import FirstPass
from reparamc.compiler.shrink import shrink

LOSSLESS_SHRINK = FirstPass(
    name="lossless-shrink",
    equation="W f(x) + b = W' f(x') + (b + w f(c)),  c a constant channel of x, w its column of W",
    exact_when="the channel is constant, and zero if a kernel that pads reads it; or nothing reads it",
    first=shrink,
)
