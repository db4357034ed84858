"""Checkpoints of torch, read as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from reparamc.errors import InputError
from reparamc.onnx.refresh import unreadable

INSIDE = ("state_dict", "model_state_dict", "model_ema", "ema", "model")
"""Where training scripts put the weights of a model."""


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a file that `torch.save` wrote, by name. No code in it is run.

    Raises:
        InputError: it cannot be read, or holds no tensors, or those of several models.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # whatever a damaged file, or one that holds code, leads to
        wrong = "it is empty, cut short, or no file that torch.save wrote; save it again"
        if is_zipfile(path):
            wrong = "it holds more than tensors, and no code is run; save the state_dict of the model alone"
        raise InputError(f"{path} cannot be read as a checkpoint: {wrong}") from error
    states = _states(held)
    if not states:
        raise InputError(f"{path} holds no state_dict; save that of the model")
    if len(states) > 1:
        raise InputError(f"{path} holds several state_dicts: {', '.join(states)}; save one of them alone")
    return arrays_of(*states.values())


def _states(held: Any, path: str = "") -> dict[str, Mapping[str, Any]]:
    """The state_dicts in ``held``, a checkpoint, by where they are: that of a usual name, or all."""
    if not isinstance(held, Mapping):
        return {}
    inner = {k: v for k, v in held.items() if isinstance(k, str)}
    if any(isinstance(t, Tensor) for t in inner.values()):
        return {path: inner}
    usual = next((key for key in INSIDE if isinstance(inner.get(key), Mapping)), None)
    keys = inner if usual is None else [usual]
    return {at: state for key in keys for at, state in _states(inner[key], f"{path}.{key}".strip(".")).items()}


def arrays_of(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a state_dict as arrays of the same dtype.

    Raises:
        InputError: one has no form as an array, such as a quantized tensor.
    """
    found: dict[str, np.ndarray] = {}
    for name, t in state.items():
        if isinstance(t, Tensor):
            try:
                found[name] = _array(t.detach().to_dense().cpu())
            except (NotImplementedError, RuntimeError, TypeError) as error:
                raise InputError(
                    f"{name!r} is {t.dtype} on {t.device}, which cannot be read; save it as float"
                ) from error
    return found


def _array(t: Tensor) -> np.ndarray:
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()
