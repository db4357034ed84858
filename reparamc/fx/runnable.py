"""torch modules as comparisons and inputs need them: run on arrays, left as they are, asked what they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparamc.equivalence.difference import Outputs, nudged
from reparamc.equivalence.runnable import Domain, NoArrayError, Tree, bounds_of, leaves
from reparamc.equivalence.trials import GUESSES, Slot
from reparamc.errors import InputError
from reparamc.fx.calls import is_plain, lookup
from reparamc.fx.copying import State, submodules, tensors

T = TypeVar("T")


class TorchRunnable:
    """A module in the mode it is in. Each call starts from the same state and the same random numbers."""

    flat = False

    def __init__(self, module: nn.Module) -> None:
        self.kind = f"{type(module).__name__} (torch{', in training mode' if module.training else ''})"
        self.module = module
        parameters = inspect.signature(module.forward).parameters.values()
        variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
        self.names = None if variadic else tuple(p.name for p in parameters)
        self.epsilon = max((torch.finfo(t.dtype).eps for t in floats(module)), default=0.0)
        self.device = next((t.device for t in tensors(module)), torch.device("cpu"))

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Outputs:
        with unchanged(self.module):
            result = without_gradients(lambda: called(self.module, args, kwargs, self.device))
            return {place: array(leaf) if isinstance(leaf, Tensor) else leaf for place, leaf in leaves(result)}

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
                # Axes at the same place and of the same size vary together: a batch is one thing.
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
                yield from ((2, channels, *(size,) * axes) for size in GUESSES)
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
    """The result of ``function`` on copies of the tensors in its arguments, or on tensors made of the arrays there.

    Random operators draw the same numbers each time, and the generators of the caller stay as they are.
    """

    def fresh(leaf: Any) -> Any:
        return (
            tensor(leaf, device) if isinstance(leaf, np.ndarray) else leaf.clone() if isinstance(leaf, Tensor) else leaf
        )

    args, kwargs = pytree.tree_map(fresh, (list(args), dict(kwargs)))
    with same_random_numbers([torch.device(device)]):
        return function(*args, **kwargs)


def run(model: nn.Module, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Outputs:
    """Everything that ``model`` returns, by its place; ``model`` is afterwards as it was before.

    Tensors that are no arrays are made dense or plain ones. What cannot be compared is given by its type.
    """
    with unchanged(model):
        devices = [t.device for t in tensors(model)]
        return plain(without_gradients(lambda: called(model, args, kwargs, next(iter(devices), "cpu"))))


def without_gradients(runs: Callable[[], T]) -> T:
    """What ``runs`` gives without gradients; if it asks for some itself, as force fields do, with them."""
    try:
        with torch.no_grad():
            return runs()
    except RuntimeError as error:
        if "require grad" not in str(error):
            raise
    with torch.enable_grad():
        return runs()


def plain(result: Any) -> dict[str, Any]:
    """Every value in ``result`` by its place, as something that can be compared with another."""
    return {place: _plain(leaf) for place, leaf in leaves(result)}


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, float | complex | np.generic):
        return np.asarray(leaf)  # it rounds as a tensor does
    if not isinstance(leaf, Tensor):
        return leaf if isinstance(leaf, bool | int | str | bytes | np.ndarray | None) else type(leaf).__name__
    try:
        if leaf.is_quantized:
            return array(leaf.dequantize())
        return array(leaf.to_dense() if leaf.layout != torch.strided else leaf)
    except (NoArrayError, RuntimeError, NotImplementedError):
        return f"{type(leaf).__name__} {leaf.dtype}"


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Buffers and attributes of all submodules are as before when it ends, and so are lists and mappings in them."""
    state = State(module, only=_read_alone(module))
    try:
        yield
    finally:
        state.restore()


def _read_alone(module: nn.Module) -> dict[str, nn.Module] | None:
    """The parts whose tensors a graph reads, if all else it does is to call torch's own modules in eval mode."""
    if not isinstance(module, fx.GraphModule) or module._forward_hooks or module._forward_pre_hooks:
        return None
    for path in {str(node.target) for node in module.graph.find_nodes(op="call_module")}:
        called = lookup(module, path)
        for m in submodules(called).values() if called._modules else [called]:
            if m._forward_hooks or m._forward_pre_hooks or m.training or not is_plain(m):
                return None
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    if not all(isinstance(lookup(module, path), Tensor) for path in read):
        return None
    return {home: lookup(module, home) if home else module for home in {path.rpartition(".")[0] for path in read}}


@contextmanager
def same_random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    """Seeded inside, and as before outside."""
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            generator.manual_seed(0)  # torch.manual_seed takes much longer: it asks every kind of device
        yield


def own_randomness(module: nn.Module) -> AbstractContextManager[None]:
    """`same_random_numbers` on the devices of ``module``."""
    return same_random_numbers([t.device for t in tensors(module)])


def floats(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers that round."""
    return [t for t in tensors(module) if t.is_floating_point()]


def perturbed(given: Tree, seed: int) -> Tree:
    """``given`` with every floating entry of a tensor moved by one rounding, up or down."""
    rng = np.random.default_rng(seed)

    def moved(t: Tensor) -> Tensor:
        return tensor(nudged(array(t), rng), t.device) if t.is_floating_point() and t.layout == torch.strided else t

    return pytree.tree_map_only(Tensor, moved, given)


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
