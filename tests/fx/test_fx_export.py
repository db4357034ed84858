"""Models that torch.fx cannot follow, and the ways in which fuse_fx is called."""

import pytest

pytest.importorskip("torch")

import copy
import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fx_checks import CHANNELS, Net, conv_bn, counts, images, ready, relative_error, report, run, vector
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.errors import InputError, InputTypeError, VerificationError
from reparamc.fx.emit import Emitter

C = CHANNELS


class PadsAsNeeded(nn.Module):
    """A convolution whose padding is computed from the sizes of its input, with control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(C, C, 3, 2), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        pads = [max((-(-e // 2) - 1) * 2 + 3 - e, 0) for e in x.shape[-2:]]
        if pads[0] > 0 or pads[1] > 0:
            x = F.pad(x, [0, pads[1], 0, pads[0]])
        return self.n(self.a(x))


class Standardised(nn.Module):
    """Weights computed from parameters in forward, beside a loop over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn(1)
        self.weight = nn.Parameter(torch.linspace(-1, 1, C * C * 9).reshape(C, C, 3, 3) ** 2)
        self.mix = nn.Parameter(torch.linspace(0.5, 2, C * 3).reshape(C, 3))
        self.n = nn.BatchNorm2d(C)
        self.g = vector()

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("oikl,ol->oikl", self.weight, self.mix) / self.weight.std()
        y = self.n(F.conv2d(x, weight, padding=1)) + self.g * (self.a(x) + self.b(x))
        return torch.stack([*y.unbind(1)], 1)


