"""Tracing: a torch module as a graph, by torch.fx or by torch.export, with its own names and its writes in place."""

from __future__ import annotations

import builtins
import dataclasses
import dis
import functools
import inspect
import keyword
import operator
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, cast
from unittest import mock

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _maybe_revert_all_patches
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.fx.proxy import Attribute
from torch.utils import _pytree as pytree

from reparamc.certificate.fx_shapes import as_written, run_recorded
from reparamc.errors import InputError, one_line
from reparamc.fx.calls import by_position, lookup, over
from reparamc.fx.casts import DTypes, drop_casts
from reparamc.fx.constants import BITS, CONSTANT, MOST_NUMBERS, anew, own_constants
from reparamc.fx.copying import named_tensors, submodules
from reparamc.fx.dry_run import DryRun
from reparamc.fx.functions import Functions
from reparamc.fx.handed import SHAPES, describe_handed
from reparamc.fx.memory import reads_size_only
from reparamc.fx.operators import IN_PLACE
from reparamc.fx.questions import Questions, asking, is_of_torch, may_tell, step_of
from reparamc.fx.recompose import recompose
from reparamc.fx.watch import LOCK, Call


class _Unknown(fx.Proxy):
    """A proxy that refuses to tell what is not known before a run: a number, a text, whether it is in a dict."""

    def _refuse(self, what: str) -> Any:
        raise cast(_Tracer, self.tracer).questions.refusal(
            f"it asks a value for {what}, which is not known before it runs"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if not is_of_torch(sys._getframe(1)):
            self._refuse(f"another {name!r}")
        object.__setattr__(self, name, value)

    def __int__(self) -> int:
        return self._refuse("a number")

    def __float__(self) -> float:
        return self._refuse("a number")

    def __complex__(self) -> complex:
        return self._refuse("a number")

    def __index__(self) -> int:
        cast(_Tracer, self.tracer).questions.probed(sys._getframe(1))
        return self._refuse("a number")

    @classmethod
    def __torch_function__(cls, *given: Any, **named: Any) -> Any:
        result = super().__torch_function__(*given, **named)
        if isinstance(result, fx.Proxy):
            cast(_Tracer, result.tracer).questions.took(sys._getframe(1))
        return result

    def __hash__(self) -> int:
        return object.__hash__(self) if is_of_torch(sys._getframe(1)) else self._refuse("a key")

    def __str__(self) -> str:
        return self._text(sys._getframe(1))

    def __format__(self, spec: str) -> str:
        return self._text(sys._getframe(1))

    def _text(self, asking: types.FrameType) -> str:
        return repr(self) if may_tell(asking) else self._refuse("a text")


_MAY_LACK = ("grad", "grad_fn", "_base", "names")
"""Attributes that a tensor may have no value for, which is not known before a run."""


class _Attribute(_Unknown, Attribute):
    """An attribute of a value: its shape, its device, or a method."""

    def __len__(self) -> int:
        return cast(_Tracer, self.tracer).length(self)


class _Proxy(_Unknown):
    """A proxy that records ``a += b`` and ``a[i] = b`` as what they are; torch.fx would read ``a + b``, or fail.

    ``a.shape`` is read where it is written: torch.fx would read it where it is used, which may be after a write.
    That of a parameter is a number, so that nobody has to keep the parameter for it.
    ``a.requires_grad`` is true if the graph is compared with runs, in which it is false: what depends on it is found.
    """

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `_is_instance` has it, for patterns of ``match``, and where it is read."""
        caller = sys._getframe(1)
        is_read = step_of(caller) in ("MATCH_CLASS", "LOAD_ATTR", "LOAD_METHOD") and not is_of_torch(caller)
        return cast(_Tracer, self.tracer).kind(self) if is_read else type(self)

    def __getattr__(self, name: str) -> Any:
        caller = sys._getframe(1)
        if not is_of_torch(caller):
            cast(_Tracer, self.tracer).questions.meet(caller)
            if name in _MAY_LACK or (
                step_of(caller).startswith(("CALL", "PRECALL")) and not hasattr(torch.Tensor, name)
            ):
                self._refuse(f"its {name!r}")
        if name == "requires_grad" and self.node.op != "get_attr" and cast(_Tracer, self.tracer).is_compared:
            return True
        if name == "dtype":
            return _DType(self, name)
        if name in SHAPES and (held := cast(_Tracer, self.tracer).held.get(self.node)) is not None:
            return getattr(held, name)
        found = _Attribute(self, name)
        if name == "shape":
            _ = found.node
        return found

    def __getitem__(self, index: Any) -> Any:
        """A slice of a list is a list of its own: what is written into it is not written into the other."""
        tracer = cast(_Tracer, self.tracer)
        kind = type(tracer.container(self.node)) if type(index) is slice else None
        if kind not in (list, tuple):
            return cast(Any, super()).__getitem__(index)
        return kind(self[i] for i in range(*index.indices(tracer.length(self))))

    def __len__(self) -> int:
        return cast(_Tracer, self.tracer).length(self)


class _DType(_Attribute):
    """The dtype of a value, which can be compared with that of another one where weights tell both."""

    def __eq__(self, other: object) -> Any:
        known = cast(_Tracer, self.tracer).dtypes
        with _maybe_revert_all_patches():  # modules give their own parameters here
            dtypes = [known.of(one.root.node) for one in (self, other) if isinstance(one, _DType)]
        return dtypes[0] == dtypes[1] if len(dtypes) == 2 and None not in dtypes else super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        return not self == other

    __hash__ = _Unknown.__hash__


_isinstance = isinstance


def _is_instance(value: Any, kind: Any) -> bool:
    """As `isinstance`. To models, though not to torch, a proxy is what it is in the example, a number, or a Tensor.

    A proxy cannot say so by its ``__class__`` in calls: torch would read memory of it that only a tensor has.
    """
    if _isinstance(value, kind):
        return True
    asking = sys._getframe(1)
    if asking.f_code is torch.is_tensor.__code__ and asking.f_back is not None:
        asking = asking.f_back
    if not _isinstance(value, _Unknown) or is_of_torch(asking):
        return False
    return issubclass(cast(_Tracer, value.tracer).kind(value), kind)


@contextmanager
def _told_types() -> Iterator[None]:
    """Let models ask `_is_instance`, and what asks most in torch the function itself, which is quicker."""
    for home in _ASKING:
        home["isinstance"] = _isinstance
    try:
        with mock.patch.object(builtins, "isinstance", _is_instance):
            yield
    finally:
        for home in _ASKING:
            home.pop("isinstance", None)


_ASKING = [globals(), vars(pytree), vars(nn.parameter)]
_ASKING += [vars(sys.modules[f"torch.fx.{name}"]) for name in ("graph", "proxy", "_symbolic_trace")]


def _recorder(function: Any, of_numbers: Any) -> Any:
    def record(self: _Proxy, *given: Any) -> fx.Proxy:
        is_number = of_numbers is not None and cast(_Tracer, self.tracer).is_number(self.node)
        chosen: Any = of_numbers if is_number else function
        return self.tracer.create_proxy("call_function", chosen, (self, *given), {})

    return record


for _name, _function in IN_PLACE.items():
    setattr(_Proxy, _name, _recorder(_function, getattr(operator, f"__{_name[3:]}", None)))


class _Tracer(fx.Tracer):
    """Steps into everything but torch's own modules and those whose hooks tracing would drop.

    Args:
        opaque: submodules that are called as they are, by path, with the reasons; others that cannot be followed join.
        examples: arguments of the outermost forward; those that are lists, tuples and dicts keep their lengths.
        is_compared: whether the graph is compared with runs of the module.
        is_mended: whether tracing succeeds once it starts anew, by an error that was raised.
        answer: what a forward is told that asks a size one question; None where it may ask none.

    Attributes:
        asked: what the innermost forward has asked.
        questions: what forwards ask beside.
    """

    def __init__(
        self,
        opaque: dict[str, str],
        examples: Mapping[str, Any],
        is_compared: bool,
        is_mended: Callable[[BaseException], bool],
        answer: bool | None,
    ) -> None:
        super().__init__()
        self.answer, self.asked, self._again = answer, "", bool(answer)
        self.questions = Questions(self)
        self.opaque, self._is_mended = opaque, is_mended
        self.thread = threading.get_ident()
        self.is_compared = is_compared
        self.examples = examples
        self._containers: dict[fx.Node, Any] = {}
        self._numbers: dict[fx.Node, bool] = {}
        self._parameters: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}
        self.held: dict[fx.Node, nn.Parameter] = {}
        self._bits: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._like = torch.empty(0, dtype=torch.int8)
        self._asserted: dict[fx.Node, fx.Node] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        for named in (submodules(root), named_tensors(root, "_buffers"), named_tensors(root, "_parameters")):
            self._names |= {id(value): name for name, value in named.items()}
            self.questions.follows |= {id(t): t for t in named.values() if isinstance(t, torch.Tensor)}
        found = super().trace(root, concrete_args)
        self.questions.settle()
        return found

    def told(self, value: torch.Tensor, name: str, *given: Any) -> Any:
        """What is read of a parameter or buffer, as a value: a copy may be moved, or converted to another dtype."""
        if (path := self._name(value)) is None:
            return NotImplemented
        found = getattr(self.create_proxy("get_attr", path, (), {}), name)
        return found(*given) if callable(getattr(torch.Tensor, name)) else found

    def _name(self, value: Any) -> str | None:
        """The name of a parameter, buffer or submodule; torch.fx walks the whole model for each."""
        name = self._names.get(id(value))
        if not name:
            return None
        *path, last = name.split(".")
        module = self.root
        for part in path:
            module = cast(nn.Module, module._modules.get(part))
            if module is None:
                return None
        found = (held.get(last) for held in (module._parameters, module._buffers, module._modules))
        return name if any(one is value for one in found) else None

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if kind is _Proxy:  # this and the next are most
            return a.node
        if kind is tuple:
            return tuple(map(self.create_arg, a))
        is_own = isinstance(a, dict | list) and kind not in _PLAIN
        if is_own and (kind is OrderedDict or not self.is_compared):
            return self._container(a)
        named = isinstance(a, (torch.Tensor, nn.Module)) and self._name(a)  # quicker than by a union
        if named:
            return self.create_node("get_attr", named, (), {})
        return self._constant(cast(torch.Tensor, a)) if kind is torch.Tensor else super().create_arg(a)

    def _constant(self, a: torch.Tensor) -> Any:
        """A constant, in its own dtype wherever a copy is converted to another one.

        The graph makes it of numbers, as forward does, or of the bits of a large one, which exporters do not take.
        """
        if id(a) in self.questions.follows or not (a.is_floating_point() or a.is_complex()):
            return super().create_arg(a)
        if a.numel() <= MOST_NUMBERS and a.layout == torch.strided and (a.isfinite().all() or not a.is_complex()):
            return self.create_node(*anew(cast(fx.Node, super().create_arg(self._like)), a))
        if a.itemsize not in BITS:
            raise self.questions.refusal(f"it makes a large tensor of {a.dtype}")
        if id(a) not in self._bits:
            self._bits[id(a)] = a, a.detach().view(BITS[a.itemsize])
        held = super().create_arg(self._bits[id(a)][1])
        return self.create_node("call_method", "view", (held, a.dtype), {})

    def _container(self, a: Any) -> fx.Node:
        """A call that makes a dict or list of a class of its own; torch.fx would make a plain one."""
        kind = type(a)
        if dataclasses.is_dataclass(a):
            given, fields = (), {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a)}
        elif kind is OrderedDict:
            given, fields = ([(name, self.create_arg(value)) for name, value in a.items()],), {}
        else:
            raise self.questions.refusal(f"it makes a {kind.__name__}, which no graph holds")
        node = self.create_node("call_function", kind, given, fields)
        node.meta["is_wrapped"] = True  # a graph is traced again when it is loaded from a file: as a call there, too
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind.startswith("call"):
            self.questions.meet(sys._getframe(1))
        node = super().create_node(kind, *args, **kwargs)
        if isinstance(given := self._example(node), list | tuple | dict):
            self._containers[node] = given
        return node

    def _example(self, node: Any) -> Any:
        """What ``node`` is in the example, if it is an argument, or a part of one, or a size of that."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            return self.examples.get(str(node.target).lstrip("*"))
        if node.target == "size" or node.args[1:] == ("shape",):
            given = self._example(node.args[0])
            if not isinstance(given, torch.Tensor) or node.kwargs:
                return None
            axis = node.args[1] if node.target == "size" and len(node.args) > 1 else None
            return given.shape if axis is None else given.shape[axis] if isinstance(axis, int) else None
        if node.target is operator.getitem and node.args[0] in self._containers:
            try:
                return self._containers[cast(fx.Node, node.args[0])][node.args[1]]
            except (LookupError, TypeError):
                return None
        return None

    def container(self, node: fx.Node) -> Any:
        """The list, tuple or dict that ``node`` is in the example; None where it is none."""
        return self._containers.get(node)

    def is_number(self, node: fx.Node) -> bool:
        """Whether ``node`` is a size or a number, or computed from those, which nothing writes into."""
        if node not in self._numbers:
            self._numbers[node] = self._is_number(node)
        return self._numbers[node]

    def _is_number(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return isinstance(self._example(node), int | float | complex | tuple)
        if reads_size_only(node) or (node.op == "call_method" and node.target == "item"):
            return True
        given = node.all_input_nodes
        plain = getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
        return node.op == "call_function" and plain and bool(given) and all(map(self.is_number, given))

    @functools.cached_property
    def _dry_run(self) -> DryRun:
        return DryRun(self.root, self.examples)

    @functools.cached_property
    def dtypes(self) -> DTypes:
        return DTypes(self.graph, self.root)

    def kind(self, value: Any) -> type:
        """The type of a value, a Tensor where nothing tells of another one; it is refused for some numbers."""
        if not isinstance(value, fx.Proxy):
            return type(value)
        try:
            if isinstance(value, Attribute):
                return type(getattr(self._sample(value.root.node), value.attr))
            return type(self._sample(value.node))
        except Exception as error:
            raise self.questions.refusal(
                "it asks of what type a value is, which is not known before it runs"
            ) from error

    def _sample(self, node: Any, rank: int | None = None) -> Any:
        """Something of the type of ``node``, as in the example; or where all values have ``rank`` axes."""
        if not isinstance(node, fx.Node):
            return node
        if rank is None and (given := self._example(node)) is not None:
            return given
        if not self.is_number(node):
            return torch.empty((1,) * (rank or 8), device="meta")
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._sample(n, rank))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Any, node.target)(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Whether a size is zero, as in the example, and it must be so in every later call."""
        node = obj.node
        size = self._example(node.args[0]) if node.target is operator.eq and node.args[1] == 0 else None
        if isinstance(size, int):
            same = obj if size == 0 else self.create_proxy("call_function", operator.not_, (obj,), {})
            message = f"a size must be {'zero' if size == 0 else 'more than zero'}, as the example had it"
            self.create_proxy("call_function", torch._assert, (same, message), {})
            return size == 0
        reason = "it branches on a value, which is not known before it runs"
        if not self.is_number(node):
            raise self.questions.refusal(reason)
        return self.chosen(f"{node} {len(self.graph.nodes)}", reason)

    def chosen(self, question: str, reason: str) -> bool:
        """An answer to one question, which may be asked again."""
        if self.asked == question and self.answer is not None:
            return self.answer
        if self.answer is None or self.asked or _writes(asking().f_code):
            raise self.questions.refusal(reason)
        self.asked = question
        return self.answer

    def made(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As ``torch.zeros(h, w)``, by a method of what tells a size: files follow no function that takes sizes."""
        named = {key: value for key, value in kwargs.items() if value is not None}
        given = [named.pop("size"), *args] if "size" in named else list(args)
        fill = [named.pop("fill_value") if "fill_value" in named else given.pop()] if name == "full" else []
        is_whole = len(given) == 1 and not issubclass(self.kind(given[0]), int)
        sizes = given[0] if is_whole else given
        like = next((n.node for n in pytree.tree_leaves(sizes) if isinstance(n, fx.Proxy)), None)
        while like is not None and like.op != "placeholder" and (self.is_number(like) or like.all_input_nodes):
            if not self.is_number(like) and like.target is operator.getitem:
                break
            like = like.all_input_nodes[0]
        kind = {int: torch.int64, bool: torch.bool, float: torch.get_default_dtype()}.get(type((fill or [1.0])[0]))
        if like is None or kind is None or self.is_number(like) or not named.keys() <= {"dtype", "device"}:
            raise self.questions.refusal(f"it gives torch.{name} what is not known before it runs")
        given = {"dtype": kind, "device": torch.get_default_device()} | named
        return self.create_proxy("call_method", f"new_{name}", (fx.Proxy(like, self), sizes, *fill), given)

    def _settled(self, module: nn.Module, run: Callable[[], Any], may_ask: bool) -> Any:
        """What ``run`` of ``module`` gives. A question that it asks of sizes is none if both answers give the same."""
        outer, place = (self.answer, self.asked, self._again), self._place()
        self.answer, self.asked = False if may_ask else None, ""
        try:
            try:
                result = run()
                if not self.asked or self._again or self._gives_again(module, run, place[0], result):
                    return result
            except Exception:
                if not self.asked:
                    raise
            self._back_to(*place)
            self.answer = self.questions.refused = None
            return run()
        finally:
            self.answer, self.asked, self._again = outer

    def _gives_again(self, module: nn.Module, run: Callable[[], Any], start: int, result: Any) -> bool:
        """Whether ``run`` gives ``result``, as it did from ``start`` on, for the other answer."""
        place, held = self._place(), _attributes(module)
        self.answer, self.asked, self._again = True, "", True
        try:
            other = run()
            nodes = list(self.graph.nodes)
            same = _is_same(self.root, nodes[start : place[0]], nodes[place[0] :], result, other)
            return same and held == _attributes(module)
        except Exception:  # forward may raise anything
            return False
        finally:
            self._back_to(*place)

    def _place(self) -> tuple[int, int]:
        return len(self.graph.nodes), len(self.module_stack)

    def _back_to(self, before: int, around: int) -> None:
        """Forget the nodes after the first ``before`` ones."""
        for node in list(reversed(self.graph.nodes))[: len(self.graph.nodes) - before]:
            self.graph.erase_node(node)
        for name in [name for name, proxy in self._parameters.items() if proxy.node._erased]:
            del self._parameters[name]
        while len(self.module_stack) > around:
            self.module_stack.popitem(last=True)

    def length(self, proxy: fx.Proxy, unknown: str = "the length of a value is not known") -> int:
        """The length of an argument, or of a shape, which every later call must have as well."""
        if (found := self._number_of_sizes(proxy.node)) is not None:
            return found
        given = self.container(proxy.node)
        if given is None:
            raise self.questions.refusal(unknown)
        found = len(given)
        length = self.create_proxy("call_function", len, (proxy,), {})
        message = f"an argument must have {found} elements, as the example had"
        self.create_proxy("call_function", torch._assert, (length == found, message), {})
        return found

    def _number_of_sizes(self, node: fx.Node) -> int | None:
        """How many sizes a shape or a part of it has, for values of any rank, or of that of the example."""
        if not self.is_number(node):
            return None
        try:
            found = {len(self._sample(node, rank)) for rank in range(2, 8)}
            if len(found) == 1:
                return found.pop()
            value = node
            while self.is_number(value):
                value = value.all_input_nodes[0]
            rank = self._dry_run.rank(value) if self.examples else None
            return None if rank is None else len(self._sample(node, self._with_rank(value, rank)))
        except (IndexError, TypeError, ValueError):  # it is one number, or there are no such axes
            return None

    def _with_rank(self, value: fx.Node, rank: int) -> int:
        """``rank``, which ``value`` must have in every later call as well."""
        if value not in self._asserted or self._asserted[value]._erased:
            same = self.create_proxy("call_method", "dim", (fx.Proxy(value, self),), {}) == rank
            message = f"a value must have {rank} axes, as it had in the example"
            self._asserted[value] = self.create_proxy("call_function", torch._assert, (same, message), {}).node
        return rank

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        unknown = "it iterates over a value whose length is not known before it runs"
        if isinstance(self.container(obj.node), dict):
            raise self.questions.refusal(unknown)
        return iter([cast(Any, obj)[i] for i in range(self.length(obj, unknown))])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        hooked = hooked or "forward" in vars(m)
        parametrized = "parametrizations" in m._modules and nn.utils.parametrize.is_parametrized(m)
        special = hooked or parametrized or module_qualified_name in self.opaque
        return special or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self._refuse_others(m, recurse=False)
        place = self._place()
        given = [(x, x.copy()) for x in _containers((args, *kwargs.values()))]
        try:
            with self.questions.of_another():
                return self._settled(m, functools.partial(super().call_module, m, forward, args, kwargs), not given)
        except Exception as error:
            if self._is_mended(error):
                raise _Anew from error
            if given and (_may_write(m) or any(not _is_as(x, held) for x, held in given)):
                raise  # what it writes into a list, another forward reads
            self._refuse_others(m, recurse=True)
            self._back_to(*place)
            path = self.path_of_module(m)
            self.opaque[path] = f"torch.fx cannot follow it: {_first_sentence(error)}"
            return self.create_proxy("call_module", path, args, kwargs)

    def _refuse_others(self, m: nn.Module, recurse: bool) -> None:
        """Raise an error where ``m`` was given other parameters or buffers for this call."""
        if any(id(t) not in self._names for t in (*m.parameters(recurse), *m.buffers(recurse))):
            raise self.questions.refusal("it calls a part with other parameters or buffers than its own")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        self._parameters = parameter_proxy_cache
        if isinstance(attr_val, nn.Parameter) and (name := self._name(attr_val)):
            if name not in parameter_proxy_cache:
                parameter_proxy_cache[name] = proxy = self.create_proxy("get_attr", name, (), {})
                self.held[proxy.node] = attr_val
            return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_PLAIN = (dict, list, immutable_dict, immutable_list)


def _is_same(root: nn.Module, first: Sequence[fx.Node], second: Sequence[fx.Node], *results: Any) -> bool:
    """Whether two lists of nodes do the same, and give the same of two ``results``."""
    read = {n.target: n for n in first if n.op == "get_attr"}
    same = {n: read.get(n.target, n) for n in second if n.op == "get_attr"}
    constants = [[n for n in of if str(n.target).startswith(CONSTANT)] for of in (read.values(), same)]
    for a, b in zip(*constants, strict=True):
        one, other = getattr(root, str(a.target)), getattr(root, str(b.target))
        if one.dtype != other.dtype or not torch.equal(one, other):
            return False
        same[b] = a
    calls = [[n for n in nodes if n.op != "get_attr"] for nodes in (first, second)]
    for a, b in zip_longest(*calls):
        given = None if b is None else map_arg((b.args, b.kwargs), lambda n: same.get(n, n))
        if a is None or b is None or (a.op, a.target) != (b.op, b.target) or given != (a.args, a.kwargs):
            return False
        if repr(given) != repr((a.args, a.kwargs)):  # 1 and 1.0 are equal, and are other numbers
            return False
        same[b] = a
    leaves, specs = zip(*map(pytree.tree_flatten, results), strict=True) if results else ([[], []], [None, None])
    return specs[0] == specs[1] and all(
        same.get(b.node, b.node) is a.node if isinstance(a, fx.Proxy) and isinstance(b, fx.Proxy) else a is b
        for a, b in zip(*leaves, strict=True)
    )


def _containers(given: Any) -> list[Any]:
    """The lists and dicts in ``given``, at any depth."""
    if type(given) is _Proxy:  # most are
        return []
    found = [given] if isinstance(given, list | dict) else []
    inner = given.values() if isinstance(given, dict) else given if isinstance(given, list | tuple) else ()
    return found + [x for one in inner for x in _containers(one)]


def _is_as(now: Any, before: Any) -> bool:
    """Whether a list or dict holds the very things that it held before."""
    a, b = ([*x.keys(), *x.values()] if isinstance(x, dict) else x for x in (now, before))
    return len(a) == len(b) and all(map(operator.is_, a, b))


_WRITES = {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_ATTR", "DELETE_SUBSCR"}
_WRITING = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "put", "remove", "setattr", "setdefault",
    "update", "write",
}  # fmt: skip


def _may_write(module: nn.Module) -> bool:
    """Whether a method of ``module``, or of what is in it, may write into something."""
    kinds = {kind for m in module.modules() for kind in type(m).__mro__ if kind.__module__.partition(".")[0] != "torch"}
    codes = (getattr(f, "__code__", None) for kind in kinds for name, f in vars(kind).items() if name != "__init__")
    return any(_writes(code) for code in codes if code is not None)


def _writes(code: types.CodeType) -> bool:
    """Whether a function may write into something: a second run would find what the first one left."""
    return not _WRITING.isdisjoint(code.co_names) or any(i.opname in _WRITES for i in dis.get_instructions(code))


class Traced(fx.GraphModule):
    """A graph that is run node by node: to write it as Python and compile that takes as long as some runs."""

    def recompile(self) -> Any:
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (given := by_position(self, args, kwargs)) is not None:
            return run_recorded(self, given)[0]
        super().recompile()  # which replaces this method
        return self(*args, **kwargs)

    def literal(self) -> Any:
        """What it returns, as far as that is written out; nodes stand for the rest."""
        (output,) = self.graph.find_nodes(op="output")
        return as_written(self.graph.process_outputs(output.args[0]))


def trace(model: nn.Module) -> fx.GraphModule:
    """``model`` as a graph; submodules that torch.fx cannot follow are called as they are. Its own hooks are left out.

    Raises:
        InputError: the outermost forward cannot be followed.
    """
    return traced(model)[0]


def traced(
    model: nn.Module, call: Call | None = None, opaque: Mapping[str, str] = types.MappingProxyType({})
) -> tuple[Traced, dict[str, str]]:
    """``model`` as a graph over its own submodules, and those that are called as they are, each with the reason.

    Functions that torch.fx cannot follow are called as they are, too, where they can be found by their names.

    Args:
        model: a module; its own hooks are left out.
        call: arguments that forward takes; without them, arguments are taken for their defaults.
        opaque: paths of submodules that are to be called as they are, with the reasons.

    Raises:
        InputError: the outermost forward cannot be followed.
    """
    if "forward" in vars(model):
        raise InputError(f"the forward of this {type(model).__name__} was replaced on the instance")
    examples = {} if call is None else inspect.signature(model.forward).bind(*call[0], **call[1]).arguments
    fixed, functions = fixed_arguments(model, call), Functions()
    while True:
        try:
            tracer, graph = _traced_for(
                model,
                fixed,
                lambda answer: _Tracer(dict(opaque), examples, call is not None, functions.found, answer),
                functions,
                not _containers((*examples.values(), *fixed.values())),
            )
            _plain_assertions(graph)
            _plain_writes(graph)
            _restore_names(graph, model)
            _refuse_reserved(graph, model)
            own_constants(graph, tracer.root)
            graph._tracer_cls = None  # or else a file with the module in it could be read by reparamc only
            called = _called_as_they_are(graph, model)
            drop_unread(graph)
            made = over(Traced, tracer.root, graph, type(model).__name__)
            describe_handed(made)
            recompose(made)
            drop_casts(made)
            return made, called | tracer.opaque
        except Reserved:
            raise
        except _Anew:
            continue
        except Exception as error:  # a model's forward may raise anything when it meets a proxy
            if functions.found(error):
                continue
            way_out = "; with example_inputs its parts are fused, or export it to ONNX and use fuse_onnx"
            raise InputError(
                f"torch.fx cannot trace {type(model).__name__}: {_first_sentence(error)}"
                f"{way_out if call is None else ''}"
            ) from error


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith(CONSTANT)}


