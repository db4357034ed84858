"""`overparameterize`: trainable branches for a plain network, which `fuse_fx` takes back.

Each recipe adds branches beside convolutions, or beside linear layers, that add nothing at first: their last BatchNorm
has a factor of zero, or their last layer has weights of zero. So the network computes the same in training and in eval
mode, to rounding, and the branches come alive with the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reparamc.errors import InputError, InputTypeError
from reparamc.fx.calls import is_plain
from reparamc.fx.copying import copied


class Grown(nn.Module):
    """``main`` and its ``branches``, added. What code asks of a layer, such as its dtype, ``main`` answers."""

    def __init__(self, main: nn.Module, branches: list[nn.Module]) -> None:
        super().__init__()
        self.main, self.branches = main, nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        for branch in self.branches:
            y = y + branch(x)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("main"), name)


class Mixer(Grown):
    """FastViT's token mixer: ``x + scale * (mixer(x) - norm(x))``; here ``norm`` starts as the identity."""

    def __init__(self, main: nn.Module, branches: list[nn.Module], norm: nn.Module, channels: int) -> None:
        super().__init__(main, branches)
        self.norm = norm
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (super().forward(x) - (x + self.norm(x)))


def overparameterize(
    model: nn.Module,
    recipe: str,
    *,
    branches: int = 4,
    rank: int = 8,
    where: Callable[[str, nn.Module], bool] = lambda path, module: True,
) -> nn.Module:
    """A copy of ``model`` with trainable branches, which computes the same; ``fuse_fx`` takes them back.

    | recipe | branches beside a convolution (C) or a linear layer (L) | paper |
    |---|---|---|
    | "repvgg" | C: 1x1 + BatchNorm; BatchNorm | Ding et al., RepVGG, 2021 |
    | "acnet" | C: 1xk + BatchNorm, kx1 + BatchNorm | Ding et al., ACNet, 2019 |
    | "dbb" | C: 1x1; 1x1 - kxk; 1x1 - average; a BatchNorm after each | Ding et al., Diverse Branch Block, 2021 |
    | "mobileone" | C: several kxk + BatchNorm; 1x1 + BatchNorm; BatchNorm | Vasu et al., MobileOne, 2023 |
    | "repmixer" | depthwise C: skip connection, layer scale, BatchNorm | Vasu et al., FastViT, 2023 |
    | "lora" | L, C: down to ``rank`` and up again | Hu et al., LoRA, 2022 |

    Args:
        model: a module; it stays as it is.
        recipe: one of the names above.
        branches: how many kxk branches "mobileone" adds.
        rank: of "lora".
        where: chooses among the places, by path and module.

    Raises:
        InputTypeError: ``model`` is no module.
        InputError: there is no such recipe, or no place to grow.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"overparameterize takes a torch.nn.Module, not {type(model).__name__}")
    if recipe not in [*RECIPES]:
        raise InputError(f"unknown recipe {recipe!r}; the recipes are {', '.join(RECIPES)}")
    if not all(isinstance(n, int) and n >= 1 for n in (branches, rank)):
        raise InputError(f"branches and rank are whole numbers from 1, not {branches!r} and {rank!r}")
    grow, place = RECIPES[recipe]
    root = nn.Module()
    root.model = copied(model)
    replaced: dict[int, nn.Module] = {}
    for path, holder, name in list(_places(root)):
        old: Any = holder._modules[name]
        if id(old) not in replaced:
            made = grow(old, branches, rank) if is_plain(old) and where(path, old) else None
            replaced[id(old)] = old if made is None else _alike(made, old)
        holder._modules[name] = replaced[id(old)]
    if not any(isinstance(m, Grown) for m in replaced.values()):
        raise InputError(f"{type(model).__name__} has no place to grow for {recipe!r}, which needs {place}")
    return root.model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of ``model`` for an optimizer: those of BatchNorms in branches are not decayed."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"parameter_groups takes a torch.nn.Module, not {type(model).__name__}")
    mixers = [m for m in model.modules() if isinstance(m, Mixer)]
    grown = [*(m.branches for m in model.modules() if isinstance(m, Grown)), *(m.norm for m in mixers)]
    norms = [n for part in grown for n in part.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm)]
    bare = {id(p): p for n in norms for p in n.parameters(recurse=False)}
    bare |= {id(m.scale): m.scale for m in mixers}
    rest = [p for p in model.parameters() if id(p) not in bare]
    return [{"params": rest, "weight_decay": weight_decay}, {"params": [*bare.values()], "weight_decay": 0.0}]


def _places(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Convolutions and linear layers: path, where they are held, and their name there."""
    for path, holder in root.named_modules(remove_duplicate=False):
        if isinstance(holder, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            continue  # they read the weights of their layers without calling them
        for name, module in holder._modules.items():
            if type(module) in (nn.Conv2d, nn.Linear):
                yield f"{path}.{name}".partition(".")[2], holder, name


def _alike(made: nn.Module, old: nn.Module) -> nn.Module:
    """``made`` in the mode of ``old``, and where its weight is."""
    weight: Any = old.weight
    made.to(weight.device, weight.dtype)
    for module in made.modules():
        if module is not old:
            module.training = old.training
    return made


def _silent(norm: nn.Module) -> Any:
    """``norm``, giving zero."""
    nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
    return norm


def _convolution(like: nn.Conv2d, kernel: tuple[int, int], padding: tuple[int, int], **other: Any) -> nn.Conv2d:
    given: dict[str, Any] = {"stride": like.stride, "groups": like.groups, "bias": False} | other
    return nn.Conv2d(like.in_channels, like.out_channels, kernel, padding=padding, **given)


def _conv_bn(like: nn.Conv2d, kernel: tuple[int, int], padding: tuple[int, int], **other: Any) -> nn.Module:
    return nn.Sequential(_convolution(like, kernel, padding, **other), _silent(nn.BatchNorm2d(like.out_channels)))


def _margin(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Padding with which a kernel of one tap meets the middle of that of ``conv``; None where there is none."""
    if isinstance(conv.padding, str) or any(k % 2 == 0 for k in conv.kernel_size):
        return None
    reach = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    found = tuple(p - r for p, r in zip(conv.padding, reach, strict=True))
    return found if min(found) >= 0 else None  # type: ignore[return-value]


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"


def _points(conv: nn.Conv2d) -> list[nn.Module]:
    """1x1 + BatchNorm, and a BatchNorm alone, where the sizes allow it."""
    margin = _margin(conv)
    if margin is None:
        return []
    found = [_conv_bn(conv, (1, 1), margin)] if max(conv.kernel_size) > 1 else []
    keeps = conv.in_channels == conv.out_channels and max(conv.stride) == 1 and not any(margin)
    return [*found, _silent(nn.BatchNorm2d(conv.out_channels))] if keeps else found


def _grown(main: nn.Module, branches: list[nn.Module]) -> nn.Module | None:
    return Grown(main, branches) if branches else None


def _repvgg(module: Any, branches: int, rank: int) -> nn.Module | None:
    return _grown(module, _points(module)) if _is_conv(module) else None


def _mobileone(module: Any, branches: int, rank: int) -> nn.Module | None:
    if not _is_conv(module):
        return None
    geometry = {"dilation": module.dilation}
    alike = [_conv_bn(module, module.kernel_size, module.padding, **geometry) for _ in range(branches)]
    return _grown(module, [*alike, *_points(module)])


def _acnet(module: Any, branches: int, rank: int) -> nn.Module | None:
    if not _is_conv(module) or _margin(module) is None or min(module.kernel_size) == 1:
        return None
    (high, wide), (above, beside), (down, across) = module.kernel_size, module.padding, _margin(module)  # type: ignore[misc]
    dilation = module.dilation
    return Grown(
        module,
        [
            _conv_bn(module, (1, wide), (down, beside), dilation=dilation),
            _conv_bn(module, (high, 1), (above, across), dilation=dilation),
        ],
    )


def _dbb(module: Any, branches: int, rank: int) -> nn.Module | None:
    """The padding comes first in each branch, so that all that follows it is a kernel without borders."""
    if not _is_conv(module) or _margin(module) is None or max(module.kernel_size) == 1 or max(module.dilation) > 1:
        return None
    (above, beside), inside, out = module.padding, module.in_channels, module.out_channels
    pad = [beside, beside, above, above]
    dense = module.groups == 1 or module.groups < inside

    def point(channels: int) -> list[nn.Module]:
        layer = nn.Conv2d(inside, channels, 1, groups=module.groups, bias=False)
        return [nn.ZeroPad2d(tuple(pad)), layer, nn.BatchNorm2d(channels)]  # type: ignore[arg-type]

    found = [_conv_bn(module, (1, 1), _margin(module))]  # type: ignore[arg-type]
    if dense:
        second = _convolution(module, module.kernel_size, (0, 0))
        found.append(nn.Sequential(*point(inside), second, _silent(nn.BatchNorm2d(out))))
    start = point(out) if inside != out or dense else [nn.ZeroPad2d(tuple(pad))]  # type: ignore[arg-type]
    average = nn.AvgPool2d(module.kernel_size, module.stride)
    found.append(nn.Sequential(*start, average, _silent(nn.BatchNorm2d(out))))
    return Grown(module, found)


def _repmixer(module: Any, branches: int, rank: int) -> nn.Module | None:
    if not _is_conv(module) or not module.groups == module.in_channels == module.out_channels:
        return None
    if _margin(module) != (0, 0) or max(module.stride) > 1 or max(module.kernel_size) == 1:
        return None
    channels = module.out_channels
    return Mixer(module, [_conv_bn(module, (1, 1), (0, 0))], _silent(nn.BatchNorm2d(channels)), channels)


def _lora(module: Any, branches: int, rank: int) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        down: nn.Module = nn.Linear(module.in_features, rank, bias=False)
        up: Any = nn.Linear(rank, module.out_features, bias=False)
    elif _is_conv(module) and module.groups == 1:
        geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        down = nn.Conv2d(module.in_channels, rank, module.kernel_size, bias=False, **geometry)
        up = nn.Conv2d(rank, module.out_channels, 1, bias=False)
    else:
        return None
    nn.init.zeros_(up.weight)
    return Grown(module, [nn.Sequential(down, up)])


Grow = Callable[[Any, int, int], "nn.Module | None"]

RECIPES: dict[str, tuple[Grow, str]] = {
    "repvgg": (_repvgg, "a plain Conv2d with an odd kernel whose padding covers its reach"),
    "acnet": (_acnet, "a plain Conv2d with an odd kernel above 1 whose padding covers its reach"),
    "dbb": (_dbb, "a plain Conv2d with an odd kernel above 1, not dilated, whose padding covers its reach"),
    "mobileone": (_mobileone, "a plain Conv2d"),
    "repmixer": (_repmixer, "a plain depthwise Conv2d with an odd kernel above 1, of stride 1, that keeps the size"),
    "lora": (_lora, "a plain Linear or dense Conv2d"),
}
"""How to grow, and what is needed for it."""
