"""What a forward asks while a graph is made of it, and what later runs may answer otherwise: no graph is made then.

A graph would hold the answer of now: the dtype or the device of a weight, whether gradients are enabled, of what type
a value is, whether two values are one object, whether an operator raises an error.
"""

from __future__ import annotations

import ast
import dis
import inspect
import operator
import os
import random
import re
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_TELLING = {"_assert", "debug", "info", "log", "print", "warn", "warning", "warn_once", "warning_once"}
"""What functions call that write a value into a text for someone to read."""
_OF_TENSORS = {
    "dtype", "device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "requires_grad", "grad", "grad_fn",
    "is_leaf", "itemsize", "nbytes", "element_size", "get_device", "type", "is_inference", "is_contiguous", "stride",
    "data_ptr",
}  # fmt: skip
_HOMES = (
    "torch", "torch._C", "torch.jit", "torch.compiler", "torch._dynamo", "torch.onnx", "torch.cuda",
    "torch.backends.cuda", "torch.backends.mha", "torch.distributed", "torch.fx._symbolic_trace",
)  # fmt: skip
_MODE = re.compile(
    r"(?!_is_torch_function)_?(is|are)_\w*(enabled|only|tracing|compiling|exporting|onnx_export|capturing|initialized)"
    r"|_?get_\w*(enabled|autocast\w*|default_dtype|default_device|precision|num_\w*threads|tf32|tracing_state|debug_mode)"
    r"|get_rank|get_world_size|\w+_sdp_enabled"
)
"""Functions that each run may answer otherwise, in the modules ``_HOMES``; what is True or False is asked by name."""
_DRAWING = re.compile(
    r"rand|normal|uniform|bernoulli|multinomial|poisson|exponential|geometric|cauchy|drop|rrelu|gumbel|seed"
)
"""Names of functions of torch that draw random numbers, or may."""
_SIZED = ("zeros", "ones", "full", "empty")
"""Functions of torch that take sizes, and refuse those of a graph."""
_CASTS = ("float", "double", "half", "bfloat16")
_SETTINGS = {
    "torch": ("set_autocast_enabled",),
    "torch._C": ("_set_grad_enabled", "_InferenceMode"),
}
"""What a forward calls, by way of `torch.autocast` and `torch.no_grad`, to set a mode around a part of it."""
_NUMBERS = (
    (torch.SymBool, "__bool__"), (torch.SymInt, "__bool__"), (torch.SymInt, "__int__"), (torch.SymInt, "__index__"),
    (torch.SymFloat, "__bool__"), (torch.SymFloat, "__int__"),
)  # fmt: skip
"""How Python asks what sizes are."""
_STARTS = {
    ("torch.fx._symbolic_trace", "forward"),
    ("torch.fx._symbolic_trace", "trace"),
    ("reparamc.fx.export", "exported"),
}
_OF_OBJECTS = {"type", "callable", "id", "vars", "dir"}


