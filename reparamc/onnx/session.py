"""ONNX Runtime: a model ready to run, and random inputs that it accepts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from reparamc.algebra.dtypes import epsilon_of, is_floating
from reparamc.equivalence.trials import GUESSES, TooLarge, check_size
from reparamc.errors import InputError, one_line
from reparamc.onnx.values import forget_negative_sizes, known_size

FILE_LIMIT = 2**31 - 2**20
"""A serialised model beyond this many bytes keeps its weights in a file beside it."""


MOST_ELEMENTS = 2**23
"""Of the inputs together, once some were refused: a size that a model takes is found among small ones first."""
PATIENCE = 20.0
"""Seconds after which no further sizes are tried."""
MOST_TRIED = 32
"""Combinations of small sizes that are tried where no guess runs."""


class Run:
    """A model in ONNX Runtime on the CPU."""

    def __init__(self, path_or_bytes: str | bytes, outputs: list[str], what: str, optimize: bool) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        # Sessions that take turns must not spin in one another's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        self.outputs = outputs
        try:
            self.session = ort.InferenceSession(
                path_or_bytes, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InputError(f"ONNX Runtime cannot load {what}: {one_line(error)}") from error

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in zip(self.outputs, self.run(inputs), strict=True)}

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """All outputs, in order; they may be lists where they are sequences."""
        feeds = {name: np.asarray(value) for name, value in inputs.items()}  # NumPy's scalars are no arrays
        return list(self.session.run(self.outputs, feeds))


@contextmanager
def session(model: ModelProto, what: str, optimize: bool = False) -> Iterator[Run]:
    """``model`` ready to run, with ONNX Runtime's own optimizations if wanted.

    Models beyond the file limit go through a temporary file.
    """
    outputs = [o.name for o in model.graph.output]
    if model.ByteSize() < FILE_LIMIT:
        yield Run(model.SerializeToString(), outputs, what, optimize)
        return
    with tempfile.TemporaryDirectory(prefix="reparamc-") as folder:
        path = os.path.join(folder, "model.onnx")
        copy = ModelProto()
        copy.CopyFrom(model)
        onnx.save_model(copy, path, save_as_external_data=True)
        yield Run(path, outputs, what, optimize)


def first_working_inputs(
    model: ModelProto, run: Run, seed: int, guesses: Sequence[int] = GUESSES
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random inputs that ``run`` accepts, and its outputs; unknown extents are the first of ``guesses`` that runs.

    Raises:
        InputError: none does.
    """
    _, inputs, outputs = working(model, run, seed, guesses)
    return inputs, outputs


def working(
    model: ModelProto, run: Run, seed: int, guesses: Sequence[int]
) -> tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]:
    failure: Exception | None = None
    too_large: TooLarge | None = None
    start = perf_counter()
    for guess, sizes in _attempts(model, guesses):
        try:
            inputs = random_inputs(model, seed, guess, sizes, most=None if failure is None else MOST_ELEMENTS)
        except TooLarge as error:
            too_large = error
            continue
        try:
            return guess, inputs, run(inputs)
        except Exception as error:  # as above; another size may fit
            failure = failure or error
        if perf_counter() - start > PATIENCE:
            break
    if failure is None and too_large is not None:
        raise too_large
    raise InputError(f"ONNX Runtime cannot run the model on random inputs: {one_line(failure)}; try --verify region")


def _attempts(model: ModelProto, guesses: Sequence[int]) -> Iterator[tuple[int, dict[str, int]]]:
    """What to try for the open sizes: one for all but the batch; other batches; then small ones, each by itself."""
    if not has_open_extents(model):
        yield guesses[0], {}
        return
    yield from ((guess, {}) for guess in guesses)
    firsts = {_symbol(v, 0, d) for v in free_inputs(model) for d in v.type.tensor_type.shape.dim[:1] if not d.dim_value}
    for batch in (1, 3, 4):
        yield from ((guess, dict.fromkeys(firsts, batch)) for guess in guesses[:2])
    names = sorted({_symbol(v, i, d) for v in free_inputs(model) for i, d in enumerate(v.type.tensor_type.shape.dim)})
    rng = np.random.default_rng(0)
    for n in range(MOST_TRIED):
        yield guesses[0], dict(zip(names, rng.integers(n % 2, 7, len(names)).tolist(), strict=True))


def _symbol(value: onnx.ValueInfoProto, axis: int, dim: onnx.TensorShapeProto.Dimension) -> str:
    """What an open size goes by: inputs share those of one name."""
    return dim.dim_param or f"{value.name}[{axis}]"


