"""The kit for users' own tests: random models of linear structure, a comparison, random BatchNorms, a guard for pytest.

    linear_modules, linear_onnx, branches    strategies for hypothesis: models
    inputs_for, batchnorm_states             strategies for hypothesis: inputs of a model, states of a BatchNorm
    assert_equivalent                        two models compute the same, or it is said where they do not
    randomize_batchnorm                      statistics that a wrong rewrite cannot hide behind
    randomize_layer_scales                   the same for layer scales
    fuse_guard                               fuse a model and hold it to its structure; also a fixture of pytest

Importing this package imports neither torch, onnx, hypothesis nor pytest; its functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reparamc.testing.assertions import assert_equivalent
    from reparamc.testing.guard import fuse_guard
    from reparamc.testing.inputs import inputs_for
    from reparamc.testing.randomize import randomize_batchnorm, randomize_layer_scales
    from reparamc.testing.strategies import batchnorm_states, branches, linear_modules, linear_onnx

__all__ = [
    "assert_equivalent",
    "batchnorm_states",
    "branches",
    "fuse_guard",
    "inputs_for",
    "linear_modules",
    "linear_onnx",
    "randomize_batchnorm",
    "randomize_layer_scales",
]

_HOMES = {
    "assert_equivalent": "assertions",
    "batchnorm_states": "strategies",
    "branches": "strategies",
    "fuse_guard": "guard",
    "inputs_for": "inputs",
    "linear_modules": "strategies",
    "linear_onnx": "strategies",
    "randomize_batchnorm": "randomize",
    "randomize_layer_scales": "randomize",
}


_NEEDS = "reparamc.testing.{} needs {}; install it with: pip install 'reparamc[{}]'"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reparamc.testing' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"reparamc.testing.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(_NEEDS.format(name, "hypothesis", "testing")) from error