class Halves(nn.Module):
    """Two branches of stride 2 whose sizes agree for even sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C, C, 3, 2, 1), nn.Conv2d(C, C, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x))


class HalvesEven(Halves):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            raise ValueError("odd")
        return super().forward(x)


@pytest.mark.parametrize(("make", "left"), [(Halves, 2), (HalvesEven, 2)])
def test_sizes_that_agree_for_some_sizes_only(make: Callable[[], nn.Module], left: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, C, 8, 6)
    fused = fuse_fx(model, (x,))
    assert counts(fused)[0] == left
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-6


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make", [PadsAsNeeded, Standardised])
def test_what_torch_fx_cannot_follow(make: Callable[[], nn.Module], inside: bool) -> None:
    torch.manual_seed(0)
    block = make()
    model = ready(nn.Sequential(conv_bn(), block, nn.ReLU()) if inside else block)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        original = copy.deepcopy(model).to(dtype)
        state = copy.deepcopy(original.state_dict())
        x = images((1, C, 8, 7), dtype=dtype)[0]
        fused = fuse_fx(original, x)
        assert counts(fused) == (1 + inside, 0)
        assert report(fused).after.batchnorm == 0
        by_export = make is Standardised  # the other one calls its BatchNorm right after its convolution
        assert [p.how for p in report(fused).parts].count("torch.export") == by_export
        assert report(fused).end_to_end
        assert not fused.training
        assert all(torch.equal(state[k], v) for k, v in original.state_dict().items())
        kept = {t.untyped_storage().data_ptr() for t in (*original.parameters(), *original.buffers())}
        assert not kept & {t.untyped_storage().data_ptr() for t in (*fused.parameters(), *fused.buffers())}
        assert list(inspect.signature(fused.forward).parameters) == ["input" if inside else "x"]
        for batch in images((1, C, 8, 7), (2, C, 8, 7), (5, C, 8, 7), dtype=dtype):
            assert relative_error(run(fused, batch), run(original, batch)) < tolerance
            assert relative_error(run(copy.deepcopy(fused), batch), run(original, batch)) < tolerance
        for other in images((1, C, 9, 9), (3, C, 6, 12), dtype=dtype):
            assert relative_error(run(fused, other), run(original, other)) < tolerance


def test_structures_and_keywords_of_an_exported_model() -> None:
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = PadsAsNeeded()

        def forward(self, batch: dict[str, Tensor], factor: Tensor | None = None) -> dict[str, Any]:
            y = self.block(batch["image"])
            return {"out": [y if factor is None else y * factor, None], "n": 3}

    model = ready(Batch()).double()
    x, factor = images((2, C, 8, 7), (2, 1, 1, 1))
    fused = fuse_fx(model, {"batch": {"image": x}})
    assert counts(fused) == (1, 0)
    with torch.no_grad():
        assert relative_error(fused(batch={"image": x}), model({"image": x})) < 1e-12
    assert factor is not None


def test_without_examples_nothing_is_exported() -> None:
    with pytest.raises(InputError, match="cannot trace"):
        fuse_fx(ready(PadsAsNeeded()))
    fused = fuse_fx(ready(nn.Sequential(conv_bn(), PadsAsNeeded())))
    assert counts(fused) == (2, 0)


def test_hooks_are_not_lost_in_an_export() -> None:
    model = ready(nn.Sequential(conv_bn(), PadsAsNeeded()))
    calls: list[int] = []
    model[1].a.register_forward_hook(lambda *_: calls.append(1))
    x = images((1, C, 8, 7), dtype=torch.float32)[0]
    fused = fuse_fx(model, x)
    assert report(fused).note == ""
    calls.clear()
    run(fused, x)
    assert calls == [1]


TIMM = {"efficientvit_b0": (50, 0), "tf_efficientnet_lite0": (49, 0), "levit_128s": (4, 0)}
"""Convolutions, and BatchNorms that stay."""


@pytest.mark.parametrize("name", TIMM)
def test_timm(timm: Any, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, 3, size, size)
    fused = fuse_fx(ready(model).double(), x.double(), verify="region")
    assert (report(fused).after.conv, report(fused).after.batchnorm) == TIMM[name]
    both = torch.cat([x, x.flip(3)]).double()
    assert relative_error(run(fused, both), run(model, both)) < 1e-8


# Ways to call


def test_autocast_is_no_false_alarm() -> None:
    model = ready(nn.Sequential(*[nn.Sequential(conv_bn(), nn.ReLU()) for _ in range(3)]))
    x = images((1, C, 8, 8), dtype=torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fuse_fx(model, x)
    assert counts(fused) == (3, 0)
    assert report(fused).end_to_end[0].max_rel < 1e-5
    with torch.inference_mode():
        assert counts(fuse_fx(model, x)) == (3, 0)


@pytest.mark.parametrize("wrong", [{"passes": 3}, {"skip": None}, {"passes": "bn-folding"}, {"skip": [3]}])
def test_wrong_names_of_passes(wrong: Any) -> None:
    with pytest.raises(InputError, match="takes the names of passes"):
        fuse_fx(ready(conv_bn()), **wrong)


def test_the_original_runs_few_times_on_the_examples_as_they_are() -> None:
    """Once to be followed, and to see whether it computes the same again, as a whole and as the graph's measure."""
    seen: list[Tensor] = []

    class Watched(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            if type(input) is Tensor:
                seen.append(input)
            return super().forward(input)

    x = images((1, C, 8, 8), dtype=torch.float32)[0]
    fuse_fx(ready(Watched(conv_bn())), x)
    assert 1 <= sum(torch.equal(s, x) for s in seen) <= 4


def test_a_copy_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Emitter, e: Any) -> Any:
        return self._call(torch.reshape, self.value(e.x), (3, 3))

    monkeypatch.setattr(Emitter, "_conv", broken)
    with pytest.raises(VerificationError, match="does not run") as raised:
        fuse_fx(ready(conv_bn()), torch.ones(1, C, 8, 8))
    assert "\n" not in str(raised.value)


def test_arguments_keep_their_names() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = conv_bn()

        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0, shift: Tensor) -> Tensor:
            return self.block(x) * scale + shift

    model = ready(Keywords())
    x, shift = torch.ones(1, C, 5, 6), torch.ones(6)
    fused = fuse_fx(model, {"x": x, "shift": shift})
    with torch.no_grad():
        expected = model(x, shift=shift)
        assert relative_error(fused(x, mask=None, scale=2.0, shift=shift), expected) < 1e-5
        assert relative_error(fused(x=x, shift=shift), expected) < 1e-5
        assert relative_error(fused(x, scale=3.0, shift=shift), model(x, scale=3.0, shift=shift)) < 1e-5


