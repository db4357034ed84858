"""`fuse_fx`: the whole way of a torch module, from its arguments to verification."""

from __future__ import annotations

import copy
import hashlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparamc.certify import Certificate
from reparamc.cost import objective as priced_by
from reparamc.errors import InputError, InputTypeError, VerificationError, one_line
from reparamc.fx_calls import operation
from reparamc.fx_certify import certify_fx, shapes_of, sizes_of
from reparamc.fx_export import is_exported, live_in_training
from reparamc.fx_graph import FxGraph
from reparamc.fx_regions import by_position, run_alone
from reparamc.fx_trace import copied, fixed_arguments, followed
from reparamc.graph import Splice, Value
from reparamc.outcome import proven, regions_of, undone
from reparamc.plan import Plan, make_plan
from reparamc.record import records_of
from reparamc.report import Counts, Origin, OutputError, Report, Rewrite, rewritten
from reparamc.rewrite import Pass, select
from reparamc.verify import Alone, Region, compare_outputs, level_of

ShapeT = TypeVar("ShapeT")


def fuse_fx(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    verify: bool | str = True,
    objective: str = "latency",
    pass_table: tuple[Pass, ...] | None = None,
) -> fx.GraphModule:
    """A fused copy of ``model``: every linear structure between two non-linearities collapsed.

    ``model`` stays bitwise as it is and shares no storage with the copy. Dtype, device, memory format
    and ``requires_grad`` of parameters carry over. The `Report` is at ``result.meta["reparamc"]``.

    Args:
        model: a module in eval mode, its BatchNorms included. Arguments of its ``forward`` whose default is
            no tensor (None, a number) are fixed to that default. What torch.fx cannot trace is followed
            by torch.export, which needs ``example_inputs`` and fixes their sizes but for the batch; the
            report then says so.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. With them the original and the copy are run and compared, and ranks are known,
            which BatchNorm1d behind a linear layer and functional batch_norm may need.
        passes, skip: names of the passes to apply (default: all), and to leave out.
        verify: True or "full": every replacement in float64, the certificate of the whole result, and both modules
            on ``example_inputs``, and at another size if the model was not exported and takes one; "region": all but
            the last; False or "off": nothing.
        objective: what shall become small: "latency", "macs" (multiply-adds) or "params" (parameters).
        pass_table: the passes to choose from, instead of the built-in ones.

    Raises:
        InputTypeError: ``model`` is no traceable kind of module.
        InputError: it is in training mode, cannot be traced or run, or an option is unknown.
        VerificationError: the copy computes something else.
    """
    level = level_of(verify)
    if pass_table is None:
        from reparamc_passes import PASSES as pass_table
    selected = select(pass_table, passes, skip)
    model = _checked(model)
    with _plain_modes():
        fused = _fuse(model, example_inputs, selected, level, objective)
    if (warning := fused.meta["reparamc"].warning) is not None:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return fused


