"""`fuse_fx`: the whole way of a torch module, from its arguments to verification."""

from __future__ import annotations

import hashlib
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from reparamc.algebra.recorded import Tape, recording, tape
from reparamc.algebra.rewrite import Pass, select
from reparamc.compiler.host import Options
from reparamc.compiler.pipeline import level_of, seldom_collecting_garbage
from reparamc.equivalence.end_to_end import Region
from reparamc.errors import InputError, InputTypeError, VerificationError, one_line
from reparamc.fx.arguments import call_of, elements, few, others
from reparamc.fx.calls import is_exported
from reparamc.fx.copying import State, copied, kept_aside, named_tensors, submodules, tensors
from reparamc.fx.end_to_end import verify_end_to_end
from reparamc.fx.export import live_in_training
from reparamc.fx.outcome import difference, ran
from reparamc.fx.parts import Parts, Placed, Taken, Way, Whole, has_options, remembered
from reparamc.fx.parts_alone import run_parts_alone
from reparamc.fx.runnable import perturbed, plain
from reparamc.fx.watch import LOCK, Call, Seen, Watched, watching
from reparamc.fx.wrappers import unwrapped
from reparamc.report.data import FailedRegion, Origin, OutputError, Part, Report
from reparamc.report.merge import merged

DRAWS = 8
"""Runs of a model on the same arguments, in which a number that it draws is likely to be another one."""
TOOLS = ("generate", "predict", "predict_step", "training_step", "validation_step", "test_step", "save_pretrained")
"""Methods by which other tools run a model: where there is one, the copy is of the same class."""


def fuse_fx(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    verify: bool | str = True,
    objective: str = "latency",
    specialize: bool = False,
    pass_table: tuple[Pass, ...] | None = None,
) -> Any:
    """A fused copy of ``model``: every linear structure between two non-linearities collapsed.

    ``model`` stays bitwise as it is and shares no storage with the copy. Dtype, device, memory format
    and ``requires_grad`` of parameters carry over. The `Report` is at ``result.meta["reparamc"]``.

    The structure of the copy does not depend on the values of parameters: a model that is fused before a checkpoint is
    loaded, and one that is fused after it, have the same parameters.

    A model that torch.fx can follow comes back as a `torch.fx.GraphModule`. Any other one, and one whose forward has
    arguments that can be left out, comes back as a module of its own class: the parts in it that torch.fx can follow
    are replaced by fused graphs, the Python around them stays. In these graphs attributes that a forward reads, such
    as flags, are as they are now. Under autocast a scale, shift or skip in float32 that was folded no longer makes its
    result float32.

    Args:
        model: a module in eval mode, its BatchNorms included.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. With them the original and the copy are run and compared, and no model is refused that runs.
        passes, skip: names of the passes to apply (default: all), and to leave out.
        verify: True or "full": every replacement in float64, the certificate of the whole result, and both modules
            on ``example_inputs``, and at another size if the model takes one; "region": all but the last; False or
            "off": nothing but that each graph computes what its module does before it is rewritten.
        objective: what to minimize: "latency" (on a runtime: "latency@openvino"), "macs" (multiply-adds) or "params".
        specialize: let the structure follow from the values of now as well: a branch of zeros and channels that are
            constant leave (lossless-shrink), a shift that is zero may pass a padding. The weights of another
            checkpoint need not fit the copy then.
        pass_table: the passes to choose from, instead of the built-in ones; they count on values.

    Raises:
        InputTypeError: ``model`` is no kind of module that can be fused.
        InputError: it is in training mode, does not run on the example, or cannot be traced without one, or an option
            is unknown.
        VerificationError: the copy computes something else.
    """
    specialize = specialize or pass_table is not None
    if pass_table is None:
        from reparamc_passes import PASSES as pass_table
    options = Options(select(pass_table, passes, skip), level_of(verify), objective, told={})
    inner, wrapped = unwrapped(model)
    _check(inner)
    with LOCK, plain_modes(), seldom_collecting_garbage(), ExitStack() as stack:
        # Weights that are not trained yet tell nothing of those that are loaded later. A `Fuser` records by itself.
        if not specialize and tape() is None:
            stack.enter_context(recording(Tape(generic=True)))
        fused = _Fusion(inner, options).run(example_inputs)
    if (warning := cast(Any, fused).meta["reparamc"].warning) is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return wrapped(fused)


