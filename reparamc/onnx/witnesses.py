"""Constant operators, computed by two independent sources that have to agree: ONNX Runtime and ONNX's reference.

The reference evaluator departs from the standard here and there (Softmax before opset 13 along one axis, Resize with
align_corners, BatchNormalization before opset 14 in training mode), and so may any runtime. A value counts only if
both compute it, in the same type and shape, to within rounding; it is then what ONNX Runtime computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from reparamc.algebra.dtypes import epsilon_of, is_floating
from reparamc.onnx.session import Run

MOST_NODES, MOST_BYTES = 256, 2**28
"""What one session computes at most: every result of it is kept until the last is there."""

ROUNDING = 32
"""Roundings of its largest value by which two computations of a result may differ."""

IR_VERSION = 10
"""Of the models made here: old enough for every runtime, and operators do not depend on it."""

CARRIED = np.dtype(ml_dtypes.bfloat16)
"""A type that goes in and out of ONNX Runtime as float32, because numpy itself does not know it."""


def computed(
    nodes: Sequence[NodeProto],
    given: Mapping[str, np.ndarray],
    opset: int,
    sizes: Mapping[str, int],
    kinds: Mapping[str, np.dtype | None],
) -> dict[str, np.ndarray]:
    """The results of ``nodes``, in execution order, that both sources agree on.

    Args:
        given: what they read from elsewhere.
        opset: of the standard operators.
        sizes: about how many bytes each result takes.
        kinds: the floating type of each result; None for others.
    """
    values = dict(given)
    found: dict[str, np.ndarray] = {}
    for part in _parts(nodes, sizes):
        by_runtime = _by_runtime(part, values, opset, kinds)
        for node in part:
            results = _agreed(node, values, by_runtime, opset)
            values.update(results)
            found.update(results)
    return found


def _parts(nodes: Iterable[NodeProto], sizes: Mapping[str, int]) -> Iterator[list[NodeProto]]:
    part: list[NodeProto] = []
    total = 0
    for node in nodes:
        need = sum(sizes.get(name, 0) for name in node.output)
        if part and (len(part) == MOST_NODES or total + need > MOST_BYTES):
            yield part
            part, total = [], 0
        part.append(node)
        total += need
    if part:
        yield part


def _by_runtime(
    nodes: Sequence[NodeProto], given: Mapping[str, np.ndarray], opset: int, kinds: Mapping[str, np.dtype | None]
) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of ``nodes``, without those that it cannot run."""
    found: dict[str, np.ndarray] = {}
    stack = [list(nodes)]
    while stack:
        part = stack.pop()
        values = {**given, **found}
        inside: set[str] = set()
        runnable = []
        for node in part:
            if all(name in values or name in inside for name in node.input if name):
                runnable.append(node)
                inside.update(name for name in node.output if name)
        if not runnable:
            continue
        try:
            found.update(_run(runnable, values, opset, kinds))
        except Exception:  # ONNX Runtime's exceptions share no base class: the node stays, which is always right
            if len(part) > 1:
                stack += [part[len(part) // 2 :], part[: len(part) // 2]]
    return found


def _run(
    nodes: Sequence[NodeProto], given: Mapping[str, np.ndarray], opset: int, kinds: Mapping[str, np.dtype | None]
) -> dict[str, np.ndarray]:
    outputs = [name for node in nodes for name in node.output if name]
    inputs = {name: given[name] for node in nodes for name in node.input if name and name not in outputs}
    carried = {name for name, a in inputs.items() if a.dtype == CARRIED}
    fetched = {name: f"{name}/carried" if kinds.get(name) == CARRIED else name for name in outputs}
    feeds = {
        f"{name}/carried" if name in carried else name: a.astype(np.float32) if name in carried else a
        for name, a in inputs.items()
    }
    casts = [helper.make_node("Cast", [f"{n}/carried"], [n], to=TensorProto.BFLOAT16) for n in sorted(carried)]
    casts_back = [helper.make_node("Cast", [a], [b], to=TensorProto.FLOAT) for a, b in fetched.items() if a != b]
    graph = helper.make_graph(
        [*casts, *nodes, *casts_back],
        "constants",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()],
        [ValueInfoProto(name=name) for name in fetched.values()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    run = Run(model.SerializeToString(), list(fetched.values()), "the constant operators", optimize=False)
    results = run(feeds)
    return {a: results[b].astype(CARRIED) if a != b else results[b] for a, b in fetched.items()}


def _agreed(
    node: NodeProto, values: Mapping[str, np.ndarray], by_runtime: Mapping[str, np.ndarray], opset: int
) -> dict[str, np.ndarray]:
    """The results of ``node``, as ONNX Runtime has them; none where the reference, given the same, has others."""
    names, operands = [n for n in node.output if n], list(dict.fromkeys(n for n in node.input if n))
    if not all(n in by_runtime for n in names) or not all(n in values for n in operands):
        return {}
    from onnx.reference import ReferenceEvaluator

    feeds = {n: values[n] for n in operands}
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(_alone(node, feeds, opset)).run(None, feeds)
    except Exception:  # it lacks an operator or a type
        return {}
    if node.op_type in ("Cast", "CastLike") and not _is_whole(values[node.input[0]], by_runtime[names[0]]):
        return {}
    alike = all(agree(by_runtime[n], np.asarray(r)) for n, r in zip(names, results, strict=True))
    return {n: by_runtime[n] for n in names} if alike else {}


def _is_whole(x: np.ndarray, cast: np.ndarray) -> bool:
    """Whether floating numbers fit the whole ones that they are cast to; of others, processors decide."""
    if not is_floating(x.dtype) or cast.dtype.kind not in "iu":
        return True
    return np.array_equal(np.trunc(x.astype(np.float64)), cast.astype(np.float64))


def _alone(node: NodeProto, feeds: Mapping[str, np.ndarray], opset: int) -> ModelProto:
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    graph = helper.make_graph([node], "constant", inputs, [ValueInfoProto(name=n) for n in node.output if n])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two results are of one type and shape, and of one value but for the rounding of floating numbers."""
    text = a.dtype.kind in "OSU" and b.dtype.kind in "OSU"
    if a.shape != b.shape or not (text or a.dtype == b.dtype):
        return False
    if not is_floating(a.dtype):
        return bool(np.array_equal(a, b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return False
    x, y = x[finite], y[finite]
    return bool(np.all(np.abs(x - y) <= ROUNDING * epsilon_of(a.dtype) * np.abs(x).max(initial=0.0)))
