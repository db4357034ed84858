"""Operators over constants whose result no implementation has a choice about: they move elements, or round once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, cast

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from reparamc.onnx.values import attribute

Operands: TypeAlias = Sequence[np.ndarray]
Operator: TypeAlias = Callable[[NodeProto, Operands], "np.ndarray | None"]


def exactly(node: NodeProto, operands: Iterable[np.ndarray]) -> np.ndarray | None:
    """The result of a standard operator, all operands given; None where it is not listed here, or not beyond doubt."""
    compute = OPERATORS.get(node.op_type)
    if compute is None or len(node.output) != 1:
        return None
    try:
        with np.errstate(all="raise"):  # what overflows, or is not a number, may have several forms
            found = compute(node, list(operands))
    except (FloatingPointError, IndexError, ValueError, TypeError, OverflowError):
        return None
    return None if found is None else np.asarray(found)


def _arithmetic(compute: Callable[..., np.ndarray], kinds: str = "iuf") -> Operator:
    def run(node: NodeProto, operands: Operands) -> np.ndarray | None:
        dtypes = {a.dtype for a in operands}
        plain = len(dtypes) == 1 and all(d.kind in kinds and (d.kind != "f" or d.itemsize >= 4) for d in dtypes)
        return compute(*operands).astype(dtypes.pop()) if plain else None

    return run


def _mod(node: NodeProto, operands: Operands) -> np.ndarray | None:
    return None if attribute(node, "fmod", 0) else _arithmetic(np.mod, "iu")(node, operands)


def _cast(node: NodeProto, operands: Operands) -> np.ndarray | None:
    (x,) = operands
    to = np.dtype(helper.tensor_dtype_to_np_dtype(cast(int, attribute(node, "to"))))
    if x.dtype.kind not in "iufb" or to.kind not in "iuf":
        return None
    found = x.astype(to)
    back = found.astype(x.dtype) if to.kind != "f" else None
    return found if back is None or np.array_equal(back, x) else None


def _concat(node: NodeProto, operands: Operands) -> np.ndarray | None:
    alike = len({a.dtype for a in operands}) == 1
    return np.concatenate(operands, cast(int, attribute(node, "axis"))) if alike else None


def _gather(node: NodeProto, operands: Operands) -> np.ndarray:
    return np.take(*operands, axis=cast(int, attribute(node, "axis", 0)))


def _slice(node: NodeProto, operands: Operands) -> np.ndarray | None:
    x, *bounds = operands
    if len(bounds) < 2 or any(b.ndim != 1 or len(b) != len(bounds[0]) for b in bounds):
        return None
    starts, ends, *rest = (b.tolist() for b in bounds)
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    at = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        width = x.shape[axis]
        if step < 0 and not (-width <= start < width and end < width):
            return None
        at[axis] = slice(start, end, step)
    return x[tuple(at)]


def _filled(node: NodeProto, operands: Operands) -> np.ndarray:
    value = attribute(node, "value")
    number = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(cast(TensorProto, value))
    return np.full(operands[0], number[0])


def _expanded(node: NodeProto, operands: Operands) -> np.ndarray:
    x, shape = operands
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist())))


OPERATORS: dict[str, Operator] = {
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
    "Mul": _arithmetic(np.multiply),
    "Div": _arithmetic(np.divide, "f"),
    "Sqrt": _arithmetic(np.sqrt, "f"),
    "Mod": _mod,
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Gather": _gather,
    "Slice": _slice,
}
