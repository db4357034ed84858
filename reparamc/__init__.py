"""reparamc: structural reparameterization for any model, from the graph alone, verified.

    reparamc.fuse_fx(module)        a torch module in eval mode
    reparamc.fuse_exported(program) what torch.export makes
    reparamc.fuse_onnx(model)       an ONNX ModelProto, path, or onnx-graphsurgeon Graph
    reparamc.Fuser(module, inputs)  the same after every epoch, and trained through
    reparamc.overparameterize(module, recipe)  branches for training, which fuse_fx takes back
    reparamc.verify_onnx(a, b)      two ONNX models on many inputs, whoever made the second
    reparamc fuse in.onnx -o out    the same from a shell; also reparamc verify a.onnx b.onnx

Importing this package imports neither torch nor onnx; the functions do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reparamc.errors import InputError, InputTypeError, ReparamcError, VerificationError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reparamc.fx.fuse import fuse_fx
    from reparamc.fx.programs import fuse_exported
    from reparamc.onnx.fuse import fuse_onnx
    from reparamc.report.data import Report
    from reparamc.training.fuser import Fuser
    from reparamc.training.grow import overparameterize, parameter_groups
    from reparamc.verify.audit import audit
    from reparamc.verify.result import Verification
    from reparamc.verify.search import verify_onnx

__all__ = [
    "Fuser",
    "InputError",
    "InputTypeError",
    "ReparamcError",
    "Report",
    "Verification",
    "VerificationError",
    "__version__",
    "audit",
    "fuse_exported",
    "fuse_fx",
    "fuse_onnx",
    "overparameterize",
    "parameter_groups",
    "verify_onnx",
]

_HOMES = {
    "Fuser": "reparamc.training.fuser",
    "Report": "reparamc.report.data",
    "Verification": "reparamc.verify.result",
    "audit": "reparamc.verify.audit",
    "fuse_exported": "reparamc.fx.programs",
    "fuse_fx": "reparamc.fx.fuse",
    "fuse_onnx": "reparamc.onnx.fuse",
    "overparameterize": "reparamc.training.grow",
    "parameter_groups": "reparamc.training.grow",
    "verify_onnx": "reparamc.verify.search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reparamc' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"reparamc.{name} needs torch; install it with: pip install 'reparamc[torch]'") from error
