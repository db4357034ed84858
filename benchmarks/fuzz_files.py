"""Fuse ONNX files that nobody meant to write: small valid models with a few bits, fields or references changed.

    python benchmarks/fuzz_files.py --count 10000

Each file goes through the loader and `fuse_model` at every level of verification. It may be refused in one line, or
fused; then the result must run where the original runs, and give what it gives. Anything else is counted and listed:
a traceback, more than ten seconds of processor time, a wrong result. Files work in a process of their own, because
ONNX Runtime itself aborts on some; these are counted, too. Exit code 1 if there is a traceback, a hang or a wrong
result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from reparamc.errors import ReparamcError
from reparamc.onnx.files import load
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs, session

LEVELS = ("off", "region", "full")
HANG = 10.0
"""Seconds of processor time that one file may take at one level."""
PATIENCE = 120.0
"""Seconds without an answer after which a process is ended."""
BAD = ("traceback", "hang", "wrong")
CHUNK = 50

ODD = (-(2**63), -(2**31), -100, -2, -1, 0, 1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, 1e-45, 1e-38, 3e38, -3e38, float("inf"), float("nan"), 1.0)
BYTES = (b"", b"SAME_UPPER", b"SAME_LOWER", b"VALID", b"\xff\xfe", b"reflect", b"edge", b"linear", b"ij,jk")
OPSETS = (0, 1, 6, 7, 8, 9, 10, 11, 12, 13, 15, 18, 21, 23, 99, -1)
WORDS = ("", "x", "y", "w", "x w", "Conv", "Add", "\N{SNOWMAN}", "a" * 300)
OPERATORS = (
    "Add", "BatchNormalization", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Einsum", "Expand",
    "Flatten", "Gather", "Gemm", "Identity", "If", "MatMul", "Pad", "Range", "ReduceMean", "Relu", "Reshape", "Resize",
    "Shape", "Slice", "Softmax", "Split", "Squeeze", "Sum", "Tile", "Transpose", "Unsqueeze", "Upsample", "Where",
)  # fmt: skip

# Valid models


def _model(nodes: list[NodeProto], constants: dict[str, Any], shape: Any, opset: int = 17, **rest: Any) -> ModelProto:
    vi = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(np.asarray(a, order="C"), name) for name, a in constants.items()]
    results = [vi("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", [vi("x", TensorProto.FLOAT, shape)], results, tensors)
    domains = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in rest.get("functions", ()))]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8, **rest)
    (inferred,) = shape_inference.infer_shapes(model).graph.output
    rank = len(inferred.type.tensor_type.shape.dim) or 4  # what functions and bodies compute are images
    model.graph.output[0].CopyFrom(vi("y", TensorProto.FLOAT, [f"y{axis}" for axis in range(rank)]))
    return model


def _node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, ["" if n == "-" else n for n in inputs.split()], outputs.split(), **attributes)


def _norm(x: str, y: str) -> NodeProto:
    return _node("BatchNormalization", f"{x} g b m v", y, epsilon=1e-4)


def _body(op: str) -> GraphProto:
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, list("abcd"))
    return helper.make_graph([_node(op, "c", "r")], op, [], [result])


def models() -> list[ModelProto]:
    """Small models, one for each way that a graph can be read."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    norm = {"g": draw(4), "b": draw(4), "m": draw(4), "v": np.abs(draw(4)) + 0.5}
    image, pads = ("N", 3, "H", "W"), {"pads": [1, 1, 1, 1]}
    conv = _node("Conv", "x w", "c", **pads, strides=[1, 1], dilations=[1, 1], group=1)
    w = {"w": draw(4, 3, 3, 3)}
    twice = helper.make_function(
        "own", "Scaled", ["a"], ["r"], [_node("Mul", "a a", "p"), _node("Neg", "p", "r")], [helper.make_opsetid("", 17)]
    )
    choose = _node("If", "flag", "y", then_branch=_body("Neg"), else_branch=_body("Relu"))
    weight = numpy_helper.from_array(draw(4, 3), "t")
    return [
        _model([conv, _norm("c", "n"), _node("Relu", "n", "y")], w | norm, image),
        _model(
            [conv, _norm("c", "n"), _node("Conv", "x u", "d"), _node("Add", "n d", "y")],
            w | norm | {"u": draw(4, 3, 1, 1)}, (2, 3, 5, 4),
        ),
        _model(
            [_node("ConvTranspose", "x w", "c", strides=[2, 2], output_padding=[1, 1]), _norm("c", "y")],
            {"w": draw(3, 4, 3, 3)} | norm, image,
        ),
        _model(
            [
                _node("Split", "x s", "p q", axis=1), _node("Conv", "p w", "c"), _node("Conv", "q h", "d"),
                _node("Concat", "c d", "e", axis=1), _norm("e", "y"),
            ],
            {"s": np.array([3, 1]), "w": draw(2, 3, 1, 1), "h": draw(2, 1, 1, 1)} | norm, (1, 4, 3, 3),
        ),
        _model(
            [
                _node("MatMul", "x w", "p"), _node("Reshape", "p s", "r"),
                _node("Transpose", "r", "t", perm=[0, 2, 1, 3]),
                _node("Mul", "t f", "z"), _node("Softmax", "z", "y", axis=-1),
            ],
            {"w": draw(6, 8), "s": np.array([0, 0, 2, 4]), "f": np.array(0.5, np.float32)}, ("N", 5, 6),
        ),
        _model(
            [
                _node("Constant", "", "t", value=weight), _node("Constant", "", "a", value_ints=[2, 3]),
                _node("Unsqueeze", "t a", "w"), _node("Pad", "x o", "p", mode="constant"), _node("Conv", "p w", "c"),
                _norm("c", "n"), _node("AveragePool", "n", "y", kernel_shape=[2, 2], strides=[2, 2]),
            ],
            norm | {"o": np.array([0, 0, 1, 1, 0, 0, 1, 1])}, image,
        ),
        _model(
            [conv, _norm("c", "n"), _node("Mul", "n f", "k"), choose],
            w | norm | {"f": draw(4, 1, 1), "flag": np.array(True)}, image,
        ),
        _model(
            [conv, helper.make_node("Scaled", ["c"], ["s"], domain="own"), _norm("s", "y")], w | norm, image,
            functions=[twice],
        ),
        _model(
            [
                _node("Shape", "x", "s"), _node("Gather", "s i", "n0", axis=0), _node("Concat", "n0 rest", "k", axis=0),
                _node("Reshape", "x k", "f"), _node("Gemm", "f w b", "e", transB=1, alpha=0.5), _norm("e", "y"),
            ],
            {"i": np.array([0]), "rest": np.array([-1]), "w": draw(4, 12)} | norm, (2, 3, 2, 2),
        ),
        _model(
            [
                _node("QuantizeLinear", "x q z", "a"), _node("DequantizeLinear", "a q z", "d"),
                _node("DequantizeLinear", "k h l", "w", axis=0),
                _node("Conv", "d w", "c", **pads), _norm("c", "y"),
            ],
            norm | {
                "q": np.array(0.05, np.float32), "z": np.array(0, np.int8), "h": np.abs(draw(4)),
                "k": rng.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8), "l": np.zeros(4, np.int8),
            }, image,
        ),
        _model(
            [
                _node("Slice", "x a e d", "p"), _node("ReduceMean", "p", "r", axes=[2, 3], keepdims=1),
                _node("Conv", "r w", "c"), _norm("c", "y"),
            ],
            {"a": np.array([0]), "e": np.array([3]), "d": np.array([1]), "w": draw(4, 3, 1, 1)} | norm, (2, 5, 4, 3),
        ),
        _model(
            [
                _node("Resize", "x - k", "u", mode="linear"), _node("Expand", "o s", "e"), _node("Mul", "u e", "p"),
                _node("Tile", "p t", "y"),
            ],
            {
                "k": np.array([1, 1, 2, 2], np.float32), "o": draw(1), "s": np.array([3, 1, 1]),
                "t": np.array([1, 1, 1, 2]),
            }, (1, 3, 4, 4),
        ),
    ]  # fmt: skip


