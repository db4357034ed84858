"""Giving untrained networks parameters that a wrong rewrite cannot hide behind, in torch and ONNX.

A fresh network has BatchNorms that do nothing and layer scales near zero: a rewrite that forgets one of them
still computes the right output.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from reparamc.errors import InputTypeError

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

ModelT = TypeVar("ModelT", bound="nn.Module | ModelProto")
ModuleT = TypeVar("ModuleT", bound="nn.Module")


def randomize_batchnorm(model: ModelT, seed: int = 0, example_inputs: Any = None) -> ModelT:
    """Give every BatchNorm random parameters and statistics that fit what it sees.

    Weights are 0.5 to 1.5 in size, one in five negative; biases lie within 0.35 of 0. With `example_inputs`
    the running mean and variance are those of each layer's input (N, C, ...) in one forward pass, moved by up to a
    tenth of a standard deviation and by a factor from 0.8 to 1.25. Each layer is set just before it first computes, so
    that later layers see the output of the new earlier ones. Layers that the pass does not reach, and all
    of them where there are no inputs, get a mean within 0.1 of 0 and a variance within 0.8 and 1.25.

    The result depends on `seed`, the model and the inputs alone. The global random state and the training
    mode of every module are left as they were.

    Args:
        model: a torch module, which is changed and returned; or an ONNX ModelProto, of which a changed copy is
            returned. There, layers whose parameters are computed or given by the caller stay as they are.
        example_inputs: a tuple of the model's positional inputs, or its only input; for ONNX, also a mapping from
            names to arrays.

    Raises:
        InputTypeError: `model` is neither.
    """
    onnx, torch = sys.modules.get("onnx"), sys.modules.get("torch")
    if onnx is not None and isinstance(model, onnx.ModelProto):
        from reparamc.testing.onnx_randomize import randomize_model

        return cast(Any, randomize_model(cast(Any, model), seed, example_inputs))
    if torch is not None and isinstance(model, torch.nn.Module):
        from reparamc.testing.fx_randomize import randomize_module

        return randomize_module(cast(Any, model), seed, example_inputs)
    raise InputTypeError(f"randomize_batchnorm takes a torch module or an ONNX ModelProto, not {type(model).__name__}")


def randomize_layer_scales(model: ModuleT, seed: int = 0) -> ModuleT:
    """Give every layer scale normal values with mean 0 and standard deviation 0.5; returns `model`.

    A layer scale is a parameter named `layer_scale*`, `gamma` or `gamma_<n>`, or any parameter of a module
    whose class name contains "LayerScale". The result depends on `seed` and the model alone; the global
    random state is left as it was.
    """
    from reparamc.testing.fx_randomize import randomize_scales

    return randomize_scales(model, seed)
