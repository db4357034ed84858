"""FastViT in its training form: multi-branch networks to train, export and compile.

The models carry no fusion code of their own; turning the training form into the deployed one is the
compiler's work. `create_model(name, deployed=True)` builds the deployed structure directly, for weights
that are fused already.
"""

try:
    import torch as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("fastvit_zoo needs torch; install it with: pip install 'reparamc[torch]'") from error

from fastvit_zoo.checkpoint import CheckpointError, load_checkpoint
from fastvit_zoo.model import Backbone, Config, FastViT, FeatureInfo, create_model, list_models

__all__ = [
    "Backbone",
    "CheckpointError",
    "Config",
    "FastViT",
    "FeatureInfo",
    "create_model",
    "list_models",
    "load_checkpoint",
]
