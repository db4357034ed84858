"""Random BatchNorms and layer scales of torch modules; `randomize` says what they are for."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LAYER_SCALE_PARAMETER = re.compile(r"layer_?scale\w*|gamma(_\d+)?")
_LAYER_SCALE_CLASS = re.compile(r"layer_?scale", re.IGNORECASE)


def randomize_module(model: ModuleT, seed: int = 0, example_inputs: Any = None) -> ModuleT:
    """As `randomize_batchnorm`, of a module."""
    generator = torch.Generator().manual_seed(seed)
    pending = {module: None for module in model.modules() if isinstance(module, _BatchNorm)}

    def set_before_first_use(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if norm in pending:
            del pending[norm]
            _randomize_norm(norm, generator, inputs[0])

    if example_inputs is not None:
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        hooks = [norm.register_forward_pre_hook(set_before_first_use) for norm in pending]
        modes = [(module, module.training) for module in model.modules()]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model.eval()(*arguments)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training
    for norm in pending:
        _randomize_norm(norm, generator, None)
    return model


def _randomize_norm(norm: _BatchNorm, generator: Generator, x: Tensor | None) -> None:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(norm.num_features, dtype=torch.float64).uniform_(low, high, generator=generator)

    sign = torch.where(uniform(0, 1) < 0.2, -1.0, 1.0)
    size, bias, shift, stretch = (
        uniform(0.5, 1.5),
        uniform(-0.35, 0.35),
        uniform(-0.1, 0.1),
        uniform(0.8, 1.25),
    )
    with torch.no_grad():
        if norm.affine:
            norm.weight.copy_(sign * size)
            norm.bias.copy_(bias)
        if norm.running_mean is None or norm.running_var is None:
            return
        mean, variance = torch.zeros_like(shift), torch.ones_like(stretch)
        if x is not None:
            channels = x.detach().double().cpu().transpose(0, 1).flatten(1)
            mean, variance = channels.mean(1), channels.var(1, correction=0)
            # A channel that does not vary at all must not be amplified without bound.
            variance = variance.clamp_min(1e-4 * (1 + mean.square()))
        norm.running_mean.copy_(mean + shift * variance.sqrt())
        norm.running_var.copy_(variance * stretch)


def randomize_scales(model: ModuleT, seed: int = 0) -> ModuleT:
    """As `randomize_layer_scales`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            scales_only = _LAYER_SCALE_CLASS.search(type(module).__name__)
            for name, parameter in module.named_parameters(recurse=False):
                if scales_only or _LAYER_SCALE_PARAMETER.fullmatch(name):
                    parameter.copy_(torch.normal(0.0, 0.5, parameter.shape, generator=generator))
    return model
