"""`Fuser`: the structure of a fusion is found once, and carried out again on the weights that the model has now."""

from __future__ import annotations

import os
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparamc.algebra.arrays import values
from reparamc.algebra.recorded import At, Program, Tape, recording
from reparamc.errors import InputError, InputTypeError, RecipeError, VerificationError, one_line
from reparamc.fx.arguments import call_of
from reparamc.fx.copying import copied
from reparamc.fx.emit import channels_last
from reparamc.fx.fuse import fuse_fx, plain_modes
from reparamc.fx.outcome import difference, ran
from reparamc.fx.parts import is_leaf
from reparamc.fx.result import HOOKS
from reparamc.fx.runnable import perturbed
from reparamc.fx.watch import Call
from reparamc.fx.wrappers import unwrapped


class Fuser:
    """Fuses one model again and again while it is trained.

        fuser = reparamc.Fuser(model, example_inputs)
        for epoch in range(epochs):
            train(model)
            validate(fuser())

    The first fusion is that of `fuse_fx`: searched, proven and compared. Each call carries it out again on the weights
    of that moment, on their device, and returns the same fused module with new values. The model may be in training
    mode: what is fused is what it computes in eval mode. Its modes, its state and its hooks stay as they are. A model
    in DistributedDataParallel, DataParallel or torch.compile is taken out of it.

    A call searches anew where the model has changed in structure, or where the fusion counted on a value that has
    changed, such as a shift of zero before a padding. Then it returns another module.

    Args:
        model: the module that is trained.
        example_inputs: as for `fuse_fx`, on the device of the model.
        differentiable: return a module whose parameters are those of ``model``: each forward computes the fused
            kernels from them, BatchNorms on their running statistics, so that gradients reach every branch.
        check: compare the fused module with the model on one example at each call.
        options: those of `fuse_fx`, for the search.

    Attributes:
        searches: how often the structure was searched.
        last: why the last search was needed; empty for the first.

    Raises:
        InputTypeError, InputError, VerificationError: as `fuse_fx`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        differentiable: bool = False,
        check: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputTypeError(f"Fuser takes a torch.nn.Module, not {type(model).__name__}")
        self._model: nn.Module = unwrapped(model)[0]
        self._call = None if example_inputs is None else call_of(self._model, example_inputs)
        self._follows = _dtypes(pytree.tree_leaves(self._call)) == _dtypes(_tensors(self._model).values())
        self._differentiable, self._check, self._options = differentiable, check, options
        self.searches, self.last = 0, ""
        self._found = self._search("")

    def __call__(self) -> nn.Module:
        """The model of now, fused.

        Raises:
            InputError, VerificationError: as `fuse_fx`, where it has to be searched anew.
        """
        with plain_modes():
            if why := self._obstacle():
                self._found = self._search(why)
        return self._found.module

    def refresh_onnx(self, path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> None:
        """Put the weights of now into the ONNX file ``path``, or write ``output`` instead; its graph stays as it is.

        The file is one that `fuse_onnx` made of an export of the model, or an export of what this returns. Then it is
        compared with that on the example.

        Raises:
            InputError: the file cannot be refreshed, or its parameters are not those of the model; nothing is written.
            VerificationError: the result differs; nothing is written.
        """
        from reparamc.onnx.files import check_target, load, save
        from reparamc.onnx.record import structures
        from reparamc.onnx.refresh import refreshed, replaced
        from reparamc.training.checkpoints import arrays_of

        source, target = Path(path), Path(output or path)
        check_target(source, target, in_place=True)
        file = load(source, target)
        if structures(file):
            made, _ = refreshed(file, arrays_of(self._model.state_dict()), "the model")
        else:
            fused = self()
            made = replaced(file, arrays_of(fused.state_dict()), "the fused model")
            if self._call is not None:
                compared(made, fused, self._fitting(self._call))
        save(made, target)

    def _obstacle(self) -> str:
        """Why the structure has to be searched anew; empty where the fused module is up to date."""
        found = self._found
        if (where := _changed(found.structure, structure(self._model))) is not None:
            return f"the structure of the model has changed: {where or type(self._model).__name__}"
        if found.incomplete:
            return found.incomplete
        try:
            return (
                found.moved(self._model)
                or found.renew(self._model)
                or (found.difference(found.current(self._model)) if self._check else "")
            )
        except RecipeError as error:
            return str(error)

    def _search(self, why: str) -> _Found:
        with plain_modes():
            return self._recorded(why)

    def _recorded(self, why: str) -> _Found:
        reference = copied(self._model).eval()
        tape = Tape(generic=self._differentiable)
        call = None if self._call is None else self._fitting(self._call)
        with recording(tape):
            fused = fuse_fx(reference, None if call is None else call[1] or call[0], **self._options)
            one = None if call is None else _one(call)
            found = _Found(self._model, reference, fused, tape, one, self._differentiable)
        self.searches, self.last = self.searches + 1, why
        if found.incomplete and self._differentiable:
            raise InputError(f"no gradient would reach every parameter: {found.incomplete}")
        return found

    def _fitting(self, call: Call) -> Call:
        """``call`` where the parameters of the model are, if they are in one place, and of their dtype, if it was."""
        tensors = _tensors(self._model).values()
        devices, dtypes = {t.device for t in tensors}, _dtypes(tensors)
        device = devices.pop() if len(devices) == 1 else None
        dtype = dtypes.pop() if self._follows and len(dtypes) == 1 else None
        return pytree.tree_map_only(Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else None), call)


class _Found:
    """A fusion that can be carried out again.

    Attributes:
        structure: that of the model.
        module: what the user gets.
        incomplete: why it cannot be carried out again; empty where it can.
    """

    def __init__(
        self, model: nn.Module, reference: nn.Module, fused: nn.Module, tape: Tape, call: Call | None, through: bool
    ) -> None:
        self.structure, self._fused, self._call = structure(model), fused, call
        self._reference = None if UNKNOWN in self.structure else reference
        made = {name: at for name, t in _tensors(fused).items() if isinstance(at := tape.at(t), At)}
        self._targets = list(made)
        self._program = Program(tape, list(made.values()), values)
        self.module = Differentiable(model, fused, self._program, self._targets) if through else fused
        self._fixed: dict[str, Tensor] = {}
        self.incomplete = self._trial(reference, ()) if call is not None else ""
        fixed = {name: t.clone() for name, t in _users_buffers(model).items()} if self.incomplete else {}
        if fixed and not self._trial(self.current(model), fixed):  # tracing makes constants of what buffers become
            self._fixed, self.incomplete = fixed, ""

    def _trial(self, reference: nn.Module, fixed: Container[str]) -> str:
        """What is missing, told from other weights for ``reference``, but for those that are ``fixed``."""
        targets = _tensors(self._fused)
        kept = {name: targets[name].clone() for name in self._targets}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, t in _tensors(reference).items():
                if t.is_floating_point() and name not in fixed:
                    noise = 1 + 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64)
                    t.copy_(torch.where((t == 0) | (t.abs() == 1), t, t * noise.to(t.device, t.dtype)))
            try:
                self.renew(reference)
                why = self.difference(reference)
            except RecipeError:
                why = ""  # these weights say nothing of others for which it holds
            for name, value in kept.items():
                targets[name].copy_(value)
        return f"a part of it cannot be computed again from its parameters: {why}" if why else ""

    def moved(self, model: nn.Module) -> str:
        """Which constant has changed; empty where none has."""
        tensors = _tensors(model) if self._fixed else {}
        name = next((n for n, t in self._fixed.items() if not torch.equal(t, tensors[n])), "")
        return f"{name!r} has changed, of which tracing made a constant" if name else ""

    def renew(self, model: nn.Module) -> str:
        """Give the fused module the weights of ``model``; why they do not fit it, empty where they do."""
        tensors, targets = _tensors(model), _tensors(self._fused)
        with torch.no_grad():
            results = _run(self._program, tensors)
            rounded = [torch.zeros((), dtype=torch.float64)]
            for name, result in zip(self._targets, results, strict=True):
                target = targets[name]
                target.copy_(result)
                if target.is_floating_point() and result is not target:
                    rounded.append(target.sum(dtype=torch.float64).to(rounded[0].device))
            return "" if bool(torch.stack(rounded).isfinite().all()) else "a fused parameter is not finite"

    def current(self, model: nn.Module) -> nn.Module:
        """A copy of ``model``, which is of this structure, in eval mode."""
        if self._reference is None:
            return copied(model).eval()
        with torch.no_grad():
            for mine, theirs in zip(_tensors(self._reference).values(), _tensors(model).values(), strict=True):
                mine.copy_(theirs)
        return self._reference

    def difference(self, reference: nn.Module) -> str:
        """How the fused module differs from ``reference``, a model in eval mode, on one example."""
        if self._call is None:
            return ""
        try:
            expected = ran(reference, self._call)
            actual = ran(self._fused, self._call)
        except Exception as error:  # whatever a module raises on one example that runs on more
            return one_line(error)
        return difference(actual, expected, lambda: ran(reference, perturbed(cast(Call, self._call), 0)))


class Differentiable(nn.Module):
    """A fused module over the parameters of ``model``: each forward computes the fused kernels from them.

    ``state_dict``, ``parameters`` and the rest are those of ``model``, under the name "model".
    """

    def __init__(self, model: nn.Module, fused: nn.Module, program: Program, targets: list[str]) -> None:
        super().__init__()
        self.model = model
        self._way: Any
        made = _tensors(fused)
        for name in targets:
            if (t := made[name]).is_leaf and t.requires_grad:
                t.register_hook(_hidden)
        self.__dict__["_way"] = fused, program, targets  # no submodule: its parameters are computed

    def kernels(self) -> dict[str, Tensor]:
        """The parameters and buffers of the fused module, by name, as functions of those of the model."""
        fused, program, targets = self._way
        tensors, made = _tensors(self.model), _tensors(fused)
        results = _run(program, tensors)
        return {name: _like(result, made[name]) for name, result in zip(targets, results, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kernels, held = self.kernels(), _tensors(self._way[0])
        for name, kernel in kernels.items():  # what a checkpoint runs again finds them there
            held[name].data = kernel.detach()
        return torch.func.functional_call(self._way[0], kernels, args, kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._way[0]._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)


def _hidden(gradient: Tensor) -> None:
    raise InputError("a checkpoint hides the fused kernels from autograd; give it use_reentrant=False")


def compared(file: Any, fused: nn.Module, call: Call) -> None:
    """Raise VerificationError where an ONNX model computes something else than ``fused`` of these arguments."""
    from reparamc.onnx.refresh import outputs_of

    given = [t.detach().cpu().numpy() for t in pytree.tree_leaves(call) if isinstance(t, Tensor)]
    expected = [t for t in pytree.tree_leaves(ran(fused, call)) if isinstance(t, Tensor)]
    for (name, a), b in zip(outputs_of(file, given).items(), expected, strict=False):
        e = b.detach().cpu().numpy()
        worst = np.abs(a - e).max(initial=0.0) / max(np.abs(e).max(initial=0.0), 1e-30) if a.shape == e.shape else 1.0
        if not worst < DIFFERS:
            raise VerificationError(f"output {name!r} of the file differs by {worst:.1e}", where=name)


DIFFERS = 1e-2
"""Relative difference of a file with other weights than those of the model, beyond the rounding of any runtime."""


def _like(result: Tensor, target: Tensor) -> Tensor:
    result, last = result.to(target.dtype), channels_last(target)
    return result if last is None else result.contiguous(memory_format=last)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by each of their names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _run(program: Program, tensors: Mapping[str, Tensor]) -> Sequence[Any]:
    """What ``program`` makes of the parameters and buffers of a model; a model may have none."""
    return program.run(tensors.__getitem__, next(iter(tensors.values()), torch.zeros(())))


def _users_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no module of torch's own holds."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not is_leaf(module):
            found.update((f"{path}.{name}".lstrip("."), t) for name, t in module._buffers.items() if t is not None)
    return found


def structure(model: nn.Module) -> dict[str, Hashable]:
    """What decides what is computed, by place: all but the values of parameters and buffers, and modes."""
    found: dict[str, Hashable] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        ours = is_leaf(module)
        plain = [(k, _print(v, found, ours)) for k, v in own.items() if k not in _OF_EVERY_MODULE]
        hooks = [len(own[name]) for name in HOOKS if own.get(name)]
        found[path] = type(module), tuple(plain), tuple(hooks)
    for name, t in _tensors(model).items():
        found[name] = t.shape, t.dtype, t.device, t.requires_grad
    return found


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

UNKNOWN = "?"
"""Where a structure says that a model holds objects that are not looked into; no module has such a name."""


def _print(value: Any, found: dict[str, Hashable], ours: bool, depth: int = 4) -> Hashable:
    """What tells the value of an attribute, of a module that is torch's ``ours`` or not, from others."""
    match value:
        case bool() | int() | float() | complex() | str() | None | torch.dtype() | torch.device() | Enum():
            return type(value), repr(value)
        case Tensor():
            if ours or not value.is_leaf or isinstance(value, nn.Parameter):
                return None  # computed anew, or counted elsewhere
            return value.shape, value.dtype, hash(value.detach().cpu().double().numpy().tobytes())
        case dict() if depth:
            return tuple((repr(k), _print(v, found, ours, depth - 1)) for k, v in value.items())
        case list() | tuple() if depth:
            return type(value), tuple(_print(v, found, ours, depth - 1) for v in value)
        case _ if callable(value):
            return id(value)
        case _ if is_dataclass(value) and depth:
            return type(value), tuple(_print(getattr(value, f.name), found, ours, depth - 1) for f in fields(value))
        case _:
            found[UNKNOWN] = True
            return None


def _changed(old: dict[str, Hashable], new: dict[str, Hashable]) -> str | None:
    """The first place that differs, if any does."""
    return next((name for name in {**new, **old} if old.get(name, name) != new.get(name, name)), None)


def _one(call: Call) -> Call:
    """``call`` with one example only of what seems to be a batch."""
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.ndim]
    if len({t.shape[0] for t in tensors}) != 1 or all(t.ndim == 1 for t in tensors):
        return call
    return pytree.tree_map_only(Tensor, lambda t: t[:1] if t.ndim else t, call)


def _dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    """Those of all tensors of floating point numbers."""
    return {t.dtype for t in values if isinstance(t, Tensor) and t.is_floating_point()}
