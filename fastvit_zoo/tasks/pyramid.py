"""The feature pyramid that detection and segmentation build on."""

from collections import OrderedDict

from torch import Tensor, nn

import fastvit_zoo.torchvision_operators  # noqa: F401
from fastvit_zoo.model import Backbone

# isort: split
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> maps (B, channels, H / stride, W / stride) of strides 4, 8, 16, 32, and 64 if `extra`.

    Every map of the backbone has a BatchNorm first; fused, it is part of the pyramid's 1x1 convolution.
    """

    def __init__(self, maps: Backbone, channels: int = 256, *, extra: bool = False) -> None:
        super().__init__()
        dims = maps.feature_info.channels()
        self.backbone = maps
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in dims)
        self.pyramid = FeaturePyramidNetwork(dims, channels, LastLevelMaxPool() if extra else None)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [norm(one) for norm, one in zip(self.norms, self.backbone(image), strict=True)]
        return list(self.pyramid(OrderedDict((str(i), one) for i, one in enumerate(maps))).values())
