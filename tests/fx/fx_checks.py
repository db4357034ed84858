"""What the tests of `fuse_fx` share: small models, and the comparison with the original."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from reparamc import fuse_fx
from reparamc.fx.arguments import others
from reparamc.fx.end_to_end import verify_end_to_end
from reparamc.fx.runnable import run as outputs
from reparamc.fx.watch import Call
from reparamc.report.data import OutputError, Report
from reparamc.testing import randomize_batchnorm

CHANNELS = 4
SHAPES = ((2, CHANNELS, 7, 6), (1, CHANNELS, 8, 9))


class Net(nn.Module):
    """Parts by name, and a forward that is a function of the network and its inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv_bn(kernel: int = 3, out: int = CHANNELS, **options: Any) -> nn.Sequential:
    geometry: dict[str, Any] = {"padding": kernel // 2} | options
    return nn.Sequential(
        nn.Conv2d(CHANNELS, out, kernel, **geometry),
        nn.BatchNorm2d(out),
    )


def vector(*shape: int) -> nn.Parameter:
    """A factor per channel, away from one and from zero."""
    return nn.Parameter(torch.linspace(0.5, 1.7, CHANNELS).reshape(shape or (CHANNELS, 1, 1)))


def ready(model: nn.Module, seed: int = 0) -> Any:
    """``model`` in eval mode with BatchNorms that do something."""
    return randomize_batchnorm(model, seed).eval()


def report(fused: fx.GraphModule) -> Report:
    return fused.meta["reparamc"]


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference of any tensor of two results, relative to the largest value of the expected one."""
    found, wanted = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert found[1] == wanted[1], "the results differ in structure"
    errors = [0.0]
    for a, e in zip(found[0], wanted[0], strict=True):
        if not isinstance(e, Tensor):
            assert a == e
            continue
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        size = e.double().abs().max().clamp_min(1e-300)
        errors.append(((a.double() - e.double()).abs().max() / size).item())
    return max(errors)


def run(model: nn.Module, *inputs: Any) -> Any:
    """The result on copies of the inputs, so that in-place operators cannot reach the originals."""
    with torch.no_grad():
        return model(*pytree.tree_map_only(Tensor, Tensor.clone, inputs))


def compared(original: nn.Module, fused: nn.Module, *args: Any, resize: bool = True) -> list[OutputError]:
    """Both end to end on ``args``, and on the first other arguments that the original takes."""
    given: Call = args, {}
    trials = [(given, outputs(original, *given))]
    for other in others(given) if resize else ():
        with contextlib.suppress(Exception):
            trials.append((other, outputs(original, *other)))
            break
    return verify_end_to_end(original, fused, trials)


def images(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def check(model: nn.Module, *shapes: tuple[int, ...], examples: bool | None = None, **options: Any) -> fx.GraphModule:
    """Fuse in float64 with and without example inputs, in float32 with them, and compare on inputs of every shape.

    Returns the copy in float64 that was made with example inputs (without them if ``examples`` is False).
    """
    model = ready(model)
    result: Any = None
    for dtype, tolerance, ways in ((torch.float32, 2e-5, (True,)), (torch.float64, 1e-12, (False, True))):
        original = copy.deepcopy(model).to(dtype)
        inputs = images(*(shapes or SHAPES), dtype=dtype)
        for given in ways if examples is None else (examples,):
            fused = fuse_fx(original, inputs[0].clone() if given else None, **options)
            for x in inputs:
                assert relative_error(run(fused, x), run(original, x)) < tolerance
            result = fused
    return result


def counts(fused: nn.Module) -> tuple[int, int]:
    """Convolutions (and linear layers) and BatchNorms that are left."""
    kinds = [type(module) for module in fused.modules()]
    linear = sum(issubclass(k, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) for k in kinds)
    norms = sum(issubclass(k, nn.modules.batchnorm._BatchNorm) for k in kinds)
    graphs = [module.graph for module in fused.modules() if isinstance(module, fx.GraphModule)]
    functions = [n.target for graph in graphs for n in graph.nodes if n.op == "call_function"]
    linear += sum(t in (F.conv1d, F.conv2d, F.conv3d, F.linear) for t in functions)
    return linear, norms + functions.count(F.batch_norm)


def reasons(fused: fx.GraphModule) -> str:
    return "; ".join(k.reason for k in report(fused).kept)
