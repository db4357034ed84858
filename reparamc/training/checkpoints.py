"""Checkpoints of torch, read as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from reparamc.errors import InputError, one_line

INSIDE = ("state_dict", "model_state_dict", "model_ema", "ema", "model")
"""Where training scripts put the weights of a model."""


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a file that `torch.save` wrote, by name. No code in it is run.

    Raises:
        InputError: it cannot be read, or holds no tensors.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # whatever a damaged file, or one that holds code, leads to
        raise InputError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from error
    for key in INSIDE:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            break
    if not isinstance(held, Mapping) or not any(isinstance(t, Tensor) for t in held.values()):
        raise InputError(f"{path} holds no state_dict")
    return arrays_of(held)


def arrays_of(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a state_dict as arrays of the same dtype."""
    return {name: _array(t.detach().cpu()) for name, t in state.items() if isinstance(t, Tensor)}


def _array(t: Tensor) -> np.ndarray:
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()