class _Fusion:
    """One model on its way."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.start = perf_counter()
        self.shared: list[str] = []
        self.own = copied(model, self.shared)
        caches = [(path, name) for path, module in submodules(model).items() if (name := kept_aside(module))]
        self.blocked = {p: f"it keeps tensors aside, in {name!r}" for path, name in caches for p in _around(path)}
        """Modules that no graph may take the place of: such tensors would be constants in it."""
        remembered(self.own)
        self.runs: list[Seen] = []
        self.failed: list[FailedRegion] = []
        self.compared: list[OutputError] = []
        self.writes_parameters = False
        self.wavers = False
        """Whether the model was seen to compute something else each time."""

    def run(self, example_inputs: Any) -> nn.Module:
        """The fused copy, with its report."""
        as_graph = not has_options(self.model) and not any(hasattr(self.model, name) for name in TOOLS)
        if example_inputs is None:
            parts = Parts(self.model, self.own, self.options, blocked=self.blocked)
            if isinstance(why := parts.whole(""), str):
                way_out = "" if "example_inputs" in why else "; with example_inputs its parts are fused"
                raise InputError(f"{why}{way_out}")
            return self.reported(
                parts.without_doubles(parts.take("", as_graph)), "not run end to end: no example_inputs"
            )
        call, self.state = call_of(self.model, example_inputs), State(self.model, self.own)
        try:
            classes = recorded(self.model)
            alone = Parts(self.model, self.own, self.options, [Seen(call)])
            first, parts = alone.traced("", {}) if as_graph else None, None
            whole = first if isinstance(first, Whole) and not (first.opaque or self.blocked) else None
            if whole is not None and not isinstance(whole.graph.literal(), dict):  # which is often of another class
                parts = self.parts(call, None, classes, first)  # its parts need not be watched then
            if parts is None or isinstance(parts.whole(""), str):
                parts = self.parts(call, Watched(self.model), classes, first)
            taken = self.checked(parts, parts.without_doubles(parts.take("", as_graph)))
        finally:
            self.state.restore()
        return self.reported(taken, "")

    def parts(self, call: Call, watched: Watched | None, classes: list[str], first: Whole | str | None) -> Parts:
        """The parts of the model, after it was run on the example and on other arguments, if it takes some."""
        changed: set[str] = set()

        def seen(given: Call) -> Seen:
            one = Seen(given)
            try:
                with nullcontext() if watched is None else watching(watched):
                    one.ended(ran(self.model, given))
            except Exception:
                if watched is not None:
                    watched.forget_run()
                raise
            finally:
                changed.update(self.state.restore())
            return one

        smaller = few(call)
        for given in ([smaller] if smaller is not None else []) + [call]:
            try:
                self.runs = [seen(given)]
                break
            except Exception as error:  # whatever the user's forward raises
                if given is call and watched is None:
                    return self.parts(call, Watched(self.model), classes, first)
                if given is call and watched is not None:
                    where = f" ({watched.raised!r} fails)" if watched.raised else ""
                    raise InputError(f"the model does not run on example_inputs{where}: {one_line(error)}") from error
        for other in others(self.runs[0].call):
            try:
                self.runs.append(seen(other))
                break
            except Exception:  # whatever a module raises that does not take a size
                continue
        self.writes_parameters = self.state.has_written_parameters
        blocked = self.blocked | {
            p: "transformers records the outputs of parts of it" for path in classes for p in _around(path)[:-1]
        }
        blocked |= {place: "forward changes what it holds" for path in changed for place in _around(path)}
        return Parts(self.model, self.own, self.options, self.runs, watched, blocked, classes, first)

    def checked(self, parts: Parts, taken: Taken) -> Taken:
        """``taken``, compared with the model; of a part that is wrong, its own parts are taken instead."""
        if self.writes_parameters or taken.is_compared:
            return taken
        while (fault := self.fault(taken.module, parts.placed)) is not None:
            self.wavers = self.wavers or self.draws()
            if self.wavers:
                return taken
            where, why = fault
            if not any(part.where == where for part in parts.placed):
                where, why = self.blamed(parts, taken, why)
            if not parts.placed and taken.module is self.own:
                return taken
            taken = parts.entered(taken, where, f"the fused graph does not compute the same: {why}")
        return taken

    def draws(self) -> bool:
        """Whether the model computes something else in some of several runs on the same arguments."""
        least = min(self.runs, key=lambda seen: elements(seen.call))
        return any(difference(ran(self.model, least.call), least.result) for _ in range(DRAWS))

    def fault(self, module: nn.Module, placed: Sequence[Placed]) -> tuple[str, str] | None:
        """The part that computes something else, or an output, and how it differs."""
        why = "" if self.options.level == "full" else self.differs(module)
        if self.options.level != "full" and not why:
            return None
        calls = {id(seen.call): (seen.call, plain(seen.result)) for seen in self.runs}
        alone = [part for part in placed if len(part.sites) == 1]
        fused = {id(part.new): (part.where, part.old) for part in alone}
        regions = [Region(part.where, (), part.where, "the module itself", "what was fused") for part in alone]
        try:
            self.compared = verify_end_to_end(
                self.model, module, list(calls.values()), regions,
                lambda call: run_parts_alone(module, fused, *calls[id(call)]),
            )  # fmt: skip
        except VerificationError as error:
            return error.where, why or one_line(error).partition("; nothing was written")[0]
        return None

    def blamed(self, parts: Parts, taken: Taken, why: str) -> tuple[str, str]:
        """The first part with which a copy differs from the model, where none does so alone, and how; or the last."""
        for part in reversed(parts.placed):
            part.put_back()
        if other := self.differs(self.own):
            raise InputError(
                f"a copy of this {type(self.model).__name__} does not compute the same: {other}; "
                "other code may know the original by its identity"
            )
        if taken.module is not self.own:
            self.failed.append(FailedRegion("the whole model", "run", None, 0.0, (), "", "", why))
            return "", why
        found = ("", why)
        for part in parts.placed:
            part.put()
            found = part.where, self.differs(self.own)
            if found[1]:
                break
        for part in parts.placed:
            part.put()
        return found[0], found[1] or why

    def differs(self, copy: nn.Module) -> str:
        state = State(copy, copied(copy) if self.writes_parameters else None)
        for seen in self.runs:
            try:
                actual = ran(copy, seen.call)
            except Exception as error:  # whatever a wrong copy raises
                return one_line(error)
            finally:
                state.restore()
            if why := difference(actual, seen.result, lambda seen=seen: ran(self.model, perturbed(seen.call, 0))):
                return why
        return ""

    def reported(self, taken: Taken, note: str) -> nn.Module:
        """The result with its report, after it was compared end to end."""
        result = taken.module
        report = merged(
            [(w.where, w.report) for w in taken.ways if w.report is not None],
            [w.size for w in taken.ways if w.size is not None],
        )
        report.seconds = {"tracing": perf_counter() - self.start - sum(report.seconds.values()), **report.seconds}
        if self.wavers or self.writes_parameters:
            why = "forward writes parameters" if self.writes_parameters else "it computes something else each time"
            note = f"not run end to end: {why}"
        elif self.compared:
            report.end_to_end = self.compared
        report.before = replace(report.before, parameters=_parameters(self.model))
        report.after = replace(report.after, parameters=_parameters(result))
        report.passes = {p.name: report.passes.get(p.name, 0) for p in self.options.passes}
        report.objective, report.level = self.options.objective, self.options.level
        report.origin, report.history = _origin(self.model), _history(self.model)
        report.parts = _parts(taken.ways)
        report.failed += self.failed
        notes = [note] if note else []
        if self.shared:
            notes.append(f"shared with the original: {', '.join(self.shared)}")
        if report.after.parameters > report.before.parameters:
            notes.append(_why_more(report, self.model, result))
        report.note = "; ".join(notes)
        if not isinstance(getattr(result, "meta", None), dict):
            vars(result)["meta"] = {}
        cast(Any, result).meta["reparamc"] = report
        return result


def recorded(model: nn.Module) -> list[str]:
    """The paths of modules that transformers finds by their class when it is asked for hidden states or attentions."""
    kinds: list[Any] = []
    for module in submodules(model).values():
        given = getattr(type(module), "_can_record_outputs", None)
        for held in given.values() if isinstance(given, dict) else ():
            for one in held if isinstance(held, list | tuple) else [held]:
                kinds.append(getattr(one, "target_class", one))
    classes = tuple(k for k in kinds if isinstance(k, type))
    return [path for path, module in submodules(model).items() if path and isinstance(module, classes)]


def _around(path: str) -> list[str]:
    """``path``, and those of all modules that it is in."""
    names = path.split(".") if path else []
    return [".".join(names[:n]) for n in range(len(names) + 1)]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in tensors(module, "_parameters"))


def _why_more(report: Report, model: nn.Module, result: nn.Module) -> str:
    """Why a result has more parameters than the model."""
    uses = Counter(name for rewrite in report.rewrites for name in dict.fromkeys(rewrite.parameters))
    uses.update(name for name, _ in result.named_parameters() if name in uses)
    several = [name for name, n in uses.items() if n > 1]
    if several:
        others = f" and {len(several) - 1} more" if several[1:] else ""
        return f"more parameters: {several[0]}{others} used several times"
    before, after = (sum(t.numel() for t in tensors(m)) for m in (model, result))
    return "more parameters: what was in buffers is in them" if after <= before else "more parameters: larger kernels"


def _parts(ways: list[Way]) -> list[Part]:
    """The ways that the parts took; none where there is one graph only."""
    sizes = [(w, w.size or (w.report.after if w.report is not None else None)) for w in ways]
    if len(ways) == 1 and ways[0].how == "torch.fx" and not ways[0].where:
        return []
    return [Part(w.where, w.how, w.why, s.conv, s.batchnorm) for w, s in sizes if s is not None]


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The generators of torch, NumPy and Python are as before when it ends."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 in all its digits: cuDNN rounds the operands of convolutions to 11 bits if it is not told otherwise."""
    cudnn, mkldnn, matmul = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul
    operators = [getattr(owner, name, None) for owner in (cudnn, mkldnn) for name in ("conv", "rnn", "matmul")]
    newer = [owner for owner in (*operators, matmul) if hasattr(owner, "fp32_precision")]  # since torch 2.9
    settings = [(o, "allow_tf32", False) for o in (cudnn, matmul)] + [(o, "fp32_precision", "ieee") for o in newer]
    kept = []
    for owner, name, value in settings:
        with suppress(RuntimeError):  # torch refuses to read the older setting where the newer one was used
            kept.append((owner, name, getattr(owner, name), value))
    try:
        for owner, name, _, value in kept:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, old, _ in kept:
            setattr(owner, name, old)


