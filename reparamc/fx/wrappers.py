"""Modules around a module (torch.compile, DataParallel, DistributedDataParallel), put around its copy again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

Wrapper = Callable[[nn.Module], nn.Module]


def unwrapped(model: Any) -> tuple[Any, Wrapper]:
    """What is inside of ``model``, and what puts the same around another module."""
    match model:
        case nn.Module() if _is_compiled(model):
            inside, around = model._orig_mod, _compiled(model)
        case nn.DataParallel():
            inside, around = model.module, _parallel(model)
        case nn.parallel.DistributedDataParallel():
            inside, around = model.module, _distributed(model)
        case _:
            return model, lambda module: module
    inner, wrapped = unwrapped(inside)
    return inner, lambda module: around(wrapped(module))


def _is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile made it. What that comes from takes as long to import as all of torch."""
    home = sys.modules.get("torch._dynamo.eval_frame")
    return home is not None and isinstance(model, home.OptimizedModule)


def _compiled(model: Any) -> Wrapper:
    def around(module: nn.Module) -> nn.Module:
        return type(model)(module, model.dynamo_ctx)

    return around


def _parallel(model: Any) -> Wrapper:
    def around(module: nn.Module) -> nn.Module:
        if not model.device_ids:
            return type(model)(module).eval()
        return type(model)(module, model.device_ids, model.output_device, model.dim).eval()

    return around


def _distributed(model: Any) -> Wrapper:
    def around(module: nn.Module) -> nn.Module:
        if not any(p.requires_grad for p in module.parameters()):
            return module  # torch refuses to wrap it
        options = {"device_ids": model.device_ids, "process_group": model.process_group, "dim": model.dim}
        return type(model)(module, **options, broadcast_buffers=model.broadcast_buffers).eval()

    return around
