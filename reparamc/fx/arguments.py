"""Example inputs as the arguments of forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from reparamc.errors import InputError, one_line
from reparamc.fx.runnable import run
from reparamc.fx.trace import fixed_arguments


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def bound_to(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def tried(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    try:
        return run(model, args, kwargs)
    except InputError:
        raise
    except Exception as error:  # whatever the user's forward raises
        raise InputError(f"the model does not run on example_inputs: {one_line(error)}") from error


def examples_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor argument, by the name of its placeholder."""
    if not args and not kwargs:
        return {}
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {k: v for k, v in bound.items() if isinstance(v, Tensor)}
