"""f(c) = c': an operator whose operands are all constant is computed now.

Exporters write weights as Transpose, Unsqueeze or Concat of other constants; other rewrites see a
parameter only once those are gone. Parameters of a torch module are constants already, so this pass
acts on ONNX alone, where the adapter carries it out (`reparamc.onnx_constants`).
"""

from __future__ import annotations

from reparamc.rewrite import Pass

CONSTANT_FOLDING = Pass(
    name="constant-folding",
    equation="f(c) = c'",
    exact_when="f is deterministic and its operands cannot be overridden; done when c' takes no more bytes (ONNX only)",
)