class Answering(Protocol):
    """What makes a graph of a forward, and answers what that asks."""

    def told(self, value: Tensor, name: str, *given: Any) -> Any:
        """What it is told that asks a tensor for an attribute, or calls such a method; NotImplemented: what is so."""

    def chosen(self, question: str, reason: str) -> bool:
        """What it is told that asks for a mode; an error with ``reason`` where it may not ask."""
        ...

    def made(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of sizes that the graph computes."""


class Questions(TorchFunctionMode):
    """What the innermost forward that is followed asks, in this thread.

    Args:
        answering: what makes the graph; None for torch.export. That holds where autocast is turned on or off, but takes
            for granted what Python branches on, and that no size is 1.

    Attributes:
        refused: why it was refused what it asked for; it may catch the error and go on without.
        follows: tensors computed from parameters and buffers alone, by id: converted with those, they would be as well.
    """

    def __init__(self, answering: Answering | None = None) -> None:
        super().__init__()
        self._answering, self._exporting = answering, answering is None
        self.refused: TraceError | None = None
        self.follows: dict[int, Tensor] = {}
        self._thread = threading.get_ident()
        self._probe: tuple[FrameType, int, TraceError | None] | None = None
        self._frames: dict[FrameType, None] = {}
        self._looked: dict[CodeType, str | None] = {}
        self._modes = _modes(tuple(home for home in _HOMES if home in sys.modules))
        self._drew = False
        self._set: dict[tuple[int, str], tuple[nn.Module, Any]] = {}

    def refusal(self, reason: str) -> TraceError:
        """An error for what a forward asks; it is remembered."""
        self.refused = TraceError(reason)
        return self.refused

    def _told(self, value: Tensor, name: str, *given: Any) -> Any:
        if self._answering is not None:
            return self._answering.told(value, name, *given)
        raise self.refusal(f"it asks a tensor for its {name}, which may be another one later")

    def probed(self, frame: FrameType) -> None:
        """A number is asked for, and will be refused: by a function of torch too, to see what it is given."""
        self._probe = frame, frame.f_lasti, self.refused

    def took(self, frame: FrameType) -> None:
        """A function of torch was recorded: what the same call was refused before that, it goes without."""
        if self._probe is not None and self._probe[:2] == (frame, frame.f_lasti):
            self.refused = self._probe[2]
        self._probe = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
            frame = frame.f_back
        self.took(frame)
        if self._exporting or not is_of_torch(frame):
            self.meet(frame)
        name = getattr(func, "__name__", "")
        self._drew = self._drew or _draws(name)
        if not is_of_torch(frame):
            name = func.__self__.__name__ if name == "__get__" else name
            of_tensor = bool(args) and isinstance(args[0], Tensor)
            is_asked = of_tensor and name in _OF_TENSORS and not (name == "type" and args[1:])
            answer = self._told(args[0], name, *args[1:]) if is_asked else NotImplemented
            if answer is not NotImplemented:
                return answer
        result = func(*args, **(kwargs or {}))
        if type(result) is not Tensor or self._exporting:
            return result
        return self._noted(result, getattr(func, "__name__", "") in _CASTS, (args, kwargs or {}))

    def _noted(self, result: Tensor, is_cast: bool, given: Any) -> Tensor:
        """``result``, a tensor of its own unless it follows the dtype of parameters and buffers."""
        leaves = pytree.tree_leaves(given)
        held = [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.ndim]
        if is_cast or any(isinstance(v, torch.dtype) for v in leaves):
            return result.clone() if id(result) in self.follows else result
        if held and all(id(v) in self.follows for v in held):
            self.follows[id(result)] = result
        return result

    def meet(self, frame: FrameType | None) -> None:
        """``frame`` computes something, and so do those around it, up to where a forward begins that is followed."""
        while frame is not None and ((home := _home(frame)), frame.f_code.co_name) not in _STARTS:
            if not _is_home_of_torch(home):
                if (mode := self._mode_held_in(frame)) is not None:
                    raise self.refusal(f"it holds {mode} aside, which may answer otherwise later")
                if any(frame.f_lineno in lines for lines in _caught(frame.f_code)):
                    raise self.refusal("it catches errors of operators, and whether there are some is not known")
                if _asked_in(frame):
                    self._frames[frame] = None
            frame = frame.f_back

    def _mode_held_in(self, frame: FrameType) -> str | None:
        """The mode that a function may ask for by a variable, a default or an attribute: `_functions` are not asked."""
        code = frame.f_code
        if code not in self._looked or code.co_freevars:
            held = frame.f_locals
            owner = held.get(next(iter(code.co_varnames), ""))
            read = (
                [inspect.getattr_static(owner, n, None) for n in code.co_names] if isinstance(owner, nn.Module) else []
            )
            self._looked[code] = self._mode_among([*held.values(), *read], 2)
        return self._looked[code]

    def _mode_among(self, values: Sequence[object], depth: int) -> str | None:
        """The name of the first mode among ``values``, or ``depth`` steps inside them."""
        found = next((self._modes[id(v)][1] for v in values if id(v) in self._modes), None)
        if found is not None or not depth:
            return found
        return self._mode_among([inner for v in values for inner in _held_by(v)], depth - 1)

    @contextmanager
    def of_another(self) -> Iterator[None]:
        """While this forward calls another one: what that asks is settled by itself."""
        outer = self.refused, self._frames
        self.refused, self._frames = None, {}
        try:
            yield
            self.settle()
        finally:
            self.refused, self._frames = outer

    def settle(self) -> None:
        """Raise the error where something was refused, or where a function asked what a value alone cannot refuse."""
        for frame in self._frames:
            held = [frame.f_locals.get(n) for n in _asked_in(frame)]
            if any(_is_value(leaf) for leaf in pytree.tree_leaves(held)):
                self.refusal("it asks what object or of what type a value is, which is not known before it runs")
        self._frames.clear()
        if self.refused is not None:
            raise self.refused

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While this thread makes a graph."""
        answers = [(torch.SymInt, name, self._text) for name in ("__str__", "__format__")]
        answers += [(kind, name, self._number(kind, name)) for kind, name in (_NUMBERS if self._exporting else ())]
        settings = (torch.backends.ContextProp, "__get__"), (type(torch.backends.cuda.matmul), "__getattr__")
        answers += [(owner, name, self._setting_of_backends(getattr(owner, name))) for owner, name in settings]
        answers += [(os._Environ, "__getitem__", self._variable(os._Environ.__getitem__))]
        answers += [(torch.autograd.Function, "apply", self._gradients_of_its_own())]
        answers += [(nn.Module, "__setattr__", self._setting_of_a_part())]
        kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in answers]
        drawn, alone = (random.getstate(), torch.get_rng_state()), threading.active_count() == 1
        with replaced_by_name(self._functions()), self:
            try:
                for owner, name, made in answers:
                    setattr(owner, name, made)
                yield
            finally:
                for owner, name, plain in kept:
                    setattr(owner, name, plain) if plain is not None else delattr(owner, name)
        for (_, name), (module, before) in self._set.items():
            if _is_one(vars(module).get(name), before):
                raise self.refusal(f"it sets {name!r} of a part, and sets it back")
        if not self._drew and not (alone and threading.active_count() == 1):
            return  # other threads did
        if random.getstate() != drawn[0]:
            raise self.refusal("it draws random numbers of Python, which a graph would fix")
        if not self._exporting and not torch.equal(torch.get_rng_state(), drawn[1]):
            raise self.refusal("it draws random numbers, which a graph would fix")

    def _functions(self) -> dict[Any, Any]:
        """What functions of torch are replaced by."""
        found = {plain: self._mode(plain, name) for plain, name in self._modes.values()}
        found |= {plain: self._drawing(plain) for plain in vars(random).values() if _is_drawing(plain)}
        for home, names in _SETTINGS.items():
            for name in names:
                plain = getattr(sys.modules[home], name)
                found[plain] = self._setting(plain, "autocast" if "autocast" in name else "gradients")
        return found | {getattr(torch, name): self._sized(name) for name in _SIZED}

    def _mode(self, plain: Any, name: str) -> Any:
        is_choice = re.search("is_|are_|state|enabled", name) is not None

        def answer(*given: Any) -> Any:
            if not self._is_asked_by(sys._getframe(1)):
                return plain(*given)
            reason = f"it asks {name}, which may answer otherwise later"
            if self._answering is None or not is_choice:
                raise self.refusal(reason)
            return self._answering.chosen(f"{name}{given}", reason) or (None if "state" in name else False)

        return answer

    def _drawing(self, plain: Any) -> Any:
        def drawing(*given: Any, **named: Any) -> Any:
            self._drew = self._drew or threading.get_ident() == self._thread
            return plain(*given, **named)

        return drawing

    def _setting(self, plain: Any, what: str) -> Any:
        def setting(*given: Any) -> Any:  # torch itself calls it, in `torch.autocast` and `torch.no_grad`
            caller = sys._getframe(1)
            refused = not self._exporting if what == "autocast" else _is_set_by_model(caller)
            if threading.get_ident() == self._thread and refused:
                raise self.refusal(f"it turns {what} on or off, which no graph holds")
            return plain(*given)

        return setting

    def _sized(self, name: str) -> Any:
        plain = getattr(torch, name)

        def made(*given: Any, **named: Any) -> Any:
            answering = self._answering if self._is_asked_by(sys._getframe(1)) else None
            if answering is not None and any(isinstance(v, fx.Proxy) for v in pytree.tree_leaves((given, named))):
                return answering.made(name, given, named)
            return plain(*given, **named)

        return made

    def _number(self, kind: type, name: str) -> Any:
        plain = getattr(kind, name)

        def answer(value: Any) -> Any:
            if self._is_asked_by(sys._getframe(1)) and not value.node.is_constant():
                raise self.refusal("it branches on a size, or takes it for a number, which a graph would fix")
            return plain(value)

        return answer

    def _setting_of_backends(self, plain: Any) -> Any:
        def answer(*asked: Any) -> Any:
            if self._is_asked_by(sys._getframe(1)):
                raise self.refusal("it asks for a setting of torch.backends, which may be another one later")
            return plain(*asked)

        return answer

    def _gradients_of_its_own(self) -> Any:
        plain = vars(torch.autograd.Function)["apply"].__func__

        def apply(kind: Any, *given: Any, **named: Any) -> Any:
            if self._is_asked_by(sys._getframe(1)):
                raise self.refusal(f"it calls {kind.__name__}, whose gradients no graph would keep")
            return plain(kind, *given, **named)

        return classmethod(apply)

    def _setting_of_a_part(self) -> Any:
        plain = nn.Module.__setattr__

        def setting(module: nn.Module, name: str, value: Any) -> None:
            before = vars(module).get(name, value)
            own = threading.get_ident() == self._thread and not _is_one(before, value)
            if own and not _home(sys._getframe(1)).startswith(("torch.fx.", "reparamc.")):
                self._set.setdefault((id(module), name), (module, before))
            plain(module, name, value)

        return setting

    def _variable(self, plain: Any) -> Any:
        def answer(environment: Any, name: Any) -> Any:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and _home(frame) in ("os", "_collections_abc", "collections.abc"):
                frame = frame.f_back
            if frame is not None and self._is_asked_by(frame) and not _is_imported(frame):
                raise self.refusal("it asks for an environment variable, which may be another one later")
            return plain(environment, name)

        return answer

    def _text(self, size: torch.SymInt, *_spec: str) -> str:
        if size.node.is_constant() or may_tell(sys._getframe(1)):
            return repr(size)
        raise self.refusal("it asks a size for a text, which is not known before it runs")

    def _is_asked_by(self, frame: FrameType) -> bool:
        is_models = not is_of_torch(frame) and _home(frame).partition(".")[0] not in _STANDARD
        return is_models and threading.get_ident() == self._thread


