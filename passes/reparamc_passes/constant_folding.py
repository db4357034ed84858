"""f(c) = c': an operator whose operands are all constant is computed now.

Exporters write weights as Transpose, Unsqueeze or Concat of other constants, and modules compute them
in forward (weight standardisation, branches summed before one convolution); other rewrites see a
parameter only once that is done. The adapters carry it out (`reparamc.onnx.constants`, `reparamc.fx.graph`).
"""

from __future__ import annotations

from reparamc.algebra.rewrite import Pass

CONSTANT_FOLDING = Pass(
    name="constant-folding",
    equation="f(c) = c'",
    exact_when="f is deterministic and its operands cannot be overridden; done when c' takes no more room",
)
