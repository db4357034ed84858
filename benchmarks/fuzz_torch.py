"""The programs of `fuzz_graphs` as torch modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fuzz_graphs import Program, Step
from torch import Tensor, nn
from torch.nn import functional as F


def to_module(p: Program, seed: int = 0) -> Network:
    """The program as a torch module in eval mode, in its dtype; some layers as modules, the others as functions."""
    # torch.fx reads the names of the arguments off the function.
    names = ", ".join(f"x{n}" for n in range(len(p.inputs)))
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {names}): return self.compute({names})", scope)
    made = type("Network", (Network,), {"forward": scope["forward"]})(p, np.random.default_rng(seed))
    return made.to(getattr(torch, p.dtype)).eval().requires_grad_(requires_grad=bool(seed % 2))


class Network(nn.Module):
    """A program; the method named like an operator computes the step ``s`` on ``x``.

    A call keeps nothing: `fuse_fx` leaves a module alone whose forward changes what it holds.
    """

    def __init__(self, p: Program, rng: np.random.Generator) -> None:
        super().__init__()
        self.p = p
        self.layers = nn.ModuleDict()
        for key, values in p.params.items():
            self.register_parameter(_name(key), nn.Parameter(torch.from_numpy(values)))
        for at, s in enumerate(p.steps):
            layer = self.layer(s) if rng.random() < 0.6 else None
            if layer is not None:
                self.layers[str(at)] = layer

    def compute(self, *inputs: Any) -> Any:
        v = self.values(inputs)
        found = [v[n] for n in dict.fromkeys(self.p.outputs)]
        return found[0] if len(found) == 1 else tuple(found)

    def values(self, inputs: Sequence[Any], seen: Callable[[Any], object] = lambda value: None) -> list[Any]:
        """The inputs and the results of all steps; ``seen`` is called with each before a later step writes into it."""
        v: list[Any] = []
        for x in inputs:
            seen(x)
            v.append(x)
        for at, s in enumerate(self.p.steps):
            operands = [v[i] for i in s.inputs]
            made = str(at) in self.layers
            v.append(self.layers[str(at)](*operands) if made else getattr(self, f"_{s.op}")(s, *operands))
            seen(v[-1])
        return v

    def largest(self, inputs: Sequence[Tensor]) -> float:
        """The largest magnitude met on the way from ``inputs``."""
        sizes: list[float] = []
        with torch.no_grad():
            self.values([x.clone() for x in inputs], lambda value: sizes.append(float(value.abs().max())))
        return max(sizes)

    def held(self, s: Step, *roles: str) -> list[Any]:
        """The parameters of these roles; None where the step does without."""
        return [getattr(self, _name(s.params[role])) if role in s.params else None for role in roles]

    # Modules

    def layer(self, s: Step) -> nn.Module | None:
        """The step as a module, if it is one."""
        made: Any
        o, (weight, bias) = s.settings, self.held(s, "weight", "bias")
        if s.op == "conv" and o["begin"] == o["end"] and not o["computed"]:
            out, per_group, *kernel = weight.shape
            grid = {"stride": o["stride"], "padding": o["begin"], "dilation": o["dilation"], "groups": o["groups"]}
            conv = getattr(nn, f"Conv{len(kernel)}d")
            made = conv(per_group * o["groups"], out, kernel, bias=bias is not None, **grid)
        elif s.op == "linear":
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        elif s.op == "norm":
            gamma, beta, mean, var = self.held(s, "gamma", "beta", "mean", "var")
            made = getattr(nn, f"BatchNorm{max(self._frame(s), 1)}d")(gamma.numel(), eps=o["eps"])
            made.running_mean, made.running_var = mean.detach().clone(), var.detach().clone()
            weight, bias = gamma, beta
        else:
            return None
        made.weight, made.bias = weight, bias  # tied where the program uses a weight twice
        return made

    # Functions

    def _frame(self, s: Step) -> int:
        return len(self.p.shapes[s.inputs[0]]) - 2

    def _conv(self, s: Step, x: Tensor) -> Tensor:
        o, (weight, bias) = s.settings, self.held(s, "weight", "bias")
        convolve = getattr(F, f"conv{self._frame(s)}d")
        weight = torch.neg(torch.neg(weight)) if o["computed"] else weight
        pads = o["begin"]
        if o["begin"] != o["end"]:
            x, pads = F.pad(x, _pairs(o)), 0
        return convolve(x, weight, bias, o["stride"], pads, o["dilation"], o["groups"])

    def _conv_transpose(self, s: Step, x: Tensor) -> Tensor:
        o, (weight, bias) = s.settings, self.held(s, "weight", "bias")
        convolve = getattr(F, f"conv_transpose{self._frame(s)}d")
        return convolve(x, weight, bias, o["stride"], o["padding"], o["more"], o["groups"])

    def _norm(self, s: Step, x: Tensor) -> Tensor:
        gamma, beta, mean, var = self.held(s, "gamma", "beta", "mean", "var")
        return F.batch_norm(x, mean, var, gamma, beta, eps=s.settings["eps"])

    def _constant(self, s: Step, x: Tensor) -> Tensor:
        return CONSTANTS[s.settings["kind"], bool(s.settings.get("inplace"))](x, *self.held(s, "value"))

    def _linear(self, s: Step, x: Tensor) -> Tensor:
        return F.linear(x, *self.held(s, "weight", "bias"))

    def _neg(self, s: Step, x: Tensor) -> Tensor:
        return -x

    def _relu(self, s: Step, x: Tensor) -> Tensor:
        return F.relu(x, inplace=s.settings["inplace"])

    def _sigmoid(self, s: Step, x: Tensor) -> Tensor:
        return x.sigmoid_() if s.settings["inplace"] else torch.sigmoid(x)

    def _tanh(self, s: Step, x: Tensor) -> Tensor:
        return x.tanh_() if s.settings["inplace"] else x.tanh()

    def _plus(self, s: Step, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def _minus(self, s: Step, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def _concat(self, s: Step, *operands: Tensor) -> Tensor:
        return torch.cat(list(operands), 1)

    def _slice(self, s: Step, x: Tensor) -> Tensor:
        return x[:, s.settings["start"] : s.settings["stop"]]

    def _gather(self, s: Step, x: Tensor) -> Tensor:
        return x[:, s.settings["index"]]

    def _take(self, s: Step, x: Tensor) -> Tensor:
        axis, at = s.settings["axis"], s.settings["at"]
        return x.unbind(axis)[at] if s.settings["unbound"] else x.select(axis, at)

    def _crop(self, s: Step, x: Tensor) -> Tensor:
        ends = [slice(b, -e if e else None) for b, e in zip(s.settings["begin"], s.settings["end"], strict=True)]
        return x[(slice(None), slice(None), *ends)]

    def _shuffle(self, s: Step, x: Tensor) -> Tensor:
        groups, (n, width, *rest) = s.settings["groups"], self.p.shapes[s.inputs[0]]
        return x.reshape(n, groups, width // groups, *rest).transpose(1, 2).reshape(n, width, *rest)

    def _pool(self, s: Step, x: Tensor) -> Tensor:
        o, pooled = s.settings, getattr(F, f"avg_pool{self._frame(s)}d")
        return pooled(x, o["kernel"], o["stride"], o["pads"], count_include_pad=o["counted"])

    def _pad(self, s: Step, x: Tensor) -> Tensor:
        return F.pad(x, _pairs(s.settings), value=s.settings["value"])

    def _mean(self, s: Step, x: Tensor) -> Tensor:
        return x.mean(s.settings["axes"], keepdim=s.settings["keep"])

    def _permute(self, s: Step, x: Tensor) -> Tensor:
        return x.permute(s.settings["axes"])

    def _reshape(self, s: Step, x: Tensor) -> Tensor:
        return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(s.settings["target"])])


CONSTANTS: dict[tuple[str, bool], Callable[[Tensor, Tensor], Tensor]] = {
    ("add", False): lambda x, c: x + c,
    ("sub", False): lambda x, c: x - c,
    ("rsub", False): lambda x, c: c - x,
    ("mul", False): lambda x, c: x * c,
    ("div", False): lambda x, c: x / c,
    ("add", True): lambda x, c: x.add_(c),
    ("mul", True): lambda x, c: x.mul_(c),
}
"""By kind, and whether it is in place."""


def _name(key: str) -> str:
    return key.replace("+", "v").replace("-", "")


def _pairs(o: dict[str, Any]) -> list[int]:
    """Amounts of padding as `torch.nn.functional.pad` takes them, the last axis first."""
    return [n for pair in reversed(list(zip(o["begin"], o["end"], strict=True))) for n in pair]