# Ranks and sizes


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_norm_folded_for_one_rank_refuses_the_other(kind: str) -> None:
    first, shape = (nn.Linear(C, C), (C, C)) if kind == "linear" else (nn.Conv1d(C, C, 1), (C, C, C))
    model = ready(nn.Sequential(first, nn.BatchNorm1d(C))).double()
    x = images(shape)[0]
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-12
    other = x[0] if kind == "conv" else x[None].repeat(2, 1, 1)
    assert relative_error(run(model[1], run(first, other)), run(model, other)) == 0  # the original takes it
    with pytest.raises(AssertionError, match="must have"):
        run(fused, other)
    again = fuse_fx(fused, x)
    assert relative_error(run(again, x), run(model, x)) < 1e-12


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: torch.cat([y, m.b(y)], 1),
        lambda m, y: y[:, :2],
        lambda m, y: y.chunk(2, 1)[0],
        lambda m, y: m.b(y.flip(1)),
        lambda m, y: y * m.g,
        lambda m, y: y * m.g[:, :1],
    ],
)
def test_an_axis_counted_from_the_first_holds_for_one_rank(between: Callable[..., Tensor]) -> None:
    """A convolution takes one image without a batch as well, and such an axis is another one then."""
    model = ready(
        Net(lambda m, x: between(m, m.a(x)), a=nn.Conv2d(C, C, 1), b=nn.Conv2d(C, C, 1), g=vector(1, C, 1, 1))
    ).double()
    x = images((2, C, C, C))[0]
    fused = fuse_fx(model, x)
    assert report(fused).rewrites
    assert relative_error(run(fused, x), run(model, x)) < 1e-12
    assert run(model, x[0]).ndim > 0  # the original takes it
    with pytest.raises(AssertionError, match="x must have 4 axes"):
        run(fused, x[0])


def test_an_argument_of_whole_numbers_has_a_rank_too() -> None:
    model = ready(nn.Sequential(nn.Embedding(9, C), nn.Linear(C, C), nn.BatchNorm1d(C)))
    fused = fuse_fx(model, torch.tensor([1, 2, 3]))
    assert counts(fused) == (1, 0)
    assert run(model, torch.zeros(2, C, dtype=torch.int64)).shape == (2, C, C)
    with pytest.raises(AssertionError, match="must have 1 axes"):
        run(fused, torch.zeros(2, C, dtype=torch.int64))


def test_a_squeeze_may_leave_another_rank() -> None:
    model = ready(
        Net(lambda m, x: m.a(x.mean((2, 3), keepdim=True).squeeze()) * m.g, a=nn.Linear(C, C), g=vector(1, C))
    ).double()
    x = images((3, C, 2, 2))[0]
    fused = fuse_fx(model, x)
    assert report(fused).rewrites
    assert relative_error(run(fused, x), run(model, x)) < 1e-5
    assert run(model, x[:1]).shape == (1, C)  # of a vector
    with pytest.raises(AssertionError, match="squeeze must have 2 axes"):
        run(fused, x[:1])


def test_no_rank_is_asserted_where_axes_are_counted_from_the_last() -> None:
    model = ready(
        Net(
            lambda m, x: m.wide(torch.cat([m.a(x) * m.g, m.b(x)], -3)),
            a=nn.Conv2d(C, C, 1),
            b=nn.Conv2d(C, C, 1),
            wide=nn.Conv2d(2 * C, C, 1),
            g=vector(),
        )
    ).double()
    x = images((2, C, 5, 6))[0]
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    for given in (x, x[0]):
        assert relative_error(run(fused, given), run(model, given)) < 1e-12


def test_no_rank_is_asserted_where_the_model_fixes_it() -> None:
    model = ready(
        Net(lambda m, x: m.t(m.head(m.a(x).mean((2, 3)))), a=conv_bn(), head=nn.Linear(C, 5), t=nn.BatchNorm1d(5))
    )
    fused = fuse_fx(model, torch.ones(2, C, 5, 6))
    assert counts(fused) == (1, 0)
    assert not [n for n in fused.graph.nodes if n.target is torch._assert]


