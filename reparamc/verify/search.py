"""`verify_onnx`: is one ONNX model equal to another, whoever made it?

Both models run in ONNX Runtime on the same inputs, by default without its optimizations, which would hide or
add differences. First come sizes and values that wrong rewrites are known to show at, then a random search; what
fails is shrunk, and the smallest failing input is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto

from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.proof import Certificate, Window
from reparamc.equivalence import trials
from reparamc.equivalence.difference import CEILING, Difference, difference
from reparamc.equivalence.pair import PERTURBATIONS, BrokenError, Comparison, Pair, RefusedError
from reparamc.equivalence.trials import Inputs, Slot, Space, Trial
from reparamc.errors import InputError, InputTypeError, one_line
from reparamc.onnx import weights
from reparamc.onnx.check import check as check_model
from reparamc.onnx.files import check_keeps_weights, check_target, opened
from reparamc.onnx.session import Run, epsilon, fits, session
from reparamc.verify.arrays import read_inputs, write_inputs
from reparamc.verify.branches import LARGEST, Branches, branches_of, factors
from reparamc.verify.interface import Interface, compare_interfaces
from reparamc.verify.result import Disagreement, OutputCheck, Verification, check_output
from reparamc.verify.witness import Witness, operands_of, witness

EXAMPLES = 100
"""Random inputs that are tried after the fixed ones, if time allows."""


class Budget(NamedTuple):
    """How long all may take by default.

    Attributes:
        patience: in units of loading and running both models once.
        least: in seconds, in any case: small models are searched thoroughly.
    """

    patience: float
    least: float


EVIDENCE = Budget(2.5, 3.0)
"""Where inputs are what decides."""
SECOND_OPINION = Budget(1.5, 1.0)
"""Where all is proven equal. The proof goes on beside the first runs, which makes these longer than they are alone."""

BEYOND = 64
"""A coefficient that is off by more than so many roundings of all that it is added up from is another one."""

TIES = "halves"
"""Inputs that are exact, and lie between two results of what rounds or compares."""
SEEN = 1e-2
"""A step between two results is larger, relative to the largest."""

ALONE = ("channels", "uniform")
"""Inputs on which a tensor is run alone, after ordinary ones."""

SUSPECT = 32
"""An error of so many roundings is no equality without a word, unless all is proven."""

FURTHER = 1.25
"""How far beyond a threshold values go."""

MOST_FACTORS, MOST_SIZES, MOST_VALUES = 8, 6, 64
"""Thresholds, sizes and values of a graph that are tried."""

RENAMINGS = 4
"""How often the proof is made anew without the names that mean something else in each model."""

SHRINKING = 200
"""So many runs may make a failing input smaller."""

SHOWN = 5
"""Windows of another form that are named."""
FLOOR = 16
"""A difference of so many machine epsilons of the output's ordinary size is rounding in any case: on inputs such
as zeros, constants may cancel, and what is left of them has no correct digit."""

ModelOrPath = ModelProto | str | os.PathLike[str]


def verify_onnx(
    original: ModelOrPath,
    fused: ModelOrPath,
    *,
    inputs: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    examples: int = EXAMPLES,
    seconds: float | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    non_finite: bool = False,
    optimize: bool = False,
    save: str | os.PathLike[str] | None = None,
) -> Verification:
    """Compare two ONNX models, given as paths or as `ModelProto`; neither need be made by reparamc.

    Args:
        inputs: compare on these alone: one array per input of the original, or a file or folder of them
            (see `reparamc.verify.arrays`).
        examples: how many random inputs to try after the fixed ones.
        seconds: how long that may go on; by default 2.5 times what loading both models and running them once
            takes, and 3 seconds at least; where all is proven equal, 1.5 times as much, and 1 second at least.
        seed: of all random numbers.
        rtol, atol: judge every entry by these, as ``numpy.allclose`` does, instead of by the original's response to
            rounding; one that is not given is then 0.
        non_finite: also try inputs that hold NaN or an infinity.
        optimize: let ONNX Runtime optimise both models.
        save: write the smallest failing input to this .npz file.

    Returns:
        The figures and the verdict; ``.equal`` is True where no difference was found and there is no doubt.

    Raises:
        InputTypeError: a model is neither a path nor a ModelProto.
        InputError: a model cannot be read, ONNX Runtime cannot load one or run the original, ``inputs`` do not fit, or
            inputs of the declared sizes take more memory than there is.
    """
    start = perf_counter()
    given = None if rtol is None and atol is None else (rtol or 0.0, atol or 0.0)
    for tolerance in given or ():
        if not tolerance >= 0:
            raise InputError(f"a tolerance cannot be {tolerance:g}: give 0 or more")
    target = None if save is None else Path(save)
    names = [_name(original, "the original"), _name(fused, "the fused model")]
    with ExitStack() as stack:
        stack.enter_context(weights.holding())
        models = [_opened(original), _opened(fused)]
        if target is not None:
            for source in (original, fused):
                check_target(Path() if isinstance(source, ModelProto) else Path(source), target)
        check_keeps_weights(target)
        interface = compare_interfaces(*models)
        result = Verification(*names, inputs=[str(s) for s in interface.inputs], notes=interface.notes)
        if interface.problem:
            result.failure = Disagreement(interface.problem)
            result.seconds = perf_counter() - start
            return result
        branches = [branches_of(m) for m in models]
        background = stack.enter_context(ThreadPoolExecutor(1))
        proof = background.submit(copy_context().run, _proven, *models) if inputs is None else None
        loading = perf_counter()
        first, second = (
            stack.enter_context(_session(source, m, n, optimize))
            for source, m, n in zip((original, fused), models, names, strict=True)
        )
        if first.narrowed != second.narrowed:
            raise InputError(
                f"ONNX Runtime lacks operators of the dtype of {names[second.narrowed]}, and of that alone"
            )
        clock = _Clock(start, seconds, perf_counter() - loading)
        pair = _Pair(interface, first, second, given, partial(fits, models[0]))
        search = _Search(pair, result, clock, seed, target)
        search.branches = branches
        search.factors = partial(_factors, models, branches, interface)
        search.alone = partial(witness, *models)
        try:
            if proof is not None:
                is_plain = given is None and not (non_finite or optimize)
                search.made_up(examples, non_finite, proof, is_plain)
            elif inputs is not None:
                search.given(inputs)
        except MemoryError as error:
            raise InputError(
                f"the comparison does not fit into memory ({one_line(error)}); give smaller inputs with --inputs"
            ) from error
    result.seconds = perf_counter() - start
    return result


def _proven(original: ModelProto, fused: ModelProto) -> Certificate | str:
    """What can be proven without running anything, or why nothing can. What is not proven may be equal."""
    try:
        for model in (original, fused):
            check_model(model)  # a proof follows the graph, which must be one: without circles, every value made once
        return _followed(original, fused)
    except Exception as error:  # a graph by an unknown hand may be anything; the models are compared all the same
        return one_line(error)


def _factors(
    models: Sequence[ModelProto], branches: Sequence[Branches], interface: Interface, inputs: Inputs
) -> list[float]:
    """The factors of ``inputs`` at which one of two models branches; a few, the smallest first."""
    found: set[float] = set()
    renamed = {interface.inputs_in_fused[name]: x for name, x in inputs.items()}
    for model, known, arrays in zip(models, branches, (inputs, renamed), strict=True):
        if known.compared:
            found |= factors(model, known, arrays)
    steps = {round(4 * np.log2(f)): f for f in sorted(found) if 1e-9 < f < 1e9}  # those that are nearly alike are one
    return [FURTHER * f for f in steps.values()][:MOST_FACTORS]


def _followed(original: ModelProto, fused: ModelProto) -> Certificate:
    """The proof, also where an optimizer keeps names for other tensors: a convolution's for its norm's."""
    first = found = certify_onnx(original, fused, weights.array)
    outputs = {o.name for o in fused.graph.output}
    operands = operands_of(original, fused)
    moved: set[str] = set()
    for _ in range(RENAMINGS):
        others = {w.where for w in found.windows if _is_other(w) and w.before} - outputs - moved
        # What is made of one of these has to be looked at again.
        more = {name for name in others if others.isdisjoint(operands(name))}
        if not more:
            break
        moved |= more
        found = certify_onnx(original, fused, weights.array, without=moved)
        if not found.undecided and not any(map(_is_other, found.windows)):
            return found
    return first


def _is_other(window: Window) -> bool:
    """Whether a tensor is another function, and not one that is off by the rounding of its parameters."""
    return window.verdict == "different" and (window.excess > BEYOND or not window.before)


@contextmanager
def _session(source: ModelOrPath, model: ModelProto, what: str, optimize: bool) -> Iterator[Run]:
    """``model`` ready to run; ONNX Runtime reads its file itself, which saves a copy of it."""
    if not isinstance(source, ModelProto):
        try:
            run = Run(os.fspath(source), [], what, optimize)
        except InputError:  # it may lack an operator of the dtype
            pass
        else:
            yield run
            return
    with session(model, what, optimize) as run:
        yield run


def _opened(model: ModelOrPath) -> ModelProto:
    if isinstance(model, ModelProto):
        return model
    if isinstance(model, str | os.PathLike):
        return opened(Path(model))
    raise InputTypeError(f"verify_onnx takes an onnx.ModelProto or a path, not {type(model).__name__}")


def _name(model: ModelOrPath, otherwise: str) -> str:
    return otherwise if isinstance(model, ModelProto) else os.fspath(model)


@dataclass
class _Clock:
    """How long the comparison may go on."""

    start: float
    seconds: float | None
    loading: float
    last: float = 0.0
    """What the last pair of runs took."""
    limit: float = float("inf")

    def calibrate(self, budget: Budget) -> None:
        """Set the limit, once both models have run."""
        if self.seconds is not None:
            self.limit = self.seconds
        else:
            self.limit = max(budget.least, budget.patience * (self.loading + self.last))

    def extend(self) -> None:
        """As much again, to shrink what was found."""
        self.limit = max(self.limit, perf_counter() - self.start) + self.limit / 2

    def allows_another(self) -> bool:
        return perf_counter() - self.start + self.last <= self.limit


@dataclass
class _Comparison:
    checks: list[OutputCheck]
    problem: str
    overflow: bool = False
    """The models differ, and the original's output holds NaN or infinities."""
    sensitive: bool = False
    """The original's response to one rounding is so large that no difference would say anything."""
    told: frozenset[str] = frozenset()
    """The outputs of the original that hold an element that is no NaN: the others tell nothing."""


