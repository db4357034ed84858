"""An operator whose operands are all constant is computed once.

    f(c) = c'

Exporters write weights as Transpose, Unsqueeze or Concat of other constants, and other passes would not
recognise them. In a torch module it is what `forward` computes from parameters alone: weight standardisation,
OREPA's sum over the kernels of its branches, LoRA's `s B A` added to a frozen matrix. The adapters carry it out
(`reparamc.onnx.constants`, `reparamc.fx`).

| left alone | example |
|---|---|
| random operators, training mode | RandomNormal, Dropout |
| quantised weights | DequantizeLinear |
| results larger than their operands (small ones excepted) | a vector expanded to a map |
| operands that a caller can override | ONNX graph inputs with a default |
| ONNX: operands as large as a weight that something else reads as well | a tied embedding, transposed for one user |
"""

from __future__ import annotations

from reparamc.compiler.plan import FoldingPass

CONSTANT_FOLDING = FoldingPass(
    name="constant-folding",
    equation="f(c) = c'",
    exact_when="f is deterministic and its operands cannot be overridden; done when c' takes no more room",
)
