"""`fuse_fx`: the whole way of a torch module, from tracing to verification."""

from __future__ import annotations

import copy
import hashlib
import inspect
import keyword
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from reparamc.fx_export import can_be_exported, exported, holds_linear, is_exported, live_in_training
from reparamc.fx_graph import FxGraph
from reparamc.fx_memory import IN_PLACE_DUNDERS
from reparamc.fx_regions import by_position, run_alone
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
            on ``example_inputs``; "region": all but the last; False or "off": nothing.
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
    traced, note = _followed(model, given if example_inputs is not None else None)
    _refuse_changed_state(model, traced)
    before = count(traced)
    traced_at = perf_counter()
    kept = fx.GraphModule(traced, copy.deepcopy(traced.graph)) if level != "off" else None
    examples = _examples(model, args, kwargs)
    positional = None
    if example_inputs is not None:
        positional = (*given[0], *given[1].values()) if note else by_position(traced, args, kwargs)
    ranks = {name: len(shape) for name, shape in _of_runs(sizes_of, model, traced, positional).items()}

    def rewrite(traced: fx.GraphModule, without: set[str]) -> _Rewritten:
        graph = FxGraph(traced, examples, ranks, exported=bool(note))
        with priced_by(objective):
            return _rewrite(graph, make_plan(graph, selected, verify=level != "off"), selected, without)

    made = rewrite(traced, set())
    certificate, wrong = None, dict[str, str]()
    if kept is not None and any(made.counts.values()):
        shapes = _of_runs(shapes_of, model, kept, positional)

        def certificate_without(units: set[str]) -> Certificate:
            nonlocal made
            if units:
                made = rewrite(_followed(model, given if example_inputs is not None else None)[0], units)
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

            def alone() -> Alone | None:
                original = _followed(model, given)[0]
                positional = by_position(original, *call)
                if positional is None:
                    return None
                return run_alone(original, fused, regions, places, positional, _named, _nudged)

            report.end_to_end = verify_end_to_end(model, fused, *call, expected, regions, alone)
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


def _followed(model: nn.Module, given: tuple[Any, Any] | None) -> tuple[fx.GraphModule, str]:
    """``model`` as a graph, and how it was made where not by torch.fx.

    torch.export is asked where torch.fx fails, or leaves something to fold inside a submodule that it
    cannot follow; it needs the example inputs.
    """
    copied = _copied(model)
    traced = failure = None
    try:
        traced, opaque = _traced(copied)
        hidden = [path for path in opaque if holds_linear(copied.get_submodule(path))]
        if not hidden or given is None:
            return traced, ""
    except _Reserved as error:
        raise InputError(str(error)) from None  # torch.export would meet the same
    except InputError as error:
        failure = error
    if given is not None and can_be_exported(model):
        found = exported(_copied(model), *given)
        if found is not None:
            return found
    if traced is None:
        raise failure or AssertionError
    return traced, ""


