"""Branches are grown, start at the same function, train, and are taken back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fx_checks import Net
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparamc import InputError, InputTypeError, fuse_fx, overparameterize, parameter_groups
from reparamc.testing import randomize_batchnorm
from reparamc.training.grow import RECIPES


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Tokens(nn.Module):
    """One block of a vision transformer."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return (x + self.mlp(x)).mean(1)


def resnet() -> nn.Module:
    body = nn.Sequential(*conv_bn(6, 6, 3), nn.ReLU(), *conv_bn(6, 6, 3))
    return nn.Sequential(*conv_bn(3, 6, 3, 2), nn.ReLU(), Residual(body), nn.ReLU(), *conv_bn(6, 8, 1, 2))


def mobilenet() -> nn.Module:
    body = nn.Sequential(*conv_bn(6, 12, 1), nn.ReLU6(), *conv_bn(12, 12, 3, 1, 12), nn.ReLU6(), *conv_bn(12, 6, 1))
    return nn.Sequential(*conv_bn(3, 6, 3, 2), nn.ReLU6(), Residual(body), nn.Conv2d(6, 4, 1))


def convnext() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(6, 6, 7, padding=3, groups=6), ChannelsLast(), nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(),
        nn.Linear(12, 6), ChannelsLast(), ChannelsLast(),
    )  # fmt: skip
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), Residual(body))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet, "mobilenet": mobilenet, "convnext": convnext, "vit": Tokens,
}  # fmt: skip
PAIRS = [
    *((m, r) for m in ("resnet", "mobilenet") for r in ("repvgg", "acnet", "dbb", "mobileone", "lora")),
    *(("convnext", r) for r in ("repvgg", "acnet", "mobileone", "repmixer", "lora")),
    *(("vit", r) for r in ("mobileone", "lora")),
    ("mobilenet", "repmixer"),
]
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batchnorm(MODELS[name](), 0, X.float()).double().eval()


def shape(fused: Any) -> Any:
    """The layers that are called, and the sizes of all tensors."""
    calls = fused.graph.find_nodes(op="call_module")
    layers = Counter(type(fused.get_submodule(n.target)).__name__ for n in calls)
    return layers, Counter(tuple(t.shape) for t in fused.state_dict().values())


def trained(model: nn.Module, steps: int = 2) -> dict[str, Tensor]:
    """The gradients of the last step."""
    model.train()
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    model.eval()
    return {n: torch.zeros(()) if p.grad is None else p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_grown_trained_and_taken_back(name: str, recipe: str) -> None:
    model = plain(name)
    before = copy.deepcopy(model.state_dict())
    grown = overparameterize(model, recipe, rank=2)
    assert len(list(grown.parameters())) > len(list(model.parameters()))
    for mode in (True, False):
        torch.testing.assert_close(
            copy.deepcopy(grown).train(mode)(X), copy.deepcopy(model).train(mode)(X), rtol=1e-9, atol=1e-9
        )
    reference = shape(fuse_fx(model, X[:2], verify="region"))
    for name_, gradient in trained(grown).items():
        assert gradient.abs().max() > 0, name_
    fused: fx.GraphModule = fuse_fx(grown, X[:2], verify="region")
    with torch.no_grad():
        torch.testing.assert_close(fused(X), grown(X), rtol=1e-9, atol=1e-9)
    assert shape(fused) == reference
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_before_training_it_is_fused_to_the_plain_network() -> None:
    model = plain("resnet").float()
    grown = fuse_fx(overparameterize(model, "mobileone"), X.float())
    expected = fuse_fx(model, X.float())
    for a, b in zip(grown.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_groups() -> None:
    model = overparameterize(plain("resnet"), "repvgg")
    decayed, bare = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)
    norms = [m for n, m in model.named_modules() if ".branches." in n and isinstance(m, nn.BatchNorm2d)]
    assert {id(p) for p in bare["params"]} == {id(p) for m in norms for p in m.parameters()}
    assert len(decayed["params"]) + len(bare["params"]) == len(list(model.parameters()))


def test_where_and_what_is_shared() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 2))
    grown: Any = overparameterize(model, "lora", where=lambda path, module: path != "3")
    assert grown[0] is grown[2]
    assert type(grown[3]) is nn.Linear
    assert type(model[0]) is nn.Linear


def test_a_convolution_by_itself() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).half()
    grown = overparameterize(conv, "repvgg")
    assert {p.dtype for p in grown.parameters()} == {torch.float16}


class Asking(nn.Module):
    """A forward that reads attributes of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.to(self.conv.weight.dtype)).mean((2, 3)).view(-1, self.head.in_features))


def test_layers_that_are_asked_for_their_attributes() -> None:
    grown = overparameterize(Asking().double(), "mobileone")
    trained(grown)
    torch.testing.assert_close(fuse_fx(grown, X, verify="region")(X), grown(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_that_share_a_weight_or_are_asked_for_it(recipe: str) -> None:
    """No recipe changes a weight: another layer may hold it, or the model may read it."""
    a, b = (nn.Conv2d(4, 4, 3, padding=1, groups=4).double() for _ in range(2))
    b.weight = a.weight
    run = lambda m, x: m.last(m.b(torch.relu(m.a(x.to(m.b.weight.dtype)))))  # noqa: E731
    model = Net(run, a=a, b=b, last=nn.Conv2d(4, 5, 1).double())
    grown, x = overparameterize(model, recipe), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(grown(x), model(x), rtol=1e-9, atol=1e-9)


def test_layers_that_torch_reads_without_a_call_stay() -> None:
    encoder = nn.TransformerEncoderLayer(6, 2, 4, batch_first=True)
    grown: Any = overparameterize(nn.Sequential(nn.Linear(6, 6), encoder), "lora")
    assert (type(grown[1].linear1), type(grown[0]).__name__) == (nn.Linear, "Grown")


@pytest.mark.parametrize("recipe", ["repvgg", "acnet", "dbb", "repmixer"])
def test_no_place_to_grow(recipe: str) -> None:
    with pytest.raises(InputError, match=f"Tokens has no place to grow for '{recipe}', which needs a plain"):
        overparameterize(Tokens(), recipe)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="unknown recipe 'vgg'; the recipes are repvgg, acnet, dbb"):
        overparameterize(resnet(), "vgg")
    with pytest.raises(InputTypeError, match=r"takes a torch\.nn\.Module, not int"):
        overparameterize(3, "lora")  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match=r"takes a torch\.nn\.Module, not int"):
        parameter_groups(3, 0.1)  # type: ignore[arg-type]
    for wrong in ({"branches": 0}, {"branches": "4"}, {"rank": 1.5}):
        with pytest.raises(InputError, match="branches and rank are whole numbers from 1"):
            overparameterize(resnet(), "mobileone", **wrong)  # type: ignore[arg-type]
