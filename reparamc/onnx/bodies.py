"""Graphs within a graph: bodies of If, Loop and Scan, and local functions.

A body is fused like any graph, as a model of its own: what it captures is an input of that model, or a constant where
it is one outside. So is a local function, where its calls agree on types. An If whose condition is constant is replaced
by the branch that it takes, and functions by what they compute where that lets more fold and the file does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    ValueInfoProto,
    helper,
    inliner,
    numpy_helper,
)

from reparamc.algebra.records import replace
from reparamc.certificate.onnx_bounds import bodies
from reparamc.errors import InputError
from reparamc.onnx.constants import fold_constants
from reparamc.onnx.values import (
    Constants,
    Names,
    Types,
    captured,
    commit,
    defined,
    defined_names,
    inferred,
    is_standard,
    operand,
)
from reparamc.onnx.weights import fill
from reparamc.report.data import Report

Fuse = Callable[[ModelProto], tuple[ModelProto, Report]]


def has_bodies(model: ModelProto) -> bool:
    return any(map(bodies, model.graph.node))


# Functions


def called(model: ModelProto) -> list[tuple[str, str]]:
    """The local functions that the graphs of ``model`` call, by domain and name."""
    known = {(f.domain, f.name) for f in model.functions}
    return list(dict.fromkeys(c for n in _all_nodes(model.graph) if (c := (n.domain, n.op_type)) in known))


def inlined(model: ModelProto, functions: Sequence[tuple[str, str]]) -> ModelProto | None:
    """``model`` with what some functions compute in the place of their calls; None if that cannot be done."""
    try:
        return inliner.inline_selected_functions(model, [*functions])
    except Exception:  # whatever the inliner cannot do stays a function
        return None


def _all_nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    stack: list[GraphProto | FunctionProto] = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            stack.extend(bodies(node))


# Constant conditions


def resolve(model: ModelProto) -> int:
    """Replace each If of the main graph whose condition is constant by its branch, in place; how many there were."""
    total = 0
    while any(node.op_type == "If" and is_standard(node) for node in model.graph.node):
        probe = ModelProto()
        probe.CopyFrom(model)
        fold_constants(probe)
        constants, nodes, found, names = Constants(probe), [], 0, Names(defined_names(model.graph))
        for node in model.graph.node:
            branch = _taken(node, constants)
            if branch is None:
                nodes.append(node)
            else:
                nodes += _opened(model, node, branch, names)
                found += 1
        if not found:
            break
        fed = {node.input[0] for node in model.graph.node if node.op_type == "If" and node.input}
        fed.update(name for node in model.graph.node if node.op_type == "If" for name in captured(node))
        commit(model, nodes, [], fed)
        total += found
    return total


def _taken(node: NodeProto, constants: Constants) -> GraphProto | None:
    """The branch that an If always takes; None where that is open."""
    if node.op_type != "If" or not is_standard(node) or not node.input or node.input[0] not in constants:
        return None
    condition = constants.array(node.input[0])
    wanted = "then_branch" if condition.size == 1 and condition.any() else "else_branch"
    branch = next((a.g for a in node.attribute if a.name == wanted), None)
    fits = condition.size == 1 and branch is not None and len(branch.output) == len(node.output)
    return branch if fits else None


def _opened(model: ModelProto, node: NodeProto, branch: GraphProto, names: Names) -> list[NodeProto]:
    """The nodes of ``branch`` under free ``names``; the main graph of ``model`` gets its constants."""
    renamed = {name: names.fresh(name) for name in defined(branch)}
    computed = {name for inner in branch.node for name in inner.output}
    for inner, outer in zip(branch.output, node.output, strict=True):
        if outer and inner.name in computed and renamed[inner.name] not in node.output:
            renamed[inner.name] = outer
    opened = GraphProto()
    opened.CopyFrom(branch)
    _rename(opened, renamed)
    model.graph.initializer.extend(opened.initializer)
    model.graph.sparse_initializer.extend(opened.sparse_initializer)
    if model.ir_version < 4:
        model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in opened.initializer)
    nodes = list(opened.node)
    for inner, outer in zip(opened.output, node.output, strict=True):
        if outer and inner.name != outer:
            nodes.append(helper.make_node("Identity", [inner.name], [outer]))
    return nodes


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Give values other names, in the bodies within ``graph`` as well."""
    stack = [graph]
    while stack:
        g = stack.pop()
        for tensor in (*g.initializer, *(t.values for t in g.sparse_initializer), *g.value_info, *g.output):
            tensor.name = names.get(tensor.name, tensor.name)
        for node in g.node:
            for group in (node.input, node.output):
                group[:] = [names.get(name, name) for name in group]
            stack.extend(bodies(node))


# Bodies


def fuse_bodies(model: ModelProto, fuse: Fuse) -> list[tuple[str, Report]]:
    """Fuse each body in the main graph of ``model``, in place; where each is, and what was done there.

    A body whose values are of unknown types is left alone.
    """
    done: list[tuple[str, Report]] = []
    constants, types = Constants(model), Types(model)
    read: set[str] = set()
    for node in model.graph.node:
        for a in node.attribute:
            if a.type != AttributeProto.GRAPH:
                continue
            alone = _alone(model, a.g, constants, types)
            if alone is None:
                continue
            try:
                fused, report = fuse(alone)
            except InputError:
                continue
            done.append((f"{node.name or node.output[0]}.{a.name}", report))
            if report.changed:
                read.update(captured(node))
                _put_back(model, a.g, alone, fused)
    if read:
        commit(model, list(model.graph.node), [], read)
    return done