_STANDARD = sys.stdlib_module_names - {"__main__"}
_SCANNED: dict[str, ModuleType] = {}
_SEEN: list[ModuleType] = []
_PLACES: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
"""Where modules of others hold functions by name that may be replaced, and those functions."""


@contextmanager
def replaced_by_name(functions: dict[Any, Any]) -> Iterator[None]:
    """Functions are other ones wherever modules hold them by a name."""
    modules = [*sys.modules.values()]
    same = len(modules) == len(_SEEN) and all(map(operator.is_, modules, _SEEN))  # as most often
    for name, module in [("__main__", sys.modules["__main__"])] if same else list(sys.modules.items()):
        if _SCANNED.get(name) is module and name != "__main__":
            continue
        _SCANNED[name] = module
        top = name.partition(".")[0]
        if top == "reparamc" or (top in _STANDARD and top != "random"):
            continue
        if top != "torch" or name in (*_HOMES, *_SETTINGS):
            known = {id(f) for f in functions}
            held = vars(module)
            _PLACES.update({(id(held), key): (held, key, v) for key, v in list(held.items()) if id(v) in known})
    _SEEN[:] = modules
    places = [(held, key, functions[v]) for held, key, v in _PLACES.values() if held.get(key) is v and v in functions]
    with replaced_globals(places):
        yield