@contextmanager
def plain_modes() -> Iterator[None]:
    """Autocast, inference mode and TF32 switched off: they would round what is compared, and hide writes.

    What torch.compile was applied to runs as it was written.
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_own_random_numbers())
        if (
            "torch._dynamo" in sys.modules
        ):  # otherwise nothing is compiled, and its import takes as long as that of torch
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _check(model: Any) -> None:
    """Raise an error that says what to do where ``model`` cannot be fused."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError("fuse_fx cannot see into a ScriptModule; pass the module it was made from")
    if isinstance(model, torch.export.ExportedProgram):
        raise InputTypeError("fuse_fx takes a torch.nn.Module, not an ExportedProgram; pass it to fuse_exported")
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"fuse_fx takes a torch.nn.Module, not {type(model).__name__}; an ONNX model goes to fuse_onnx"
        )
    for name, t in named_tensors(model).items():
        if nn.parameter.is_lazy(t):
            raise InputError(f"{name!r} is a parameter that is not initialised yet; run the model once first")
        if t.is_meta:
            raise InputError(f"{name!r} is on the meta device and has no value; load the weights first")
    if is_exported(model):
        if (live := live_in_training(model)) is not None:
            raise InputError(
                f"the model was exported in training mode, for {live} computes as in training; "
                "call .eval() on what it was exported from, and export that again"
            )
    elif model.training:
        raise InputError(
            "the model is in training mode, where BatchNorm and Dropout are live; call .eval() on it first"
        )
    else:
        for name, module in submodules(model).items():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise InputError(
                    f"BatchNorm {name!r} is in training mode inside a model in eval mode; call .eval() first"
                )


def _origin(model: nn.Module) -> Origin | None:
    """SHA-256 of all parameters and buffers, names and types included; None where one has no data of its own."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model).items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        try:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except Exception:  # whatever a subclass raises that holds something else
            return None
    return Origin(digest.hexdigest(), "parameters and buffers")


def _history(model: nn.Module) -> list[dict[str, Any]]:
    """The records of ``model``, if it was fused before; one that comes from a file has them as plain data."""
    meta = getattr(model, "meta", None)
    return list(getattr(meta.get("reparamc"), "records", [])) if isinstance(meta, dict) else []
