"""torch modules as comparisons and inputs need them: run on arrays, left as they are, asked what they take."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparamc.equivalence.trials import Slot
from reparamc.errors import InputError, one_line
from reparamc.fx.trace import trace
from reparamc.testing.inputs import Domain, NoArrayError, Tree, bounds_of, leaves, mapped

_FIRST_EXTENTS = (16, 32, 64, 224)


class TorchHost:
    """A module in the mode it is in. Each call starts from the same buffers and the same random state."""

    flat = False

    def __init__(self, module: nn.Module) -> None:
        self.kind = f"{type(module).__name__} (torch{', in training mode' if module.training else ''})"
        self.module = module
        try:
            self._copy = copy.deepcopy(module)
        except Exception as error:  # whatever the attributes of the user's module raise
            raise InputError(f"{type(module).__name__} cannot be copied: {one_line(error)}") from error
        self._buffers = [(b, b.clone()) for b in self._copy.buffers()]
        parameters = inspect.signature(module.forward).parameters.values()
        variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        self.names = None if variadic else tuple(p.name for p in parameters)
        floats = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
        self.epsilon = max((torch.finfo(t.dtype).eps for t in floats), default=0.0)
        self.device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> list[tuple[str, Any]]:
        try:
            with torch.no_grad():
                return leaves(arrays(called(self._copy, args, kwargs, self.device)))
        finally:
            with torch.no_grad():
                for buffer, kept in self._buffers:
                    buffer.copy_(kept)

    def runs(self, inputs: Tree) -> bool:
        args, kwargs = split(inputs)
        try:
            self(args, kwargs)
        except Exception:  # a model may refuse an input in any way it likes
            return False
        return True

    def domain(self, example_inputs: Any) -> Domain:
        if example_inputs is None:
            example_inputs = self._guess()
        example = arrays(example_inputs if isinstance(example_inputs, tuple | list | Mapping) else (example_inputs,))
        parts, spec = pytree.tree_flatten(example)
        if not self.runs(example):
            self(*split(example))  # raises the model's own error
        base: dict[str, int] = {}
        slots = []
        for at, part in enumerate(parts):
            if isinstance(part, np.ndarray):
                # Axes at the same place and of the same extent vary together: a batch is one thing.
                names = [f"axis{axis}:{n}" for axis, n in enumerate(part.shape)]
                base |= dict(zip(names, part.shape, strict=True))
                slots.append(Slot(str(at), part.dtype, tuple(names), bounds=bounds_of(part)))
        places = [int(s.name) for s in slots]

        def assemble(drawn: list[np.ndarray]) -> Tree:
            whole = list(parts)
            for place, array in zip(places, drawn, strict=True):
                whole[place] = tensor(array, self.device)
            return pytree.tree_unflatten(whole, spec)

        return Domain(slots, base, self.runs, assemble)

    def _guess(self) -> tuple[Tensor, ...]:
        """An example input for a module of one argument, from the first layer that says what it takes."""
        required = [p for p in inspect.signature(self.module.forward).parameters.values() if p.default is p.empty]
        if len(required) == 1 and required[0].kind is not required[0].VAR_POSITIONAL:
            for shape in self._guesses():
                x = torch.zeros(shape, dtype=self._dtype(), device=self.device)
                if self.runs((x,)):
                    return (x,)
        raise InputError(f"{type(self.module).__name__} does not tell what inputs it takes; give example_inputs")

    def _guesses(self) -> Iterator[tuple[int, ...]]:
        for layer in self.module.modules():
            axes = next((n for n in (1, 2, 3) if type(layer).__name__.endswith(f"{n}d")), None)
            channels = getattr(layer, "in_channels", None) or getattr(layer, "num_features", None)
            if axes and channels:
                yield from ((2, channels, *(extent,) * axes) for extent in _FIRST_EXTENTS)
                if axes == 1:
                    yield (2, channels)
                return
            if isinstance(layer, nn.Linear):
                yield (2, layer.in_features)
                yield (2, 5, layer.in_features)
                return

    def _dtype(self) -> torch.dtype:
        return next((t.dtype for t in self.module.parameters() if t.is_floating_point()), torch.float32)


def called(function: Callable[..., Any], args: Sequence[Tree], kwargs: Mapping[str, Tree], device: Any = "cpu") -> Any:
    """The result of ``function`` on tensors made of the arrays in its arguments, with the same random numbers."""
    args = [mapped(lambda array: tensor(array, device), a) for a in args]
    kwargs = {k: mapped(lambda array: tensor(array, device), v) for k, v in kwargs.items()}
    with same_random_numbers(torch.device(device)):
        return function(*args, **kwargs)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Seeded inside, and as before outside."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def split(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs as positional and keyword arguments, arrays for tensors."""
    inputs = arrays(inputs)
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def arrays(tree: Tree) -> Tree:
    """``tree`` with its tensors as arrays; bfloat16 becomes that of ml_dtypes."""
    return pytree.tree_map_only(Tensor, array, tree)


def array(t: Tensor) -> np.ndarray:
    if t.is_meta:
        raise NoArrayError("a tensor on the meta device, which has no values to compare")
    if t.is_quantized:
        raise NoArrayError("a quantized tensor, which cannot be compared; convert it with .dequantize()")
    if t.is_nested or t.layout != torch.strided:
        what = "nested" if t.is_nested else str(t.layout).removeprefix("torch.").lstrip("_")
        raise NoArrayError(f"a {what} tensor, which cannot be compared; make a dense one of it")
    t = t.detach().cpu().contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    try:
        return t.numpy().copy()
    except TypeError as error:  # numpy has no such dtype
        raise NoArrayError(f"a tensor of {t.dtype}, which cannot be compared; convert it to a wider dtype") from error


def tensor(a: np.ndarray, device: Any = "cpu") -> Tensor:
    a = np.array(a, order="C")
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(a).to(device)


def layers(module: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """How often each convolution and linear layer is called, and each BatchNorm; once where torch.fx cannot tell."""
    linear, norms = (nn.modules.conv._ConvNd, nn.Linear), nn.modules.batchnorm._BatchNorm
    named = dict(module.named_modules())
    try:
        calls = Counter(str(n.target) for n in trace(copy.deepcopy(module)).graph.find_nodes(op="call_module"))
    except InputError:
        calls = Counter(dict.fromkeys(named, 1))
    for name in named:  # inside a submodule that torch.fx calls as it is
        parts = name.split(".")
        if not calls[name] and any(".".join(parts[:n]) in calls for n in range(1, len(parts))):
            calls[name] = 1
    found = [Counter({n: calls[n] for n, m in named.items() if isinstance(m, kinds)}) for kinds in (linear, norms)]
    return found[0], found[1]
