"""ONNX Runtime: a model ready to run, and random inputs that it accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from time import thread_time
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner

from reparamc.algebra.dtypes import epsilon_of, is_floating
from reparamc.certificate.onnx_bounds import may_propagate, nested
from reparamc.equivalence.pair import perturbed
from reparamc.equivalence.trials import GUESSES, TooLarge, check_size
from reparamc.errors import InputError, one_line
from reparamc.onnx import weights
from reparamc.onnx.in_float32 import DTYPES, in_float32
from reparamc.onnx.values import forget_negative_sizes, inferred, known_size, skeleton

MOST_DRAWN = 2**25
"""Elements of random inputs of open sizes in all: a size that a model takes is found among small ones."""
MOST_COMPUTED, MOST_FIXED = 2**25, 2**28
"""Elements of one tensor that trial inputs may lead to: those of open sizes, and those of the sizes of the model."""
PATIENCE = 5.0
"""Seconds of processor time after which no further sizes are tried."""
MOST_TRIED = 32
"""Combinations of small sizes that are tried where no guess runs."""


class Run:
    """A model in ONNX Runtime on the CPU.

    Args:
        light: says where its weights are, unless they are in it.
        narrowed: whether the model is given as `in_float32`; inputs are converted.

    Raises:
        InputError: ONNX Runtime cannot load it.
    """

    def __init__(
        self,
        path_or_bytes: str | bytes,
        outputs: list[str],
        what: str,
        optimize: bool,
        light: weights.ForRuntime | None = None,
        narrowed: bool = False,
    ) -> None:
        self.outputs, self._light, self.narrowed = outputs, light, narrowed
        self._model, self._what, self._optimize = path_or_bytes, what, optimize
        self._session: Any = self._opened()

    def _opened(self) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if self._optimize else levels.ORT_DISABLE_ALL
        # Sessions that take turns must not spin in one another's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        if self._light is not None:
            self._light.set_in(options)
            if not self._optimize:  # weights would be copied for a few runs
                options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            return ort.InferenceSession(self._model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise InputError(f"ONNX Runtime cannot load {self._what}: {one_line(error)}") from error

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in zip(self.outputs, self.run(inputs), strict=True)}

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """All outputs, in order; they may be lists where they are sequences."""
        feeds = {name: np.asarray(value) for name, value in inputs.items()}  # NumPy's scalars are no arrays
        if self.narrowed:
            feeds = {name: a.astype(np.float32) if a.dtype in DTYPES else a for name, a in feeds.items()}
        self._session = self._session or self._opened()
        try:
            return list(self._session.run(self.outputs, feeds))
        finally:
            if self._light is not None and self._light.is_large and not self._optimize:
                self._session = None

    def perturbed(self, inputs: Mapping[str, np.ndarray], seed: int) -> Mapping[str, np.ndarray]:
        """``inputs`` moved by one rounding of what the model computes in."""
        if self.narrowed:
            inputs = {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in inputs.items()}
        return perturbed(inputs, seed)


@contextmanager
def session(model: ModelProto, what: str, optimize: bool = False, narrowed: bool = True) -> Iterator[Run]:
    """``model`` ready to run, with ONNX Runtime's own optimizations if wanted.

    Where it lacks an operator of doubles or bfloat16, the model runs in float32, if that may be (``narrowed``).
    """
    with weights.holding():
        given = weights.lightened(model)
        outputs = [o.name for o in model.graph.output]
        try:
            light = weights.for_runtime(given)
            run = Run(light.data, outputs, what, optimize, light)
        except InputError as error:
            copy = in_float32(given) if narrowed else None
            if copy is None:
                raise
            light = weights.for_runtime(copy)
            try:
                run = Run(light.data, outputs, what, optimize, light, narrowed=True)
            except InputError:
                raise error from error.__cause__
        yield run


def first_working_inputs(
    model: ModelProto, run: Run, seed: int, guesses: Sequence[int] = GUESSES
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random inputs that ``run`` accepts, and its outputs; unknown sizes are the first of ``guesses`` that runs.

    Raises:
        InputError: none does.
    """
    _, inputs, outputs = working(model, run, seed, guesses)
    return inputs, outputs