@contextmanager
def _plain_modes() -> Iterator[None]:
    """Autocast and inference mode switched off: they would round what is compared, and hide writes."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _fuse(
    model: nn.Module, example_inputs: Any, selected: tuple[Pass, ...], level: str, objective: str
) -> fx.GraphModule:
    given = args, kwargs = _arguments(example_inputs)
    expected = None
    if example_inputs is not None:
        args, kwargs = _bound(model, args, kwargs)
        expected = _try(model, args, kwargs)
    start = perf_counter()
    traced, note = followed(model, given if example_inputs is not None else None)
    _refuse_changed_state(model, traced)
    before = count(traced)
    traced_at = perf_counter()
    kept = fx.GraphModule(traced, copy.deepcopy(traced.graph)) if level != "off" else None
    examples = _examples(model, args, kwargs)
    positional = None
    if example_inputs is not None:
        positional = (*given[0], *given[1].values()) if note else by_position(traced, args, kwargs)
    sizes = _of_runs(sizes_of, model, traced, positional)
    ranks = {name: len(shape) for name, shape in sizes.items()}

    def rewrite(traced: fx.GraphModule, without: set[str]) -> _Rewritten:
        graph = FxGraph(traced, examples, ranks, exported=bool(note))
        with priced_by(objective):
            return _rewrite(graph, make_plan(graph, selected, verify=level != "off"), selected, without)

    made = rewrite(traced, set())
    certificate, wrong = None, dict[str, str]()
    if kept is not None and (any(made.counts.values()) or made.graph.sizes_moved):
        shapes = _of_runs(partial(shapes_of, first=sizes or None), model, kept, positional)

        def certificate_without(units: set[str]) -> Certificate:
            nonlocal made
            if units:
                made = rewrite(followed(model, given if example_inputs is not None else None)[0], units)
            return certify_fx(kept, made.fused, shapes)

        certificate, wrong = proven(made.units, certificate_without)
    graph, plan, fused, counts = made.graph, made.plan, made.fused, made.counts
    failed, left = undone(graph, plan.splices, wrong, _node_name)
    done = perf_counter()
    report = Report(
        before=before,
        after=count(fused),
        passes={p.name: counts[p.name] for p in selected},
        rewrites=made.rewrites,
        kept=[*plan.kept, *left],
        failed=[*plan.failed, *failed],
        host=plan.host,
        certificate=certificate,
        note=note,
        seconds={"tracing": traced_at - start, "rewriting": done - traced_at},
        objective=objective,
        level=level,
        origin=_origin(model),
        history=_history(model),
    )
    if level == "full":
        if expected is None:
            report.note = "not run end to end: no example_inputs"
        else:
            call = given if note else (args, kwargs)
            regions = regions_of(graph, made.splices, _node_name)
            places = {_node_name(s.root): graph.current(s.root).name for s in made.splices}

            def alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Alone | None:
                original = followed(model, given)[0]
                positional = by_position(original, args, kwargs)
                if positional is None:
                    return None
                return run_alone(original, fused, regions, places, positional, _named, _nudged)

            report.end_to_end = verify_end_to_end(model, fused, *call, expected, regions, alone, resize=not note)
            report.seconds["verification"] = perf_counter() - done
    fused.meta["reparamc"] = report
    return fused


@dataclass(frozen=True)
class _Rewritten:
    """A module with its splices carried out, and what was done; ``units``: those of the splices by their last node."""

    fused: fx.GraphModule
    graph: FxGraph
    plan: Plan
    splices: list[Splice]
    counts: Counter[str]
    rewrites: list[Rewrite]
    units: dict[str, str]


def _rewrite(graph: FxGraph, plan: Plan, selected: tuple[Pass, ...], without: set[str]) -> _Rewritten:
    """Carry out ``plan``, but for the splices of the units ``without``."""
    splices = [s for s in plan.splices if _node_name(s.unit) not in without]
    rewrites = [rewritten(graph, s) for s in splices]
    units = {_node_name(s.root): _node_name(s.unit) for s in splices}
    for splice in splices:
        graph.splice(splice)
    counts = sum((s.counts for s in splices), Counter[str]())
    if any(p.name == "constant-folding" for p in selected):
        counts["constant-folding"] = graph.fold_constants()
    return _Rewritten(graph.finish(), graph, plan, splices, counts, rewrites, units)


def _node_name(value: Value) -> str:
    return cast(fx.Node, value).name


def _origin(model: nn.Module) -> Origin | None:
    """SHA-256 of all parameters and buffers, names and types included; None where one has no data of its own."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Origin(digest.hexdigest(), "parameters and buffers")


def _history(model: nn.Module) -> list[dict[str, Any]]:
    """The records of ``model``, if it was fused before."""
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    earlier = meta.get("reparamc")
    return records_of(earlier) if isinstance(earlier, Report) else []


