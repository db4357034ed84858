"""torch.export as the fall-back for models that torch.fx cannot follow."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

NOTE = "traced by torch.export for these example inputs: only {} may differ, other inputs are refused"


def can_be_exported(model: nn.Module) -> bool:
    """Whether nothing would be lost: hooks run once during the export, and never again."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(m, name, None) for m in model.modules() for name in names)


def holds_linear(module: nn.Module) -> bool:
    """Whether there is anything to fold inside ``module``."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)
    return any(isinstance(m, kinds) for m in module.modules())


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.GraphModule, str] | None:
    """``model`` as a graph of ATen operators and a note on the inputs it takes; None where it cannot be exported.

    The number of images stays open where the model allows it; all other extents are fixed. The result
    shares storage with ``model``.
    """
    for attempt, varies in ((_open_batch, "the size of the batch"), (_as_it_is, "values")):
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _silence():
            warnings.simplefilter("ignore")
            try:
                module = cast(fx.GraphModule, attempt(model, args, kwargs).module())
            except Exception:  # whatever the model's forward or the exporter raises
                continue
        for node in module.graph.find_nodes(op="get_attr"):
            if not node.users:
                module.graph.erase_node(node)
        return fx.GraphModule(module, module.graph, type(model).__name__), NOTE.format(varies)
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing printed or logged by torch: of a model that it cannot follow, the exporter dumps the graph."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def is_exported(model: nn.Module) -> bool:
    """Whether ``model`` is the module of an exported program: its graph has a mode, its flags say nothing of that."""
    return isinstance(model, fx.GraphModule) and "eval" in vars(model)  # replaced by one that refuses


def live_in_training(module: fx.GraphModule) -> str | None:
    """An operator in the graph that computes as in training: batch statistics, random zeros; None where none does."""
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        without_statistics = "running_mean" in names and given.get("running_mean") is None  # these it has in any mode
        if any(given.get(name) is True for name in ("train", "training")) and not without_statistics:
            return str(node.target)
    return None


def _open_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """With the first axis of all tensors left open; one image is doubled, for an extent of one is never open."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim > 1]
    sizes = {t.shape[0] for t in tensors}
    if len(sizes) != 1:
        raise ValueError("no axis is the batch")
    if sizes == {1}:
        double: Callable[[Tensor], Tensor] = lambda t: torch.cat([t, t]) if t.ndim > 1 else t  # noqa: E731
        args, kwargs = pytree.tree_map_only(Tensor, double, (args, kwargs))
    shapes = torch.export.ShapesCollection()
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.ndim > 1:
            shapes[t] = {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(model, args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)


def _as_it_is(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    return torch.export.export(model, args, kwargs, strict=False)
