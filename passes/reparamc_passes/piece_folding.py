"""A scale of some channels of a convolution goes into the rows that compute them.

    s P(W * x + b)[i] + t  =  P((s' W) * x + (s' b + t'))[i]        s', t' = s, t at i, and 1, 0 elsewhere

For a convolution or linear layer that is cut into pieces (q, k and v of one fused projection) with a BatchNorm
or scale after some of them. The convolution is computed once for all pieces, so the scale goes before the
selection, as a scale of all channels that changes only those at i; scale-folding takes it in there, and all
pieces are cut from the new convolution. A Split stays one operator.

P moves channels in any way that can be followed: split into heads, transposed, and cut along what was part of
the channel axis (q, k and v before the heads, or inside each). A scale may be a scalar, or vary along an axis
that is made of channels.

Exact when nothing else that uses `W * x + b` reads the channels at i. Several regions change together, or none,
because otherwise both convolutions would be computed: `reparamc.compiler.pieces` carries it out, after
all other passes. At most 16 regions may read the convolution. It needs scale-folding, also for a BatchNorm.

| declined because | example |
|---|---|
| something else than selections uses the convolution | `relu(W * x + b)` beside them; an output of the model |
| another selection reads the channels that it scales | channels 0 to 3 with a BatchNorm, channels 2 to 5 without |
| something writes into the convolution that it scales a piece of | torch: `k += 1` on a piece |
"""

from __future__ import annotations

from reparamc.compiler.pieces import OTHERS, READ_TWICE, WRITTEN, fold_pieces
from reparamc.compiler.plan import GraphPass

PIECE_FOLDING = GraphPass(
    name="piece-folding",
    equation="s (W*x + b)[i] + t = ((s'W)*x + (s'b + t'))[i],  s' = s and t' = t at i, elsewhere 1 and 0",
    exact_when="all users of W*x + b are selections of channels, and no other one uses i",
    run=fold_pieces,
    refusals=(OTHERS, WRITTEN, READ_TWICE, "it failed its check: ..."),
)
