"""Do no harm: which rewrites would break a pattern that ONNX Runtime fuses on its own.

ONNX Runtime recognises GELU, LayerNorm, attention and their like by the operators that exporters write for
them, and computes each by one kernel. A rewrite that moves a constant out of such a pattern saves an
operator and loses that kernel. The readers of `onnx_graph` leave the known patterns alone; here the
outcome is checked, on the graphs that ONNX Runtime itself makes of the original and of the result.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import onnx
from onnx import ModelProto, helper

from reparamc.certificate.onnx_bounds import bodies
from reparamc.onnx import weights
from reparamc.onnx.values import captured

PROTECTED = {
    "Gelu": ("Gelu", "FastGelu", "BiasGelu"),
    "QuickGelu": ("QuickGelu", "Swish"),
    "HardSwish": ("HardSwish",),
    "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"),
    "SimplifiedLayerNormalization": (
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "RMSNormalization",
    ),
    "RotaryEmbedding": ("RotaryEmbedding", "GemmaRotaryEmbedding"),
    "Attention": ("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"),
}
"""What ONNX Runtime makes of a pattern. Members of one kind do the same, with or without an addition beside it."""

_KIND = {op: kind for kind, ops in PROTECTED.items() for op in ops}

PLAIN = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Constant", "Conv", "ConvTranspose", "Flatten",
    "Gemm", "GlobalAveragePool", "Identity", "LeakyRelu", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Transpose",
}  # fmt: skip
"""No pattern consists of these alone: each has a product, a quotient, or another function."""

ItemT = TypeVar("ItemT")


def fused_by_runtime(model: ModelProto) -> dict[str, str] | None:
    """The kinds of `PROTECTED` that ONNX Runtime makes of patterns in ``model``, by the tensor that each computes.

    Those that ``model`` itself spells as one operator are left out. None when ONNX Runtime cannot
    optimise the model.
    """
    if all(node.op_type in PLAIN for node in model.graph.node):
        return {}
    optimized = _optimized(model)
    if optimized is None:
        return None
    spelled = protected(model)
    return {name: kind for name, kind in protected(optimized).items() if spelled.get(name) != kind}


def protected(model: ModelProto) -> dict[str, str]:
    """The kinds of `PROTECTED` in ``model``, bodies of If and Loop included, by the tensor that each computes."""
    found: dict[str, str] = {}
    stack = [model.graph]
    while stack:
        graph = stack.pop()
        found.update((node.output[0], _KIND[node.op_type]) for node in graph.node if node.op_type in _KIND)
        stack.extend(body for node in graph.node for body in bodies(node))
    return found


def _optimized(model: ModelProto) -> ModelProto | None:
    """The graph that ONNX Runtime would run, its own operators included; None when it cannot say."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    options.intra_op_num_threads = 1  # nothing is run: no threads to start
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        with weights.holding(), tempfile.TemporaryDirectory(prefix="reparamc-") as folder:
            light = weights.for_runtime(_without_kernels(weights.lightened(model)))
            light.set_in(options)
            options.optimized_model_filepath = os.path.join(folder, "model.onnx")
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            ort.InferenceSession(light.data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
            return onnx.load(options.optimized_model_filepath, load_external_data=False)
    except Exception:  # ONNX Runtime's exceptions share no base class; a full disk is no error either
        return None


def _without_kernels(model: ModelProto) -> ModelProto:
    """A copy whose convolutions and BatchNorms are given their weights: no pattern needs them, and folding takes time.

    From version 4 on, what is stored need not be an input.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    kernels, others = set[str](), {v.name for v in (*graph.input, *graph.output)}
    for node in graph.node:
        of = 1 if node.op_type in ("Conv", "ConvTranspose", "BatchNormalization") else len(node.input)
        others.update(node.input[:of], captured(node))
        kernels.update(node.input[of:])
    kernels -= others
    for t in [t for t in graph.initializer if t.name in kernels]:
        graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        graph.initializer.remove(t)
    return copy


MOST_ROUNDS = 40
"""How often a part of the items is tried, so that the work stays in proportion to the graph."""


def harmful(
    items: Sequence[ItemT], wanted: Counter[str], counts: Callable[[Sequence[ItemT]], Counter[str] | None]
) -> dict[ItemT, str]:
    """The ``items`` to leave out so that the others lose none of ``wanted``, each with the kind that it would lose.

    Args:
        counts: what is left of each kind when some of the items, in their order, are applied; None
            when that is unknown, which counts as no loss.

    By bisection: few rounds when few items do harm, and no more than `MOST_ROUNDS`, after which all that are
    suspected are found. Of items that do harm only together, the last is blamed. What is lost without any item is
    nobody's fault.
    """
    found: dict[ItemT, str] = {}
    rounds = 0

    def lost(chosen: Sequence[ItemT]) -> str | None:
        nonlocal rounds
        rounds += 1
        left = counts(chosen)
        return None if left is None else next(iter(wanted - left), None)

    def search(safe: list[ItemT], suspects: Sequence[ItemT], kind: str) -> None:
        """``safe`` alone loses nothing; with the suspects, ``kind``."""
        if len(suspects) == 1 or rounds >= MOST_ROUNDS:
            found.update(dict.fromkeys(suspects, kind))
            return
        left, right = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        if (of_left := lost([*safe, *left])) is None:
            search([*safe, *left], right, kind)
            return
        search(safe, left, of_left)
        safe = [*safe, *(item for item in left if item not in found)]
        if of_right := lost([*safe, *right]):
            search(safe, right, of_right)

    if (kind := lost(items)) is not None:
        wanted = wanted & (counts([]) or Counter())
        if kind := lost(items):
            search([], items, kind)
    return found


def reason(kind: str) -> str:
    """Why a rewrite that loses ``kind`` is not made."""
    return f"it would hide {'an' if kind[0] in 'AEIOU' else 'a'} {kind} that ONNX Runtime fuses"