def _checked(model: Any) -> nn.Module:
    """``model`` without the wrapper of torch.compile, if it can be fused."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError("fuse_fx cannot see into a ScriptModule; pass the module it was made from")
    if isinstance(model, torch.export.ExportedProgram):
        raise InputTypeError("fuse_fx takes a torch.nn.Module, not an ExportedProgram; pass its .module()")
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"fuse_fx takes a torch.nn.Module, not {type(model).__name__}; an ONNX model goes to fuse_onnx"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputTypeError(f"fuse_fx takes the module inside {type(model).__name__}; pass model.module")
    model = getattr(model, "_orig_mod", model)
    if "forward" in vars(model):
        raise InputError(
            f"the forward of this {type(model).__name__} was replaced on the instance; tracing would miss it"
        )
    if any(nn.parameter.is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise InputError("the model has parameters that are not initialised yet; run it once first")
    if is_exported(model):
        if (live := live_in_training(cast(fx.GraphModule, model))) is not None:
            raise InputError(
                f"the model was exported in training mode, for {live} computes as in training; "
                "call .eval() on what it was exported from, and export that again"
            )
        return model
    if model.training:
        raise InputError(
            "the model is in training mode, where BatchNorm and Dropout are live; call .eval() on it first"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise InputError(f"BatchNorm {name!r} is in training mode inside a model in eval mode; call .eval() first")
    return model


def _refuse_changed_state(model: nn.Module, traced: fx.GraphModule) -> None:
    """Raise InputError where running forward once, to trace it, has changed a parameter or buffer."""
    kept = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, after in (*traced.named_parameters(), *traced.named_buffers()):
        before = kept.get(name)
        if before is not None and before.is_meta:
            raise InputError(f"{name!r} is on the meta device and has no value; load the weights first")
        if before is not None and not _same(before, after):
            raise InputError(f"forward changes {name!r}: a state that every call updates cannot be fused")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as forward's own arguments, in order."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    bound.apply_defaults()
    for name, default in fixed_arguments(model).items():
        value = bound.arguments[name]
        if value is not default and (isinstance(value, Tensor) or value != default):
            raise InputError(
                f"example_inputs give {name!r} another value than its default {default!r}, to which tracing fixes it"
            )
    return bound.args, bound.kwargs


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    try:
        return _run(model, args, kwargs)
    except InputError:
        raise
    except Exception as error:  # whatever the user's forward raises
        raise InputError(f"the model does not run on example_inputs: {one_line(error)}") from error


def _examples(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor argument, by the name of its placeholder."""
    if not args and not kwargs:
        return {}
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {k: v for k, v in bound.items() if isinstance(v, Tensor)}


def _of_runs(
    ask: Callable[[fx.GraphModule, Sequence[Any]], dict[str, ShapeT]],
    model: nn.Module,
    traced: fx.GraphModule,
    args: Sequence[Any] | None,
) -> dict[str, ShapeT]:
    """What ``ask`` learns from running a copy, because forward may update buffers; nothing where it does not run."""
    if args is None:
        return {}
    with _own_randomness(model), torch.no_grad():
        try:
            return ask(cast(fx.GraphModule, copied(traced)), args)
        except Exception:  # whatever the model's forward raises; the comparison will say so
            return {}


Given = tuple[tuple[Any, ...], dict[str, Any]]


def verify_end_to_end(
    original: nn.Module,
    fused: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: dict[str, np.ndarray] | None = None,
    regions: Sequence[Region] = (),
    alone: Callable[[tuple[Any, ...], dict[str, Any]], Alone | None] = lambda args, kwargs: None,
    *,
    resize: bool = True,
) -> list[OutputError]:
    """Run both modules on the example inputs, in their own dtype, and compare every output tensor.

    With ``resize``, inputs of another batch and other parities are tried, too, where the original takes them. The
    tolerance comes from the original's response to a perturbation of its inputs at rounding level.
    ``expected`` is the result of the original, where it is known already. Where that says too little, or an
    output differs by more, ``regions`` (what was rewritten) are compared one by one; see `compare_outputs`.

    Returns:
        One entry per output, and per region where they were compared, for the inputs that came closest to what is
        allowed.

    Raises:
        VerificationError: the fused model does not run, or an output differs by more than rounding explains; names
            the region that is wrong, or else the output.
    """
    given = args, kwargs
    trials = [(given, _run(original, args, kwargs) if expected is None else expected)]
    if resize and (other := _other_sizes(original, given)) is not None:
        trials.append(other)
    worst: dict[tuple[str, bool], OutputError] = {}
    for given, outputs in trials:
        for error in _compared(original, fused, given, outputs, regions, partial(alone, *given)):
            before = worst.setdefault((error.output, error.alone), error)
            if error.closeness > before.closeness:
                worst[error.output, error.alone] = error
    return list(worst.values())


