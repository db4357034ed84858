"""Replacements that many faults are made of: readings, attributes that are overlooked, geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from onnx import NodeProto, helper
from planting import Make, Replace, given, instead, result

from reparamc.algebra.expr import Conv, Expr
from reparamc.compiler.readings import Reading


def reading(change: Callable[[Any], Expr]) -> Make:
    """For a reader: it builds ``change`` of the expression that it should build."""

    def changed(found: Any) -> Any:
        if not isinstance(found, Reading):
            return found
        return Reading(change(found.template))

    return result(changed)


def geometry(e: Conv, **other: Any) -> Conv:
    """``e`` with another stride, dilation, begin or end of the padding; the rest as before."""
    begin, end = e.padding
    g = {"stride": e.stride, "dilation": e.dilation, "begin": begin, "end": end, **other}
    return Conv.padded(e.x, e.weight, e.bias, g["stride"], g["dilation"], g["begin"], g["end"], e.groups)


def ones(e: Conv) -> tuple[int, ...]:
    return (1,) * len(e.kernel)


# ONNX


def node_with(**attributes: Any) -> Make:
    """For a reader of ONNX: it sees a node with these attributes; None: without."""
    return given(lambda graph, node, *more: (graph, _changed(node, attributes), *more))


def _changed(node: NodeProto, attributes: dict[str, Any]) -> NodeProto:
    kept = [a for a in node.attribute if a.name not in attributes]
    copy = helper.make_node(node.op_type, node.input, node.output, node.name, domain=node.domain)
    copy.attribute.extend(kept)
    copy.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    return copy


def node_of_inputs(change: Callable[[list[str]], list[str]]) -> Make:
    """For a reader of ONNX: it sees a node with other operands."""

    def changed(graph: Any, node: NodeProto, *more: Any) -> tuple[Any, ...]:
        copy = helper.make_node(node.op_type, change(list(node.input)), node.output, node.name)
        copy.attribute.extend(node.attribute)
        return (graph, copy, *more)

    return given(changed)


def written(*ops: str, **attributes: Any) -> Make:
    """For `_Emitter._node`: operators ``ops`` are written with other attributes, each a function of the right one."""

    def make(original: Any) -> Any:
        def write(self: Any, op: str, inputs: list[str], output: str | None, **right: Any) -> str:
            if op in ops:
                right = {k: attributes[k](v) if k in attributes else v for k, v in right.items()}
            return original(self, op, inputs, output, **{k: v for k, v in right.items() if v is not None})

        return write

    return make


def operands_written(*ops: str, change: Callable[[list[str]], list[str]]) -> Make:
    """For `_Emitter._node`: operators ``ops`` are written with other operands."""
    return lambda original: (
        lambda self, op, inputs, output, **more: original(
            self, op, change(inputs) if op in ops else inputs, output, **more
        )
    )


# torch


def call_with(**arguments: Any) -> Make:
    """For a reader of torch: it sees a call with these arguments; None: without."""

    def changed(graph: Any, node: Any, call: Any) -> tuple[Any, ...]:
        args = {k: v for k, v in {**call.args, **arguments}.items() if v is not None}
        return graph, node, replace(call, args=args)

    return given(changed)


# Checks that every fault of one kind has to take out


UNCHECKED_PROBE = (
    Replace("reparamc.algebra.probe:_follows", instead(lambda *_: True)),
    Replace("reparamc.algebra.probe:_difference", instead(lambda *_: 0.0)),
    Replace("reparamc.compiler.impulse:difference", instead(lambda *_: 0.0)),
)
"""The kernel of an impulse response is believed without a test."""