def fits(model: ModelProto, inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether the standard takes ``inputs``. ONNX Runtime joins maps of other sizes to what is empty."""
    if not {"Concat", "Slice"} <= {node.op_type for node in model.graph.node}:
        return True
    light = skeleton(model)
    for value in light.graph.input:
        if value.name in inputs:
            shape = value.type.tensor_type.shape
            del shape.dim[:]
            for n in inputs[value.name].shape:
                shape.dim.add().dim_value = n
    del light.graph.value_info[:]
    try:
        onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=may_propagate(light))
    except Exception:  # whatever the inference of an operator raises
        return False
    return True


def working(
    model: ModelProto, run: Run, seed: int, guesses: Sequence[int]
) -> tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]:
    failure: Exception | None = None
    too_large: TooLarge | None = None
    of_nothing: tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]] | None = None
    start, left = thread_time(), MOST_DRAWN
    light, is_open = skeleton(model), has_open_sizes(model)
    for guess, sizes in _attempts(model, guesses):
        if of_nothing is not None and 0 in sizes.values():
            continue  # not of more
        kinds = input_kinds(model, guess, sizes)
        drawn = sum(prod(shape) for shape, _ in kinds.values())
        try:
            check_size({name: shape for name, (shape, _) in kinds.items()})
            check_computed(light, kinds, MOST_COMPUTED if is_open else MOST_FIXED)
            if is_open and drawn > left:
                raise TooLarge(f"random inputs of {drawn} elements are too many")
            inputs = _drawn_inputs(kinds, seed)
        except TooLarge as error:
            too_large = error
            continue
        try:
            if not fits(model, inputs):
                raise InputError("the sizes of what it joins do not fit together")
            found = guess, inputs, run(inputs)
            if not is_open or any(a.size for a in found[2].values()):
                return found
            of_nothing = of_nothing or found
        except Exception as error:  # as above; another size may fit
            failure = failure or error
        left -= drawn
        if thread_time() - start > PATIENCE:
            break
    if of_nothing is not None and too_large is None:
        return of_nothing
    if too_large is not None and (failure is None or of_nothing is not None):
        raise TooLarge(f"{too_large}; try --verify region") from too_large
    raise InputError(f"ONNX Runtime cannot run the model on random inputs: {one_line(failure)}; try --verify region")


def check_computed(light: ModelProto, inputs: Mapping[str, tuple[list[int], np.dtype]], most: int) -> None:
    """See that no tensor gets ``most`` elements on ``inputs`` of these shapes, as far as shape inference can tell.

    Args:
        light: its `skeleton`, which is changed.

    Raises:
        TooLarge: one would be; names it.
    """
    for value in light.graph.input:
        if value.name in inputs:
            kind = value.type.tensor_type
            kind.CopyFrom(helper.make_tensor_type_proto(kind.elem_type, inputs[value.name][0]).tensor_type)
    whole = inliner.inline_local_functions(light) if light.functions else light
    found = inferred(whole, {"data_prop": True}, {}).graph
    for value in (v for g in nested(found) for v in (*g.value_info, *g.output)):
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if prod(sizes) > most:
            raise TooLarge(f"{value.name!r} would have {prod(sizes)} elements on random inputs")


def _attempts(model: ModelProto, guesses: Sequence[int]) -> Iterator[tuple[int, dict[str, int]]]:
    """What to try for the open sizes: one for all but the batch; other batches; then small ones, each by itself."""
    if not has_open_sizes(model):
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


def has_open_sizes(model: ModelProto) -> bool:
    return any(not d.HasField("dim_value") for v in free_inputs(model) for d in v.type.tensor_type.shape.dim)


def random_inputs(model: ModelProto, seed: int = 0, size: int = 32) -> dict[str, np.ndarray]:
    """One random array per input without a default: standard normal, or small whole numbers; see `input_kinds`.

    Raises:
        InputError: an input is no dense tensor of numbers.
        TooLarge: they do not fit into memory.
    """
    kinds = input_kinds(model, size, {})
    check_size({name: shape for name, (shape, _) in kinds.items()})
    return _drawn_inputs(kinds, seed)


def input_kinds(model: ModelProto, size: int, sizes: Mapping[str, int]) -> dict[str, tuple[list[int], np.dtype]]:
    """A shape, and the dtype, of each input without a default.

    Open sizes are as ``sizes`` has them, or else 2 on the first axis and ``size`` on the others; a name means
    one size.

    Raises:
        InputError: an input is no dense tensor of numbers.
    """
    kinds: dict[str, tuple[list[int], np.dtype]] = {}
    named = dict(sizes)
    for value in free_inputs(model):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type == TensorProto.STRING:
            what = "holds strings" if value.type.HasField("tensor_type") else "is no tensor"
            raise InputError(f"input {value.name!r} {what}, so no random value can be made for it; try --verify region")
        shape = [
            d.dim_value if d.HasField("dim_value") else named.setdefault(_symbol(value, axis, d), size if axis else 2)
            for axis, d in enumerate(kind.shape.dim)
        ]
        kinds[value.name] = shape, helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return kinds


def _drawn_inputs(kinds: Mapping[str, tuple[list[int], np.dtype]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    try:
        return {name: _drawn(rng, shape, dtype) for name, (shape, dtype) in kinds.items()}
    except MemoryError as error:
        raise TooLarge(f"random inputs do not fit into memory: {one_line(error)}") from error


def _drawn(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    drawn = rng.standard_normal(shape) if is_floating(dtype) else rng.integers(0, 2, shape)
    return np.asarray(drawn).astype(dtype)


def free_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must give: those without a default. A size that an operator demands is filled in."""
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
        axis, size = count
        dims = value.type.tensor_type.shape.dim
        if -len(dims) <= axis < len(dims) and not dims[axis].HasField("dim_value"):
            if dims[axis].dim_param:
                demanded.setdefault(dims[axis].dim_param, size)
            dims[axis].dim_value = size
    for d in (d for v in found for d in v.type.tensor_type.shape.dim if d.dim_param in demanded):
        d.dim_value = demanded[d.dim_param]
    return found


def _demanded(node: NodeProto, weight: Sequence[int]) -> tuple[int, int] | None:
    """(axis, size) of the first operand of ``node``, where its weight takes one number of channels only."""
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