def has_open_extents(model: ModelProto) -> bool:
    return any(not d.HasField("dim_value") for v in free_inputs(model) for d in v.type.tensor_type.shape.dim)


def random_inputs(
    model: ModelProto, seed: int = 0, extent: int = 32, sizes: Mapping[str, int] = {}, most: int | None = None
) -> dict[str, np.ndarray]:
    """One random array per input without a default: standard normal, or small whole numbers.

    Open sizes are as ``sizes`` has them, or else 2 on the first axis and ``extent`` on the others; a name stands for
    one size.

    Raises:
        InputError: an input is no dense tensor of numbers.
        TooLarge: they do not fit into memory, or have more than ``most`` elements.
    """
    shapes: dict[str, list[int]] = {}
    kinds: dict[str, np.dtype] = {}
    named = dict(sizes)
    for value in free_inputs(model):
        if not value.type.HasField("tensor_type"):
            raise InputError(
                f"input {value.name!r} is no tensor, so no random value can be made for it; try --verify region"
            )
        kind = value.type.tensor_type
        shape = []
        for axis, d in enumerate(kind.shape.dim):
            guess = 2 if axis == 0 else extent
            if d.HasField("dim_value"):
                shape.append(d.dim_value)
            else:
                shape.append(named.setdefault(_symbol(value, axis, d), guess))
        if kind.elem_type == TensorProto.STRING:
            raise InputError(
                f"input {value.name!r} holds strings, so no random value can be made for it; try --verify region"
            )
        shapes[value.name] = shape
        kinds[value.name] = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    rng = np.random.default_rng(seed)
    try:
        check_size(shapes)
        if most is not None and sum(map(prod, shapes.values())) > most:
            raise TooLarge(f"random inputs of more than {most} elements")
        return {name: _drawn(rng, shape, kinds[name]) for name, shape in shapes.items()}
    except TooLarge as error:
        raise TooLarge(f"{error}; try --verify region") from error
    except MemoryError as error:
        raise TooLarge(f"random inputs do not fit into memory: {one_line(error)}; try --verify region") from error


def _drawn(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    drawn = rng.standard_normal(shape) if is_floating(dtype) else rng.integers(0, 2, shape)
    return np.asarray(drawn).astype(dtype)


def free_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must give: those without a default. An extent that an operator demands is filled in."""
    defaults = {t.name for t in model.graph.initializer}
    free = [v for v in model.graph.input if v.name not in defaults]
    if all(known_size(d) is not None for v in free for d in v.type.tensor_type.shape.dim):
        return free
    found = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in free]
    forget_negative_sizes(found)
    by_name = {v.name: v for v in found}
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    demanded: dict[str, int] = {}
    for node in model.graph.node:
        value = by_name.get(node.input[0]) if node.input else None
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        if value is None or weight is None or (count := _demanded(node, weight)) is None:
            continue
        axis, extent = count
        dims = value.type.tensor_type.shape.dim
        if -len(dims) <= axis < len(dims) and not dims[axis].HasField("dim_value"):
            if dims[axis].dim_param:
                demanded.setdefault(dims[axis].dim_param, extent)
            dims[axis].dim_value = extent
    for d in (d for v in found for d in v.type.tensor_type.shape.dim if d.dim_param in demanded):
        d.dim_value = demanded[d.dim_param]
    return found


def _demanded(node: NodeProto, weight: Sequence[int]) -> tuple[int, int] | None:
    """(axis, extent) of the first operand of ``node``, where its weight takes one number of channels only."""
    given = {a.name: a.i for a in node.attribute}
    match node.op_type:
        case "Conv" if len(weight) > 2:
            return 1, weight[1] * given.get("group", 1)
        case "ConvTranspose" if len(weight) > 2:
            return 1, weight[0]
        case "BatchNormalization" | "InstanceNormalization" if len(weight) == 1:
            return 1, weight[0]
        case "Gemm" if len(weight) == 2:
            return 0 if given.get("transA") else 1, weight[1 if given.get("transB") else 0]
        case "MatMul" if len(weight) >= 2:
            return -1, weight[-2]
        case _:
            return None


def epsilon(output: np.ndarray, inputs: Mapping[str, np.ndarray]) -> float:
    """The machine epsilon to judge ``output`` by: the coarsest of its own and the inputs'."""
    return max([epsilon_of(a.dtype) for a in (output, *inputs.values())], default=0.0)