@pytest.mark.parametrize("operator", [torch.add, torch.mul])
def test_constant_with_the_rank_of_its_operand(operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The sizes of a constant say nothing about those of a value of unknown sizes."""
    model = ready(
        Net(
            lambda m, x: m.n(operator(x[:, :, ::2, ::2], m.g)).sum((0, 2, 3)), n=nn.BatchNorm2d(C), g=vector(1, C, 1, 1)
        )
    )
    one, all_ = images((2, 1, 6, 7), (2, C, 6, 7))
    for example in (one, all_):
        fused = fuse_fx(model.double(), example)
        for x in (one, all_):
            assert relative_error(run(fused, x), run(model, x)) < 1e-12


def test_sizes_are_those_of_their_own_axis() -> None:
    """A number of channels that one axis must have is not taken for another axis."""
    model = ready(
        Net(
            lambda m, x: m.linear((m.a(x).flatten(2).transpose(1, 2) * m.g).flatten(0, 1)),
            a=conv_bn(),
            linear=nn.Linear(C, 3),
            g=vector(C),
        )
    ).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((2, C, 3, 5), (1, C, 6, C)):
            x = images(shape)[0]
            for example in (None, x):
                assert relative_error(run(fuse_fx(model, example), x), run(model, x)) < 1e-12


class Steered(nn.Module):
    """A module with control flow, which torch.export alone follows."""

    def __init__(self, f: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.net = Net(f, **parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.shape[-1] > 2 else x.exp())


def test_an_exported_copy_refuses_another_rank() -> None:
    model = ready(Steered(lambda m, x: m.n(m.a(x)), a=nn.Linear(C, C), n=nn.BatchNorm1d(C)))
    fused = fuse_fx(model, torch.ones(3, C))
    assert counts(fused) == (1, 0)
    assert run(fused, torch.ones(5, C)).shape == (5, C)
    assert run(model, torch.ones(2, C, C)).ndim == 3
    with pytest.raises(AssertionError, match="must have 2 axes"):
        run(fused, torch.ones(2, C, C))


@pytest.mark.parametrize(
    ("f", "dtype"),
    [
        (lambda m, x: x * 0.5 + x * 0.5, torch.int64),
        (lambda m, x: x * 0.0 + x, torch.int64),
        (lambda m, x: x + 0 * x.relu().double(), torch.float32),
        (lambda m, x: x.relu().half() + 0 * x, torch.float32),
    ],
)
def test_what_widens_a_dtype_stays(f: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A factor of one and a term of zeros may be what the dtype of a result comes from."""
    model = ready(Steered(f))
    x = torch.arange(6 * C).reshape(2, C, 1, 3).to(dtype)
    fused = fuse_fx(exported(model, x).module(), x)
    assert fused(x).dtype == model(x).dtype
    assert torch.equal(fused(x), model(x))


# Exported programs


def exported(model: nn.Module, x: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (x,), **options)


def small() -> Any:
    return nn.Sequential(conv_bn(), nn.ReLU(), nn.Dropout(0.5))


def test_an_exported_program_in_eval_mode() -> None:
    """Its module says that it trains, and refuses eval(); its graph says what it does."""
    (x, other) = images((2, C, 6, 5), (3, C, 6, 5), dtype=torch.float32)
    original = ready(small())
    program = exported(original, x, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    module = program.module()
    assert module.training
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fused = fuse_fx(module, x)
    assert counts(fused) == (1, 0)
    for given in (x, other):
        assert relative_error(run(fused, given), run(original, given)) < 1e-5
    assert not any(m.training for m in fused.modules())
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert counts(fuse_fx(fused, x)) == (1, 0)


@pytest.mark.parametrize(
    "model", [conv_bn(), nn.Sequential(nn.Conv2d(C, C, 1), nn.Dropout(0.5))], ids=["norm", "dropout"]
)
def test_an_exported_program_in_training_mode(model: nn.Module) -> None:
    (x,) = images((2, C, 6, 5), dtype=torch.float32)
    module = exported(model.train(), x).module()
    with pytest.raises(
        InputError, match=r"exported in training mode, for aten\.(batch_norm|dropout)\.default"
    ) as raised:
        fuse_fx(module, x)
    assert str(raised.value).endswith("call .eval() on what it was exported from, and export that again")
    again = fuse_fx(exported(model.eval(), x).module(), x)
    assert relative_error(run(again, x), run(model, x)) < 1e-5


def test_a_norm_without_statistics_has_those_of_the_batch_in_any_mode() -> None:
    (x,) = images((2, C, 6, 5), dtype=torch.float32)
    model = ready(nn.Sequential(conv_bn(), nn.ReLU(), nn.BatchNorm2d(C, track_running_stats=False)))
    fused = fuse_fx(exported(model, x).module(), x)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


def test_an_exported_program_itself() -> None:
    (x,) = images((2, C, 6, 5), dtype=torch.float32)
    with pytest.raises(InputTypeError, match="not an ExportedProgram; pass it to fuse_exported"):
        fuse_fx(exported(ready(conv_bn()), x), x)


class Deciding(nn.Module):
    """Control flow that depends on values: nothing can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y if y.sum() > 0 else -y


def test_the_exporter_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing but the one line; and what torch logs otherwise is logged as before."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    filters = [list(h.filters) for h in logger.handlers]
    fused = fuse_fx(ready(Deciding()), *images((2, C, 6, 5), dtype=torch.float32))
    assert (type(fused), counts(fused)) == (Deciding, (1, 0))
    assert capfd.readouterr() == ("", "")
    assert [list(h.filters) for h in logger.handlers] == filters


def test_the_exporter_says_nothing_in_a_process_of_its_own() -> None:
    """Where nothing captures the streams that torch took hold of when it was imported."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import torch, reparamc, test_fx_export as t\n"
        "reparamc.fuse_fx(t.ready(t.Deciding()), torch.ones(2, t.C, 6, 5)); print('fused')"
    )
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("fused\n", "", 0)


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        if y.dtype == torch.float64:
            y = y.clamp(-0.1, 0.1)
        return self.n(y)


def test_no_export_holds_the_dtype_of_an_argument() -> None:
    model, (x,) = ready(Clamped()), images((2, CHANNELS, 6, 5))
    fused = fuse_fx(model, x.float(), verify="off")
    assert relative_error(run(fused.double(), x), run(model.double(), x)) < 1e-6


def test_no_export_refuses_larger_inputs() -> None:
    class Large(Clamped):
        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            return y * 2 if x.shape[2] > 30 else self.n(y)

    model, (x, large) = ready(Large()), images((2, CHANNELS, 6, 5), (1, CHANNELS, 40, 5), dtype=torch.float32)
    fused = fuse_fx(model, x, verify="off")
    assert all(relative_error(run(fused, y), run(model, y)) < 1e-5 for y in (x, large))


class OfSeveral(nn.Module):
    """What it does depends on sizes in ways that an export takes for granted, or refuses to be given."""

    def __init__(self, asked: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.norm, self.asked = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), asked

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.asked(x):
            y = y - y.mean((2, 3), keepdim=True)
        return torch.stack([*self.norm(y + y.roll(1, 1)).unbind(1)], 1)


@pytest.mark.parametrize(
    "asked",
    [
        lambda x: x.shape[0] > 1,
        lambda x: x.shape[0] != 1,
        lambda x: x.shape == torch.Size([2, C, 9, 8]),
        lambda x: x.shape[-1] % 4,
        lambda x: int(x.shape[-1] ** 0.5) == 3,
        lambda x: x.shape[-1] == x.shape[-2] == 12,
        lambda x: max(7, x.shape[-2]) == 7,
        lambda x: len(range(x.shape[-1])) == 8,
    ],
)
def test_no_way_that_depends_on_sizes_is_fixed(asked: Callable[[Tensor], bool]) -> None:
    model = ready(OfSeveral(asked))
    fused = fuse_fx(model, torch.randn(2, C, 9, 8), verify="off")
    for shape in ((2, C, 9, 8), (1, C, 9, 8), (3, C, 12, 12), (1, C, 7, 10), (2, C, 5, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-5
