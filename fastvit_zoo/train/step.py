"""One step of an optimizer, in half precision where that is asked for."""

# pyright: reportPrivateImportUsage=false
# timm exports its names without saying so.

import torch
from torch import Tensor, nn

import fastvit_zoo.torchvision_operators  # noqa: F401

from timm.utils import NativeScaler, dispatch_clip_grad  # isort: skip


class Stepper:
    """Gradients and steps. `scaler` keeps small gradients in float16, and is None elsewhere."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, amp: bool) -> None:
        self.optimizer, self.device, self.amp = optimizer, device, amp
        self.scaler = NativeScaler("cuda") if amp and device.type == "cuda" else None

    def autocast(self) -> torch.autocast:
        """Half precision inside this context, if it is asked for."""
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.amp)

    def step(self, loss: Tensor, model: nn.Module, *, clip: float = 0.0, update: bool = True) -> None:
        """Add the gradients of `loss`, clipped to the norm `clip` if it is not 0, and with `update` take a step.

        Raises ValueError if the loss is infinite or not a number.
        """
        if not loss.isfinite():
            raise ValueError(f"the loss is {loss.item()}: give a smaller --lr")
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=clip or None, parameters=model.parameters(), need_update=update)
            return
        loss.backward()
        if update:
            if clip:
                dispatch_clip_grad(model.parameters(), clip)
            self.optimizer.step()
