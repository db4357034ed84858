"""Mutated pairs of small ONNX models: is what the certificate calls equal really equal?

    python benchmarks/mutate.py [--pairs 10000] [--seed 0]

Each pair is a random model and a copy in which one thing was changed: an attribute, a constant, an operand, an
operator, or nothing but names and the way it is written. Where the certificate says "equal", ONNX Runtime runs both,
at small sizes too: whatever the original takes, the other has to take, with the same results up to rounding.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.certificate.onnx import certify_onnx

CHANNELS = 4
CHUNK = 50
"""Pairs for one process."""

TRIALS = (
    (1, 1, 1, 1.0), (1, 3, 3, 1.0), (2, 5, 4, 1.0), (3, 8, 7, 1.0), (0, 3, 3, 1.0), (1, 3, 3, 2.0**24),
    (1, 3, 3, 2.0**-24),
)  # fmt: skip
"""Batch, height, width, and the magnitude of inputs."""


class Draft:
    """A model in the making."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.images, self.rows = ["x"], list[str]()

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape).astype(np.float32))

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"t{len(self.nodes)}_{n}" for n in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def image(self) -> str:
        return self.pick(*self.images)


def conv(d: Draft) -> list[str]:
    group, kernel = d.pick(1, 1, 2, 4), d.pick(1, 2, 3)
    pads = d.pick({}, {"pads": [kernel // 2] * 4}, {"pads": [0, 1, 1, 0]}, {"auto_pad": "SAME_UPPER"})
    extra = {key: [d.pick(1, 1, 2)] * 2 for key in ("strides", "dilations") if d.pick(True, False)}
    operands = [d.image(), d.weight(CHANNELS, CHANNELS // group, kernel, kernel)]
    operands += [d.weight(CHANNELS)] if d.pick(True, False) else []
    return d.node("Conv", *operands, group=group, **pads, **extra)


def transposed(d: Draft) -> list[str]:
    stride = d.pick(1, 2)
    weight = d.weight(CHANNELS, CHANNELS, 2, 2)
    return d.node("ConvTranspose", d.image(), weight, strides=[stride] * 2, pads=[d.pick(0, 1)] * 4)


def norm(d: Draft) -> list[str]:
    parts = [d.weight(CHANNELS) for _ in range(3)]
    variance = d.constant(np.abs(d.random.standard_normal(CHANNELS)).astype(np.float32) + 0.1)
    return d.node("BatchNormalization", d.image(), *parts, variance, epsilon=d.pick(1e-5, 1e-3))


def arithmetic(d: Draft) -> list[str]:
    if d.pick(True, False):
        return d.node(d.pick("Add", "Sub"), d.image(), d.image())
    shape = d.pick((), (1,), (CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (1, 1))
    return d.node(
        d.pick("Add", "Sub", "Mul", "Div"),
        d.image(),
        d.constant(np.float32(1.5) + d.random.random(shape).astype(np.float32)),
    )


def pool(d: Draft) -> list[str]:
    kernel = d.pick(1, 2, 3)
    options = d.pick({}, {"pads": [kernel // 2] * 4}, {"ceil_mode": 1})
    strides = [d.pick(1, 1, 2)] * 2
    if d.pick(True, False):
        return d.node("MaxPool", d.image(), kernel_shape=[kernel] * 2, strides=strides, **options)
    counted = {"count_include_pad": d.pick(0, 1)}
    return d.node("AveragePool", d.image(), kernel_shape=[kernel] * 2, strides=strides, **counted, **options)


def pad(d: Draft) -> list[str]:
    amounts = d.constant(np.array([0, 0, *d.random.integers(-1, 3, 2), 0, 0, *d.random.integers(-1, 3, 2)]))
    return d.node("Pad", d.image(), amounts, *([d.constant(np.float32(d.pick(0, 1)))] if d.pick(True, False) else []))


def channels(d: Draft) -> list[str]:
    match d.pick("gather", "slice", "split", "concat", "shuffle"):
        case "gather":
            return d.node("Gather", d.image(), d.constant(d.random.integers(-CHANNELS, CHANNELS, CHANNELS)), axis=1)
        case "slice":
            bounds = [d.constant(np.array([n])) for n in (d.pick(0, 1, -3), d.pick(4, 3, 9, -1), d.pick(1, 2, 3), 1)]
            return d.node("Slice", d.image(), *bounds)
        case "split":
            parts = d.node("Split", d.image(), outputs=2, axis=1)
            return d.node("Concat", *(parts if d.pick(True, False) else parts[::-1]), axis=1)
        case "concat":
            return d.node("Concat", d.image(), d.image(), axis=1)
    shape = d.constant(np.array([0, 2, CHANNELS // 2, -1]))
    (t,) = d.node("Transpose", *d.node("Reshape", d.image(), shape), perm=[0, 2, 1, 3])
    (back,) = d.node("Shape", d.image())
    return d.node("Reshape", t, back)


def layout(d: Draft) -> list[str]:
    match d.pick("transpose", "mean", "flatten", "squeeze", "linear"):
        case "transpose":
            perm = d.pick([0, 1, 3, 2], [0, 1, 2, 3], [0, 2, 3, 1])
            (t,) = d.node("Transpose", d.image(), perm=perm)
            return d.node("Transpose", t, perm=d.pick(perm, [0, 3, 1, 2]))
        case "mean":
            return d.node("ReduceMean", d.image(), axes=d.pick([2, 3], [-1], [2], [3, 2]), keepdims=1)
        case "flatten":
            d.rows += d.node("Flatten", *d.node("GlobalAveragePool", d.image()), axis=1)
            return []
        case "squeeze":
            (t,) = d.node("Unsqueeze", d.image(), d.constant(np.array([d.pick(0, 2, 4, -1)])))
            return d.node("Squeeze", t, d.constant(np.array([d.pick(0, 2, 4, -1)])))
    if not d.rows:
        return []
    weight = d.weight(CHANNELS, CHANNELS)
    x = d.pick(*d.rows)
    options = {"transB": d.pick(0, 1), "alpha": d.pick(1.0, 0.5), "beta": d.pick(1.0, 2.0)}
    d.rows += d.pick(d.node("Gemm", x, weight, d.weight(CHANNELS), **options), d.node("MatMul", x, weight))
    return []


def other(d: Draft) -> list[str]:
    return d.node(d.pick("Relu", "Sigmoid", "Identity", "Neg", "Sum"), d.image())


STEPS: tuple[Callable[[Draft], list[str]], ...] = (
    conv, conv, transposed, norm, arithmetic, arithmetic, pool, pad, channels, layout, layout, other,
)  # fmt: skip


def drawn(random: np.random.Generator) -> ModelProto:
    """A model of some random steps."""
    d = Draft(random)
    for _ in range(int(random.integers(1, 6))):
        made = d.pick(*STEPS)(d)
        d.images = d.images[-1:] + made if made and d.pick(True, True, False) else d.images + made
    if not d.nodes:
        d.node("Identity", "x")
    if random.random() < 0.9:
        _prune(d)
    return _model(d.nodes, d.constants, ("N", CHANNELS, "H", "W") if d.pick(True, True, False) else (1, CHANNELS, 3, 3))


def _prune(d: Draft) -> None:
    """Drop what the result does not depend on."""
    needed, kept = {d.nodes[-1].output[0]}, []
    for node in reversed(d.nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    d.nodes = kept[::-1]
    d.constants = {name: a for name, a in d.constants.items() if name in needed}


def _model(nodes: list[NodeProto], constants: dict[str, np.ndarray], shape: tuple[Any, ...]) -> ModelProto:
    tensors = [numpy_helper.from_array(np.ascontiguousarray(a) if a.ndim else a, name) for name, a in constants.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    y.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(nodes, "drawn", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


# Mutations


INTEGERS = {
    "group": (0, 1, 2, 3, 4), "axis": (-4, -1, 0, 1, 2, 3), "keepdims": (-1, 0, 1, 2), "ceil_mode": (0, 1),
    "count_include_pad": (0, 1), "transA": (0, 1), "transB": (0, 1, 2), "noop_with_empty_axes": (0, 1),
}  # fmt: skip
LISTS = ("pads", "strides", "dilations", "kernel_shape", "perm", "axes", "output_padding")
SPELLINGS = {"Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "AveragePool": "MaxPool", "Relu": "Sigmoid"}
OF_KERNELS = ("Conv", "ConvTranspose", "AveragePool", "MaxPool")


def mutated(model: ModelProto, random: np.random.Generator) -> ModelProto:
    """A copy with one thing changed, and often other names for what lies in between."""
    made = ModelProto()
    made.CopyFrom(model)
    way = MUTATIONS[int(random.integers(len(MUTATIONS)))]
    way(made, random)
    if random.random() < 0.7:
        _rename(made)
    return made


def _rename(model: ModelProto) -> None:
    kept = {"x", model.graph.output[0].name}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [n if n in kept or not n or n.startswith("c") else f"m_{n}" for n in names]


def _any(items: Any, random: np.random.Generator) -> Any:
    return items[int(random.integers(len(items)))] if len(items) else None


def _change_attribute(model: ModelProto, random: np.random.Generator) -> None:
    node = _any(model.graph.node, random)
    here = [a.name for a in node.attribute]
    more = ["pads", "strides", "dilations", "auto_pad", "kernel_shape", "group", "ceil_mode"]
    name = _any(
        here + (more if node.op_type in OF_KERNELS else []) + ["keepdims"] * (node.op_type == "ReduceMean"), random
    )
    if name is None:
        return
    old = next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if random.random() < 0.1:
        return
    if name == "auto_pad":
        value: Any = _any(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"], random)
    elif name in INTEGERS:
        value = _any(INTEGERS[name], random)
    elif name in LISTS:
        value = (
            list(old)
            if old is not None
            else [int(name not in ("pads", "output_padding"))] * (4 if name == "pads" else 2)
        )
        value[int(random.integers(len(value)))] += int(_any([-1, 1, 2], random))
    else:
        value = float(old) * _any([2.0, 1.001, -1.0], random)
    node.attribute.append(helper.make_attribute(name, value))


def _change_constant(model: ModelProto, random: np.random.Generator) -> None:
    tensor = _any(model.graph.initializer, random)
    if tensor is None:
        return
    array = np.array(numpy_helper.to_array(tensor))
    if not array.size:
        return
    at = int(random.integers(array.size))
    match int(random.integers(4)):
        case 0:
            array = array[..., :-1] if array.ndim else array
        case 1:
            array = array[None]
        case 2 if array.dtype.kind == "f":
            array = array * np.float32(_any([1e30, 1e-30, 0.0, np.inf, 1.0, 1 + 1e-7], random))
        case _:
            array.reshape(-1)[at] += int(_any([-5, -1, 1, 5], random)) if array.dtype.kind == "i" else np.float32(0.01)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _rewire(model: ModelProto, random: np.random.Generator) -> None:
    at = int(random.integers(len(model.graph.node)))
    node = model.graph.node[at]
    names = ["x", *(o for n in model.graph.node[:at] for o in n.output), *(t.name for t in model.graph.initializer)]
    node.input[int(random.integers(len(node.input)))] = _any(names, random)


def _respell(model: ModelProto, random: np.random.Generator) -> None:
    node = _any([n for n in model.graph.node if n.op_type in SPELLINGS], random)
    if node is not None:
        node.op_type = SPELLINGS[node.op_type]


def _scaled_and_back(model: ModelProto, random: np.random.Generator) -> None:
    """Times a number and its reciprocal; or the same added and taken away."""
    at, ops = (
        int(random.integers(len(model.graph.node))),
        _any([("Mul", "Mul"), ("Add", "Sub"), ("Mul", "Div")], random),
    )
    number = np.float32(_any([2.0, 2.0**100, 2.0**-100, 2.0**30], random))
    back = number if ops[1] != "Mul" else np.float32(1 / number)
    name = model.graph.node[at].input[0]
    for n, (op, value) in enumerate(zip(ops, (number, back), strict=True)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), f"c_back{n}"))
        model.graph.node.insert(at + n, helper.make_node(op, [name, f"c_back{n}"], [f"back{n}"]))
        name = f"back{n}"
    model.graph.node[at + 2].input[0] = name


def _cropped_and_back(model: ModelProto, random: np.random.Generator) -> None:
    """Padded and cropped, or the other way round."""
    at, first = int(random.integers(len(model.graph.node))), int(_any([1, -1], random))
    name = model.graph.node[at].input[0]
    for n, amount in enumerate((first, -first)):
        amounts = np.array([0, 0, amount, 0, 0, 0, 0, amount])
        model.graph.initializer.append(numpy_helper.from_array(amounts, f"c_crop{n}"))
        model.graph.node.insert(at + n, helper.make_node("Pad", [name, f"c_crop{n}"], [f"crop{n}"]))
        name = f"crop{n}"
    model.graph.node[at + 2].input[0] = name


def _flattened_and_back(model: ModelProto, random: np.random.Generator) -> None:
    """Regrouped to what it is, with one size left open."""
    at = int(random.integers(len(model.graph.node)))
    target = _any([[0, 0, 0, -1], [-1, 4, 3, 3], [0, 4, -1, 3], [0, -1, 0, 0], [-1, 0, 0, 0]], random)
    model.graph.initializer.append(numpy_helper.from_array(np.array(target), "c_to"))
    model.graph.node.insert(at, helper.make_node("Reshape", [model.graph.node[at].input[0], "c_to"], ["to"]))
    model.graph.node[at + 1].input[0] = "to"


def _left_out(model: ModelProto, random: np.random.Generator) -> None:
    node = _any(model.graph.node, random)
    made = helper.make_node("Identity", [node.input[0]], [node.output[0]])
    if len(node.output) == 1:
        node.CopyFrom(made)


def _nothing(model: ModelProto, random: np.random.Generator) -> None:
    pass


MUTATIONS: tuple[Callable[[ModelProto, np.random.Generator], None], ...] = (
    _change_attribute, _change_attribute, _change_attribute, _change_constant, _change_constant, _rewire, _respell,
    _scaled_and_back, _cropped_and_back, _flattened_and_back, _left_out, _nothing,
)  # fmt: skip


# The witness


class Found(NamedTuple):
    """A pair that is called equal and is not."""

    seed: int
    original: ModelProto
    result: ModelProto
    why: str


def _session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def difference(original: ModelProto, result: ModelProto, random: np.random.Generator) -> str:
    """What ONNX Runtime sees differ, where the original runs without overflow; empty where nothing does."""
    try:
        first = _session(original)
    except Exception:
        return ""
    try:
        second = _session(result)
    except Exception as error:
        second, why = None, f"the second cannot be loaded: {str(error)[:120]}"
    for batch, height, width, scale in TRIALS:
        x = (random.standard_normal((batch, CHANNELS, height, width)) * scale).astype(np.float32)
        try:
            with np.errstate(all="ignore"):
                (a,) = first.run(None, {"x": x})
        except Exception:
            continue
        if second is None:
            return why
        try:
            (b,) = second.run(None, {"x": x})
        except Exception as error:
            return f"the second refuses {x.shape}: {str(error)[-160:]}"
        if a.shape != b.shape:
            return f"at {x.shape}: {a.shape} against {b.shape}"
        largest = float(np.abs(a).max(initial=0.0))
        rounding = 16 * 2.0**-23 * float(np.abs(x).max(initial=0.0))  # of what cancels in exact numbers
        allowed = 1e-3 * max(largest, 1e-3 * max(scale, 1.0)) + rounding
        if np.isfinite(a).all() and not np.abs(a - b).max(initial=0.0) <= allowed:
            return f"at {x.shape}: {np.abs(a - b).max():.3g} of {largest:.3g}"
    return ""


def pairs(count: int, seed: int, verdicts: Counter[str]) -> Iterator[Found]:
    """The pairs that are called equal and are not; ``verdicts`` are counted."""
    for n in range(seed, seed + count):
        random = np.random.default_rng(n)
        original = drawn(random)
        result = mutated(original, random)
        try:
            found = certify_onnx(original, result)
        except Exception:
            continue
        verdicts["equal" if found.holds else "different" if found.different else "undecided"] += 1
        if found.holds and (why := difference(original, result, random)):
            yield Found(n, original, result, why)


def _work(seed: int, stop: int, at: Any, results: Any) -> None:
    verdicts: Counter[str] = Counter()
    for n in range(seed, stop):
        at.value = n
        for found in pairs(1, n, verdicts):
            results.put(f"seed {n}: {found.why}")
    results.put(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    verdicts: Counter[str] = Counter()
    wrong, start, stop = 0, given.seed, given.seed + given.pairs
    while start < stop:  # in chunks, because some mutated models end the process that runs them
        end, at, results = min(start + CHUNK, stop), context.Value("q", start), context.Queue()
        worker = context.Process(target=_work, args=(start, end, at, results))
        worker.start()
        worker.join()
        while not results.empty():
            found = results.get()
            if isinstance(found, str):
                wrong += 1
                print(found, flush=True)
            else:
                verdicts += found
        if worker.exitcode:
            end = at.value + 1
            verdicts["ended by the runtime"] += 1
        start = end
    print(f"{given.pairs} pairs: {dict(verdicts)}, {wrong} called equal that are not")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
