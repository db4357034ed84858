"""A module fused part by part: the largest parts that can be followed are replaced, the Python around them stays."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparamc.algebra.recorded import tape
from reparamc.certificate.fx_shapes import run_recorded
from reparamc.compiler.host import Options
from reparamc.errors import InputError, one_line
from reparamc.fx.arguments import elements
from reparamc.fx.calls import by_position, is_exported, is_plain, operation
from reparamc.fx.constants import CONSTANT
from reparamc.fx.copying import State, copied
from reparamc.fx.direct import chained, reaches_into
from reparamc.fx.export import can_be_exported, exported, keep_sizes
from reparamc.fx.host import fuse_traced
from reparamc.fx.outcome import another_structure, difference, ran
from reparamc.fx.result import HOOKS, FusedModule, in_place_of, within
from reparamc.fx.runnable import perturbed, plain
from reparamc.fx.trace import Traced, fixed_arguments, trace, traced
from reparamc.fx.watch import LINEAR, Call, Seen, Watched, is_leaf
from reparamc.report.data import Counts, Report

NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Way:
    """The way that one part took: fused as a graph, with the report of that, or left as it is, with its size."""

    where: str
    how: str
    why: str
    size: Counts | None = None
    report: Report | None = None


@dataclass
class Taken:
    """What takes the place of a module, the ways of all parts of it, and whether it was compared with the module."""

    module: nn.Module
    ways: list[Way] = field(default_factory=list)
    is_compared: bool = False


@dataclass(frozen=True)
class Whole:
    """A module as a graph that was seen to compute the same.

    Attributes:
        opaque: what it calls as it is, and why.
        sizes: of its nodes, in the first of the calls that were seen; empty where they were not noted.
    """

    graph: Traced
    opaque: dict[str, str]
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])


@dataclass(frozen=True)
class Placed:
    """A module ``new`` that took the place of ``old`` at ``where`` in the model.

    ``sites``: a module, the name of a submodule of it, and what that was before and after.
    """

    where: str
    old: nn.Module
    new: nn.Module
    sites: tuple[tuple[nn.Module, str, nn.Module, nn.Module], ...]

    def put(self) -> None:
        for home, name, _, new in self.sites:
            home._modules[name] = new

    def put_back(self) -> None:
        for home, name, old, _ in self.sites:
            home._modules[name] = old


class Parts:
    """The parts of one model on their way.

    Args:
        model: the caller's module, which parts are compared with.
        own: a copy of it, in which parts are replaced.
        options: what to do.
        outermost: calls of the model itself; None where it was not run.
        watched: the calls of its submodules, and which of those other code reaches into.
        blocked: submodules that no graph may take the place of, by path, with the reason.
        classes: paths of submodules that other code finds by their class.
        first: what `traced` makes of the model, if it was asked before.
    """

    def __init__(
        self,
        model: nn.Module,
        own: nn.Module,
        options: Options,
        outermost: list[Seen] | None = None,
        watched: Watched | None = None,
        blocked: Mapping[str, str] = MappingProxyType({}),
        classes: Collection[str] = (),
        first: Whole | str | None = None,
    ) -> None:
        self.options = options
        self.originals = dict(model.named_modules(remove_duplicate=False))
        self.own = dict(own.named_modules(remove_duplicate=False))
        self.blocked, self.outermost, self.watched = dict(blocked), outermost, watched
        self.classes = set(classes)
        if watched is not None:
            cast_at = "the Python around it turns autocast on"
            self.blocked |= {path: cast_at for path, m in self.originals.items() if id(m) in watched.cast}
        self.placed: list[Placed] = []
        self._taken: dict[int, Taken] = {}
        self._apart: dict[str, str] = {}
        self._wholes: dict[str, Whole | str] = {}
        self._first = first

    # What can be followed

    def seen(self, path: str) -> list[Seen] | None:
        """The calls of the module at ``path``; None where they are not known."""
        if not path:
            return self.outermost
        return None if self.watched is None else self.watched.calls.get(id(self.originals[path]), [])

    def is_touched(self, path: str) -> bool:
        """Whether other code reaches into the module at ``path``."""
        if path and self._is_held(path):
            return True
        if not path or self.watched is None:
            return False
        around, _, name = path.rpartition(".")
        read = reaches_into(type(self.originals[around]), name) if not is_leaf(self.originals[path]) else frozenset()
        return id(self.originals[path]) in self.watched.touched or any(n in self.originals[path]._modules for n in read)

    def whole(self, path: str) -> Whole | str:
        """The module at ``path`` as a graph that agrees with it; or why there is none."""
        if path not in self._wholes:
            self._wholes[path] = self._whole(path)
        return self._wholes[path]

    def _whole(self, path: str) -> Whole | str:
        if path in self.blocked:
            return self.blocked[path]
        calls = self.seen(path)
        if calls is not None and not calls:
            return "the example does not run it"
        opaque = {inner: why for place, why in self.blocked.items() if (inner := _below(path, place))}
        why = ""
        for _ in range(4):
            found = self._first if self._first is not None and not (path or opaque) else self.traced(path, opaque)
            if isinstance(found, str) or not (why := self._disagreement(path, found.graph, calls or [], found.sizes)):
                return found
            more = self._suspects(path, found.opaque)
            if not more:
                break
            opaque = found.opaque | more
        return f"what torch.fx makes of it computes something else: {why}"

    def traced(self, path: str, opaque: Mapping[str, str]) -> Whole | str:
        """The module at ``path`` as a graph that may not agree with it; or why there is none."""
        module, calls = self.own[path], self.seen(path)
        state = State(module, self.originals[path])
        try:
            found = Whole(*traced(module, calls[0].call if calls else None, opaque))
            if is_exported(original := self.originals[path]):
                keep_sizes(found.graph, original)
            for name in [n for n in vars(module) if n.startswith(CONSTANT)]:
                delattr(module, name)  # torch.fx puts them there; the graph has its own
            if not calls and state.changed():
                name = state.first_change()
                return f"forward changes {repr(name) if name else 'a buffer'}: a state that a call changes is not fused"
            return found
        except InputError as error:
            return str(error)
        finally:
            state.restore()

    def _disagreement(
        self, path: str, graph: fx.GraphModule, calls: list[Seen], sizes: dict[str, tuple[int, ...]] | None = None
    ) -> str:
        """How a graph differs from the module, on every recorded call; ``sizes`` is given those in the first."""
        if calls and isinstance(graph, Traced) and (why := another_structure(graph.literal(), calls[0].result)):
            return why
        original, ways = self.originals[path], list[Callable[..., Any]]()
        way: Callable[..., Any] = graph.forward  # for the module would print what its graph raises
        if has_hooks(original):
            way = in_place_of(original, graph)
        elif sizes is not None and len(calls) > 1:
            ways.append(partial(_interpreted, graph, sizes))
        ways += [way] * (len(calls) - len(ways))
        pairs = sorted(zip(ways, calls, strict=True), key=lambda pair: elements(pair[1].call))
        return next((why for way, seen in pairs if (why := _difference(original, way, seen))), "")

    def _suspects(self, path: str, opaque: Mapping[str, str]) -> dict[str, str]:
        """Submodules of ``path`` that cannot be followed, although they were."""
        found: dict[str, str] = {}
        for name, child in self.own[path].named_children():
            inner = _joined(path, name)
            if name in opaque or is_leaf(child) or self.watched is None:
                continue
            if not self.seen(inner):
                more = self._suspects(inner, {o: "" for place in opaque if (o := _below(name, place))})
                found |= {_joined(name, place): why for place, why in more.items()}
            elif isinstance(whole := self.whole(inner), str):
                found[name] = whole
            else:
                found |= {_joined(name, place): why for place, why in whole.opaque.items()}
        return {place: why for place, why in found.items() if place not in opaque}

    # What is put in its place

    def take(self, path: str, as_graph: bool | None = None) -> Taken:
        """What takes the place of the module at ``path``.

        ``as_graph``: whether its graph may, where the parts in it could be replaced instead. By default where its
        forward takes no argument that can be left out, for only Python leaves the choice.
        """
        module = self.own[path]
        if id(module) in self._taken:  # it has several names
            return Taken(self._taken[id(module)].module)
        if path and (is_leaf(module) or not any(module.state_dict(keep_vars=True))):
            return Taken(module)
        self._taken[id(module)] = Taken(module)
        self._taken[id(module)] = self._taken_now(path, not has_options(module) if as_graph is None else as_graph)
        return self._taken[id(module)]

    def _taken_now(self, path: str, as_graph: bool) -> Taken:
        module, seen = self.own[path], self.seen(path)
        whole: Whole | str = ""
        fixed = fixed_argument(module, seen[0].call if seen else None)
        if path and self.is_touched(path):
            whole = "other code reaches into it"
        elif calls_its_own_way(module):
            whole = f"{type(module).__name__} has a __call__ of its own"
        elif fixed:
            whole = f"a graph would fix its argument {fixed!r}, of which callers may give another value"
        elif as_graph or any(map(is_leaf, module.children())):
            whole = self.whole(path)
            as_graph = as_graph and bool(path or isinstance(whole, str) or not counts_an_argument(whole.graph))
        if isinstance(whole, Whole) and (variadic := variadic_argument(whole.graph)):
            whole = f"a graph would fix how many there are of {variadic!r}"
        if isinstance(whole, Whole) and as_graph:
            return self._as_graph(path, whole)
        taken = self._entered(path, whole if isinstance(whole, str) else "")
        if isinstance(whole, Whole):
            other = self._as_graph(path, whole)
            return other if size(other.module) < size(taken.module) else taken
        by_export = whole and not fixed and not has_options(module) and (as_graph or path)
        return self._by_export(path, taken) if by_export else taken

    def _as_graph(self, path: str, whole: Whole) -> Taken:
        """The fused graph, what it calls as it is being taken in turn; a part in which nothing folds stays."""
        module = self.own[path]
        seen = self.seen(path) or []
        is_alone = not path and not whole.opaque and not has_hooks(module)  # or else it is compared with what is around
        expected = [plain(one.result) for one in seen] if is_alone else []
        calls = [one.call for one in seen]
        graph = fuse_traced(whole.graph, self.originals[path], calls, expected, self.options, sizes=whole.sizes)
        report: Report = graph.meta.pop("reparamc")
        result: nn.Module = in_place_of(module, graph) if report.changed or not path else module
        ways = [Way(path, "torch.fx", "", report=report)]
        for inner, why in whole.opaque.items():
            place = _joined(path, inner)
            if not _holds(result, inner):
                continue
            taken = self.take(place)
            ways += [Way(w.where, w.how, w.why or why, w.size, w.report) if w.where == place else w for w in taken.ways]
            self._put(place, result, inner, taken.module)
        result = within(module, result) if path in self.classes and result is not module else result
        return Taken(result, ways, bool(expected))

    def _by_export(self, path: str, taken: Taken) -> Taken:
        """As a graph by torch.export, where that folds a BatchNorm that would stay; else what was ``taken``."""
        module, original, calls = self.own[path], self.originals[path], self.seen(path)
        stays = any(isinstance(m, NORM) for m in taken.module.children())
        if not (stays and calls and can_be_exported(original)):
            return taken
        if path in self.blocked or path in self._apart or self.is_touched(path):
            return taken
        state = State(original)
        try:
            graph = exported(copied(original), max((seen.call for seen in calls), key=_smallest))
        except InputError:
            return taken
        finally:
            state.restore()
        if self._disagreement(path, graph, calls):
            return taken
        remembered(graph, path)
        fused = fuse_traced(graph, original, [seen.call for seen in calls], [], self.options, exported=True)
        report: Report = fused.meta.pop("reparamc")
        result = in_place_of(module, fused)
        if size(result) >= size(taken.module):
            return taken
        return Taken(result, [Way(path, "torch.export", taken.ways[-1].why, report=report)])

    def _entered(self, path: str, why: str) -> Taken:
        """The module itself, with its parts replaced."""
        module, ways = self.own[path], list[Way]()
        for name, child in list(module._modules.items()):
            if child is not None:
                taken = self.take(_joined(path, name))
                ways += taken.ways
                self._put(_joined(path, name), module, name, taken.module)
        pairs, folded = self._pairs(path)
        leaves = [m for name, m in module.named_children() if is_leaf(m) and name not in folded]
        if isinstance(module, (NORM, *LINEAR)) and not is_leaf(module):  # of a class of its own
            leaves.append(module)
        if any(isinstance(m, (NORM, *LINEAR)) for m in leaves) or not path:
            ways.append(Way(path, "as it is", "; ".join(filter(None, (why, self._apart.get(path)))), counts_of(leaves)))
        return Taken(module, ways + pairs)

    def _pairs(self, path: str) -> tuple[list[Way], set[str]]:
        """Convolutions with the BatchNorms that the Python of a module always calls after them, as one; their names."""
        module, ways, names = self.own[path], list[Way](), set[str]()
        if not any(isinstance(m, NORM) for m in module.children()):
            return ways, names
        places = Counter(map(id, self.own.values()))
        found, why = chained(module, self._kinds)
        for both in found:
            pair = [module._modules.get(name) for name in both]
            first, second = pair
            if not (isinstance(first, LINEAR) and isinstance(second, NORM)):
                continue
            calls = self.seen(_joined(path, both[0]))
            inner = [_joined(path, name) for name in both]
            if any(self.is_touched(p) or p in self.blocked for p in inner) or any(places[id(m)] > 1 for m in pair):
                continue
            if not (is_plain(first) and is_plain(second)):
                continue
            if any(id(v) in self._held for m in pair for v in _with_tensors(m)):
                why = f"a module holds {both[0]!r} or {both[1]!r} in an attribute that is no submodule"
                continue
            model = nn.Sequential(first, second)
            model.training = False
            graph = fuse_traced(trace(model), model, [seen.call for seen in calls or []], [], self.options)
            report: Report = graph.meta.pop("reparamc")
            inside = [graph.get_submodule(str(n.target)) for n in graph.graph.find_nodes(op="call_module")]
            if not report.after.batchnorm:
                plain_one = len(graph.graph.nodes) == 3 and isinstance(inside[0], type(first))
                new = inside[0] if plain_one else in_place_of(first, graph)  # it may have to assert a rank
                ways.append(Way(_joined(path, both[0]), "torch.fx", "", report=report))
                names.update(both)
                sites = (module, both[0], first, new), (module, both[1], second, nn.Identity())
                self.placed.append(Placed(_joined(path, both[0]), first, new, sites))
                self.placed[-1].put()
        if why:
            self._apart[path] = f"a convolution and its BatchNorm stay two: {why}"
        return ways, names

    @cached_property
    def _kinds(self) -> list[type]:
        """The classes of the modules that hold others."""
        return [*dict.fromkeys(type(m) for m in self.originals.values() if not is_leaf(m))]

    @cached_property
    def _held(self) -> dict[int, set[int]]:
        """Ids of what modules hold in attributes of another kind, such as lists, each with those of the holders."""
        usual = vars(nn.Module()).keys()
        found: dict[int, set[int]] = {}
        for m in set(self.own.values()):
            for leaf in pytree.tree_leaves([v for name, v in vars(m).items() if name not in usual]):
                found.setdefault(id(leaf), set()).add(id(m))
        return found

    @cached_property
    def _listed(self) -> bool:
        """Whether modules hold others in such a way."""
        return not self._held.keys().isdisjoint(map(id, self.own.values()))

    def _is_held(self, path: str) -> bool:
        """Whether a module elsewhere holds the one at ``path``, or one in it, beside its place."""
        if not self._listed:
            return False
        inside = set(map(id, self.own[path].modules()))
        return any(not self._held.get(m, set()) <= inside for m in inside)

    def _put(self, where: str, holder: nn.Module, path: str, new: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        home = holder.get_submodule(parent)
        old = home._modules[name]
        if old is not None and old is not new:
            self.placed.append(Placed(where, old, new, ((home, name, old, new),)))
            self.placed[-1].put()

    def _keep_class(self, parts: list[Placed]) -> None:
        for part in parts:
            self.placed.remove(part)
            new = within(part.old, part.new)
            self.placed.append(Placed(part.where, part.old, new, tuple((*site[:3], new) for site in part.sites)))
            self.placed[-1].put()

    def without_doubles(self, taken: Taken) -> Taken:
        """``taken``, but that no part is fused whose weights another place in the model keeps as well."""
        while (part := self._doubled(taken.module)) is not None:
            taken = self.entered(taken, part.where, "another place in the model holds what would fold in it")
        return taken

    def _doubled(self, root: nn.Module) -> Placed | None:
        """A part whose parameters ``root`` holds elsewhere, though they are no more in what took its place."""
        kept = set(map(id, root.parameters()))
        for part in self.placed:
            gone = (p for p in part.old.parameters() if id(p) in kept) if len(part.sites) == 1 else ()
            if any(all(p is not other for other in part.new.parameters()) for p in gone):
                return part
        return None

    def entered(self, taken: Taken, path: str, why: str) -> Taken:
        """``taken``, with what is at ``path`` in its own class; or, where it is already, with its parts replaced."""
        blamed = [part for part in self.placed if part.where == path]
        if path not in self.classes and all(isinstance(p.new, FusedModule) and len(p.sites) == 1 for p in blamed):
            self.classes.add(path)
            self._keep_class(blamed)
            if blamed:
                return taken
        gone = set(map(id, taken.module.modules())) if not path else set[int]()
        for part in blamed:
            part.put_back()
            gone |= set(map(id, part.new.modules()))
        gone -= set(map(id, self.own.values()))
        self.placed = [p for p in self.placed if p not in blamed and not any(id(s[0]) in gone for s in p.sites)]
        ways = [w for w in taken.ways if w.where != path]
        if any(len(part.sites) > 1 for part in blamed):  # a pair of operators, which has no parts
            return Taken(
                taken.module, [*ways, Way(path, "as it is", why, counts_of([s[2] for p in blamed for s in p.sites]))]
            )
        root = taken.module if path else self.own[path]
        return Taken(root, [*ways, *self._entered(path, why).ways])


def _with_tensors(module: nn.Module | None) -> list[Any]:
    return [] if module is None else [module, *module.parameters(), *module.buffers()]


def _holds(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def has_options(module: nn.Module) -> bool:
    """Whether forward takes arguments that can be left out, or any number of them."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def calls_its_own_way(module: nn.Module) -> bool:
    """Whether the class of ``module`` does more than run its forward where it is called."""
    kind = type(module)
    return not isinstance(module, fx.GraphModule) and kind.__call__ is not nn.Module.__call__


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of ``module`` itself run before or after its forward."""
    return any(vars(module).get(name) for name in HOOKS)


def fixed_argument(module: nn.Module, call: Call | None) -> str:
    """An argument that can be left out, or steers forward, and that a graph would need as the example has it."""
    fixed = [*fixed_arguments(module, call)]
    if call is not None:
        signature = inspect.signature(module.forward)
        given = signature.bind(*call[0], **call[1]).arguments
        fixed += [name for name in given if signature.parameters[name].default is not inspect.Parameter.empty]
    return next(iter(fixed), "")


def variadic_argument(graph: fx.GraphModule) -> str:
    """A variadic argument that is read; empty where there is none."""
    names = (str(node.target) for node in graph.graph.find_nodes(op="placeholder") if node.users)
    return next((name.lstrip("*") for name in names if name.startswith("*")), "")


def counts_an_argument(graph: fx.GraphModule) -> bool:
    """Whether a graph takes only as many elements of a list, or of a mapping, as the example has."""
    return any(node.target is len for node in graph.graph.find_nodes(op="call_function", target=len))


def _interpreted(graph: fx.GraphModule, sizes: dict[str, tuple[int, ...]], *args: Any, **kwargs: Any) -> Any:
    """What ``graph`` makes of arguments, node by node; ``sizes`` is given those of the nodes."""
    given = by_position(graph, args, kwargs)
    if given is None:
        return graph(*args, **kwargs)
    result, found = run_recorded(graph, given)
    sizes.update(found)
    return result


def _difference(original: nn.Module, graph: Callable[..., Any], seen: Seen) -> str:
    """How ``graph`` differs from ``original`` on the arguments of one call.

    What was recorded of the call decides where they agree. Where not, it was overwritten since, or another state of
    the random generators went into it, or they differ: then the original is run.
    """
    try:
        actual: Any = ran(graph, seen.call)
    except Exception as error:  # whatever a wrong graph raises
        actual = error
    if seen.is_kept() and not isinstance(actual, Exception) and not difference(actual, seen.result):
        return ""
    try:
        expected, again = ran(original, seen.call), ran(original, seen.call)
    except Exception as error:  # whatever it raises outside of the model around it
        return f"alone it does not run: {one_line(error)}"
    if difference(again, expected):
        return "it computes something else each time, by numbers that torch does not draw"
    if isinstance(actual, Exception):
        return one_line(actual)
    return difference(actual, expected, lambda: ran(original, perturbed(seen.call, 0)))


def size(module: nn.Module) -> tuple[int, int]:
    """How many BatchNorms there are, as modules or as calls, and how many modules that hold tensors."""
    inner = list(module.modules())
    graphs = [m for m in inner if isinstance(m, fx.GraphModule)]
    calls = [operation(n, g) for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    norms = sum(call is not None and call.op == "batch_norm" for call in calls)
    norms += sum(isinstance(m, NORM) for m in inner)
    return norms, sum(bool(m._parameters or m._buffers) for m in inner)


def counts_of(modules: list[nn.Module]) -> Counts:
    return Counts(
        len(modules),
        sum(isinstance(m, LINEAR) for m in modules),
        sum(isinstance(m, NORM) for m in modules),
        sum(p.numel() for m in modules for p in m.parameters()),
    )


def _smallest(call: Call) -> int:
    """The smallest size of any tensor in ``call``; torch.export takes a size of one for a fixed one."""
    return min((n for t in pytree.tree_leaves(call) if isinstance(t, Tensor) for n in t.shape), default=0)


def _below(path: str, other: str) -> str:
    """``other`` as seen from ``path``; empty where it is not inside it."""
    if not path:
        return other
    return other[len(path) + 1 :] if other.startswith(f"{path}.") else ""


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def remembered(module: nn.Module, path: str = "") -> None:
    """Count the tensors of ``module`` as those of the model at ``path``, if it is recorded what becomes of them."""
    if (on := tape()) is not None:
        for name, t in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            on.source(t, _joined(path, name), isinstance(t, nn.Parameter))
