"""Random BatchNorms of ONNX models; `randomize` says what they are for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from reparamc.errors import InputError
from reparamc.onnx.session import session
from reparamc.onnx.values import Constants, captured, is_standard
from reparamc.testing.inputs import arrays_of

_ROLES = ("scale", "bias", "mean", "var")


def randomize_model(model: ModelProto, seed: int = 0, example_inputs: Any = None) -> ModelProto:
    """As `randomize_batchnorm`, of a ModelProto: a copy."""
    copy = ModelProto()
    copy.CopyFrom(model)
    constants = Constants(copy)
    norms = [n for n in copy.graph.node if n.op_type == "BatchNormalization" and is_standard(n)]
    norms = [n for n in norms if all(name in constants for name in n.input[1:5])]
    rng = np.random.default_rng(seed)
    # Exporters store equal arrays once, such as the weights and variances of all fresh layers: each layer gets its own.
    # Layers that share all four are one layer, used twice.
    layers: dict[tuple[str, ...], list[str]] = {}
    for norm, x in _inputs_of(copy, norms, example_inputs):
        key = tuple(norm.input[1:5])
        if key not in layers:
            layers[key] = [f"{norm.output[0]}.random_{role}" for role in _ROLES]
            before = [constants.array(name) for name in key]
            for name, old, array in zip(layers[key], before, _drawn(len(before[0]), rng, x), strict=True):
                _store(copy, name, array.astype(old.dtype))
        del norm.input[1:]
        norm.input.extend(layers[key])
    _drop_unread(copy, {name for key in layers for name in key})
    return copy


def _store(model: ModelProto, name: str, array: np.ndarray) -> None:
    tensor = numpy_helper.from_array(array, name)
    model.graph.initializer.append(tensor)
    if model.ir_version < 4:  # every initializer is an input there
        model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))


def _drawn(channels: int, rng: np.random.Generator, x: np.ndarray | None) -> list[np.ndarray]:
    """Scale, bias, mean and variance that fit ``x`` (N, C, ...)."""
    sign = np.where(rng.random(channels) < 0.2, -1.0, 1.0)
    scale, bias = rng.uniform(0.5, 1.5, channels), rng.uniform(-0.35, 0.35, channels)
    shift, stretch = rng.uniform(-0.1, 0.1, channels), rng.uniform(0.8, 1.25, channels)
    mean, variance = np.zeros(channels), np.ones(channels)
    if x is not None:
        by_channel = np.moveaxis(x.astype(np.float64), 1, 0).reshape(channels, -1)
        # A channel that does not vary at all must not be amplified without bound.
        mean = by_channel.mean(1)
        variance = np.maximum(by_channel.var(1), 1e-4 * (1 + mean**2))
    return [sign * scale, bias, mean + shift * np.sqrt(variance), variance * stretch]


def _inputs_of(
    model: ModelProto, norms: Sequence[NodeProto], example_inputs: Any
) -> Iterator[tuple[NodeProto, np.ndarray | None]]:
    """Each BatchNorm with what it sees, if there are inputs; whoever asks changes it before asking for the next.

    The nodes between one and the next are run once, as a model of their own.
    """
    if example_inputs is None:
        yield from ((norm, None) for norm in norms)
        return
    nodes = list(model.graph.node)
    wanted = {id(norm) for norm in norms}
    live = _feeds(model, example_inputs)
    done = 0
    last_reader = {name: at for at, node in enumerate(nodes) for name in (*node.input, *captured(node))}
    for at, norm in enumerate(nodes):
        if id(norm) in wanted:
            live = _run(model, nodes[done:at], live, {n for n, reader in last_reader.items() if reader >= at})
            done = at
            yield norm, live[norm.input[0]]


def _feeds(model: ModelProto, given: Any) -> dict[str, np.ndarray]:
    given = arrays_of(given)
    defaults = {t.name for t in model.graph.initializer}
    names = [v.name for v in model.graph.input if v.name not in defaults]
    if not isinstance(given, Mapping):
        given = dict(zip(names, given if isinstance(given, tuple | list) else (given,), strict=False))
    if missing := [name for name in names if name not in given]:
        raise InputError(f"example_inputs lack the input {missing[0]!r}")
    return {name: np.asarray(value) for name, value in given.items()}


def _run(
    model: ModelProto, nodes: Sequence[NodeProto], live: Mapping[str, np.ndarray], later: set[str]
) -> dict[str, np.ndarray]:
    """Of the values of ``live`` and those that ``nodes`` make of them, the ones that are read later."""
    made = [name for node in nodes for name in node.output if name in later]
    kept = {name: value for name, value in live.items() if name in later}
    if not made:
        return kept
    read = {name for node in nodes for name in (*node.input, *captured(node))}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape))
        for name, value in live.items()
        if name in read
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in made]
    tensors = [t for t in model.graph.initializer if t.name in read and t.name not in live]
    part = helper.make_model(
        helper.make_graph(list(nodes), "part", inputs, outputs, tensors),
        opset_imports=model.opset_import, functions=model.functions, ir_version=max(model.ir_version, 4),
    )  # fmt: skip
    with session(part, "the model") as run:
        return kept | run({v.name: live[v.name] for v in inputs})


def _drop_unread(model: ModelProto, replaced: set[str]) -> None:
    graph = model.graph
    read = {name for node in graph.node for name in (*node.input, *captured(node))} | {o.name for o in graph.output}
    inputs = {v.name for v in graph.input}
    kept = [t for t in graph.initializer if t.name not in replaced or t.name in read or t.name in inputs]
    del graph.initializer[:]
    graph.initializer.extend(kept)
