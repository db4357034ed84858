"""`fuse_fx`: the whole way of a torch module, from its arguments to verification."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import fx, nn

from reparamc.algebra.rewrite import Pass, select
from reparamc.compiler.pipeline import level_of
from reparamc.errors import InputError, InputTypeError
from reparamc.fx.export import is_exported, live_in_training
from reparamc.fx.host import fuse_module


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
        fused = fuse_module(model, example_inputs, selected, level, objective)
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
