"""The hand model that pose and shape are given to: MANO's file where the user has it, or a small stand-in.

Reimplemented from the formula of the paper "Embodied Hands" (Romero et al. 2017): a template, blend shapes of identity
and of pose, and linear blend skinning along 16 joints. The file is licensed and comes with nothing.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
"""Of the wrist and three joints each of index, middle, little, ring finger and thumb."""

TIPS = (333, 444, 672, 555, 745)
"""The vertices of MANO that FreiHAND counts as tips of the fingers, in the order of `PARENTS`."""

ORDER = (0, 13, 14, 15, 20, 1, 2, 3, 16, 4, 5, 6, 17, 10, 11, 12, 19, 7, 8, 9, 18)
"""FreiHAND's 21 joints as numbers of the 16 joints and the five tips: wrist, thumb, index, middle, ring, little."""


class Hand(nn.Module):
    """Rotations (B, 16, 3, 3) and shapes (B, 10) -> vertices (B, V, 3) and joints (B, 21, 3), in metres.

    `arrays` are those of the file: `v_template` (V, 3), `shapedirs` (V, 3, 10), `posedirs` (V, 3, 135), `J_regressor`
    (16, V) and `weights` (V, 16). Raises ValueError if one is missing or of another shape.
    """

    template: Tensor
    shapes: Tensor
    poses: Tensor
    regressor: Tensor
    weights: Tensor

    def __init__(self, arrays: dict[str, Any], tips: tuple[int, ...] = TIPS) -> None:
        super().__init__()
        count = len(np.asarray(arrays.get("v_template", ())))
        expected = {
            "v_template": (count, 3), "shapedirs": (count, 3, 10), "posedirs": (count, 3, 135),
            "J_regressor": (16, count), "weights": (count, 16),
        }  # fmt: skip
        kept = ("template", "shapes", "poses", "regressor", "weights")
        for name, (key, shape) in zip(kept, expected.items(), strict=True):
            if key not in arrays or tuple(np.shape(arrays[key])) != shape:
                found = np.shape(arrays[key]) if key in arrays else "missing"
                raise ValueError(f"not a model of a hand: {key} is {found}, not {shape}")
            self.register_buffer(name, torch.tensor(np.asarray(arrays[key], np.float32)), persistent=False)
        self.tips = list(tips)

    def forward(self, rotations: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
        body = self.template + torch.einsum("vck,bk->bvc", self.shapes, shapes)
        rest = torch.einsum("jv,bvc->bjc", self.regressor, body)
        bent = (rotations[:, 1:] - torch.eye(3, device=rotations.device)).flatten(1)
        body = body + torch.einsum("vck,bk->bvc", self.poses, bent)
        turns, places = [rotations[:, 0]], [rest[:, 0]]
        for joint, parent in list(enumerate(PARENTS))[1:]:
            bone = (rest[:, joint] - rest[:, parent])[..., None]
            places.append(places[parent] + (turns[parent] @ bone)[..., 0])
            turns.append(turns[parent] @ rotations[:, joint])
        turn, place = torch.stack(turns, 1), torch.stack(places, 1)
        shift = place - (turn @ rest[..., None])[..., 0]
        turned = torch.einsum("vj,bjcd,bvd->bvc", self.weights, turn, body)
        vertices = turned + torch.einsum("vj,bjc->bvc", self.weights, shift)
        return vertices, torch.cat([place, vertices[:, self.tips]], 1)[:, list(ORDER)]


class _Stub:
    """Takes the place of a class of chumpy, whose arrays the file is made of."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    """Reads arrays and sparse matrices and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "chumpy":
            return _Stub
        known = {"numpy": {"dtype", "ndarray", "_reconstruct", "scalar"}, "scipy": {"csc_matrix", "csr_matrix"}}
        codecs = (module, name) in (("_codecs", "encode"), ("copy_reg", "_reconstructor"), ("builtins", "object"))
        if codecs or name in known.get(module.split(".")[0], ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def load_hand(file: Path | None) -> Hand:
    """MANO from its licensed file (`MANO_RIGHT.pkl`, or its arrays as `.npz`), or without a file the stand-in.

    Raises FileNotFoundError if it is missing, ValueError if it is something else.
    """
    if file is None:
        return Hand(stand_in(), tuple(range(16, 21)))
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: the model of the hand comes from the authors of MANO")
    try:
        if file.suffix == ".npz":
            arrays = dict(np.load(file, allow_pickle=False))
        else:
            arrays = _Unpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
            arrays = {name: _plain(value) for name, value in arrays.items()}
    except Exception as error:
        raise ValueError(f"{file} is not a file of MANO: {str(error).splitlines()[0]}") from error
    return Hand(arrays)


def _plain(value: Any) -> Any:
    while isinstance(value, _Stub):
        value = value.__dict__.get("x", value.__dict__.get("r", ()))
    return value.toarray() if hasattr(value, "toarray") else value


def stand_in() -> dict[str, np.ndarray]:
    """A hand of 21 vertices, its joints and its tips: five straight fingers of 8 cm, longer or shorter by the shape."""
    joints = np.zeros((21, 3), np.float32)
    for finger in range(5):
        angle = np.pi * (0.25 + 0.125 * finger)
        way = np.array([np.cos(angle), np.sin(angle), 0], np.float32)
        for step in range(3):
            joints[1 + 3 * finger + step] = way * (0.06 + 0.03 * step)
        joints[16 + finger] = way * 0.15
    owner = np.concatenate([np.arange(16), 3 + 3 * np.arange(5)])
    shapes = np.zeros((21, 3, 10), np.float32)
    shapes[:, :, 0] = 0.1 * joints
    for finger in range(5):
        rows = [1 + 3 * finger, 2 + 3 * finger, 3 + 3 * finger, 16 + finger]
        shapes[rows, :, 1 + finger] = 0.1 * joints[rows]
    return {
        "v_template": joints,
        "shapedirs": shapes,
        "posedirs": np.zeros((21, 3, 135), np.float32),
        "J_regressor": np.eye(16, 21, dtype=np.float32),
        "weights": np.eye(16, dtype=np.float32)[owner],
    }
