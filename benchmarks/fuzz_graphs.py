"""Fuse random ONNX graphs of ranks 0 to 6 and sizes 0 to 3, with bodies and functions: is every result right?

    python benchmarks/fuzz_graphs.py --count 10000

Each graph is drawn with its shapes, fused at every level (at "full" one in ten), and run by ONNX Runtime beside its
original, also at other sizes where sizes are open. Counted and listed are tracebacks, more than ten seconds of
processor time, results that differ or do not run, and right results that verification objects to. Exit code 1 if
there is any.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import prod
from time import process_time
from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from reparamc.errors import InputError, VerificationError
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import session

HANG = 10.0
"""Seconds of processor time that one graph may take at one level."""
OPSETS = (13, 15, 17, 18)
MOST = 4096
"""Elements of a value."""
Shape = tuple[int, ...]


class Draft:
    """A graph in the making: values with their shapes at the sizes of the draft."""

    def __init__(self, rng: np.random.Generator, opset: int, depth: int = 0) -> None:
        self.rng, self.opset, self.depth = rng, opset, depth
        self.nodes: list[NodeProto] = []
        self.values: list[tuple[str, Shape]] = []
        self.constants: dict[str, np.ndarray] = {}
        self.functions: list[FunctionProto] = []
        self.taken = 0

    def name(self, kind: str = "t") -> str:
        self.taken += 1
        return f"{kind}{self.depth}_{self.taken}"

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def constant(self, array: Any) -> str:
        """A constant in the graph, or a node that makes it."""
        array, name = np.asarray(array), self.name("c")
        if self.chance(0.15):
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            self.constants[name] = array
        return name

    def whole(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def value(self, ranks: Sequence[int] = range(7)) -> tuple[str, Shape] | None:
        """A value of one of ``ranks``, late ones more often."""
        found = [v for v in self.values if len(v[1]) in ranks]
        return None if not found else found[-1] if self.chance(0.7) else self.pick(found)

    def add(self, op: str, inputs: Sequence[str], *shapes: Shape, domain: str = "", **attributes: Any) -> list[str]:
        """A node whose results have ``shapes``."""
        names = [self.name() for _ in shapes]
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        self.values += [(n, s) for n, s in zip(names, shapes, strict=True) if prod(s) <= MOST]
        return names


def unary(d: Draft) -> None:
    x, shape = d.values[-1]
    op = d.pick(["Relu", "Neg", "Identity", "Sigmoid", "Abs", "Neg", "Dropout", "Clip"])
    d.add(op, [x], shape)


def with_constant(d: Draft) -> None:
    x, shape = d.value() or d.values[-1]
    way = d.below(6)
    other: Shape = ()
    if way == 1 and len(shape) > 1:
        other = (shape[1], *[1] * (len(shape) - 2))
    elif way == 2:
        other = shape[-1:]
    elif way == 3:
        other = tuple(n if d.chance(0.4) else 1 for n in shape)
    elif way == 4:
        other = (1,) * d.below(7)
    elif way == 5 and 1 in shape:
        other = tuple(d.below(3) if n == 1 else 1 for n in shape)
    made = np.broadcast_shapes(shape, other)
    operands = [x, d.constant((d.rng.uniform(0.5, 2, other) * d.pick([1, -1])).astype(np.float32))]
    op = d.pick(["Add", "Sub", "Mul", "Div", "Mul", "Add"])
    if len(made) <= 6:
        d.add(op, operands if op == "Div" or d.chance(0.7) else operands[::-1], made)


def together(d: Draft) -> None:
    x, shape = d.value() or d.values[-1]
    others = [v for v in d.values if _broadcasts(shape, v[1])]
    y, other = d.pick(others)
    made = np.broadcast_shapes(shape, other)
    if d.chance(0.3):
        z, third = d.pick([v for v in others if _broadcasts(made, v[1])] or [(y, other)])
        d.add(d.pick(["Sum", "Mean"]), [x, y, z], np.broadcast_shapes(made, third))
    else:
        d.add(d.pick(["Add", "Sub", "Add", "Mul"]), [x, y], made)


def _broadcasts(a: Shape, b: Shape) -> bool:
    try:
        return len(np.broadcast_shapes(a, b)) <= 6
    except ValueError:
        return False


def linear(d: Draft) -> None:
    if (found := d.value(range(1, 7))) is None:
        return
    x, shape = found
    width = d.below(4) + d.chance(0.9)
    if len(shape) == 2 and d.chance(0.5):
        turned = d.below(2)
        dims = (width, shape[1]) if turned else (shape[1], width)
        operands = [x, d.weight(*dims), *([d.weight(*d.pick([(), (width,), (1, width)]))] if d.chance(0.6) else [])]
        options = {"alpha": d.pick([1.0, 0.5]), "beta": d.pick([1.0, 2.0]), "transB": turned}
        d.add("Gemm", operands, (shape[0], width), **options)
    elif len(shape) == 3 and d.chance(0.2):
        d.add("Einsum", [x, d.weight(shape[2], width)], (*shape[:2], width), equation="abc,cd->abd")
    else:
        d.add("MatMul", [x, d.weight(shape[-1], width)], (*shape[:-1], width))


def kernel(d: Draft) -> None:
    if (found := d.value(range(3, 6))) is None or not all(found[1][1:]):
        return
    x, (batch, channels, *sizes) = found
    axes = len(sizes)
    size, group = d.pick([1, 1, 2, 3]), d.pick([1, 1, channels])
    pads = [d.pick([0, 0, 1, size // 2])] * (2 * axes)
    stride = d.pick([1, 1, 2])
    out = group * (1 + d.below(3))
    bias = [d.weight(out)] if d.chance(0.4) else []
    options: dict[str, Any] = {"strides": [stride] * axes, "pads": pads}
    if d.chance(0.2):
        made = tuple((n - 1) * stride + size - 2 * pads[0] for n in sizes)
        operands = [x, d.weight(channels, out // group, *[size] * axes), *bias]
        if min(made) > 0:
            d.add("ConvTranspose", operands, (batch, out, *made), group=group, **options)
        return
    made = tuple((n + 2 * pads[0] - size) // stride + 1 for n in sizes)
    if d.chance(0.15):
        options = {"strides": [stride] * axes, "auto_pad": d.pick(["SAME_UPPER", "SAME_LOWER"])}
        made = tuple(-(-n // stride) for n in sizes)
    if min(made) > 0:
        d.add("Conv", [x, d.weight(out, channels // group, *[size] * axes), *bias], (batch, out, *made), group=group,
              **options)  # fmt: skip


def pool(d: Draft) -> None:
    if (found := d.value(range(3, 6))) is None or not all(found[1]):
        return
    x, (batch, channels, *sizes) = found
    size = 1 + d.below(min(*sizes, 3, 3))
    options: dict[str, Any] = {"strides": [1] * len(sizes), "kernel_shape": [size] * len(sizes)}
    op = d.pick(["AveragePool", "AveragePool", "MaxPool", "GlobalAveragePool"])
    if op == "AveragePool" and size > 1 and d.chance(0.5):
        options |= {"count_include_pad": d.below(2), "pads": [1] * (2 * len(sizes))}
        sizes = [n + 2 for n in sizes]
    made = [n - size + 1 for n in sizes]
    if op == "GlobalAveragePool":
        options, made = {}, [1] * len(sizes)
    d.add(op, [x], (batch, channels, *made), **options)


def norm(d: Draft) -> None:
    if (found := d.value(range(2, 7))) is None:
        return
    x, shape = found
    draw = [d.weight(shape[1]) for _ in range(3)]
    variance = d.constant(d.rng.uniform(0.5, 2, shape[1]).astype(np.float32))
    d.add("BatchNormalization", [x, *draw, variance], shape, epsilon=d.pick([1e-5, 1e-3]))


def layout(d: Draft) -> None:
    x, shape = d.value() or d.values[-1]
    rank = len(shape)
    match d.below(6):
        case 0:
            perm = d.rng.permutation(rank).tolist()
            d.add("Transpose", [x], tuple(shape[p] for p in perm), **({"perm": perm} if rank else {}))
        case 1 if rank < 6:
            axis = d.below(rank + 1)
            d.add("Unsqueeze", [x, d.whole(axis - d.pick([0, rank + 1]))], (*shape[:axis], 1, *shape[axis:]))
        case 2 if 1 in shape:
            axis = shape.index(1)
            d.add("Squeeze", [x, d.whole(axis - d.pick([0, rank]))], shape[:axis] + shape[axis + 1 :])
        case 3:
            axis = d.below(rank + 1)
            d.add("Flatten", [x], (prod(shape[:axis]), prod(shape[axis:])), axis=axis)
        case 4 if rank and all(shape):
            _regrouped(d, x, shape)
        case 5 if rank:
            (sizes,) = d.add("Shape", [x], (rank,))
            d.values.pop()
            other, its = d.pick([v for v in d.values if prod(v[1]) == prod(shape)])
            del its
            d.add("Reshape", [other, sizes], shape)


def _regrouped(d: Draft, x: str, shape: Shape) -> None:
    """A Reshape that splits an axis, or merges two, with sizes that are copied or left open."""
    axis = d.below(len(shape))
    made: list[int]
    if d.chance(0.5) and axis + 1 < len(shape):
        made = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
    else:
        part = d.pick([n for n in (1, 2, 3) if shape[axis] % n == 0])
        made = [*shape[:axis], part, shape[axis] // part, *shape[axis + 1 :]]
    told = [0 if at < axis and d.chance(0.5) else n for at, n in enumerate(made)]
    if d.chance(0.5):
        told[d.below(len(told))] = -1
    if len(made) <= 6:
        d.add("Reshape", [x, d.whole(*told)], tuple(made))


def pieces(d: Draft) -> None:
    if (found := d.value(range(1, 7))) is None:
        return
    x, shape = found
    axis = d.below(len(shape))
    n = shape[axis]
    at = lambda size: (*shape[:axis], size, *shape[axis + 1 :])  # noqa: E731
    match d.below(6):
        case 0:
            low, high, step = d.below(n + 1), d.below(n + 2), d.pick([1, 1, 2])
            operands = [d.whole(v) for v in (low, high, axis, step)]
            d.add("Slice", [x, *operands], at(len(range(*slice(low, high, step).indices(n)))))
        case 1:
            y = d.pick([v for v in d.values if len(v[1]) == len(shape) and _fit(v[1], shape, axis)])
            d.add("Concat", [x, y[0]], at(n + y[1][axis]), axis=axis - d.pick([0, len(shape)]))
        case 2 if n:
            places = d.rng.integers(-n, n, d.pick([(), (1,), (n,), (2,)]))
            d.add("Gather", [x, d.constant(places)], (*shape[:axis], *places.shape, *shape[axis + 1 :]), axis=axis)
        case 3 if n > 1:
            first = 1 + d.below(n - 1)
            d.add("Split", [x, d.whole(first, n - first)], at(first), at(n - first), axis=axis)
        case 4:
            low, high = d.pick([0, 1]), d.pick([0, 1, -1])
            amounts = [0] * (2 * len(shape))
            amounts[axis], amounts[axis + len(shape)] = low, high
            if n + low + high > 0:
                d.add("Pad", [x, d.whole(*amounts)], at(n + low + high))
        case 5 if n and d.opset < 18:
            keep = d.below(2)
            op = d.pick(["ReduceMean", "ReduceMax", "ReduceL2"])
            made = at(1) if keep else shape[:axis] + shape[axis + 1 :]
            d.add(op, [x], made, axes=[axis - d.pick([0, len(shape)])], keepdims=keep)


def _fit(a: Shape, b: Shape, axis: int) -> bool:
    return all(m == n for at, (m, n) in enumerate(zip(a, b, strict=True)) if at != axis)


def others(d: Draft) -> None:
    x, shape = d.value() or d.values[-1]
    match d.below(4):
        case 0:
            scale, zero = d.constant(np.float32(0.05)), d.constant(np.int8(0))
            (q,) = d.add("QuantizeLinear", [x, scale, zero], shape)
            d.values = [v for v in d.values if v[0] != q]
            d.add("DequantizeLinear", [q, scale, zero], shape)
        case 1 if shape:
            d.add("Softmax", [x], shape, axis=-1)
        case 2:
            front = (1 + d.below(2),) * (len(shape) < 6)
            d.add("Expand", [x, d.whole(*front, *[1] * len(shape))], (*front, *shape))
        case 3:
            (h,) = d.add("Cast", [x], shape, to=TensorProto.FLOAT16)
            d.values = [v for v in d.values if v[0] != h]
            d.add("Cast", [h], shape, to=TensorProto.FLOAT)


# Graphs within graphs


def _inner(d: Draft, steps: int) -> Draft:
    """A draft that reads what ``d`` has; some of its names are names of others."""
    inner = Draft(d.rng, d.opset, d.depth + 1)
    inner.values = d.values[-4:]
    inner.taken = d.taken if d.chance(0.5) else 0  # bodies beside one another use the same names
    inner.functions = d.functions
    grow(inner, steps)
    return inner


def _graph(d: Draft, inputs: Sequence[ValueInfoProto], outputs: Sequence[str], name: str) -> GraphProto:
    tensors = [numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in d.constants.items()]
    results = [ValueInfoProto(name=o) for o in outputs]
    for r in results:
        r.type.tensor_type.elem_type = TensorProto.FLOAT
    return helper.make_graph(d.nodes, name, inputs, results, tensors)


def choice(d: Draft) -> None:
    """An If whose branches give the same shape, or what they capture."""
    x, shape = d.value() or d.values[-1]
    flag = d.constant(np.array(d.chance(0.5)))
    if d.chance(0.7):
        (total,) = d.add("ReduceMax", [x], (), keepdims=0)
        d.values.pop()
        flag = d.name()
        d.nodes.append(helper.make_node("Greater", [total, d.constant(np.float32(0))], [flag]))
    branches = []
    for which in ("then", "else"):
        inner = _inner(d, 1 + d.below(4))
        found = [n for n, s in inner.values if s == shape]
        computed = [n for n in found if any(n in node.output for node in inner.nodes)]
        if not computed or d.chance(0.1):
            computed = [inner.name()]
            inner.nodes.append(helper.make_node("Identity", [x], computed))
        branches.append(_graph(inner, [], computed[-1:], which))
    if prod(shape):
        d.add("If", [flag], shape, then_branch=branches[0], else_branch=branches[1])


def repeated(d: Draft) -> None:
    """A Loop of two rounds, or a Scan over the first axis."""
    x, shape = d.value() or d.values[-1]
    inner = Draft(d.rng, d.opset, d.depth + 1)
    inner.taken, inner.functions = d.taken, d.functions
    state = inner.name()
    if d.chance(0.5) or not shape:
        inner.values = [*d.values[-2:], (state, shape)]
        grow(inner, 1 + d.below(3))
        found = [n for n, s in inner.values if s == shape and any(n in node.output for node in inner.nodes)]
        go, round_ = inner.name(), inner.name()
        result = found[-1] if found else inner.name()
        if not found:
            inner.nodes.append(helper.make_node("Neg", [state], [result]))
        inner.nodes.append(helper.make_node("Identity", [go], [f"{go}_on"]))
        given = [
            helper.make_tensor_value_info(round_, TensorProto.INT64, []),
            helper.make_tensor_value_info(go, TensorProto.BOOL, []),
            helper.make_tensor_value_info(state, TensorProto.FLOAT, None),
        ]
        body = _graph(inner, given, [f"{go}_on", result], "loop")
        body.output[0].type.tensor_type.elem_type = TensorProto.BOOL
        d.add("Loop", [d.constant(np.int64(2)), "", x], shape, body=body)
        return
    inner.values = [(state, shape[1:])]
    grow(inner, 1 + d.below(3))
    result, its = inner.values[-1]
    if result == state:
        result, its = inner.name(), shape[1:]
        inner.nodes.append(helper.make_node("Neg", [state], [result]))
    given = [helper.make_tensor_value_info(state, TensorProto.FLOAT, None)]
    if shape[0] and len(its) < 6:
        d.add("Scan", [x], (shape[0], *its), body=_graph(inner, given, [result], "scan"), num_scan_inputs=1)


def call(d: Draft) -> None:
    """A local function, of the name of a standard operator now and then, with constants of its own or given ones."""
    x, shape = d.value() or d.values[-1]
    if not d.functions or d.chance(0.5):
        nodes = [
            helper.make_node("Mul", ["a", "k"], ["p"]),
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node(d.pick(["Add", "Mul", "Sub"]), ["p", d.pick(["two", "a", "p"])], ["r"]),
        ]
        name = d.pick(["Scaled", "BatchNormalization", "Own"]) + str(len(d.functions))
        imports = [helper.make_opsetid("", d.opset)]
        d.functions.append(helper.make_function("own", name, ["a", "k"], ["r"], nodes, imports))
    f = d.pick(d.functions)
    d.add(f.name, [x, d.constant(np.float32(1.5))], shape, domain="own")


STEPS: tuple[Callable[[Draft], None], ...] = (
    unary, with_constant, with_constant, with_constant, together, together, linear, linear, kernel, kernel, kernel,
    pool, norm, norm, norm, layout, layout, pieces, pieces, others,
)  # fmt: skip
WHOLE = (choice, repeated, call)


def grow(d: Draft, steps: int) -> None:
    for _ in range(steps):
        step = d.pick(WHOLE) if d.depth < 2 and d.chance(0.12) else d.pick(STEPS)
        step(d)


def drawn(seed: int) -> tuple[ModelProto, list[dict[str, np.ndarray]]]:
    """A model, and inputs for it: those of the draft, and of other sizes where these are open."""
    rng = np.random.default_rng(seed)
    d = Draft(rng, int(rng.choice(OPSETS)))
    rank = int(rng.choice([0, 1, 2, 3, 4, 4, 4, 5, 6]))
    shape = tuple(int(n) for n in rng.choice([0, 1, 1, 2, 2, 3, 3, 3], rank))
    d.values = [("x", shape)]
    grow(d, 1 + d.below(9))
    is_open = [bool(rng.random() < 0.5) for _ in shape]
    dims = [f"n{axis}" if o else n for axis, (n, o) in enumerate(zip(shape, is_open, strict=True))]
    read = {name for node in d.nodes for name in node.input}
    computed = [(n, s) for n, s in d.values if n != "x"]
    ends = [v for v in computed if v[0] not in read or d.chance(0.08)] or computed[-1:]
    if not ends:
        d.add("Neg", ["x"], shape)
        ends = d.values[-1:]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)
    graph = _graph(d, [x], [], "drawn")
    for name, its in ends:
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(its)))
    imports = [helper.make_opsetid("", d.opset), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=d.functions)
    feeds = []
    for change in (0, 1, 2, -1):
        sizes = [max(n + change, 0) if o else n for n, o in zip(shape, is_open, strict=True)]
        feeds.append({"x": rng.standard_normal(sizes).astype(np.float32)})
    return model, feeds


# Trying


def try_one(seed: int, levels: Sequence[str]) -> tuple[str, str]:
    """What came of a graph; see `fused_at`."""
    return fused_at(levels, *drawn(seed))


def fused_at(levels: Sequence[str], model: ModelProto, feeds: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What came of ``model``: "unusable" where ONNX Runtime does not run it, "same", "fused", or what is bad."""
    expected: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    try:
        with session(model, "the original") as run:
            for given in feeds:
                try:
                    expected.append((given, run(given)))
                except Exception:  # ONNX Runtime's exceptions share no base class
                    continue
    except InputError:
        pass
    verdict = "same" if expected else "unusable"
    for level in levels:
        start = process_time()
        try:
            result, report = fuse_model(model, verify=level)
        except InputError as error:
            if "\n" in str(error):
                return "traceback", f"{level}: a message of several lines"
            if expected and level != "full" and _loads(model):
                return "refused", f"{level}: {error}"
            continue
        except VerificationError as error:
            return "alarm", f"{level}: {error}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return "traceback", f"{level}: {type(error).__name__} at {last.filename}:{last.lineno}: {str(error)[:80]!r}"
        if (took := process_time() - start) > HANG:
            return "hang", f"{level}: {took:.0f} s"
        if report.failed:
            return "alarm", f"{level}: {report.failed[0].reason}"
        verdict = "fused" if report.changed and expected else verdict
        if expected and report.changed and (wrong := _wrong(result, expected)):
            return "wrong", f"{level}: {wrong}"
    return verdict, ""


