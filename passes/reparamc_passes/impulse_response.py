"""Operators that together are affine and the same everywhere become the convolution with their impulse response.

    f(x)  =  K * x + b        b = f(0),  K = f(impulse) - b

For trees of linear operators that no rule knows (slices and slice assignments, paddings with values, reshapes,
einsums, shifts), and for those whose rules decline one by one what is exact as a whole. DBB and ECB need it:
their inner borders hold what BatchNorm or the bias would have made of zero.

b is what f makes of zero, K what it makes of a one in one place. That `K * x + b` is f is then tested in
float64 on random inputs of several sizes, up to the borders (`reparamc.algebra.probe`); if the model fixes the
sizes, at those. If sizes are dynamic, the inputs are larger than everything that the tree reaches, and than
every position that its operators name, so that what holds for them holds for all larger ones; a tree that
reaches farther than 64 positions is left alone. The framework's own operators run f. The two must agree to 32
units in the last place of the stored dtype (of float32, if that is coarser), because a border may have been
computed beforehand in it. Each channel is held to its own magnitude, and what f adds to that of b alone, which
may be far smaller. Where a fusion is recorded, f runs on recorded arrays, so that K and b are functions of its
parameters; a tree that is another kernel for others is left.

`reparamc.compiler.impulse` carries it out, after the rules, if it pays. It declines silently: what stays has the
reason of the pass that declined before it.

| not taken because | example |
|---|---|
| what it adds differs from place to place | a bias that meets zero padding |
| it is not the same affine map everywhere | a border continued by its nearest values |
| its result does not have the size of a convolution's | PixelShuffle; strides above 4 |
| it is too large to be probed | 1024 channels at 14 x 14 |
| it does not run on random inputs | a reshape to constant sizes of an image whose size is dynamic |
| the kernel would cost more | conv 1x1 from 64 to 192 channels, a border of its bias, depthwise 3x3 |
"""

from __future__ import annotations

from reparamc.compiler.impulse import take_kernels
from reparamc.compiler.plan import GraphPass

IMPULSE_RESPONSE = GraphPass(
    name="impulse-response",
    equation="f(x) = K*x + b,  b = f(0),  K = f(impulse) - b",
    exact_when="f consists of operators that are linear by kind, and K*x + b gives what f gives, borders included",
    run=take_kernels,
)
