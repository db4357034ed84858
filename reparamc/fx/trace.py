"""Tracing: a torch module as a graph, by torch.fx or by torch.export, with its own names and its writes in place."""

from __future__ import annotations

import copy
import inspect
import keyword
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparamc.errors import InputError, one_line
from reparamc.fx.export import can_be_exported, exported, holds_linear, is_exported
from reparamc.fx.memory import IN_PLACE_DUNDERS


def followed(model: nn.Module, given: tuple[Any, Any] | None) -> tuple[fx.GraphModule, str]:
    """``model`` as a graph, and how it was made where not by torch.fx.

    torch.export is asked where torch.fx fails, or leaves something to fold inside a submodule that it
    cannot follow; it needs the example inputs.

    Raises:
        InputError: neither can follow it, or it cannot be copied.
    """
    own = copied(model)
    traced = failure = None
    try:
        traced, opaque = _traced(own)
        hidden = [path for path in opaque if holds_linear(own.get_submodule(path))]
        if not hidden or given is None:
            return traced, ""
    except _Reserved as error:
        raise InputError(str(error)) from None  # torch.export would meet the same
    except InputError as error:
        failure = error
    if given is not None and can_be_exported(model):
        found = exported(copied(model), *given)
        if found is not None:
            return found
    if traced is None:
        raise failure or AssertionError
    return traced, ""


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares no storage with ``model``, tensors that were computed and kept as attributes included.

    Raises:
        InputError: an attribute cannot be copied.
    """
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own exported programs
            made = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    except Exception as error:  # whatever the attributes of the user's module raise
        raise InputError(
            f"{type(model).__name__} cannot be copied: {one_line(error)}; remove weight_norm and the like"
        ) from error
    if is_exported(model):
        for module in made.modules():
            module.training = False
    return made


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` and ``a[i] = b`` as what they are; torch.fx would read ``a + b``, or fail.

    ``a.shape`` is read where it stands: torch.fx would read it where it is used, which may be behind a write.
    """

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "shape":
            _ = found.node
        return found

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
        self.precision = _precision()

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call"):
            self._refuse_autocast()
        return super().create_node(kind, *args, **kwargs)

    def _refuse_autocast(self) -> None:
        if _precision() != self.precision:
            raise RuntimeError("it turns autocast on or off, which torch.fx does not record")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        hooked = hooked or "forward" in vars(m)
        parametrized = nn.utils.parametrize.is_parametrized(m)
        special = hooked or parametrized or module_qualified_name in self.opaque
        return special or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self._refuse_autocast()  # here it is the fault of the module around ``m``
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


def _precision() -> list[torch.dtype | None]:
    """What autocast computes in now, where it is on."""
    return [torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda")]


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
    fixed = fixed_arguments(model)
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


def fixed_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of forward that tracing fixes to their defaults: None, numbers and strings steer control flow."""
    return {
        name: p.default
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is None or isinstance(p.default, bool | int | float | str)
    }
