"""ONNX models as comparisons and inputs need them: run in ONNX Runtime as they are, asked what they take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.runnable import Domain, Tree, bounds_of
from reparamc.equivalence.trials import Slot
from reparamc.errors import InputError
from reparamc.onnx.files import load
from reparamc.onnx.session import first_working_inputs, fits, session
from reparamc.onnx.values import attribute

_COPY = "/read_by_pooling"
"""After the name of a value, the name of its copy among the outputs."""


class OnnxRunnable:
    """A ModelProto, or the path of one."""

    flat = True
    epsilon = 0.0

    def __init__(self, model: ModelProto | str | os.PathLike[str]) -> None:
        self.kind = "ONNX model" if isinstance(model, ModelProto) else f"{os.fspath(model)} (ONNX)"
        self.model = model if isinstance(model, ModelProto) else load(Path(model))
        defaults = {t.name for t in self.model.graph.initializer}
        self.inputs = [v for v in self.model.graph.input if v.name not in defaults]
        self.names = tuple(v.name for v in self.inputs)
        with session(self.model, "the model") as run:
            self._run = run
        self._windows = _windows(self.model)
        if self._windows:
            with session(_exposing(self.model, self._windows), "the model") as run:
                self._run_windows = run

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Outputs:
        feeds = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        return {f"output {name!r}": value for name, value in self._run(feeds).items()}

    def runs(self, inputs: Tree) -> bool:
        """Whether the model takes these inputs, and so does the standard: windows and sizes fit."""
        if not fits(self.model, inputs):
            return False
        try:
            if not self._windows:
                self((), inputs)
                return True
            maps = self._run_windows(inputs)
        except Exception:  # ONNX Runtime's exceptions share no base class
            return False
        # Of such a window the runtime makes one result where it should make none.
        return all(np.all(np.array(maps[x + _COPY].shape[2:]) + pads >= kernel) for x, kernel, pads in self._windows)

    def domain(self, example_inputs: Any) -> Domain:
        example = self._example(example_inputs)
        base: dict[str, int] = {}
        slots = []
        for value in self.inputs:
            array, names = example[value.name], []
            for axis, (d, n) in enumerate(zip(value.type.tensor_type.shape.dim, array.shape, strict=True)):
                names.append(int(n) if d.HasField("dim_value") else d.dim_param or f"{value.name}:{axis}")
                if isinstance(names[-1], str):
                    base.setdefault(names[-1], int(n))
            bounds = (0, 1) if example_inputs is None else bounds_of(array)
            slots.append(Slot(value.name, array.dtype, tuple(names), bounds=bounds))
        return Domain(slots, base, self.runs, lambda drawn: dict(zip(self.names, drawn, strict=True)))

    def _example(self, given: Any) -> dict[str, np.ndarray]:
        if given is None:
            return first_working_inputs(self.model, self._run, 0)[0]
        if not isinstance(given, Mapping):
            given = dict(zip(self.names, given if isinstance(given, tuple | list) else (given,), strict=False))
        example = {name: np.asarray(value) for name, value in given.items()}
        if missing := [name for name in self.names if name not in example]:
            raise InputError(f"example_inputs lack the input {missing[0]!r}")
        if not self.runs(example):
            self((), example)  # raises the runtime's own error
        return example


def _windows(model: ModelProto) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The input of each pooling, the sizes of its window, and those of its padding, both ends together."""
    found = []
    for node in model.graph.node:
        if node.op_type in ("AveragePool", "MaxPool", "LpPool") and not attribute(node, "auto_pad"):
            dilations, kernel = attribute(node, "dilations"), np.array(attribute(node, "kernel_shape"))
            reach = (kernel - 1) * np.array(dilations) + 1 if dilations else kernel
            pads = np.array(attribute(node, "pads") or [0] * (2 * len(kernel)))
            found.append((node.input[0], reach, pads[: len(kernel)] + pads[len(kernel) :]))
    return found


def _exposing(model: ModelProto, windows: list[tuple[str, np.ndarray, np.ndarray]]) -> ModelProto:
    """A copy of ``model`` whose outputs are the maps that its poolings read, and its own."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for name in dict.fromkeys(x for x, _, _ in windows):
        copy.graph.node.append(helper.make_node("Identity", [name], [f"{name}{_COPY}"]))
        copy.graph.output.append(helper.make_empty_tensor_value_info(f"{name}{_COPY}"))
    return copy