def _copied(model: nn.Module) -> nn.Module:
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own exported programs
            copied = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    except Exception as error:  # whatever the attributes of the user's module raise
        raise InputError(
            f"{type(model).__name__} cannot be copied: {one_line(error)}; remove weight_norm and the like"
        ) from error
    if is_exported(model):
        for module in copied.modules():
            module.training = False
    return copied


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


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` and ``a[i] = b`` as what they are; torch.fx would read ``a + b``, or fail."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _recorder(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name, _function in IN_PLACE_DUNDERS.items():
    setattr(_Proxy, _name, _recorder(_function))


class _Tracer(fx.Tracer):
    """Steps into everything but torch's own modules and those whose hooks tracing would drop."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def __init__(self, opaque: set[str] | None = None) -> None:
        super().__init__()
        self.opaque = opaque or set()
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        hooked = hooked or "forward" in vars(m)
        parametrized = nn.utils.parametrize.is_parametrized(m)
        special = hooked or parametrized or module_qualified_name in self.opaque
        return special or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def trace(model: nn.Module) -> fx.GraphModule:
    """``model`` as a graph; submodules that torch.fx cannot follow are called as they are.

    Raises:
        InputError: the outermost forward cannot be followed, or ``model`` has hooks of its own.
    """
    return _traced(model)[0]


def _traced(model: nn.Module) -> tuple[fx.GraphModule, set[str]]:
    """As `trace`, with the paths of the submodules that torch.fx cannot follow."""
    if model._forward_hooks or model._forward_pre_hooks:
        raise InputError(f"{type(model).__name__} has forward hooks, which tracing would drop; remove them first")
    fixed = _fixed(model)
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(model, fixed or None)
            _plain_assertions(graph)
            _restore_names(graph, model)
            _refuse_reserved(graph, model)
            return fx.GraphModule(tracer.root, graph, type(model).__name__), opaque
        except _Reserved:
            raise
        except Exception as error:  # a model's forward may raise anything when it meets a proxy
            if tracer.failed is None or tracer.failed in opaque:
                raise InputError(
                    f"torch.fx cannot trace {type(model).__name__}: {one_line(error)}; fuse its submodules one by one, "
                    "or export it to ONNX and use fuse_onnx"
                ) from error
            opaque.add(tracer.failed)


class _Reserved(InputError):
    """A part of the model has a name that no part of a GraphModule can have."""


_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


def _refuse_reserved(graph: fx.Graph, model: nn.Module) -> None:
    """Raise InputError where a part that the graph reads takes the name of what every GraphModule has, or of a keyword.

    A GraphModule holds its own graph as an attribute, and reads its parts by code that is written out.
    """
    for node in graph.nodes:
        names = str(node.target).split(".") if node.op in ("call_module", "get_attr") else [""]
        if names[0] in _RESERVED:
            raise _Reserved(
                f"{type(model).__name__} has a part called {names[0]!r}, which is the name of an attribute that every "
                "torch.fx.GraphModule has; rename it, or fuse a module that holds the model, such as "
                "torch.nn.Sequential(model)"
            )
        if any(map(keyword.iskeyword, names)):
            raise _Reserved(
                f"{type(model).__name__} has a part called {node.target!r}, and a keyword of Python is no name that "
                "torch.fx can write; rename it"
            )


def _plain_assertions(graph: fx.Graph) -> None:
    """Say "this argument is None" with torch._assert: the function torch.fx uses for it breaks every later trace."""
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "_assert_is_none":
            with graph.inserting_before(node):
                is_none = graph.call_function(operator.eq, (node.args[0], None))
                graph.call_function(torch._assert, (is_none, str(node.args[1])))
            graph.erase_node(node)


def _restore_names(graph: fx.Graph, model: nn.Module) -> None:
    """Give arguments back the names by which callers know them: torch.fx numbers those that it fixes.

    Keyword-only arguments become ordinary ones; None stands for those that must be given.
    """
    parameters = inspect.signature(model.forward).parameters
    names = [name for name, p in parameters.items() if p.kind not in _VARIADIC]
    required = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    for node in graph.find_nodes(op="placeholder"):
        original = str(node.target).removesuffix("_1")
        if original != node.target and original in names and node.target not in names:
            node.target = original
        if node.target in required:
            node.args = (None,)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _fixed(model: nn.Module) -> dict[str, Any]:
    """Arguments of forward that tracing fixes to their defaults: None, numbers and strings steer control flow."""
    return {
        name: p.default
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is None or isinstance(p.default, bool | int | float | str)
    }


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs as forward's own arguments, in order."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    bound.apply_defaults()
    for name, default in _fixed(model).items():
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
            return ask(cast(fx.GraphModule, _copied(traced)), args)
        except Exception:  # whatever the model's forward raises; the comparison will say so
            return {}


def verify_end_to_end(
    original: nn.Module,
    fused: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: dict[str, np.ndarray] | None = None,
    regions: Sequence[Region] = (),
    alone: Callable[[], Alone | None] = lambda: None,
) -> list[OutputError]:
    """Run both modules on the example inputs, in their own dtype, and compare every output tensor.

    The tolerance comes from the original's response to a perturbation of its inputs at rounding level.
    ``expected`` is the result of the original, where it is known already. Where that says too little, or an
    output differs by more, ``regions`` (what was rewritten) are compared one by one; see `compare_outputs`.

    Raises:
        VerificationError: the fused model does not run, or an output differs by more than rounding explains; names
            the region that is wrong, or else the output.
    """
    expected = _run(original, args, kwargs) if expected is None else expected
    noises = [_run(original, *_nudged((args, kwargs), seed)) for seed in range(3)]
    try:
        actual = _run(fused, args, kwargs)
    except Exception as error:  # whatever a wrong graph raises
        raise VerificationError(
            f"the fused model does not run: {one_line(error)}. Report this as a bug, with the model",
            where="output",
        ) from error
    epsilon = max((torch.finfo(t.dtype).eps for t in (*model_tensors(original), *_floats(args, kwargs))), default=0.0)

    def message(name: str, differs: float, allowed: float) -> str:
        return (
            f"{name} of the fused model differs by {differs:.2g} relative to its largest value, "
            f"{allowed:.1g} is what rounding explains. Report this as a bug, with the model"
        )

    return compare_outputs(expected, actual, noises, lambda _: epsilon, message, regions, alone)


def model_tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


def _floats(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]


def _run(model: nn.Module, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    """Every tensor that ``model`` returns, by its place in the result; random operators draw the same numbers."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    model = _copied(model)  # forward may update buffers
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