def _traced_for(
    model: nn.Module,
    fixed: dict[str, Any],
    make: Callable[[bool | None], _Tracer],
    functions: Functions,
    is_plain: bool,
) -> tuple[_Tracer, fx.Graph]:
    """``model`` traced. A question that its forward asks of sizes is none if both answers give the same."""

    def traced_with(answer: bool | None) -> tuple[_Tracer, fx.Graph]:
        tracers.append(make(answer))
        with LOCK, torch.random.fork_rng(devices=[]):
            for generator in (torch.default_generator, *torch.cuda.default_generators):
                generator.manual_seed(2)  # not that of any run: what is drawn while tracing would be a constant
            with functions.wrapped(tracers[-1]), _lenient_checks(), tracers[-1].questions.asked(), _told_types():
                return tracers[-1], tracers[-1].trace(model, fixed or None)

    tracers: list[_Tracer] = []
    held = _attributes(model)
    try:
        found = traced_with(False if is_plain else None)
        if not tracers[0].asked:
            return found
        graphs = [list(graph.nodes) for _, graph in (found, traced_with(True))]
        if _is_same(model, *graphs) and held == _attributes(model):
            return found
    except Exception:
        if not tracers[0].asked:
            raise
    return traced_with(None)


def _first_sentence(error: BaseException) -> str:
    """What torch says; the paragraphs of advice that may follow are about tracing."""
    return one_line(error).partition(". ")[0][:120]


