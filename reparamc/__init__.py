"""reparamc: structural reparameterization for any model, from the graph alone, verified.

    reparamc.fuse_fx(module)        a torch module in eval mode
    reparamc.fuse_onnx(model)       an ONNX ModelProto, path, or onnx-graphsurgeon Graph
    reparamc fuse in.onnx -o out    the same from a shell

Importing this package imports neither torch nor onnx; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reparamc._version import __version__
from reparamc.errors import InputError, InputTypeError, ReparamcError, VerificationError

if TYPE_CHECKING:
    from reparamc.fx_fuse import fuse_fx
    from reparamc.onnx_fuse import fuse_onnx
    from reparamc.report import Report

__all__ = [
    "InputError",
    "InputTypeError",
    "ReparamcError",
    "Report",
    "VerificationError",
    "__version__",
    "fuse_fx",
    "fuse_onnx",
]

_HOMES = {"fuse_fx": "reparamc.fx_fuse", "fuse_onnx": "reparamc.onnx_fuse", "Report": "reparamc.report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reparamc' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