# Changes


def _graphs(model: ModelProto) -> list[GraphProto]:
    bodies = (a.g for n in model.graph.node for a in n.attribute if a.HasField("g"))
    return [model.graph, *bodies]


class Changes:
    """Random changes of a model, in place."""

    def __init__(self, model: ModelProto, rng: np.random.Generator) -> None:
        self.model, self.rng = model, rng
        self.graphs = _graphs(model)
        self.nodes = [n for g in self.graphs for n in g.node]
        self.names = sorted({name for n in self.nodes for name in (*n.input, *n.output)})

    def pick(self, items: Any) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def number(self) -> int:
        return self.pick(ODD) if self.rng.random() < 0.6 else int(self.rng.integers(-3, 9))

    def any(self) -> None:
        """One change of a kind drawn at random; one that does not apply changes nothing."""
        change: Callable[[], None] = self.pick(
            [
                self.attribute_value, self.attribute_value, self.attribute_kind, self.attribute_name, self.reference,
                self.reference, self.result, self.operator, self.dims, self.dims, self.data, self.data, self.type,
                self.declared, self.declared, self.order, self.copies, self.version, self.removal, self.value_info,
            ]
        )  # fmt: skip
        change()

    def _attribute(self) -> AttributeProto | None:
        found = [a for n in self.nodes for a in n.attribute]
        return self.pick(found) if found else None

    def attribute_value(self) -> None:
        if (a := self._attribute()) is None:
            return
        a.i, a.f = self.number(), self.pick(FLOATS)
        a.s = self.pick(
            (b"", b"SAME_UPPER", b"SAME_LOWER", b"VALID", b"\xff\xfe", b"reflect", b"edge", b"linear", b"ij,jk")
        )
        del a.floats[:]
        if a.ints:
            change = self.rng.integers(4)
            if change == 0:
                a.ints.append(self.number())
            elif change == 1:
                del a.ints[-1:]
            elif change == 2:
                del a.ints[:]
            else:
                a.ints[int(self.rng.integers(len(a.ints)))] = self.number()

    def attribute_kind(self) -> None:
        if (a := self._attribute()) is not None:
            a.type = self.pick(sorted(AttributeProto.AttributeType.values()))
            if self.rng.random() < 0.3:
                a.ref_attr_name = "k"

    def attribute_name(self) -> None:
        if (a := self._attribute()) is not None:
            a.name = self.pick(("", "axis", "pads", "group", "strides", "auto_pad", "perm", "value", "epsilon", "k"))

    def reference(self) -> None:
        node = self.pick(self.nodes)
        if len(node.input) and self.rng.random() < 0.7:
            node.input[int(self.rng.integers(len(node.input)))] = self.pick([*self.names, *WORDS])
        elif len(node.input) and self.rng.random() < 0.5:
            del node.input[-1:]
        else:
            node.input.append(self.pick(self.names))

    def result(self) -> None:
        node = self.pick(self.nodes)
        if len(node.output) and self.rng.random() < 0.7:
            node.output[int(self.rng.integers(len(node.output)))] = self.pick([*self.names, *WORDS])
        elif self.rng.random() < 0.5:
            del node.output[-1:]
        else:
            node.output.append(self.pick(WORDS))

    def operator(self) -> None:
        node = self.pick(self.nodes)
        if self.rng.random() < 0.8:
            node.op_type = self.pick(OPERATORS)
        else:
            node.domain = self.pick(("", "ai.onnx", "com.microsoft", "own", "ai.onnx.ml"))

    def _tensor(self) -> TensorProto | None:
        found = [
            *chain.from_iterable(g.initializer for g in self.graphs),
            *(a.t for n in self.nodes for a in n.attribute if a.HasField("t")),
        ]
        return self.pick(found) if found else None

    def dims(self) -> None:
        if (t := self._tensor()) is None:
            return
        if t.dims and self.rng.random() < 0.6:
            t.dims[int(self.rng.integers(len(t.dims)))] = self.number()
        elif t.dims and self.rng.random() < 0.5:
            t.dims.reverse()
        else:
            t.dims.append(1)

    def data(self) -> None:
        """Another entry, of the type that the tensor has; or other bytes."""
        if (t := self._tensor()) is None:
            return
        if self.rng.random() < 0.8:
            try:
                array = numpy_helper.to_array(t).copy()
                flat = array.reshape(-1)
                value = self.pick(FLOATS) if array.dtype.kind == "f" else self.number()
                flat[int(self.rng.integers(flat.size))] = value
                t.CopyFrom(numpy_helper.from_array(array, t.name))
            except Exception:  # it was spoilt before
                return
        else:
            t.raw_data = t.raw_data[: int(self.rng.integers(len(t.raw_data) + 1))]

    def type(self) -> None:
        if (t := self._tensor()) is not None:
            t.data_type = int(self.rng.integers(0, 30))

    def declared(self) -> None:
        value = self.pick([v for g in self.graphs for v in (*g.input, *g.output)])
        kind = value.type.tensor_type
        change = self.rng.integers(4)
        if kind.shape.dim and change == 0:
            dim = self.pick(kind.shape.dim)
            dim.Clear()
            dim.dim_value = self.number()
        elif kind.shape.dim and change == 1:
            self.pick(kind.shape.dim).dim_param = self.pick(("N", "H", "", "?"))
        elif change == 2:
            kind.elem_type = int(self.rng.integers(0, 20))
        elif self.rng.random() < 0.5:
            kind.shape.dim.add()
        else:
            value.name = self.pick([*self.names, *WORDS])

    def value_info(self) -> None:
        dims = [self.number() for _ in range(int(self.rng.integers(5)))]
        self.model.graph.value_info.append(
            helper.make_tensor_value_info(self.pick(self.names), int(self.rng.integers(1, 17)), dims)
        )

    def order(self) -> None:
        nodes = self.pick(self.graphs).node
        if not nodes:
            return
        moved = NodeProto.FromString(nodes[-1].SerializeToString())
        nodes.insert(int(self.rng.integers(len(nodes))), moved)
        del nodes[-1:]

    def copies(self) -> None:
        graph = self.pick(self.graphs)
        group = self.pick([graph.node, graph.initializer, graph.output, graph.input])
        if len(group):
            group.add().CopyFrom(self.pick(group))

    def version(self) -> None:
        if self.rng.random() < 0.7:
            self.pick(self.model.opset_import).version = self.pick(
                (0, 1, 6, 7, 8, 9, 10, 11, 12, 13, 15, 18, 21, 23, 99, -1)
            )
        else:
            self.model.ir_version = self.pick((0, 1, 3, 4, 7, 10, 11, 99))

    def removal(self) -> None:
        graph = self.pick(self.graphs)
        group = self.pick([graph.node, graph.initializer, graph.output, graph.input])
        if len(group):
            del group[int(self.rng.integers(len(group)))]