def _loads(model: ModelProto) -> bool:
    """Whether ONNX Runtime takes ``model`` as it is."""
    try:
        with session(model, "the original", narrowed=False):
            return True
    except InputError:
        return False


def _wrong(result: ModelProto, expected: Sequence[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> str:
    try:
        with session(result, "the result") as run:
            for given, outputs in expected:
                found = run(given)
                for name, a in outputs.items():
                    if said := _difference(a, found[name]):
                        shapes = [list(np.shape(x)) for x in given.values()]
                        return f"{name} at {shapes}: {said}"
    except Exception as error:
        return f"it does not run: {str(error)[:160]!r}"
    return ""


def _difference(a: np.ndarray, b: np.ndarray) -> str:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
    if a.dtype.kind not in "fc":
        return "" if np.array_equal(a, b) else "other values"
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return "NaN or infinities elsewhere"
    finite = np.isfinite(a)
    gap, size = np.abs(a - b)[finite].max(initial=0.0), np.abs(a[finite]).max(initial=0.0)
    return f"off by {gap:.2g} of {size:.2g}" if gap > 1e-3 * max(size, 1.0) else ""


BAD = ("traceback", "hang", "wrong", "alarm", "refused", "died")
LEVELS = ("off", "region", "full")
"""The last one for each tenth graph."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first graph")
    given = parser.parse_args(argv)
    return tally("graphs", _outcomes(range(given.seed, given.seed + given.count)))


def _outcomes(seeds: Sequence[int]) -> Iterator[tuple[str, str, str]]:
    """What came of the graph of each seed, in another process: ONNX Runtime may end it."""
    while seeds:
        done = 0
        with ProcessPoolExecutor(1) as pool:
            try:
                for found in pool.map(_one, seeds):
                    yield f"seed {seeds[done]}", *found
                    done += 1
            except BrokenProcessPool:
                yield f"seed {seeds[done]}", *_died(seeds[done])
                done += 1
        seeds = seeds[done:]


def _one(seed: int) -> tuple[str, str]:
    warnings.simplefilter("ignore")
    return try_one(seed, LEVELS if seed % 10 == 0 else LEVELS[:2])


def _died(seed: int) -> tuple[str, str]:
    """Whether the original alone ends the process, too."""
    with ProcessPoolExecutor(1) as pool:
        try:
            pool.submit(try_one, seed, ()).result()
        except BrokenProcessPool:
            return "unusable", ""
    return "died", "the process ended"


def tally(what: str, outcomes: Iterable[tuple[str, str, str]]) -> int:
    """Print what is bad of (name, verdict, where), and how many there are of each verdict; 1 if any is bad."""
    counts: Counter[str] = Counter()
    for name, verdict, where in outcomes:
        counts[verdict] += 1
        if verdict in BAD:
            print(f"{verdict:<10} {name}: {where}", flush=True)
    print(f"{counts.total()} {what}: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    return int(any(counts[verdict] for verdict in BAD))


if __name__ == "__main__":
    sys.exit(main())