def _compared(
    original: nn.Module,
    fused: nn.Module,
    given: Given,
    expected: dict[str, np.ndarray],
    regions: Sequence[Region],
    alone: Callable[[], Alone | None],
) -> list[OutputError]:
    noises = [_run(original, *_nudged(given, seed)) for seed in range(3)]
    try:
        actual = _run(fused, *given)
    except Exception as error:  # whatever a wrong graph raises
        raise VerificationError(
            f"the fused model does not run: {one_line(error)}. Report this as a bug, with the model",
            where="output",
        ) from error
    epsilon = max((torch.finfo(t.dtype).eps for t in (*model_tensors(original), *_floats(*given))), default=0.0)

    def message(name: str, differs: float, allowed: float) -> str:
        return (
            f"{name} of the fused model differs by {differs:.2g} relative to its largest value, "
            f"{allowed:.1g} is what rounding explains. Report this as a bug, with the model"
        )

    return compare_outputs(expected, actual, noises, lambda _: epsilon, message, regions, alone)


def _other_sizes(original: nn.Module, given: Given) -> tuple[Given, dict[str, np.ndarray]] | None:
    """Arguments of another batch, of which all other open axes have the other parity, and what is made of them.

    None where there are none that ``original`` takes. Of three axes, the middle one or the last are the channels.
    """
    leaves = pytree.tree_leaves(given)
    if not any(isinstance(t, Tensor) and t.ndim > 1 for t in leaves):
        return None
    for channels in (2, 1) if any(isinstance(t, Tensor) and t.ndim == 3 for t in leaves) else (1,):
        generator = torch.Generator().manual_seed(channels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                resized = pytree.tree_map_only(Tensor, lambda t: _resized(t, channels, generator), given)  # noqa: B023
                return resized, _run(original, *resized)
            except Exception:  # whatever a module raises that does not know a size
                continue
    return None


SMALL = 64
"""Extents from here on are about halved where another one is tried, so that this costs little."""


def _resized(t: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    if t.ndim < 2:
        return t
    kept = channels if t.ndim == 3 else 1
    shape = [
        n if axis == kept else n + 1 if n < SMALL else n // 2 + (n // 2 - n + 1) % 2 for axis, n in enumerate(t.shape)
    ]
    shape[0] = t.shape[0] + 1
    if t.is_floating_point():
        drawn = torch.randn(shape, generator=generator).to(t.device) * t.double().std(correction=0) + t.double().mean()
        return drawn.to(t.dtype)
    for axis, n in enumerate(shape):  # indices and masks stay what they may be
        t = t.index_select(axis, torch.arange(n, device=t.device) % t.shape[axis])
    return t


def model_tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


def _floats(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]


def _run(model: nn.Module, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    """Every tensor that ``model`` returns, by its place in the result; random operators draw the same numbers."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    model = copied(model)  # forward may update buffers
    with torch.no_grad(), _own_randomness(model):
        return _named(model(*args, **kwargs))


def _named(result: Any) -> dict[str, np.ndarray]:
    """Every tensor in ``result`` by its place."""
    leaves, _ = pytree.tree_flatten_with_path(result)
    return {f"output{pytree.keystr(path)}": _array(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)}


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """Random operators draw the same numbers each time, and the caller's generators stay as they are."""
    devices = {t.device.index or 0 for t in model_tensors(model) if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        yield


def _array(leaf: Tensor) -> np.ndarray:
    leaf = leaf.detach()
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    return (leaf.double() if leaf.is_floating_point() else leaf).cpu().numpy()


def _nudged(given: Any, seed: int) -> Any:
    """``given`` with every floating tensor in it changed at rounding level."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        signs = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2.0 - 1
        signs = signs.double()
        return (t.double() * (1 + signs * torch.finfo(t.dtype).eps)).to(t.dtype)

    return pytree.tree_map_only(Tensor, nudge, given)


def count(module: fx.GraphModule) -> Counts:
    """The size of a traced module: calls, convolutions and BatchNorms (modules or functions), parameters."""
    ops = conv = norm = 0
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            call = operation(node, module)
            ops += 1
            conv += call is not None and call.op == "conv"
            norm += call is not None and call.op == "batch_norm"
    return Counts(ops, conv, norm, sum(p.numel() for p in module.parameters()))