def mutated(seed: int) -> bytes:
    """A model with one to three changes, or with a few of its bytes changed."""
    rng = np.random.default_rng(seed)
    model = ModelProto.FromString(ORIGINALS[int(rng.integers(len(ORIGINALS)))])
    if rng.random() < 0.75:
        for _ in range(int(rng.integers(1, 4))):
            Changes(model, rng).any()
        return model.SerializeToString()
    data = bytearray(model.SerializeToString())
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(data)))
        change = rng.integers(4)
        if change < 2:
            data[place] ^= 1 << int(rng.integers(8))
        elif change == 2:
            data[place] = int(rng.integers(256))
        else:
            del data[place : place + int(rng.integers(1, 9))]
    return bytes(data)


ORIGINALS = [m.SerializeToString() for m in models()]

# Trying


def try_one(seed: int, folder: Path) -> tuple[str, str]:
    """What came of a file, and where: "refused", "same", "fused", or one of `BAD`."""
    path = folder / "mutated.onnx"
    path.write_bytes(mutated(seed))
    verdict = "same"
    for level in LEVELS:
        start = process_time()
        try:
            model = load(path)
            result, report = fuse_model(model, verify=level)
        except ReparamcError as error:
            if "\n" in str(error):
                return "traceback", f"{level}: a message of several lines"
            if (took := process_time() - start) > HANG:
                return "hang", f"{level}: {took:.0f} s"
            verdict = "refused"
            continue
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            return "traceback", f"{level}: {kind}: {str(error)[:80]!r}"
        else:
            if report.changed:
                verdict = "fused"
        if (took := process_time() - start) > HANG:
            return "hang", f"{level}: {took:.0f} s"
        if verdict == "fused" and not _is_vast(model) and (wrong := _wrong(model, result)) is not None:
            return "wrong", f"{level}: {wrong}"
    return verdict, ""