class _Anew(BaseException):
    """Tracing succeeds once it starts anew; no forward catches this."""


def _called_as_they_are(graph: fx.Graph, model: nn.Module) -> dict[str, str]:
    """Modules with parts that the graph calls: those whose hooks, or replaced forward, are to stay in force."""
    called = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="call_module"))
    return {
        path: "it has hooks, or computes its weights" for path in called if any(lookup(model, path)._modules.values())
    }


def _lenient_checks() -> ExitStack:
    """Let classes derived from BatchNorm call its forward, which asks for the rank of its input."""
    patches = ExitStack()
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        for name in vars(kind).keys() & {"_check_input_dim", "_check_non_zero_input_channels"}:
            patches.enter_context(mock.patch.object(kind, name, _lenient(vars(kind)[name])))
    return patches


def _lenient(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    return lambda module, x: None if isinstance(x, fx.Proxy) else check(module, x)


class Reserved(InputError):
    """A part of the model has a name that no part of a GraphModule can have."""


_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


def _refuse_reserved(graph: fx.Graph, model: nn.Module) -> None:
    """Raise InputError where a part that the graph reads takes the name of what every GraphModule has, or of a keyword.

    A GraphModule holds its own graph as an attribute, and reads its parts by code that is written out.
    """
    for node in graph.nodes:
        names = str(node.target).split(".") if node.op in ("call_module", "get_attr") else [""]
        if names[0] in _RESERVED:
            raise Reserved(
                f"{type(model).__name__} has a part called {names[0]!r}, which is the name of an attribute that every "
                "torch.fx.GraphModule has; rename it, or fuse a module that holds the model, such as "
                "torch.nn.Sequential(model)"
            )
        if any(map(keyword.iskeyword, names)):
            raise Reserved(
                f"{type(model).__name__} has a part called {node.target!r}, and a keyword of Python is no name that "
                "torch.fx can write; rename it"
            )


def drop_unread(graph: fx.Graph) -> None:
    """Erase what reads a tensor or module that nothing uses: it would be kept for it."""
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)


