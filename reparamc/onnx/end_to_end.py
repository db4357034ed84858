"""End-to-end verification of ONNX models: original and result in ONNX Runtime, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
from onnx import ModelProto

from reparamc.algebra.records import replace
from reparamc.equivalence.end_to_end import Alone, Region, compare_models
from reparamc.equivalence.pair import Pair
from reparamc.equivalence.trials import GUESSES
from reparamc.errors import InputError
from reparamc.onnx.regions_alone import run_alone
from reparamc.onnx.session import Run, epsilon, has_open_sizes, random_inputs, session, working
from reparamc.onnx.values import FLOATS
from reparamc.onnx.weights import array
from reparamc.report.data import OutputError


def verify_end_to_end(
    original: ModelProto, result: ModelProto, regions: Sequence[Region] = (), seed: int = 0
) -> list[OutputError]:
    """Run both models in their deployed dtypes, without runtime optimizations, and compare every output.

    Where sizes are open, two neighbouring ones are tried, of which one is odd; where inputs have defaults, also
    other values. What is allowed, returned and raised, and when ``regions`` (what was rewritten) are compared one by
    one: `compare_models`.

    Raises:
        InputError: ONNX Runtime cannot run the original.
    """
    with _loaded(original) as run_original, session(result, "the rewritten model") as run_result:
        if run_original.narrowed != run_result.narrowed:
            raise InputError("ONNX Runtime runs one of the two models in float32 only; try --verify region")
        pair = Pair(run_original, run_result, seed=seed, perturb=run_original.perturbed)
        trials = _trials(original, run_original, seed)
        alone = partial(run_alone, original, result, regions, seed=seed)
        found = compare_models(pair, trials, epsilon, regions, alone)
        return [replace(entry, in_float32=True) for entry in found] if run_original.narrowed else found


@contextmanager
def _loaded(original: ModelProto) -> Iterator[Run]:
    with ExitStack() as stack:
        try:
            run = stack.enter_context(session(original, "the model"))
        except InputError as error:
            raise InputError(f"{error}; try --verify region") from error
        yield run


def run_regions(
    original: ModelProto, result: ModelProto, regions: Sequence[Region], seed: int = 0
) -> Iterator[tuple[Alone, Callable[[np.ndarray], float]]]:
    """Each of ``regions`` alone on both sides, on several inputs, and the machine epsilon to judge an array by.

    Nothing where no random inputs can be made that the original takes.
    """
    try:
        with session(original, "the model") as run:
            given = [inputs for inputs, _ in _trials(original, run, seed)]
    except InputError:
        return
    for inputs in given:
        if (seen := run_alone(original, result, regions, inputs, seed)) is not None:
            yield seen, partial(epsilon, inputs=inputs)


def _trials(model: ModelProto, run: Run, seed: int) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Inputs to compare on, and what ``model`` makes of them; only the first must fit the model."""
    size, inputs, expected = working(model, run, seed, GUESSES)
    yield inputs, expected
    others = [random_inputs(model, seed, size - 1)] if has_open_sizes(model) else []
    if defaults := _other_defaults(model, seed):
        others.append(inputs | defaults)
    for other in others:
        try:
            expected = run(other)
        except Exception:  # ONNX Runtime's exceptions share no base class
            continue
        yield other, expected


def _other_defaults(model: ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Values near the defaults of floating inputs that have one, for callers may set them."""
    if model.ir_version < 4:  # every initializer is listed as an input there
        return {}
    rng = np.random.default_rng(seed)
    names = {v.name for v in model.graph.input}
    given = [t for t in model.graph.initializer if t.name in names and t.data_type in FLOATS]
    arrays = {t.name: array(t) for t in given}
    return {name: np.asarray(a * rng.uniform(0.5, 1.5, a.shape)).astype(a.dtype) for name, a in arrays.items()}