def _is_vast(model: ModelProto) -> bool:
    """Whether a constant names a size at which running the model takes long: a padding of 65,536."""
    arrays = (numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT64)
    return any(np.any((np.abs(a) > 4096) & (np.abs(a) < 2**40)) for a in arrays)


def _wrong(original: ModelProto, result: ModelProto) -> str | None:
    """In what ``result`` differs from ``original``, on random inputs that the original takes."""
    for seed, size in ((0, 4), (1, 5)):
        try:
            feeds = random_inputs(original, seed, size)
            with session(original, "the original") as run:
                expected = run(feeds)
        except Exception:  # ONNX Runtime's exceptions share no base class
            continue
        try:
            with session(result, "the result") as run:
                found = run(feeds)
        except Exception as error:
            return f"it does not run: {str(error)[:80]!r}"
        for name, a in expected.items():
            b = found[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
            if a.dtype.kind == "f" and a.size and np.isfinite(a).all():
                error = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
                if not error <= 1e-4 * max(np.abs(a).max(), 1e-6):
                    return f"off by {error:.1g} of {np.abs(a).max():.1g}"
    return None


def _work(first: int, end: int, queue: Any) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, end):
            queue.put((seed, None))
            queue.put((seed, try_one(seed, Path(folder))))
    queue.put((end, None))


