"""A scale behind some channels of a convolution goes into the rows that compute them.

    s (W * x + b)[i] + t  =  ((s' W) * x + (s' b + t'))[i]        s', t' = s, t at i, and 1, 0 elsewhere

For a convolution that is cut into pieces (q, k and v of one fused projection) with a BatchNorm or scale behind
some of them. What is behind all pieces goes into the convolution by the other passes; what is behind one
needs the other pieces to be cut from the new convolution as well. So several regions change together, or
none: `reparamc.compiler.split_scales` carries it out, after all other passes.
"""

from __future__ import annotations

from reparamc.algebra.rewrite import Pass

PIECE_FOLDING = Pass(
    name="piece-folding",
    equation="s (W*x + b)[i] + t = ((s'W)*x + (s'b + t'))[i],  s' = s and t' = t at i, elsewhere 1 and 0",
    exact_when="all readers of W*x + b are selections of channels, and no other one reads i",
)