@contextmanager
def replaced_globals(places: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Names in modules stand for other values for a while."""
    kept = [(held, key, held[key]) for held, key, _ in places]
    try:
        for held, key, value in places:
            held[key] = value
        yield
    finally:
        for held, key, value in kept:
            held[key] = value


@cache
def _modes(homes: tuple[str, ...]) -> dict[int, tuple[Any, str]]:
    """The functions of modules that each run may answer otherwise, and their names, by identity."""
    found = dict[int, tuple[Any, str]]()
    for home in homes:
        for name, held in vars(sys.modules[home]).items():
            if type(held) in (FunctionType, BuiltinFunctionType) and _MODE.fullmatch(name):
                found.setdefault(id(held), (held, f"{home}.{name}"))
    return found


def _is_one(a: object, b: object) -> bool:
    """Whether two values are one object, or equal numbers or texts."""
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


@cache
def _draws(name: str) -> bool:
    return _DRAWING.search(name) is not None


def _is_drawing(held: object) -> bool:
    """Whether a function of `random` draws from the generator that all threads share, or sets it."""
    return isinstance(getattr(held, "__self__", None), random.Random)


def _held_by(value: object) -> Sequence[object]:
    """What a function, a method or a list has beside it."""
    match value:
        case staticmethod() | classmethod():
            return [value.__func__]
        case FunctionType():
            named = (value.__kwdefaults__ or {}).values()
            return [*_cells(value).values(), *(value.__defaults__ or ()), *named]
        case list() | tuple() if len(value) < _MOST_HELD:
            return value
        case dict() if len(value) < _MOST_HELD:
            return list(value.values())
        case _:
            return ()


_MOST_HELD = 64


def _cells(function: FunctionType) -> dict[str, Any]:
    """The values of the free variables of ``function``."""
    found = dict[str, Any]()
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it has no value yet
            found[variable] = cell.cell_contents
    return found


def _is_set_by_model(frame: FrameType | None) -> bool:
    """Whether the model sets a mode; torch does so for itself, too."""
    while frame is not None and _home(frame) in ("torch.autograd.grad_mode", "contextlib"):
        frame = frame.f_back
    if frame is not None and _home(frame) == "torch.utils._contextlib":
        home = str(getattr(frame.f_locals.get("func"), "__module__", ""))
        return home.partition(".")[0] not in ("torch", "reparamc")
    return frame is not None and not is_of_torch(frame)


def _is_imported(frame: FrameType | None) -> bool:
    """Whether a module is imported, which happens once."""
    while frame is not None and (_home(frame), frame.f_code.co_name) not in _STARTS:
        if frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


def may_tell(asking: FrameType) -> bool:
    """Whether the text that a frame asks for is for someone to read."""
    return is_of_torch(asking) or not _TELLING.isdisjoint(asking.f_code.co_names)


def asking() -> FrameType:
    """The frame of the model that asks a value."""
    frame = sys._getframe(1)
    while is_of_torch(frame) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def is_of_torch(frame: FrameType) -> bool:
    return _is_home_of_torch(_home(frame))


@cache
def _is_home_of_torch(home: str) -> bool:
    return home.startswith(("torch.", "reparamc.")) or home in ("torch", "contextlib", "functools", "inspect")


def step_of(frame: FrameType) -> str:
    """The name of the instruction that ``frame`` carries out."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]


def _home(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_value(held: object) -> bool:
    return isinstance(held, fx.Proxy | torch.SymInt | Tensor) and not isinstance(held, nn.Parameter)


_FOUND: dict[tuple[CodeType | type, ...], frozenset[str]] = {}


def _asked_in(frame: FrameType) -> frozenset[str]:
    """As `_asked`, of the function that runs in ``frame``."""
    held = frame.f_locals
    owner = held.get(next(iter(frame.f_code.co_varnames), ""))
    return _asked(frame.f_code, {n: held.get(n) for n in frame.f_code.co_freevars}, frame.f_globals, type(owner))


def _asked(code: CodeType, free: dict[str, Any], names: dict[str, Any], kind: type) -> frozenset[str]:
    """The variables in what a function asks for its type or identity: ``type(x)``, ``x is y``, also by a helper.

    ``free`` are the values of its free variables, ``names`` its globals, ``kind`` is the class of its first argument.
    """
    key = code, kind, *(f.__code__ for f in free.values() if isinstance(f, FunctionType))
    if (found := _FOUND.get(key)) is not None:
        return found
    _FOUND[key] = frozenset()  # it may call itself
    steps = list(dis.get_instructions(code))
    for at, step in enumerate(steps):
        if step.opname == "IS_OP" and not _is_none(steps[at - 1]):
            _FOUND[key] |= _variables(steps[_before(steps, at) : at])
        elif step.opname in _LOADING and _is_question(step, free, names, kind):
            _FOUND[key] |= _variables(steps[at + 1 : _end(steps, at)])
    return _FOUND[key]


_LOADING = {"LOAD_GLOBAL", "LOAD_METHOD", "LOAD_ATTR", "LOAD_DEREF"}


def _is_question(step: dis.Instruction, free: dict[str, Any], names: dict[str, Any], kind: type) -> bool:
    """Whether what is loaded asks for the type or identity of its arguments."""
    name = str(step.argval)
    if step.opname == "LOAD_GLOBAL" and name in _OF_OBJECTS and name not in names:
        return True
    if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
        helper = (names if step.opname == "LOAD_GLOBAL" else free).get(name)
    else:
        helper = inspect.getattr_static(kind, name, None) if issubclass(kind, nn.Module) else None
    if not isinstance(helper, FunctionType) or helper.__module__.partition(".")[0] in ("torch", "reparamc"):
        return False
    code = helper.__code__
    return not _asked(code, _cells(helper), helper.__globals__, kind).isdisjoint(code.co_varnames[: code.co_argcount])


def _is_none(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_CONST" and step.argval is None


def _effect(step: dis.Instruction) -> int:
    return dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None, jump=False)


def _before(steps: list[dis.Instruction], at: int) -> int:
    """Where the two operands of the step ``at`` begin."""
    height = 0
    while height < 2 and at > 0:
        at -= 1
        height += _effect(steps[at])
    return at


def _end(steps: list[dis.Instruction], at: int) -> int:
    """Where the call ends of the function that the step ``at`` loads."""
    height = 1 if steps[at].opname in ("LOAD_METHOD", "LOAD_ATTR") else 0
    for n in range(at, len(steps)):
        height += _effect(steps[n])
        if height <= 1 and steps[n].opname.startswith("CALL"):
            return n
    return len(steps)


def _variables(steps: list[dis.Instruction]) -> frozenset[str]:
    found = [s.argval for s in steps if s.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))]
    return frozenset(name for one in found for name in (one if isinstance(one, tuple) else [one]))


@cache
def _caught(code: CodeType) -> tuple[range, ...]:
    """The lines of a function on which errors are caught."""
    if dis.opmap["POP_EXCEPT"] not in code.co_code[::2]:
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found = list[range]()
    for node in ast.walk(tree):
        match node:
            case ast.Try(body, handlers) if handlers:
                pass
            case ast.With(items, body) if any("suppress" in ast.dump(item) for item in items):
                pass
            case _:
                continue
        last = cast(int, body[-1].end_lineno)
        found.append(range(code.co_firstlineno + body[0].lineno - 1, code.co_firstlineno + last))
    return tuple(found)