class _Pair:
    """Two models that are run on the same inputs."""

    def __init__(
        self, interface: Interface, original: Run, fused: Run, given: tuple[float, float] | None,
        fits: Callable[[Inputs], bool],
    ) -> None:  # fmt: skip
        self.interface, self._fits = interface, fits
        self._original, self._fused = original, fused
        self._pair = Pair(self.original, self.fused, perturb=original.perturbed)
        self._given = given
        self._typical: dict[str, float] = {}
        """The noise of each output on the first inputs, for the figures where none was needed to decide."""
        self._sizes: dict[str, float] = {}
        """The largest magnitude of each output on the first inputs."""

    def original(self, inputs: Inputs) -> dict[str, np.ndarray]:
        return _flat(self.interface.outputs, self._original.run(inputs))

    def fused(self, inputs: Inputs) -> dict[str, np.ndarray]:
        names = self.interface.inputs_in_fused
        return _flat(self.interface.outputs, self._fused.run({names[n]: x for n, x in inputs.items()}))

    def compare(self, inputs: Inputs) -> tuple[_Comparison, float]:
        """Both models on ``inputs``, and the seconds that running both took.

        Raises:
            RefusedError: the original does not take them, or the standard does not where the two differ.
            InputError: the original has outputs that are no tensors, or gives other ones each time.
        """
        found, took = self._compared(inputs)
        if found.problem and not self._fits(inputs):
            raise RefusedError("the sizes of its operators do not fit together")
        return found, took

    def _compared(self, inputs: Inputs) -> tuple[_Comparison, float]:
        start = perf_counter()
        try:
            compared = self._pair.compare(inputs)
        except BrokenError as error:
            why = f"the fused model refuses an input that the original takes: {one_line(error.__cause__ or error)}"
            return _Comparison([], why), perf_counter() - start
        took = perf_counter() - start
        if compared.found is None:
            return _Comparison([], "the fused model gives another number of values in a sequence"), took
        return self._judged(inputs, compared, compared.found), took

    def _judged(self, inputs: Inputs, compared: Comparison, found: Mapping[str, Difference]) -> _Comparison:
        self._sizes = self._sizes or {name: d.size for name, d in found.items()}
        checks = self._checks(inputs, found, {})
        fails = any(c.problem for c in checks)
        if fails or not self._typical:
            noise = {name: compared.noise(name, PERTURBATIONS if fails else 1) for name in found}
            checks = self._checks(inputs, found, noise)
            self._typical = self._typical or noise
        else:
            checks = [replace(c, noise=max(c.noise, self._typical.get(c.output, 0.0))) for c in checks]
        bad = next((c for c in checks if c.problem), None)
        sensitive = any(c.allowed is not None and c.allowed >= CEILING for c in checks)
        told = frozenset(name for name, value in compared.expected.items() if _tells(value))
        if bad is None:
            return _Comparison(checks, "", sensitive=sensitive, told=told)
        again = self.original(inputs)
        for name, value in compared.expected.items():
            if not difference(value, again[name]).equal:
                raise InputError(
                    f"the original gives another output {name!r} each time it is run, so nothing compares with it; "
                    "does it hold random operators, such as Dropout in training mode?"
                )
        overflow = any(not np.isfinite(d.expected).all() for d in found.values() if d.rounds)
        finite = all(np.isfinite(c.max_rel) for c in checks)
        return _Comparison(checks, f"output {bad.output!r} {bad.problem}", overflow, sensitive and finite, told)

    def _checks(
        self, inputs: Inputs, compared: Mapping[str, Difference], noise: Mapping[str, float]
    ) -> list[OutputCheck]:
        checks = []
        for name, found in compared.items():
            eps = epsilon(found.expected, inputs)
            floor = FLOOR * eps * self._sizes.get(name, 0.0)
            checks.append(check_output(name, found, noise.get(name, 0.0), eps, floor, self._given))
        return checks