def fuse_functions(model: ModelProto, fuse: Fuse) -> list[tuple[str, Report]]:
    """Fuse each local function by itself, in place, for all its calls; where each is, and what was done there.

    One that takes attributes, calls others, or is called elsewhere than in the main graph is left alone.
    """
    done: list[tuple[str, Report]] = []
    types = Types(model) if model.functions else None
    for function in model.functions:
        alone = _called_alone(model, function, types) if types is not None else None
        if alone is None:
            continue
        try:
            fused, report = fuse(alone)
        except InputError:
            continue
        done.append((f"{function.domain}.{function.name}", report))
        if report.changed:
            nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in fill(fused).graph.initializer]
            nodes += fused.graph.node
            del function.node[:], function.value_info[:]
            function.node.extend(nodes)
    return done


def _called_alone(model: ModelProto, function: FunctionProto, types: Types) -> ModelProto | None:
    """``function`` as a model whose inputs are of the types that all calls agree on; None where they do not."""
    others = {(f.domain, f.name) for f in model.functions}
    inside = list(_all_nodes(function))
    key = function.domain, function.name
    calls = [node for node in model.graph.node if (node.domain, node.op_type) == key]
    everywhere = [model.graph, *(f for f in model.functions if f is not function)]
    number = sum((node.domain, node.op_type) == key for part in everywhere for node in _all_nodes(part))
    if not calls or number != len(calls) or function.attribute or function.attribute_proto:
        return None
    if any((node.domain, node.op_type) in others for node in inside):
        return None
    given: list[ValueInfoProto] = []
    for at, name in enumerate(function.input):
        kinds = {types.element_type(operand(call, at) or "") for call in calls}
        shapes = [types.shape(operand(call, at) or "") for call in calls]
        kind, ranks = kinds.pop(), {None if shape is None else len(shape) for shape in shapes}
        if kinds or kind is None or None in ranks or len(ranks) > 1:
            return None
        sizes = zip(*(shape for shape in shapes if shape is not None), strict=True)
        dims = [None if len(set(s)) > 1 else s[0].known if s[0].known is not None else str(s[0]) for s in sizes]
        given.append(helper.make_tensor_value_info(name, kind, dims))
    results = [ValueInfoProto(name=name) for name in function.output]
    graph = helper.make_graph(function.node, function.name, given, results)
    made = ModelProto(ir_version=max(model.ir_version, 4), opset_import=function.opset_import, graph=graph)
    found = inferred(made, {}).graph.output
    if not all(v.type.tensor_type.elem_type and v.type.tensor_type.HasField("shape") for v in found):
        return None
    del made.graph.output[:]
    made.graph.output.extend(found)
    return made


def _alone(model: ModelProto, body: GraphProto, constants: Constants, types: Types) -> ModelProto | None:
    """``body`` as a model; None where a type is unknown that it has to declare."""
    own = set(defined(body))
    names = [*(name for node in body.node for name in (*node.input, *captured(node))), *(o.name for o in body.output)]
    given = [name for name in dict.fromkeys(names) if name and name not in own]
    made = ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import, functions=model.functions)
    made.graph.CopyFrom(body)
    made.graph.name = body.name or "body"
    for name in given:
        if name in constants:
            made.graph.initializer.append(numpy_helper.from_array(constants.array(name), name))
        elif (info := types.info(name)) is not None:
            made.graph.input.append(info)
        else:
            return None
    for declared, found in zip(made.graph.output, inferred(made, {}).graph.output, strict=True):
        if not declared.type.tensor_type.HasField("shape"):
            declared.type.CopyFrom(found.type)
    known = all(v.type.tensor_type.HasField("shape") for v in (*made.graph.output, *made.graph.input))
    return made if known else None


def _put_back(model: ModelProto, body: GraphProto, alone: ModelProto, fused: ModelProto) -> None:
    """Make ``fused`` the body, its new names free in every scope of ``model``."""
    before, names = set(defined_names(alone.graph)), Names(defined_names(model.graph))
    fresh = {name: names.fresh(name) for name in defined(fused.graph) if name not in before}
    _rename(fused.graph, fresh)
    for node in fused.graph.node:
        if node.name and node.name not in before:
            node.name = names.fresh(node.name)
    own = {t.name for t in body.initializer}
    outside = {t.name for t in alone.graph.initializer} - own
    kept = [t for t in fill(fused).graph.initializer if t.name not in outside]  # no reference leads out of a body
    groups: list[tuple[Any, Iterable[Any]]] = [
        (body.node, fused.graph.node), (body.initializer, kept), (body.value_info, fused.graph.value_info),
    ]  # fmt: skip
    for group, new in groups:
        taken = list(new)
        del group[:]
        group.extend(taken)


def merged(report: Report, inner: list[tuple[str, Report]]) -> Report:
    """``report`` with what was done in bodies, each place named after the operator that holds it."""
    for where, found in inner:
        if not found.changed:
            continue
        for name, times in found.passes.items():
            report.passes[name] = report.passes.get(name, 0) + times
        report.rewrites += [replace(r, where=f"{where}/{r.where}") for r in found.rewrites]
        report.kept += [replace(k, where=f"{where}/{k.where}") for k in found.kept]
        report.failed += [replace(f, where=f"{where}/{f.where}") for f in found.failed]
        if report.certificate is None:
            report.certificate = found.certificate
        elif found.certificate is not None:
            report.certificate = replace(
                report.certificate,
                equal=report.certificate.equal + found.certificate.equal,
                undecided=(*report.certificate.undecided, *found.certificate.undecided),
                rolled_back=report.certificate.rolled_back + found.certificate.rolled_back,
                units=max(report.certificate.units, found.certificate.units),
                bound=max(report.certificate.bound, found.certificate.bound),
                seconds=report.certificate.seconds + found.certificate.seconds,
            )
    return report
