"""The structure of a copy does not depend on the values of parameters, unless it is asked to."""

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import relative_error, report, run
from torch import nn

from reparamc import fuse_fx


class Residual(nn.Module):
    """The last BatchNorm of a residual branch starts as zero, as in many training recipes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.first, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.head((x + self.norm(self.conv(x))).relu().mean((2, 3)))


class Before(nn.Module):
    """A BatchNorm before a padded convolution, whose shift starts as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x.relu()))


class Scaled(nn.Module):
    """Layer scales of zero and of one, a convolution of zeros, and equal branches."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.delta = nn.Parameter(torch.zeros(3, 1, 1)), nn.Parameter(torch.ones(3, 1, 1))
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        nn.init.zeros_(self.c.weight)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.gamma * self.a(x).relu() + self.delta * x
        return y.relu() + self.a(y).sigmoid() + self.b(y).tanh() + self.c(y).relu()


class Picked(nn.Module):
    """Channels chosen by a buffer, which is no parameter of what is measured."""

    chosen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)
        self.register_buffer("chosen", torch.tensor([3, 1, 1, 0, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.index_select(self.conv(x), 1, self.chosen))


MODELS = (Residual, Before, Scaled, Picked)


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_fused_later_fits_the_copy_made_before(kind: type[nn.Module], verify: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 6)
    before = fuse_fx(kind().eval(), x, verify=verify)
    trained = filled(kind().eval())
    after = fuse_fx(trained, x, verify=verify)
    before.load_state_dict(after.state_dict())
    assert relative_error(run(before, x), run(trained, x)) < 1e-5
    assert report(before).after == report(after).after


def test_what_is_zero_now_leaves_where_that_is_wanted() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 6)
    for kind in (Residual, Before):
        model = kind().eval()
        fused, plain = fuse_fx(model, x, specialize=True), fuse_fx(model, x)
        assert report(fused).after.ops < report(plain).after.ops
        assert relative_error(run(fused, x), run(model, x)) < 1e-5