def _tells(value: np.ndarray) -> bool:
    return bool(value.size) and not (value.dtype.kind in "fcV" and np.isnan(value.astype(complex)).all())


def _flat(names: list[str], values: Sequence[Any]) -> dict[str, np.ndarray]:
    """Every tensor among the outputs; those of a sequence are numbered."""
    flat: dict[str, np.ndarray] = {}
    for name, value in zip(names, values, strict=True):
        items = {f"{name}[{at}]": v for at, v in enumerate(value)} if isinstance(value, list) else {name: value}
        for key, item in items.items():
            if not isinstance(item, np.ndarray | np.generic):
                raise InputError(f"output {name!r} holds values that are no tensors; such models cannot be compared")
            flat[key] = np.asarray(item)
    return flat


@dataclass
class _Search:
    """Trial after trial, until one fails or the time is up."""

    pair: _Pair
    result: Verification
    clock: _Clock
    seed: int
    target: Path | None
    worst: dict[str, OutputCheck] = field(default_factory=dict)
    known: dict[object, bool] = field(default_factory=dict)
    smallest: tuple[tuple[object, ...], Trial, _Comparison] | None = None
    told: set[str] = field(default_factory=set)
    """The outputs that ever held an element that is no NaN."""
    left: int = 2**62
    """How many more trials a random search may make."""
    tie: str = ""
    """What differs on ties of exact inputs, where one rounding makes another result."""
    wavers: bool = False
    """Whether one rounding does so on other inputs as well, so that ties tell nothing."""
    telling: Trial | None = None
    """The trial with the largest error in units of rounding."""
    branches: Sequence[Branches] = (Branches(), Branches())
    """Those of the original and of the fused model."""
    factors: Callable[[Inputs], list[float]] = lambda arrays: []
    """The factors of inputs at which one of the models branches."""
    alone: Callable[[str, Inputs], Witness | None] = lambda where, arrays: None
    """Runs one tensor alone on both sides."""

    def given(self, inputs: Mapping[str, Any] | str | os.PathLike[str]) -> None:
        slots = self.pair.interface.inputs
        if isinstance(inputs, Mapping):
            missing = {s.name for s in slots} ^ inputs.keys()
            if missing:
                raise InputError(f"the inputs are {', '.join(repr(s.name) for s in slots)}; not so {min(missing)!r}")
            sets = [("the given inputs", {s.name: np.asarray(inputs[s.name]) for s in slots})]
        else:
            sets = read_inputs(Path(inputs), slots)
        for label, arrays in sets:
            try:
                comparison, _ = self.pair.compare(arrays)
            except RefusedError as error:
                raise InputError(f"the original does not run on {label}: {_cause(error)}") from error
            if not (comparison.told or comparison.problem):
                raise InputError(
                    f"no output holds an element that is no NaN on {label}, so nothing is compared: the inputs are "
                    f"{_shapes(arrays)}; give others"
                )
            self._take(comparison)
            if comparison.problem:
                self._fail(comparison, f"{_shapes(arrays)} of {label}", arrays)
                return

    def made_up(self, examples: int, non_finite: bool, proof: Future[Certificate | str], is_plain: bool) -> None:
        """Search; ``is_plain`` says that no more is asked than what a proof is about."""
        base = self._base()
        proven = proof.result()
        is_settled = self._heed(proven) and is_plain and self.smallest is None
        self.clock.calibrate(SECOND_OPINION if is_settled else EVIDENCE)
        if self.smallest is None and self.pair.interface.inputs:
            self._explore(base, examples, non_finite)
        slots = self.pair.interface.inputs
        if self.smallest is not None:
            found = self.smallest[1]
            self.clock.extend()
            self.left = SHRINKING
            self._look(Space.below(found), max(examples, 20))
            _, found, comparison = self.smallest
            arrays = trials.make_inputs(slots, found)
            self._fail(comparison, f"{_shapes(arrays)} ({_words(found)})", arrays)
        elif self.result.compared and not self.told:
            raise InputError(
                "no output holds an element that is no NaN on any input that was tried, so nothing is compared; "
                "give inputs with --inputs"
            )
        elif not self.result.compared:
            raise InputError(
                "rounding alone changes the original's outputs beyond recognition, on every input that was tried; "
                "give inputs with --inputs, or tolerances with --rtol and --atol"
            )
        elif silent := [c.output for c in self.result.outputs if c.output not in self.told]:
            if isinstance(proven, str) or not proven.holds:
                self.result.doubt = f"output {silent[0]!r} is empty or all NaN on every input that was tried"
        elif self.tie and not self.wavers and (isinstance(proven, str) or not proven.holds):
            self.result.doubt = self.tie
        elif is_plain and not isinstance(proven, str):
            self._weigh(proven, [self.telling or base, base, *(replace(base, pattern=p) for p in ALONE)])

    def _weigh(self, proven: Certificate, tried: Sequence[Trial]) -> None:
        """No input shows a difference: does the proof, or the size of the errors, speak for one all the same?"""
        other = [w for w in proven.windows if _is_other(w) and w.before]
        worst = max((c.in_noise for c in self.result.outputs), default=0.0)
        if other:
            said = f"tensor {other[0].where!r} computes another function: {other[0].reason}"
            self.result.doubt = said
            if proven.undecided or sum(map(_is_other, proven.windows)) > 1:
                return
            # Nothing makes up for it where all others are proven.
            for inputs in (trials.make_inputs(self.pair.interface.inputs, trial) for trial in tried):
                seen = self.alone(other[0].where, inputs)
                if seen is not None and seen.shows and seen.reaches:
                    alone = f"run alone, it is off by {seen.error:.1g} of its largest value"
                    self.result.failure = Disagreement(f"{said}; {alone}, and all others are proven equal")
                    return
        elif worst > SUSPECT and not proven.holds:
            self.result.doubt = f"the largest error is {worst:.0f} times what rounding is expected to do"

    def _heed(self, found: Certificate | str) -> bool:
        """Enter what is proven; whether that is all."""
        if isinstance(found, str):
            self.result.notes.append(f"nothing is proven for every input size: {found}")
            return False
        different = [w for w in found.windows if _is_other(w)]
        self.result.windows = {
            "equal": found.equal, "rounded": found.different - len(different), "different": len(different),
            "undecided": found.undecided,
        }  # fmt: skip
        self.result.notes += [f"tensor {w.where!r} is of another form: {w.reason}" for w in different[:SHOWN]]
        return found.holds

    def _explore(self, base: Trial, examples: int, non_finite: bool) -> None:
        """Look where the models branch, at the usual suspects, and at random, until a trial fails."""
        slots = self.pair.interface.inputs
        slots[:] = [self._informed(slot, base) for slot in slots]
        limits = [*trials.limits(lambda limit: self._takes(replace(base, limit=limit)))]
        scales = self.factors(trials.make_inputs(slots, base)) if self.clock.allows_another() else []
        for trial in trials.further_trials(slots, base, non_finite, limits, scales, self._sizes(base)):
            if self.smallest is not None or not self.clock.allows_another():
                return
            self._fails(trial)
        sizes = {name: range(1, n + n // 2 + 2) for name, n in base.sizes.items()}
        patterns = [*trials.PATTERNS, trials.THRESHOLDS, *trials.NON_FINITE * non_finite]
        alone = ["", *(s.name for s in slots if len(slots) > 1)]
        self._look(Space(sizes, patterns, [*trials.scales(slots), *scales], limits, 2**16, alone), examples)

    def _informed(self, slot: Slot, base: Trial) -> Slot:
        """``slot`` with the numbers at which a model may branch, and the limit of its whole numbers."""
        if slot.dtype.kind == "O":
            return slot
        ours, theirs = (b.values for b in self.branches)
        values = tuple(sorted(ours ^ theirs) or sorted(ours))[:MOST_VALUES]
        if slot.dtype.kind not in "iu":
            return replace(slot, values=values)
        most = self.branches[0].rows.get(slot.name)
        if most is None:
            alone = replace(base, alone=slot.name)
            most = trials.limits(lambda limit: self._takes(replace(alone, limit=limit)))[-1]
        return replace(slot, values=values, most=most)

    def _sizes(self, base: Trial) -> list[int]:
        """Sizes from which a model may branch: those first that only one of the two names."""
        ours, theirs = (b.sizes for b in self.branches)
        most = min(LARGEST, 8 * max(base.sizes.values(), default=0))
        return [n for n in (*sorted(ours ^ theirs), *sorted(ours & theirs)) if n <= most][:MOST_SIZES]

    def _takes(self, trial: Trial) -> bool:
        """Whether the original runs at ``trial``; False when the time is up."""
        try:
            if self.clock.allows_another():
                self.pair.original(trials.make_inputs(self.pair.interface.inputs, trial))
                return True
        except Exception:  # ONNX Runtime's exceptions share no base class
            self.result.refused += 1
        return False

    def _base(self) -> Trial:
        """The first ordinary trial that the original takes."""
        refused = ""
        too_large: trials.TooLarge | None = None
        for trial in trials.first_trials(self.pair.interface.inputs):
            trial = replace(trial, seed=self.seed)
            try:
                self._fails(trial, refuse=True)
            except RefusedError as error:
                refused = refused or _cause(error)
                continue
            except trials.TooLarge as error:
                too_large = error
                continue
            return trial
        if too_large is not None and not refused:
            raise InputError(f"{too_large}; declare smaller sizes, or names for them, in both files") from too_large
        raise InputError(f"ONNX Runtime cannot run the original on random inputs: {refused}; give some with --inputs")

    def _look(self, space: Space, examples: int) -> None:
        """Search at random, and shrink what is found."""
        if not self.clock.allows_another() or examples < 1:
            return

        def fails(trial: Trial) -> bool:
            return self.known[trial.key] if trial.key in self.known else self._allowed(trial)

        try:
            trials.search(fails, space, examples, self.seed)
        except trials.NoHypothesis:
            self.result.notes.append("no random search: install hypothesis for it (pip install 'reparamc[testing]')")

    def _allowed(self, trial: Trial) -> bool:
        self.left -= 1
        return self.left >= 0 and self.clock.allows_another() and self._fails(trial)

    def _fails(self, trial: Trial, refuse: bool = False) -> bool:
        """Whether the models differ at ``trial``."""
        self.known[trial.key] = False
        try:
            arrays = trials.make_inputs(self.pair.interface.inputs, trial)
            comparison, self.clock.last = self.pair.compare(arrays)
        except (RefusedError, trials.TooLarge):
            if refuse:
                raise
            self.result.refused += 1
            return False
        if (comparison.overflow and trial.scale > 1) or comparison.sensitive:
            self.result.set_aside += 1
            self.wavers |= trial.pattern != TIES
            step = max((c.max_rel for c in comparison.checks), default=0.0)
            if trial.pattern == TIES and step > SEEN:
                self.tie = f"ties are decided otherwise, at input {_shapes(arrays)} ({_words(trial)})"
            return False
        largest = max((c.in_noise for c in self.result.outputs), default=0.0)
        self._take(comparison)
        if any(c.in_noise > largest for c in comparison.checks):
            self.telling = trial
        if not comparison.problem:
            return False
        self.known[trial.key] = True
        size = (sum(x.size for x in arrays.values()), *_order(trial))
        if self.smallest is None or size < self.smallest[0]:
            self.smallest = size, trial, comparison
        return True

    def _take(self, comparison: _Comparison) -> None:
        self.result.compared += 1
        self.told |= comparison.told
        for check in comparison.checks:
            if check.output not in self.worst or check.badness > self.worst[check.output].badness:
                self.worst[check.output] = check
        self.result.outputs = list(self.worst.values())

    def _fail(self, comparison: _Comparison, where: str, arrays: Inputs) -> None:
        self.result.outputs = comparison.checks
        saved = None
        if self.target is not None:
            try:
                write_inputs(self.target, arrays)
                saved = str(self.target)
            except InputError as error:
                self.result.notes.append(f"the failing input could not be saved: {error}")
        self.result.failure = Disagreement(comparison.problem, where, saved)


def _cause(error: RefusedError) -> str:
    return one_line(error.__cause__ or error)


def _order(trial: Trial) -> tuple[object, ...]:
    return trials.ORDER.index(trial.pattern), abs(np.log(trial.scale)), trial.limit, trial.seed, trial.alone


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items()) or "none"


def _words(trial: Trial) -> str:
    scale = "" if trial.scale == 1 else f" times {trial.scale:g}"
    alone = f" of {trial.alone!r} alone" if trial.alone else ""
    return f"{trial.pattern}{scale}{alone}, seed {trial.seed}"
