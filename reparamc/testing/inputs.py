"""Inputs for a model as a strategy for hypothesis, and models of all kinds as what runs on arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.runnable import Domain, Runnable, Tree, leaves, mapped
from reparamc.equivalence.trials import strategy
from reparamc.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from hypothesis import strategies as st


def inputs_for(model: Any, example_inputs: Any = None) -> st.SearchStrategy[Any]:
    """Inputs for ``model``, as a strategy for hypothesis: sizes, parities, borders, magnitudes.

    Every size that may vary does: each is tried, from 1 upwards, on the model itself before the first example.
    Values are normal, zero, one, or other than zero at the border or in one place only, and large or small. Whole
    numbers stay between the smallest and the largest of the example, or are 0 and 1.

    Args:
        model: a torch module, an ONNX ModelProto or the path of one.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword arguments. ONNX models tell
            by themselves. So does a torch module of one argument that starts with a convolution, a linear layer or
            a BatchNorm.

    Returns:
        For torch, tuples of positional arguments (mappings, if the example is one); for ONNX, mappings from names to
        arrays.

    Raises:
        InputError: the model does not run on the example, or does not tell what it takes.
    """
    domain = domain_of(model, example_inputs)
    trials = strategy(domain.space)
    if len(domain.sizes) > 1:
        trials = trials.filter(lambda trial: domain.accepts(trial.sizes))
    return trials.map(domain.inputs)


def domain_of(model: Any, example_inputs: Any = None) -> Domain:
    """The inputs that ``model`` accepts; see `inputs_for`."""
    domain = runnable_of(model).domain(arrays_of(example_inputs))
    if domain is None:
        raise InputError("a function does not tell what inputs it takes; give them")
    return domain


def runnable_of(model: Any, tensors: bool = False) -> Runnable:
    """``model`` as something that runs; ``tensors`` says whether a function is to be called with tensors.

    Raises:
        InputTypeError: it is no model.
        InputError: it cannot be read.
    """
    onnx, torch = sys.modules.get("onnx"), sys.modules.get("torch")
    if isinstance(model, str | os.PathLike) or (onnx is not None and isinstance(model, onnx.ModelProto)):
        from reparamc.onnx.runnable import OnnxRunnable

        return OnnxRunnable(model)
    if torch is not None and isinstance(model, torch.nn.Module):
        from reparamc.fx.runnable import TorchRunnable

        return TorchRunnable(model)
    if callable(model):
        return FunctionRunnable(model, tensors)
    raise InputTypeError(f"a torch module, an ONNX model, its path or a function is wanted, not {type(model).__name__}")


class FunctionRunnable:
    """A function of arrays or tensors."""

    names = None
    flat = False
    epsilon = 0.0

    def __init__(self, function: Callable[..., Any], tensors: bool) -> None:
        self.kind = f"function {getattr(function, '__name__', type(function).__name__)}"
        self.function, self.tensors = function, tensors

    def domain(self, example_inputs: Any) -> Domain | None:
        return None

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Outputs:
        call = [mapped(np.copy, a) for a in args], {k: mapped(np.copy, v) for k, v in kwargs.items()}
        if self.tensors:
            from reparamc.fx.runnable import called

            result = called(self.function, *call)
        else:
            result = self.function(*call[0], **call[1])
        return dict(leaves(arrays_of(result)))


def arrays_of(tree: Tree) -> Tree:
    """``tree`` with tensors as arrays."""
    torch = sys.modules.get("torch")
    if torch is None:
        return tree
    from reparamc.fx.runnable import arrays

    return arrays(tree)
