"""`fuse_exported`: an exported program, fused and exported again."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparamc.errors import InputError, InputTypeError, one_line
from reparamc.fx.fuse import fuse_fx
from reparamc.fx.watch import LOCK


def fuse_exported(program: torch.export.ExportedProgram, **options: Any) -> torch.export.ExportedProgram:
    """A fused copy of ``program``: the same inputs, sizes that are open in it stay open, the outputs as before.

    Args:
        program: exported in eval mode, with its example inputs.
        options: those of `fuse_fx`.

    Raises:
        InputTypeError: it is no exported program.
        InputError: it has no example inputs, or computes as in training, or the result cannot be exported again.
        VerificationError: the result computes something else.
    """
    if not isinstance(program, torch.export.ExportedProgram):
        raise InputTypeError(f"fuse_exported takes an ExportedProgram, not {type(program).__name__}; see fuse_fx")
    if program.example_inputs is None:
        raise InputError("the program has no example inputs; export it with some")
    args, kwargs = program.example_inputs
    module = program.module()
    given: Any = tuple(args)
    if kwargs:
        given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    fused = fuse_fx(module, given, **options)
    shapes = torch.export.ShapesCollection()
    names = program.graph_signature.user_inputs
    held = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
    for leaf, name in zip(pytree.tree_leaves((args, kwargs)), names, strict=True):
        if isinstance(leaf, Tensor) and isinstance(value := held.get(str(name)), Tensor):
            opened = [axis for axis, n in enumerate(value.shape) if not isinstance(n, int)]
            shapes[leaf] = dict.fromkeys(opened, torch.export.Dim.AUTO)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t, (tuple(args), dict(kwargs)))
    with LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(_plain(fused), args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)
        except Exception as error:  # whatever the exporter raises
            raise InputError(f"the fused program cannot be exported again: {one_line(error)}") from error


def _plain(fused: nn.Module) -> nn.Module:
    """``fused`` as a module that is no graph, for torch takes lists and dicts of a graph for ones of another type."""
    if not isinstance(fused, fx.GraphModule):
        return fused
    plain = nn.Module()
    for held in ("_modules", "_parameters", "_buffers"):
        setattr(plain, held, getattr(fused, held))
    plain.forward = fused.forward
    return plain
