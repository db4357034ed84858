"""torch.export as the fall-back for models that torch.fx cannot follow."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparamc.errors import InputError, one_line
from reparamc.fx.casts import drop_casts
from reparamc.fx.memory import GUARDS
from reparamc.fx.questions import Questions
from reparamc.fx.recompose import recompose
from reparamc.fx.shapes import recorded
from reparamc.fx.trace import drop_unread
from reparamc.fx.watch import Call

_MANY = 1 << 31
"""More than any size is: a smaller bound is one up to which forward computes something."""


def can_be_exported(model: nn.Module) -> bool:
    """Whether nothing would be lost: hooks run once during the export, and never again."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(m, name, None) for m in model.modules() for name in names)


def exported(model: nn.Module, call: Call) -> fx.GraphModule:
    """``model`` as a graph of ATen operators, over its own tensors; sizes stay open where the model allows it.

    Raises:
        InputError: torch.export does not follow it.
    """
    try:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), call)  # it leaves marks on them
    except RuntimeError as error:  # they were seen inside torch.vmap
        raise InputError(f"its arguments cannot be copied: {one_line(error)}") from error
    shapes = torch.export.ShapesCollection()
    for t in pytree.tree_leaves((args, kwargs)):
        if isinstance(t, Tensor):
            shapes[t] = dict.fromkeys(range(t.ndim), torch.export.Dim.AUTO)
    questions = Questions()
    with (
        warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _silence(), torch.no_grad(), questions.asked(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)
            questions.settle()
            if any(sizes.upper < _MANY for sizes in program.range_constraints.values()):
                raise InputError("it takes other ways for large inputs")
            if any("!=" in guard for guard in getattr(program, "_guards_code", ())):
                raise InputError("it refuses some sizes")
            if any(isinstance(t, Tensor) and t.is_floating_point() for t in program.constants.values()):
                raise InputError("it makes constants, whose dtype a copy would not keep")
            module = cast(fx.GraphModule, program.module())
        except Exception as error:  # whatever the model's forward or the exporter raises
            raise InputError(f"torch.export does not follow {type(model).__name__}: {one_line(error)}") from error
    made = plain_graph(module, type(model).__name__)
    try:
        _spell_guards(made)
    except Exception as error:  # a proxy cannot follow the guards
        raise InputError("what torch.export takes for granted of sizes cannot be written as a graph") from error
    recompose(made)
    drop_casts(made)
    return made


def _spell_guards(made: fx.GraphModule) -> None:
    """Write what torch.export takes for granted of sizes as operators: its own function for that cannot be pickled."""
    for node in made.graph.find_nodes(op="call_module", target=GUARDS):
        with made.graph.inserting_before(node):
            made.get_submodule(GUARDS)(*map(fx.Proxy, node.args))
        made.graph.erase_node(node)
    made.delete_submodule(GUARDS)
    made.recompile()


def keep_sizes(made: fx.GraphModule, program: fx.GraphModule) -> None:
    """Note at the arguments of ``made`` the sizes that ``program`` takes."""
    known = {n.target: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    for node in made.graph.find_nodes(op="placeholder"):
        if isinstance(value := known.get(node.target), Tensor):
            node.meta["shape"] = recorded(value)


def plain_graph(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The module of an exported program as an ordinary one, without what only its own class needs."""
    drop_unread(module.graph)
    return fx.GraphModule(module, module.graph, name)


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


def live_in_training(module: fx.GraphModule) -> str | None:
    """An operator in the graph that computes as in training: batch statistics, random zeros; None where none does."""
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        without_statistics = "momentum" in names and given.get("running_mean") is None  # these it has in any mode
        if any(given.get(name) is True for name in ("train", "training")) and not without_statistics:
            return str(node.target)
    return None