def outcomes(first: int, end: int) -> Iterator[tuple[int, str, str]]:
    """(seed, verdict, where) of each file; what kills its process is "aborted" or a "hang"."""
    context = get_context("fork")
    seed = first
    while seed < end:
        queue = context.SimpleQueue()
        stop = min(end, seed + CHUNK)
        process = context.Process(target=_work, args=(seed, stop, queue))
        process.start()
        at, since = seed, perf_counter()
        while at < stop:
            if not queue.empty():
                at, outcome = queue.get()
                since = perf_counter()
                if outcome is not None:
                    yield at, *outcome
                    at += 1
                continue
            hung = perf_counter() - since > PATIENCE
            if hung or not process.is_alive():
                if not hung and not queue.empty():
                    continue
                process.kill()
                yield at, "hang" if hung else "aborted", f"exit code {process.exitcode}"
                at += 1
                break
            process.join(0.002)
        process.join()
        seed = at


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuse mutated ONNX files.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    arguments = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    for seed, verdict, where in outcomes(arguments.seed, arguments.seed + arguments.count):
        counts[verdict] += 1
        if verdict in (*BAD, "aborted"):
            print(f"{verdict:<10} seed {seed}: {where}", flush=True)
    print(f"{arguments.count} files: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return 1 if any(counts[what] for what in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
