"""What folds and what stays: shared parts, functional forms, arithmetic, kinds of BatchNorm and of padding."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import CHANNELS, Net, check, conv_bn, counts, images, ready, reasons, relative_error, report, run, vector
from torch import nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.errors import InputError

# Sharing


def test_conv_called_twice_gets_private_copies() -> None:
    model = Net(
        lambda m, x: m.n1(m.conv(x)) * torch.relu(m.n2(m.conv(x))),
        conv=nn.Conv2d(CHANNELS, CHANNELS, 3),
        n1=nn.BatchNorm2d(CHANNELS),
        n2=nn.BatchNorm2d(CHANNELS),
    )
    assert counts(check(model)) == (2, 0)


def test_module_under_two_names() -> None:
    block = conv_bn()
    assert counts(check(Net(lambda m, x: m.b(torch.relu(m.a(x))), a=block, b=block))) == (2, 0)


def test_batchnorm_shared_by_two_convs() -> None:
    model = Net(
        lambda m, x: torch.relu(m.n(m.a(x))) + torch.relu(m.n(m.b(x))),
        a=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        b=nn.Conv2d(CHANNELS, CHANNELS, 1),
        n=nn.BatchNorm2d(CHANNELS),
    )
    assert counts(check(model)) == (2, 0)


def test_tied_weights() -> None:
    a, b = conv_bn(), conv_bn()
    b[0].weight = a[0].weight
    fused = check(Net(lambda m, x: torch.relu(m.a(x)) * torch.relu(m.b(x)), a=a, b=b))
    assert counts(fused) == (2, 0)


def test_weight_read_elsewhere_keeps_its_value() -> None:
    model = Net(lambda m, x: (m.block(x), m.block[0].weight.sum()), block=conv_bn())
    assert counts(check(model)) == (1, 0)


def test_result_of_conv_used_twice_stays() -> None:
    model = Net(lambda m, x: m.block[1](y := m.block[0](x)) * torch.sigmoid(y), block=conv_bn())
    assert counts(check(model)) == (1, 1)


def test_result_of_conv_returned_stays() -> None:
    model = Net(lambda m, x: {"norm": m.block[1](y := m.block[0](x)), "conv": [y, (y, None)]}, block=conv_bn())
    assert counts(check(model)) == (1, 1)


# Functional forms


def test_functional_conv_and_norm() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)
        return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, False, 0.1, 0.1)

    model = Net(forward, conv=nn.Conv2d(CHANNELS, CHANNELS, 3), norm=nn.BatchNorm2d(CHANNELS))
    assert counts(check(model, examples=True)) == (1, 0)


def test_functional_norm_in_training_mode_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(m.conv(x), None, None, training=True)

    assert counts(check(Net(forward, conv=nn.Conv2d(CHANNELS, CHANNELS, 3)))) == (1, 1)


def test_weight_computed_at_run_time_stays() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.norm(F.conv2d(x, m.conv.weight * x.mean(), padding=1))

    model = Net(forward, conv=nn.Conv2d(CHANNELS, CHANNELS, 3), norm=nn.BatchNorm2d(CHANNELS))
    assert counts(check(model)) == (1, 1)


class WeightStandardized(nn.Conv2d):
    def forward(self, x: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.relu(super().forward(x))


def test_subclasses_are_taken_by_what_they_compute() -> None:
    check(nn.Sequential(WeightStandardized(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)))
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), NormAndActivation(CHANNELS), nn.Conv2d(CHANNELS, 5, 1))
    check(model, (2, CHANNELS, 7, 6), (1, CHANNELS, 7, 6))  # exported, for images of one size


def test_forward_replaced_on_one_module() -> None:
    for at, forward in (
        (0, lambda self, x: F.conv2d(x * 2, self.weight, self.bias, padding=1)),
        (1, lambda self, x: torch.relu(x)),
    ):
        model = conv_bn()
        model[at].forward = forward.__get__(model[at])
        check(model)


# Arithmetic


ARITHMETIC = {
    "add alpha": lambda m, x: torch.add(m.a(x), m.b(x), alpha=2.5),
    "sub alpha": lambda m, x: torch.sub(m.a(x), m.b(x), alpha=-3),
    "method alpha": lambda m, x: m.a(x).add(m.b(x), alpha=2).sub(x, alpha=0.5),
    "scalar right": lambda m, x: (m.a(x) * 3 - 1) / 2 + 0.25,
    "scalar left": lambda m, x: 1 - 2 * m.a(x),
    "number minus, alpha": lambda m, x: torch.add(m.a(x), 3, alpha=2),
    "division by the branch": lambda m, x: 2 / (m.a(x).abs() + 1),
    "plus zero": lambda m, x: 0 + m.a(x) + 0,
    "sum": lambda m, x: sum([m.a(x), m.b(x), x]),
    "augmented": lambda m, x: _augmented(m.a(x), m.b(x)),
    "twice": lambda m, x: (y := m.a(x)) + y,
    "minus itself": lambda m, x: (y := m.a(x)) - y + x,
    "negation": lambda m, x: -m.a(x) + (-m.b(x)),
    "torch functions": lambda m, x: torch.neg(torch.mul(torch.div(m.a(x), 3), m.g)),
    "vector left": lambda m, x: m.g * m.a(x),
    "vector difference": lambda m, x: m.g - m.a(x),
    "divided by vector": lambda m, x: m.a(x) / m.g,
    "tensor with no axis": lambda m, x: m.a(x) * m.g.sum(),
    "floor division": lambda m, x: torch.div(m.a(x) * 8, 3, rounding_mode="floor"),
    "dtype raised by a tensor": lambda m, x: m.a(x) * torch.ones(CHANNELS, 1, 1, dtype=torch.float64),
    "branches of a residual": lambda m, x: x + m.g * (m.a(x) + m.b(x) - x),
}


def _augmented(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    y += z
    y -= 1
    y *= 2
    y /= 3
    return y


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str) -> None:
    check(Net(ARITHMETIC[name], a=conv_bn(), b=conv_bn(1), g=vector()))


@pytest.mark.parametrize("name", ["add alpha", "sub alpha", "sum", "augmented"])
def test_arithmetic_merges(name: str) -> None:
    assert counts(check(Net(ARITHMETIC[name], a=conv_bn(), b=conv_bn(1)))) == (1, 0)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_old_order_of_alpha() -> None:
    check(Net(lambda m, x: torch.add(m.a(x) * 3.0, 2, x), a=conv_bn()))


@pytest.mark.parametrize("shape", [(6,), (7, 1), (2, 1, 1, 1), (CHANNELS, 7, 6), (1, 1, 1, 1, 1)])
def test_constant_along_another_axis_stays(shape: tuple[int, ...]) -> None:
    factor = nn.Parameter(torch.rand(shape) + 0.5)
    check(Net(lambda m, x: m.a(x) * m.g, a=conv_bn(), g=factor), (2, CHANNELS, 7, 6))


@pytest.mark.parametrize("shape", [(CHANNELS,), (CHANNELS, 1), (CHANNELS, 1, 1), (CHANNELS, 1, 1, 1)])
def test_axes_of_equal_length_are_not_confused(shape: tuple[int, ...]) -> None:
    side = (CHANNELS,) * 4
    check(Net(lambda m, x: m.a[0](x) * m.g, a=conv_bn(), g=vector(*shape)), side)
    check(Net(lambda m, x: m.a[0](x * m.g), a=conv_bn(padding=0), g=vector(*shape)), side)
    check(Net(lambda m, x: x + m.a[0](x) * m.g, a=conv_bn(), g=vector(*shape)), side)


def test_constant_that_widens_one_channel_stays() -> None:
    check(Net(lambda m, x: m.a(x) * m.g, a=conv_bn(out=1), g=vector()))
    check(Net(lambda m, x: m.a(x) + x, a=conv_bn(out=1)))


def test_integer_images_are_not_handed_to_the_convolution() -> None:
    model = Net(lambda m, x: m.conv(x / 255), conv=nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2)).eval()
    image = torch.arange(2 * CHANNELS * 36).reshape(2, CHANNELS, 6, 6).to(torch.uint8)
    for example in (None, image):
        assert relative_error(run(fuse_fx(model, example), image), run(model, image)) < 1e-5


class Frozen(nn.Module):
    """BatchNorm of four buffers and arithmetic, as in detection models."""

    def __init__(self) -> None:
        super().__init__()
        for i, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            self.register_buffer(name, torch.rand(CHANNELS, generator=torch.Generator().manual_seed(i)) + 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = ("weight", "bias", "running_var", "running_mean")
        weight, bias, variance, mean = (self.get_buffer(name).reshape(1, -1, 1, 1) for name in names)
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_batchnorm() -> None:
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), Frozen(), nn.ReLU())
    fused = check(model)
    assert [n.op for n in fused.graph.nodes if n.op != "placeholder"][-3:] == ["call_module", "call_module", "output"]
    assert fused.meta["reparamc"].after.conv == 1


# Kinds of BatchNorm


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"eps": 0.1}, {"eps": 10.0}])
def test_options_of_batchnorm(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(CHANNELS, 6, 3), nn.BatchNorm2d(6, **options))
    assert counts(check(model)) == (1, 0)


def test_statistics_of_the_batch_stay() -> None:
    fused = check(nn.Sequential(nn.Conv2d(CHANNELS, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)))
    assert counts(fused) == (1, 1)
    assert "statistics of the batch" in reasons(fused)


def test_sync_batchnorm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(conv_bn())
    assert counts(check(model, examples=True)) == (1, 0)


@pytest.mark.parametrize("which", ["whole", "norm", "container"])
def test_training_mode_is_refused(which: str) -> None:
    model: Any = nn.Sequential(conv_bn(), nn.ReLU()).eval()
    {"whole": model, "norm": model[0][1], "container": model[0]}[which].train()
    modes = [m.training for m in model.modules()]
    with pytest.raises(InputError, match=r"\.eval\(\)"):
        fuse_fx(model)
    assert [m.training for m in model.modules()] == modes


def test_gamma_zero_and_tiny_variance() -> None:
    model: Any = conv_bn().eval()
    model[1].weight.data[0] = 0
    model[1].running_var[1] = 0
    x = images((2, CHANNELS, 5, 6), dtype=torch.float32)[0]
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay(value: float) -> None:
    model: Any = conv_bn().eval()
    model[0].weight.data[0, 0, 0, 0] = value
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 1)
    torch.testing.assert_close(run(fused, x), run(model, x), equal_nan=True)


def test_norm_before_padding_stays() -> None:
    norm, conv = nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, 6, 3, padding=1)
    assert counts(check(nn.Sequential(norm, conv))) == (1, 1)
    assert counts(check(nn.Sequential(norm, nn.Conv2d(CHANNELS, 6, 1, padding=1)))) == (1, 1)
    assert counts(check(nn.Sequential(norm, nn.Conv2d(CHANNELS, 6, 3, groups=2)))) == (1, 0)
    assert counts(check(nn.Sequential(norm, nn.ZeroPad2d(1), nn.Conv2d(CHANNELS, 6, 3)))) == (1, 1)
    assert counts(check(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(CHANNELS, 6, 1)))) == (1, 1)


# Kinds of convolution


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (2, 3), (4, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_same(kernel: int, dilation: int) -> None:
    model = Net(
        lambda m, x: x + m.n(m.a(x)) + m.b(x),
        a=nn.Conv2d(CHANNELS, CHANNELS, kernel, padding="same", dilation=dilation),
        b=nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same"),
        n=nn.BatchNorm2d(CHANNELS),
    )
    assert counts(check(model))[1] == 0


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_modes_are_no_branches_of_a_kernel(mode: str) -> None:
    model = Net(lambda m, x: m.a(x) + m.b(x), a=conv_bn(padding_mode=mode), b=conv_bn(1))
    fused = check(model)
    assert counts(fused) == (2, 0)
    assert "its parts start from different values" in reasons(fused)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_ranks(rank: int, groups: int) -> None:
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    model = Net(
        lambda m, x: x + m.n(m.a(x)) + m.b(x),
        a=conv(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False),
        b=conv(CHANNELS, CHANNELS, 1),
        n=norm(CHANNELS),
    )
    assert counts(check(model, (2, CHANNELS, 5, 6, 3)[: rank + 2], (1, CHANNELS, 4, 7, 4)[: rank + 2]))[1] == 0


def test_equal_lengths_of_one_dimension() -> None:
    model = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm1d(CHANNELS))
    assert counts(check(model, (CHANNELS,) * 3, examples=True)) == (1, 0)


@pytest.mark.parametrize(
    "between", [lambda x: F.glu(x, 1), lambda x: x.exp()[:, :CHANNELS], lambda x: x.sort()[0][:, ::2]]
)
def test_the_rank_after_any_operator_follows_from_an_example(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Net(
        lambda m, x: m.norm(m.conv(between(m.wide(x)))),
        wide=nn.Conv1d(CHANNELS, 2 * CHANNELS, 3),
        conv=nn.Conv1d(CHANNELS, CHANNELS, 3),
        norm=nn.BatchNorm1d(CHANNELS),
    )
    fused = check(model, (2, CHANNELS, 9), examples=True)
    assert counts(fused) == (2, 0)
    with pytest.raises(AssertionError, match="must have 3 axes"):
        fused(torch.ones(CHANNELS, 9))


@pytest.mark.parametrize("stride", [1, 2])
def test_branches_on_different_grids_stay(stride: int) -> None:
    model = Net(
        lambda m, x: m.a(x) + m.b(x),
        a=conv_bn(3, stride=2, padding=1),
        b=conv_bn(2, stride=2, padding=0) if stride == 2 else conv_bn(4, stride=1, padding=0),
    )
    assert counts(check(model, (2, CHANNELS, 6, 6)))[0] == 2


def test_unbatched_images() -> None:
    model = Net(lambda m, x: x + m.g * m.conv(x), conv=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), g=vector())
    assert counts(check(model, (CHANNELS, 7, 6), (CHANNELS, 4, 4))) == (1, 0)
    check(model, (2, CHANNELS, 7, 6))


def test_live_dropout_stays() -> None:
    model = Net(lambda m, x: m.block[1](F.dropout(m.block[0](x), 0.5, training=True)), block=conv_bn())
    fused = fuse_fx(ready(model), torch.ones(1, CHANNELS, 6, 6))
    assert counts(fused) == (1, 1)
    assert len({run(fused, torch.ones(1, CHANNELS, 6, 6)).sum().item() for _ in range(3)}) == 3


def test_dead_dropout_and_identity_are_looked_through() -> None:
    model = nn.Sequential(nn.Conv2d(CHANNELS, 6, 3), nn.Dropout(0.5), nn.Identity(), nn.BatchNorm2d(6))
    assert counts(check(model)) == (1, 0)
    functional = Net(lambda m, x: m.block[1](F.dropout(m.block[0](x), 0.5, m.training)), block=conv_bn())
    assert counts(check(functional)) == (1, 0)


def test_passes_can_be_chosen() -> None:
    model = ready(Net(lambda m, x: m.a(x) + m.b(x), a=conv_bn(), b=conv_bn(1)))
    assert counts(fuse_fx(model, passes=["bn-folding"])) == (2, 0)
    assert counts(fuse_fx(model, passes=iter(["bn-folding", "branch-merging"]))) == (1, 0)
    assert counts(fuse_fx(model, skip=["branch-merging"])) == (2, 0)
    assert counts(fuse_fx(model, skip=["bn-folding"])) == (2, 2)
    assert counts(fuse_fx(model, passes=[])) == (2, 2)
    assert not report(fuse_fx(model, passes=[])).changed
    wrongs: list[dict[str, Any]] = [{"passes": ["bn"]}, {"skip": ["bn"]}]
    for wrong in wrongs:
        with pytest.raises(InputError, match=r"unknown pass 'bn'; the passes are .*bn-folding"):
            fuse_fx(model, **wrong)
    with pytest.raises(InputError, match="unknown verification level"):
        fuse_fx(model, verify="deep")


@pytest.mark.parametrize(("width", "objective"), [(9, "params"), (400, "latency")])
def test_a_matrix_that_is_read_turned_as_well_is_stored_once(width: int, objective: str) -> None:
    """As a tied embedding, of which the module is called, or the matrix is multiplied with."""

    def multiplied(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x @ m.w.weight.t()) * m.s) @ m.w.weight

    def called(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.w(x).relu() @ m.w.weight.t().t()

    for forward in (multiplied, called) if objective == "params" else (called,):
        model = ready(Net(forward, w=nn.Linear(width, 7, bias=False), s=nn.Parameter(torch.rand(7) + 0.5)))
        fused, x = fuse_fx(model, torch.randn(2, width), objective=objective), torch.randn(3, width)
        assert report(fused).after.parameters <= report(fused).before.parameters
        assert relative_error(fused(x), model(x)) < 1e-5


def test_constants_that_share_their_operands_over_and_over() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        w = m.w
        for _ in range(40):
            w = torch.sin(w) + torch.cos(w)
        return m.bn(F.conv2d(x, w))

    model = ready(Net(forward, w=nn.Parameter(torch.randn(4, 3, 3, 3)), bn=nn.BatchNorm2d(4)))
    fused, x = fuse_fx(model, torch.randn(1, 3, 8, 8), specialize=True), torch.randn(3, 3, 9, 7)
    assert report(fused).passes["constant-folding"]
    assert relative_error(fused(x), model(x)) < 1e-5
