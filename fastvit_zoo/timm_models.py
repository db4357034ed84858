"""The seven variants in timm's registry, after ``import fastvit_zoo.timm_models``.

``timm.create_model("fastvit_zoo_t8", num_classes=10)`` gives a `FastViT` in training form, with `features_only=True` a
`Backbone`. Whatever builds on timm's registry takes these names, such as the encoders "tu-fastvit_zoo_t8" of
segmentation_models_pytorch.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

import fastvit_zoo.torchvision_operators  # noqa: F401
from fastvit_zoo.model import CONFIGS, create_model

# isort: split
from timm.models import register_model

_NOT_OURS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""What timm hands to every model, about weights that it would download."""


def _entry(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{build.__name__} has no weights to download: give checkpoint_path or checkpoint")
        return create_model(name, **{k: v for k, v in options.items() if k not in _NOT_OURS})

    build.__name__ = name.replace("fastvit_", "fastvit_zoo_")
    build.__module__ = __name__
    build.__doc__ = f"`fastvit_zoo.create_model({name!r}, ...)`."
    return build


for _name in CONFIGS:
    register_model(_entry(_name))
