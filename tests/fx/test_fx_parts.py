"""Models that come back as modules of their own class: their parts are fused, the Python around them stays."""

import pytest

pytest.importorskip("torch")

import copy
import pickle
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from fx_checks import CHANNELS, Net, conv_bn, counts, images, ready, relative_error, report, run
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import fuse_fx


class Output(OrderedDict):
    """As libraries return it: a mapping with attributes, which pytree does not know."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Classifier(nn.Module):
    """A class with more than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_bn(), nn.Linear(CHANNELS, 3)
        self.config = {"labels": 3}

    def forward(self, pixels: Tensor | None = None, mask: Tensor | None = None, flip: bool = False) -> Output:
        assert pixels is not None
        y = self.body(-pixels if flip else pixels)
        y = y if mask is None else y * mask
        return Output(logits=self.head(y.mean((2, 3))))

    def predict(self, pixels: Tensor) -> Tensor:
        return self(pixels).logits.argmax(1)


class Stateful(Classifier):
    def forward(self, pixels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.seen = getattr(self, "seen", 0) + 1
        return self.head(self.body(pixels).mean((2, 3))) * self.seen


class Asks(Classifier):
    def forward(self, pixels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(pixels, Tensor):
            pixels = pixels * 0.5
        return self.head(self.body(pixels).mean((2, 3)))


class Captures(Classifier):
    """Puts hooks on its parts when it first runs, and collects what they see."""

    def forward(self, pixels: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not hasattr(self, "installed"):
            self.installed = True
            self.body.register_forward_hook(lambda m, given, y: self.found.append(y))
        self.found: list[Any] = []
        return self.head(self.body(pixels).mean((2, 3))), tuple(self.found)


class Reaches(Classifier):
    """Reads inside a part that it also calls."""

    def forward(self, pixels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not len(pixels):
            return pixels
        dtype: Any = self.body[0].weight.dtype
        return self.head(self.body(pixels.to(dtype)).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]


def test_class_signature_methods_and_outputs_stay(x: Tensor) -> None:
    model = ready(Classifier())
    fused = fuse_fx(model, {"pixels": x})
    assert (type(fused), counts(fused)) == (Classifier, (2, 0))
    assert fused.config == model.config
    assert fused.config is not model.config
    with torch.no_grad():
        for given in ({}, {"mask": x[:, :1]}, {"flip": True}):
            found, wanted = fused(x, **given), model(x, **given)
            assert type(found) is Output
            assert relative_error(found.logits, wanted.logits) < 1e-5
        assert torch.equal(fused.predict(x), model.predict(x))
        other = images((3, CHANNELS, 9, 5), dtype=torch.float32)[0]
        assert relative_error(fused(other).logits, model(other).logits) < 1e-5
    assert (report(fused).before.batchnorm, report(fused).after.batchnorm) == (1, 0)
    assert [e.output for e in report(fused).end_to_end]


class Block(nn.Module):
    """Operators of its own, what it does with them being steered by arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.body = conv_bn()

    def forward(self, x: Tensor, mask: Tensor | None = None, mode: str = "both", return_features: bool = False) -> Any:
        y = self.conv(x)
        y = self.body(self.norm(y) if mode == "both" else y)
        y = y if mask is None else y * mask
        return (y.mean((2, 3)), y) if return_features else y.mean((2, 3))


class Steered(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body = Block()

    def forward(self, x: Tensor, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.body(x, **options)


@pytest.mark.parametrize("kind", [Block, Steered])
@pytest.mark.parametrize("example", [{}, {"mode": "one"}, {"return_features": True}])
def test_arguments_may_have_other_values_later(kind: type[nn.Module], example: dict[str, Any], x: Tensor) -> None:
    model = ready(kind())
    fused = fuse_fx(model, {"x": x, **example})
    assert report(fused).after.batchnorm < report(fused).before.batchnorm
    with torch.no_grad():
        for given in ({}, {"mode": "one"}, {"return_features": True}, {"mask": x[:, :1]}):
            assert relative_error(fused(x, **given), model(x, **given)) < 1e-5


@pytest.mark.parametrize("kind", [Stateful, Asks, Captures, Reaches])
@pytest.mark.parametrize("verify", ["full", "off"])
def test_what_a_trace_would_get_wrong(kind: type[nn.Module], verify: str, x: Tensor) -> None:
    model = ready(kind())
    before = {name: (dict(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()}
    fused = fuse_fx(model, x, verify=verify)
    assert {name: (dict(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()} == before
    for given in (x, *images((1, CHANNELS, 5, 8), dtype=torch.float32)):
        assert relative_error(run(fused, given), run(model, given)) < 1e-5
    assert report(fused).before.batchnorm == 1


def test_part_that_others_reach_into_stays(x: Tensor) -> None:
    fused = fuse_fx(ready(Reaches()), x)
    assert isinstance(fused.body, nn.Sequential)
    assert counts(fused) == (2, 1)
    assert "reaches" in next(p for p in report(fused).parts if p.where == "body").why


class Unit(nn.Module):
    """Its activation is one object for all units, as YOLO has it."""

    act = nn.ReLU()

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), Unit.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Indexed(nn.Module):
    """Runs its layers one by one, by what each of them says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Unit(), nn.Sequential(Unit(), nn.ModuleList([Unit()])[0]), Unit())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if len(x) else ():
            x = layer(x)
        return x


def test_modules_in_several_places_are_no_reach_into_all_of_them(x: Tensor) -> None:
    model = ready(Indexed())
    fused = fuse_fx(model, x)
    assert counts(fused) == (4, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


class Operators(nn.Module):
    """They are called by a forward that no graph stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.b, self.nb = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.c, self.nc = nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS)


class Direct(Operators):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.a(x)
        y = self.na(y)
        if mask is not None:
            y = self.nb(input=self.b(y * mask))
        elif x.shape[2] > 20:
            y = self.nb(self.b(y))
        pooled = self.c(input=y.mean((2, 3)))
        return self.nc(input=pooled) * 2


class Skips(Operators):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.a(x)
        if mask is None:
            y = self.na(y)
        z = self.b(y)
        return self.nc(self.c((self.nb(z) + z).mean((2, 3))))


class Looks(Operators):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.a(x)
        y = self.na(y)
        return y if mask is None else self.nc(self.c(self.a(y).mean((2, 3))))


@pytest.mark.parametrize(
    ("kind", "masked", "left"),
    [(Direct, True, (3, 0)), (Direct, False, (3, 0)), (Skips, True, (3, 2)), (Looks, True, (3, 2))],
)
def test_operators_that_python_calls_one_after_the_other(
    kind: type[nn.Module], masked: bool, left: tuple[int, int]
) -> None:
    model, x = ready(kind()), images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]
    fused = fuse_fx(model, {"x": x} | ({"mask": x[:, :1]} if masked else {}))
    assert (type(fused), counts(fused)) == (kind, left)
    assert report(fused).after.batchnorm == left[1]
    for mask in ((), (x[:, 1:2],)):
        assert relative_error(run(fused, x, *mask), run(model, x, *mask)) < 1e-5
    if kind is Direct:
        assert isinstance(fused.a, nn.Conv2d)
        with pytest.raises(AssertionError, match="2 axes"):  # of three, the norm would take the middle one
            fused.c(torch.ones(2, 3, CHANNELS))


class Pair(nn.Module):
    """Its forward has a branch, by size, that the example does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.large(x, y) if x.shape[2] > 20 else y

    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return y * 2


def outside(module: Any, x: Tensor) -> Tensor:
    return module.a(x)


class PassedOn(Pair):
    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return outside(self, x)


class Walked(Pair):
    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return next(self.children())(x)


class Weighed(Pair):
    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return y * sum(p.abs().mean() for p in self.parameters())


class Stated(Pair):
    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.state_dict()["a.weight"].abs().mean()


class Aliased(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.a]

    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return self.hidden[0](x)


class Named(Pair):
    def large(self, x: Tensor, y: Tensor) -> Tensor:
        return getattr(self, chr(97))(x)


class Replaced(Pair):
    pass


Replaced.large = lambda self, x, y: self.a(x)  # pyright: ignore[reportAttributeAccessIssue]


def with_its_own_method() -> nn.Module:
    model: Any = Pair()
    model.large = types.MethodType(lambda self, x, y: self.a(x), model)
    return model


class Straight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.m: Any = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        return y + self.m.a(x) if x.shape[2] > 20 else y


class Helped(Outer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        return y + outside(self.m, x) if x.shape[2] > 20 else y


class Halves:
    @classmethod
    def of(cls, x: Tensor) -> Tensor:
        return x / 2


class Made(nn.Module):
    """Nothing calls its class method; that of another class has the same name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.m: Any = inner

    @classmethod
    def of(cls, inner: Any) -> nn.Module:
        return inner.a

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(Halves.of(x))
        return y * 2 if x.shape[2] > 20 else y


class MadeNow(Made):
    def forward(self, x: Tensor) -> Tensor:
        kind = type(self)
        return kind.of(self.m)(x) if x.shape[2] > 20 else self.m(x)


class Scaled(Outer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        return y * sum(p.abs().mean() for p in self.m.parameters()) if x.shape[2] > 20 else y


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (Pair, 0),
        *((kind, 1) for kind in (PassedOn, Walked, Weighed, Stated, Aliased, Named, Replaced, with_its_own_method)),
        (lambda: Outer(Pair()), 1),
        (lambda: Outer(Straight()), 1),
        (lambda: Helped(Pair()), 1),
        (lambda: Scaled(Pair()), 1),
        (lambda: Made(Pair()), 0),
        (lambda: MadeNow(Pair()), 1),
    ],
)
def test_operators_that_other_code_may_use_stay_two(make: Callable[[], nn.Module], left: int) -> None:
    model, (x, large) = ready(make()), images((2, CHANNELS, 7, 6), (1, CHANNELS, 21, 5), dtype=torch.float32)
    fused = fuse_fx(model, x)
    assert counts(fused)[1] == left
    for given in (x, large):
        assert relative_error(run(fused, given), run(model, given)) < 1e-5


def test_that_operators_stay_two_has_a_reason(x: Tensor) -> None:
    (part,) = report(fuse_fx(ready(Walked()), x)).parts
    assert "a convolution and its BatchNorm stay two: Walked.large" in part.why


class Odd(nn.Sequential):
    """Its forward leaves running what it holds to that of its base."""

    def forward(self, input: Tensor) -> Tensor:
        x = input
        return self.after(super().forward(x if x.shape[-1] % 2 == 0 else x[..., 1:]))

    def after(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Peeks(Odd):
    def after(self, x: Tensor) -> Tensor:
        return x if len(x) == 1 else x + self[0](x).mean()


class Stops(Odd):
    def forward(self, input: Tensor) -> Tensor:
        x = input
        for module in self if len(x) else ():
            x = module(x)
            x = x * 2 if x.shape[-1] % 2 else x
        return x


@pytest.mark.parametrize(("kind", "left"), [(Odd, (2, 0)), (Peeks, (2, 2)), (Stops, (2, 2))])
def test_operators_that_a_sequential_runs_one_after_the_other(kind: type[nn.Module], left: tuple[int, int]) -> None:
    layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)]
    model = ready(kind(*layers))
    fused = fuse_fx(model, torch.ones(1, 4, 8, 8))
    assert (type(fused), counts(fused)) == (kind, left)
    for x in images((3, 4, 7, 7), (1, 4, 5, 8), dtype=torch.float32):
        assert relative_error(run(fused, x), run(model, x)) < 1e-5


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_trace_goes_on_after_what_cannot_be_followed(x: Tensor) -> None:
    inner = nn.Sequential(conv_bn(), nn.Sequential(Branches(), conv_bn()))
    model = ready(nn.Sequential(inner, Branches(), conv_bn()))
    fused = fuse_fx(model, x)
    assert counts(fused) == (3, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5
    assert not report(fused).parts  # one graph, and nothing inside what it calls


class Chosen(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


def test_parts_that_stay_for_one_reason_are_one_line(x: Tensor) -> None:
    fused = fuse_fx(ready(nn.Sequential(conv_bn(), Chosen(), Chosen(), Chosen())), x)
    (line,) = (line for line in str(report(fused)).splitlines() if " stay; " in line)
    assert "1 and 2 more: 6 Conv and 0 BatchNorm stay; torch.fx cannot" in line


class Unfolded(nn.Module):
    """torch.export can follow it, and nothing folds in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        first, *_ = self.norm(x.relu())
        return first


def test_no_export_where_nothing_folds(x: Tensor) -> None:
    fused = fuse_fx(ready(Unfolded()), x)
    assert (type(fused), report(fused).after.batchnorm) == (Unfolded, 1)


def pad_as_needed(x: Tensor) -> Tensor:
    """A function with control flow: it is called as it is."""
    return F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(CHANNELS, CHANNELS, 2), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(pad_as_needed(x)))


@pytest.mark.parametrize("example", [False, True])
def test_functions_that_cannot_be_followed_are_called_as_they_are(example: bool, x: Tensor) -> None:
    model = ready(Padded())
    fused = fuse_fx(model, x if example else None)
    assert counts(fused) == (1, 0)
    for given in (x, x[..., :5]):
        assert relative_error(run(fused, given), run(model, given)) < 1e-5
    assert pad_as_needed.__module__ == __name__


def pad_for(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.pad(x, (0, conv.kernel_size[0] - 1)) if x.shape[-1] % conv.stride[0] == 0 else x


def pad_for_the_weight(x: Tensor, conv: nn.Conv2d) -> Tensor:
    n = conv.weight.size(-1) if x.shape[-1] % 2 else getattr(conv, "groups")  # noqa: B009
    return F.pad(x, (0, n))


def pads_by_others(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return pad_for(x, conv) if x.shape[-2] % 2 else pad_for_the_weight(x, conv)


def scales(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return x * conv.weight.std() if x.shape[-1] % 2 else x


def scales_by_others(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return scales(x, conv) if x.shape[-2] % 2 else pad_for(x, conv)


def runs(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return conv(x) + x[..., 1:, 1:] if x.shape[-1] % 2 else x


HANDED: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "settings": (lambda m, x: pad_for(x, m.a), True),
    "a shape": (lambda m, x: pad_for_the_weight(x, conv=m.a), True),
    "by others": (lambda m, x: pads_by_others(x, m.a), True),
    "values": (lambda m, x: scales(x, m.a), False),
    "values by others": (lambda m, x: scales_by_others(x, m.a), False),
    "a call": (lambda m, x: runs(x, m.a), False),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", HANDED)
def test_functions_are_given_no_weights_that_they_do_not_read(name: str, example: bool, x: Tensor) -> None:
    read, folds = HANDED[name]
    model = ready(Net(lambda m, x: m.n(m.a(read(m, x))), a=nn.Conv2d(4, 4, 2), n=nn.BatchNorm2d(4)))
    fused = fuse_fx(model, x if example else None)
    assert counts(fused) == ((1, 0) if folds else (1, 1))
    assert size(fused) <= size(model)
    for given in (x, x[..., :5], x[..., :5, :5]):
        assert relative_error(run(fused, given), run(model, given)) < 1e-5


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_shape_of_a_weight_is_a_number(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        wide = m.a.weight.shape[-1] > 1 and m.a.weight.dim() == 4
        return m.n(m.a(F.pad(x, (m.a.weight.size(2),) * 4) if wide else x))

    model = ready(Net(forward, a=nn.Conv2d(4, 4, 2), n=nn.BatchNorm2d(4)))
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert [*fused.state_dict()] == ["fused.weight", "fused.bias"]


class Twice(nn.Module):
    """The convolution has two places. One of them is read, and called for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn()
        self.conv: Any = self.block[0]

    def forward(self, x: Tensor, _name: str = "") -> Tensor:
        if x.sum() > 1e6:
            return self.conv(x)
        return self.block(F.pad(x, (self.conv.stride[0],) * 4))


@pytest.mark.parametrize("verify", ["full", "off"])
def test_what_has_two_places_is_not_kept_twice(verify: str, x: Tensor) -> None:
    model = ready(Twice())
    fused = fuse_fx(model, x, verify=verify)
    assert size(fused) <= size(model)
    for given in (x, 1e9 + x):
        assert relative_error(run(fused, given), run(model, given)) < 1e-5
    (part,) = [part for part in report(fused).parts if part.where == "block"]
    assert part.why == "another place in the model holds what would fold in it"


def test_more_parameters_have_a_reason(x: Tensor) -> None:
    model = ready(Net(lambda m, x: m.n(m.a(x)) * m.p(m.a(x + 1)), a=nn.Conv2d(4, 4, 2), n=conv_bn()[1], p=conv_bn()[1]))
    fused = fuse_fx(model, x)
    assert size(fused) > size(model)
    assert report(fused).note == "more parameters: a.weight and 1 more used several times"


def test_more_parameters_may_have_been_buffers(x: Tensor) -> None:
    model = ready(Net(lambda m, x: m.a(x) + m.shift, a=nn.Conv2d(4, 4, 2, bias=False)))
    model.register_buffer("shift", torch.randn(4, 1, 1))
    assert report(fuse_fx(model, x)).note == "more parameters: what was in buffers is in them"


class Hidden(nn.Module):
    """Has a part that is no submodule."""

    teacher: nn.Module

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "teacher", conv_bn().eval())
        self.conv, self.norm = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.teacher(x)))


def test_a_part_that_is_no_submodule_stays(x: Tensor) -> None:
    model = ready(Hidden())
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


def test_what_cannot_be_copied_is_shared(x: Tensor) -> None:
    model = ready(Classifier())
    model.lock = threading.Lock()
    fused = fuse_fx(model, x)
    assert fused.lock is model.lock
    assert "lock" in report(fused).note


def test_files_hold_plain_reports(x: Tensor) -> None:
    fused = fuse_fx(ready(Classifier()), x)
    again = pickle.loads(pickle.dumps(fused))
    assert torch.equal(run(again, x).logits, run(fused, x).logits)
    assert again.meta["reparamc"].after.batchnorm == 0
    assert copy.deepcopy(fused).meta["reparamc"] == fused.meta["reparamc"]
    assert len(fuse_fx(again, x).meta["reparamc"].history) == 1


def test_threads() -> None:
    models = [ready(nn.Sequential(*(nn.Sequential(conv_bn(), nn.ReLU()) for _ in range(4)))) for _ in range(2)]
    x, wrong = images((2, CHANNELS, 8, 8), dtype=torch.float32)[0], list[str]()

    def fuse(model: nn.Module) -> None:
        try:
            assert relative_error(run(fuse_fx(model, x), x), run(model, x)) < 1e-4
        except Exception as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=fuse, args=(m,)) for m in models]
    trained = nn.Sequential(conv_bn(), conv_bn()).train()
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        trained(x).sum().backward()
    assert not wrong


class Encoder(nn.Module):
    """Two stages, and a class that knows more of itself than its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self._depth = conv_bn(), conv_bn(), 2

    @property
    def reduction(self) -> int:
        return 2**self._depth

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.reduction

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).relu())


class AsksItsEncoder(nn.Module):
    """Reads a property, or calls a method, of a part that it also calls."""

    def __init__(self, method: bool) -> None:
        super().__init__()
        self.encoder, self.method = Encoder(), method

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.encoder.reduction:
            x = F.pad(x, (0, x.shape[-1] % self.encoder.reduction))
        y = self.encoder(x)
        return self.encoder.scaled(y) if self.method and y.sum() != 0 else y.abs().sum().sqrt() + y


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("verify", ["full", "region", "off"])
def test_a_part_whose_class_is_asked_keeps_it(method: bool, verify: str) -> None:
    model = ready(AsksItsEncoder(method))
    x = images((2, CHANNELS, 9, 7), dtype=torch.float32)[0]
    fused = fuse_fx(model, x, verify=verify)
    assert counts(fused) == (2, 0)
    assert type(fused.encoder) is Encoder
    assert list(fused.encoder._modules) == ["graph"]
    for again in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert relative_error(run(again, x), run(model, x)) < 1e-5
        calls = [tuple[Any, ...]()]
        again.encoder.register_forward_hook(lambda module, args, result, calls=calls: calls.append(args))
        run(again, x)
        assert len(calls) == 2


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn()

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.body(image) for image in images]


def test_a_list_may_have_another_length_later(x: Tensor) -> None:
    model = ready(Lists())
    fused = fuse_fx(model, ([x, x],))
    assert counts(fused) == (1, 0)
    for given in ([x], [x, 2 * x, 3 * x]):
        assert all(map(lambda a, b: relative_error(a, b) < 1e-5, run(fused, given), run(model, given)))


class InBfloat16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.norm(self.conv(x))


@pytest.mark.parametrize("verify", ["full", "off"])
def test_what_runs_within_autocast_stays(verify: str, x: Tensor) -> None:
    model = ready(InBfloat16())
    fused = fuse_fx(model, x, verify=verify)
    assert counts(fused) == (1, 1)
    assert report(fused).after.batchnorm == 1
    assert relative_error(run(fused, x), run(model, x)) == 0


def test_a_convolution_of_a_class_of_its_own_that_stays_is_counted() -> None:
    class Unless(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.numel() else input

    model = ready(nn.Sequential(Unless(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)))
    sizes = report(fuse_fx(model, images((2, CHANNELS, 5, 4), dtype=torch.float32)[0], verify="off"))
    assert (sizes.before.conv, sizes.before.batchnorm, sizes.after.conv, sizes.after.batchnorm) == (1, 1, 1, 1)


class Listed(nn.Module):
    """Its forward calls modules of a list that is no ModuleList."""

    def __init__(self, kind: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(conv_bn(), nn.ReLU()) for _ in range(2))
        self.held = kind([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        for m in self.held:
            x = m(x)
        return x if x.sum() < 1e9 else x + 1


@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_modules_that_a_list_holds_are_those_that_run(kind: Callable[[Any], Any]) -> None:
    model, x = ready(Listed(kind)), torch.randn(2, CHANNELS, 7, 6)
    fused = fuse_fx(model, x, verify="off")
    assert list(fused.held) == [fused.a, fused.b]
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-5
    assert fused.half()(x.half()).dtype == torch.half