def _plain_assertions(graph: fx.Graph) -> None:
    """Say "this argument is None" with torch._assert: the function torch.fx uses for it breaks every later trace."""
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "_assert_is_none":
            with graph.inserting_before(node):
                is_none = graph.call_function(operator.eq, (node.args[0], None))
                graph.call_function(torch._assert, (is_none, str(node.args[1])))
            graph.erase_node(node)


def _plain_writes(graph: fx.Graph) -> None:
    """Say ``a.__iadd__(b)``, as a graph has it that was read from a file, as ``a += b``."""
    for node in graph.find_nodes(op="call_method"):
        if str(node.target) in IN_PLACE:
            node.op, node.target = "call_function", IN_PLACE[str(node.target)]


def _restore_names(graph: fx.Graph, model: nn.Module) -> None:
    """Give arguments back the names by which callers know them: torch.fx numbers those that it fixes.

    Keyword-only arguments become ordinary ones; None marks those that must be given.
    """
    parameters = inspect.signature(model.forward).parameters
    names = [name for name, p in parameters.items() if p.kind not in _VARIADIC]
    required = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    for node in graph.find_nodes(op="placeholder"):
        original = str(node.target).removesuffix("_1")
        if original != node.target and original in names and node.target not in names:
            node.target = original
        if node.target in required:
            node.args = (None,)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def fixed_arguments(model: nn.Module, call: Call | None = None) -> dict[str, Any]:
    """Arguments of forward that tracing fixes: None, numbers and strings steer control flow.

    Without a ``call``, to their defaults. With one, to what it gives for arguments that have such a default, or that
    are None, a truth value or a string.
    """
    parameters = inspect.signature(model.forward).parameters
    if call is None:
        return {name: p.default for name, p in parameters.items() if _steers(p.default)}
    bound = inspect.signature(model.forward).bind(*call[0], **call[1])
    bound.apply_defaults()
    return {
        name: value
        for name, p in parameters.items()
        if p.kind not in _VARIADIC
        and _steers(value := bound.arguments[name])
        and (_steers(p.default) or not isinstance(value, int | float) or isinstance(value, bool))
    }


def _steers(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
