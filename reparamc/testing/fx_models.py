"""A `Structure` as a torch module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc.testing.structure import Step, Structure, Value

_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_POOL_MODULES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_MODULES = ("conv", "transposed", "linear", "batchnorm")


def build_module(structure: Structure, dtype: str = "float32") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module of ``structure`` in eval mode, and example inputs, both of ``dtype``."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(structure.seed)
    x = torch.randn(structure.shape(), generator=generator, dtype=torch.float64).to(kind)
    return StructureModule(structure).to(kind).eval(), (x,)


class StructureModule(nn.Module):
    """Runs the steps one after the other; each is written in one of several equal ways."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.layers = nn.ModuleDict()
        for number, step in enumerate(structure.steps, 1):
            value = structure.values[step.inputs[0]]
            arrays = structure.parameters.get(number, {})
            drawn: dict[str, Tensor] = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
            if step.op in _MODULES and drawn:
                self.layers[f"{step.op}{number}"] = layer = _layer(step, value)
                layer.double().load_state_dict(drawn, strict=False)
            elif step.op in _MODULES:
                continue  # it calls the module of another step
            elif drawn:
                vector = next(iter(drawn.values()))
                column = torch.from_numpy(value.column(vector.numpy())) if vector.ndim else vector
                setattr(self, f"{step.op}{number}", nn.Parameter(column))
            elif step.op == "identity":
                self.layers[f"identity{number}"] = nn.Dropout(0.5) if step.variant(2) else nn.Identity()
            elif step.op == "pool" and step.variant(2):
                self.layers[f"pool{number}"] = _POOL_MODULES[value.frame](
                    step["kernel"], step["stride"], step["pad"], count_include_pad=step["counted"]
                )
            elif step.op == "select":
                self.register_buffer(f"index{number}", torch.tensor(step["index"]))

    def extra_repr(self) -> str:
        return repr(self.structure)

    def forward(self, x: Tensor) -> Any:
        values = list(self.values(x))
        results = [values[n] for n in self.structure.outputs]
        return tuple(results) if len(results) > 1 else results[0]

    def values(self, x: Tensor) -> Iterator[Any]:
        """The input and the result of every step; a later step may write into one."""
        values: list[Any] = [x]
        splits: dict[Any, Any] = {}
        yield x
        for number, step in enumerate(self.structure.steps, 1):
            operands = [values[n] for n in step.inputs]
            values.append(self._run(number, step, operands, self.structure.values[step.inputs[0]], splits))
            yield values[-1]

    def _run(self, number: int, step: Step, operands: list[Any], value: Value, splits: dict[Any, Any]) -> Any:
        x = operands[0]
        match step.op:
            case "conv" | "transposed" | "linear" | "batchnorm":
                return self._layered(number, step, x)
            case "scale":
                factor = getattr(self, f"scale{number}")
                return [lambda: x * factor, lambda: factor * x, lambda: torch.mul(x, factor)][step.variant(3)]()
            case "shift":
                return x + getattr(self, f"shift{number}")
            case "complement":
                return getattr(self, f"complement{number}") - x
            case "number":
                factor = getattr(self, f"number{number}")
                return x * factor if step.variant(2) else x * float(self.structure.parameters[number]["number"])
            case "negate":
                return [lambda: -x, lambda: x.neg(), lambda: x * -1][step.variant(3)]()
            case "add":
                y = operands[0]
                for other in operands[1:]:
                    y = torch.add(y, other) if step.variant(2) else y + other
                return y
            case "subtract":
                return x - operands[1] if step.variant(2) == 0 else torch.sub(x, operands[1])
            case "concat":
                return torch.cat(operands, -1 - value.frame if step.variant(2) else value.axis)
            case "part":
                return self._part(step, x, value, splits)
            case "select":
                return self._select(number, step, x, value)
            case "pool":
                if step.variant(2):
                    return self.layers[f"pool{number}"](x)
                return _POOLS[value.frame](
                    x, step["kernel"], step["stride"], step["pad"], count_include_pad=step["counted"]
                )
            case "pad":
                return F.pad(x, _pads(step["begin"], step["end"]), value=step["value"])
            case "crop":
                return _crop(step, x)
            case "shuffle":
                groups, width = step["groups"], value.channels
                rows = x.reshape(x.shape[0], groups, width // groups, *x.shape[2:])
                return rows.transpose(1, 2).reshape(x.shape)
            case "mean":
                return _mean(step, x, value)
            case "tokens":
                return x.flatten(2).transpose(1, 2) if step.variant(2) else x.flatten(2).permute(0, 2, 1)
            case "heads":
                return self._heads(step, x, value, splits)
            case "merge":
                return x.transpose(1, 2).flatten(2) if step.variant(2) else x.permute(0, 2, 1, 3).flatten(2)
            case "to_last":
                return x.permute(0, *range(2, value.rank), 1)
            case "to_first":
                return x.permute(0, value.rank - 1, *range(1, value.rank - 1))
            case "identity":
                return self.layers[f"identity{number}"](x)
            case "activation":
                in_place = step.variant(4) == 3 and self._is_fresh(step.inputs[0])
                return getattr(torch, step["kind"] + "_" * in_place)(x)
        raise AssertionError(step.op)

    def _layered(self, number: int, step: Step, x: Tensor) -> Tensor:
        layer = self.layers[f"{step.op}{self.structure.owner(number)}"]
        if step.op == "conv" and _needs_pad(step):
            x = F.pad(x, _pads(step["begin"], step["end"]))
        if step.variant(3) < 2 and not step.at.get("computed"):
            return layer(x)
        match layer:  # the same as a function
            case nn.Linear():
                return F.linear(x, layer.weight, layer.bias)
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[type(layer)]
                options: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
                weight = torch.neg(torch.neg(layer.weight)) if step["computed"] else layer.weight
                return function(x, weight, layer.bias, *options)
            case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
                norm: Any = layer
                return F.batch_norm(
                    x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps
                )
        return layer(x)

    def _is_fresh(self, number: int) -> bool:
        """Whether value ``number`` is used once, and shares its memory with no other: a write in place is safe."""
        made = number > 0 and self.structure.steps[number - 1].op in _MODULES
        return made and self.structure.users(number) == 1

    def _heads(self, step: Step, x: Any, value: Value, splits: dict[Any, Any]) -> Any:
        key = (step.inputs, step["heads"], step["parts"])
        if key not in splits:
            each = value.channels // (step["heads"] * step["parts"])
            rows = x.reshape(x.shape[0], x.shape[1], step["parts"], step["heads"], each)
            splits[key] = rows.permute(2, 0, 3, 1, 4)
        return splits[key].unbind(0)[step["which"]] if step.variant(2) else splits[key][step["which"]]

    def _part(self, step: Step, x: Any, value: Value, splits: dict[Any, Any]) -> Any:
        sizes, which = step["sizes"], step["which"]
        if step.variant(2):
            return x.narrow(value.axis, sum(sizes[:which]), sizes[which])
        key = (step.inputs, sizes)
        if key not in splits:
            equal = len(set(sizes)) == 1
            splits[key] = x.chunk(len(sizes), value.axis) if equal else x.split(list(sizes), value.axis)
        return splits[key][which]

    def _select(self, number: int, step: Step, x: Any, value: Value) -> Any:
        index = step["index"]
        contiguous = index == tuple(range(index[0], index[-1] + 1))
        if contiguous and step.variant(3) == 0 and value.axis == 1:
            return x[:, index[0] : index[-1] + 1]
        if contiguous and step.variant(3) == 1:
            return x.narrow(value.axis, index[0], len(index))
        return x.index_select(value.axis, getattr(self, f"index{number}"))


def _layer(step: Step, value: Value) -> nn.Module:
    at = step.at
    match step.op:
        case "linear":
            return nn.Linear(value.channels, at["out"], at["bias"])
        case "batchnorm":
            return getattr(nn, f"BatchNorm{max(value.frame, 1)}d")(value.channels, at["eps"])
        case "conv":
            padding: Any = 0 if _needs_pad(step) else at["begin"]
            if step.variant(3) == 1 and step.padded_same and not _needs_pad(step):
                padding = "same"
            return getattr(nn, f"Conv{value.frame}d")(
                value.channels, at["out"], at["kernel"], at["stride"], padding, at["dilation"], at["groups"], at["bias"]
            )
    return getattr(nn, f"ConvTranspose{value.frame}d")(
        value.channels, at["out"], at["kernel"], at["stride"], at["pad"], at["extra"], at["groups"], at["bias"],
        at["dilation"],
    )  # fmt: skip


def _needs_pad(step: Step) -> bool:
    """Whether the padding must be an operator of its own."""
    return step["begin"] != step["end"]


def _crop(step: Step, x: Any) -> Any:
    if step.variant(2):
        return F.pad(x, _pads(tuple(-n for n in step["begin"]), tuple(-n for n in step["end"])))
    kept = [slice(b, -e if e else None) for b, e in zip(step["begin"], step["end"], strict=True)]
    return x[(slice(None), slice(None), *kept)]


def _pads(begin: tuple[int, ...], end: tuple[int, ...]) -> list[int]:
    return [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]


def _mean(step: Step, x: Any, value: Value) -> Any:
    positions = list(range(2, value.rank))
    if step.variant(2):
        pooled = getattr(F, f"adaptive_avg_pool{value.frame}d")(x, 1)
        return pooled if step["keep"] else pooled.flatten(1)
    return x.mean(positions, keepdim=step["keep"])
