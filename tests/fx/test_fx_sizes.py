"""Reads of a shape: they keep no value that could go, and tell the same numbers at every size."""

import pytest

pytest.importorskip("torch")

import math
import random
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from fx_checks import CHANNELS, Net, check, conv_bn, counts, images, ready, relative_error, report, run
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.certificate import fx_shapes
from reparamc.errors import InputError
from reparamc.fx.trace import trace

C = CHANNELS
SHAPES = ((2, C, 7, 6), (1, C, 8, 9), (3, C, 12, 5))
Forward = Callable[[Any, Tensor], Any]


def parts(**options: int) -> dict[str, nn.Module]:
    return {
        "a": conv_bn(**options),
        "b": conv_bn(1),
        "n": nn.BatchNorm2d(C),
        "flat": nn.BatchNorm1d(C),
        "linear": nn.Linear(C, C),
        "second": nn.Linear(C, C),
    }


def unpacked(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    b, c, h, w = y.shape
    return m.a[1](y).reshape(b, c, h * w).transpose(1, 2).relu()


def size_before(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    b = y.shape[0]
    return m.a[1](y).relu().view(b, -1)


def size_after(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    z = m.a[1](y).relu()
    return z.view(y.size(0), -1, y.size(-1))


def whole_size(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    sizes = y.size()
    z = m.a[1](y)
    return z.flatten(2).relu().view(sizes[0], sizes[1], sizes[2], -1)


def whole_shape(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    return m.a[1](y).relu().flatten().view(y.shape)


def keyword(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    return m.a[1](y).relu().view(y.size(dim=0), y.size(dim=1), -1)


def resized(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    z = m.a[1](y).relu()
    return F.interpolate(x.sigmoid(), size=y.shape[2:], mode="nearest") + z


def like(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    return m.a[1](y).relu().flatten(1).reshape_as(y)


def attention(m: Any, x: Tensor) -> Tensor:
    y = m.n(x.relu())
    b, c, h, w = y.shape
    t = y.flatten(2).transpose(1, 2)
    batch, n, width = t.shape
    scores = (m.linear(t) @ m.second(t).transpose(1, 2)).softmax(-1)
    return (scores @ x.flatten(2).transpose(1, 2)).reshape(batch, n, width).transpose(1, 2).view(b, c, h, w)


def returned(m: Any, x: Tensor) -> tuple[Tensor, int, int]:
    y = m.a[0](x)
    z = m.a[1](y).relu()
    return z, y.shape[0], y.shape[1]


def tokens(m: Any, x: Tensor) -> Tensor:
    t = m.b[0](m.a[0](x)).flatten(2).transpose(1, 2)
    y = m.linear(t)
    b, n, _ = t.shape
    z = m.flat(y.flatten(0, 1)).reshape_as(y).view(b, n, 2, -1).flatten(2)
    return t + m.second(z.relu())


def computed(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    z = m.a[1](y).relu()
    return z.sum((2, 3)) / (y.shape[2] * y.shape[3] + 1)


FREED = [
    unpacked,
    size_before,
    size_after,
    whole_size,
    whole_shape,
    keyword,
    resized,
    like,
    attention,
    returned,
    tokens,
    computed,
]


NOBODY_TELLS = (unpacked, whole_size)
"""With a stride, all that stays of an image is its tokens."""


@pytest.mark.parametrize("forward", FREED)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_size_read_does_not_keep_a_norm(forward: Forward, stride: int) -> None:
    kept = stride == 2 and forward in NOBODY_TELLS
    fused = check(Net(forward, **parts(stride=stride)), *SHAPES, examples=True)
    assert counts(fused)[1] == kept, fused.code
    certificate = report(fused).certificate
    assert kept or (certificate and not certificate.undecided), certificate


@pytest.mark.parametrize("forward", FREED)
def test_sizes_without_an_example(forward: Forward) -> None:
    check(Net(forward, **parts(stride=2)), *SHAPES, examples=False)


@pytest.mark.parametrize("forward", FREED)
def test_sizes_of_an_exported_module(forward: Forward) -> None:
    model = ready(Net(forward, **parts(stride=2)).double())
    x, other = images((2, C, 8, 9), (3, C, 8, 9))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    fused = fuse_fx(program.module(), x)
    assert counts(fused)[1] == 0, fused.code
    for given in (x, other):
        assert relative_error(run(fused, given), run(model, given)) < 1e-12


def test_what_nobody_else_tells_is_still_asked() -> None:
    model = ready(Net(unpacked, **parts(stride=2)))
    fused = fuse_fx(model, images(SHAPES[0], dtype=torch.float32)[0])
    assert not [n for n in fused.graph.nodes if n.target == "size"], fused.code


def test_a_number_that_is_needed_before_anybody_tells_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a[0](x)
        z = x.relu().mean((2, 3), keepdim=True).expand(-1, -1, y.shape[2], -1)
        return m.a[1](y).relu() + z

    assert counts(check(Net(forward, **parts(stride=2)), *SHAPES, examples=True))[1] == 1


def test_who_tells_a_size_is_held_to_the_rank_of_the_example() -> None:
    """An image without a batch has its channels where the batch was: 6 after the convolution, and 4 before."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.two(y).relu().flatten().view(y.shape[0], -1)

    model = ready(Net(forward, one=nn.Conv2d(C, 6, 1), two=nn.Conv2d(6, 6, 1)).double())
    x, single = images((2, C, 7, 6), (C, 7, 6))
    fused = fuse_fx(model, x)
    assert counts(fused)[0] == 1, fused.code
    assert relative_error(run(fused, x), run(model, x)) < 1e-12
    with pytest.raises(AssertionError, match="must have 4 axes"):
        run(fused, single)


RESHAPED: dict[str, Forward] = {
    "the norm itself": lambda m, x: _then(m.n(x.relu()), lambda y: y.unsqueeze_(0), lambda y: y.view(y.shape[1], -1)),
    "what the norm reads": lambda m, x: _then(
        x.relu(), lambda r: m.keep.append(m.n(r)) or r.unsqueeze_(0), lambda r: m.keep.pop().view(r.shape[1], -1)
    ),
    "a conv": lambda m, x: _then(
        m.a[0](x), lambda y: y.transpose_(0, 2), lambda y: m.b(y.transpose(0, 2)).view(y.shape[0], -1)
    ),
    "who could tell": lambda m, x: _then(
        m.a[0](x), lambda y: x.transpose_(2, 3), lambda y: m.a[1](y).relu().view(y.shape[0], C, y.shape[2], -1)
    ),
    "resized": lambda m, x: _then(
        m.a[0](x), lambda y: y.resize_(1, C, 2, 2), lambda y: m.a[1](y).relu().view(y.shape[0], y.shape[1], -1)
    ),
}


def _then(y: Tensor, write: Callable[[Tensor], object], read: Callable[[Tensor], Tensor]) -> Tensor:
    write(y)
    return read(y)


@pytest.mark.parametrize("name", RESHAPED)
def test_a_tensor_that_is_reshaped_in_place(name: str) -> None:
    model: Any = Net(RESHAPED[name], **parts())
    model.keep = []
    check(model, *SHAPES)


def test_in_place_operators_keep_a_shape() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a[0](x)
        z = m.r(m.a[1](y))
        return z.view(y.shape[0], y.shape[1], y.shape[2] * y.shape[3])

    fused = check(Net(forward, r=nn.ReLU(inplace=True), **parts(stride=2)), *SHAPES, examples=True)
    assert counts(fused)[1] == 0, fused.code


def test_one_size_given_by_keyword_is_no_shape() -> None:
    check(Net(lambda m, x: m.a(x).flatten().reshape(x.numel() // x.size(0)), **parts()), (1, C, 4, 4))
    check(Net(lambda m, x: m.n(m.a(x)).mean((1, 2, 3)).relu().reshape(x.size(dim=0)), **parts()), *SHAPES)


@pytest.mark.parametrize("seed", range(12))
def test_sizes_of_convolutions_are_those_of_a_run(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    rank, size = rng.choice([1, 2, 3]), rng.randint(5, 9)

    def some(low: int, high: int) -> Any:
        return tuple(rng.randint(low, high) for _ in range(rank))

    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    convs = [kind(4, 4, some(1, 3), some(1, 2), some(0, 2), some(1, 2), groups=rng.choice([1, 4])) for _ in range(2)]
    convs.insert(1, kind(4, 4, 3, padding="same", padding_mode=rng.choice(["zeros", "circular"])))
    module = fx.symbolic_trace(nn.Sequential(*convs, nn.ReLU()).eval())
    x = torch.randn(3, 4, *(size + 4 * n for n in range(rank)))
    wanted = fx_shapes.sizes_of(module, (x,))  # it is small: this runs
    monkeypatch.setattr(fx_shapes, "MOST_ELEMENTS", 0)
    assert fx_shapes.sizes_of(module, (x,)) == wanted
    assert wanted["_3"] == tuple(module(x).shape)


class Sized(nn.Module):
    """Every operator of which the sizes are told without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.flat = nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(1, 2)
        self.linear, self.scale = nn.Linear(7, 5), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        y = torch.cat([x, 2.0 - x * self.scale, self.scale * x / 3], 1) + 1
        y += self.pool(y).sigmoid()
        rows = self.flat(y)
        return self.linear(rows), torch.flatten(rows, 1), torch.cat((rows, rows), dim=-1), y.flatten(2, -1).relu()


@pytest.mark.parametrize("shape", [(3, 4, 6, 9), (1, 4, 5, 9)])
def test_sizes_that_are_told_are_those_of_a_run(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = trace(Sized().eval()), torch.randn(shape)
    wanted = fx_shapes.sizes_of(module, (x,))
    monkeypatch.setattr(fx_shapes, "MOST_ELEMENTS", 0)
    monkeypatch.setattr(fx_shapes._Sized, "made", lambda *_: pytest.fail("it runs"))
    assert fx_shapes.sizes_of(module, (x,)) == wanted


def pooled(m: Any, x: Tensor) -> Tensor:
    first, second = F.max_pool2d(m.a(x), 3, 2).split(C // 2, 1)
    return m.b(torch.cat([first, second, first], 1)).mean((2, 3)) + m.n(x).amax((2, 3))


def test_sizes_are_told_without_importing_what_fake_tensors_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.fx.experimental.symbolic_shapes", raising=False)
    monkeypatch.setattr(fx_shapes, "FakeTensorMode", lambda **_: pytest.fail("it is made"))
    net = ready(Net(pooled, a=conv_bn(), b=nn.Conv2d(C * 3 // 2, C, 1), n=nn.BatchNorm2d(C)))
    made = fuse_fx(net, torch.randn(2, C, 70, 66))
    assert (found := report(made).certificate) is not None
    assert found.undecided == ()
    shapes = fx_shapes.shapes_of(trace(net), [torch.randn(2, C, 70, 66)])
    assert [d.known for d in shapes["cat"]] == [None, C * 3 // 2, None, None]


KEPT: dict[str, Tensor] = {}


def padded(x: Tensor, n: int) -> Tensor:
    return F.pad(x, (n, max(n, 1))) if math.floor(n) else x


def pads(x: Tensor) -> Tensor:
    return padded(x, 2)


def keeps(x: Tensor) -> Tensor:
    KEPT["last"] = x
    return x


def adds(x: Tensor, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
    seen.append(x)
    return x


@cache
def remembers(n: int) -> Tensor:
    return torch.arange(n)


def reads(x: Tensor) -> Tensor:
    return x + remembers(x.shape[-1])


def returns_itself(x: Tensor) -> Any:
    return mutual(x) if x is None else x


def mutual(x: Tensor) -> Any:
    return returns_itself(x)


@pytest.mark.parametrize(
    ("function", "runs"),
    [(pads, False), (keeps, True), (adds, True), (reads, True), (mutual, True), (remembers, True)],
)
def test_code_that_may_keep_a_tensor_is_given_values(function: Any, runs: bool) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    assert fx_shapes._is_of_torch(fx.GraphModule({}, graph)) is not runs


def test_a_write_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.pool(x)
        y += x
        return y

    module = trace(Net(forward, pool=nn.AdaptiveAvgPool2d(1)).eval())
    for most in (1 << 15, 0):
        monkeypatch.setattr(fx_shapes, "MOST_ELEMENTS", most)
        with pytest.raises(RuntimeError):
            fx_shapes.sizes_of(module, (torch.randn(1, 2, 4, 4),))


def _first_and_rest(m: Any, x: Tensor) -> Tensor:
    n, *rest = x.shape
    return m.a(x).flatten(2).view(n, rest[0], -1)


ITERATED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "unpacked": lambda m, x: m.a(x).relu().flatten(1).view(x.shape[0], CHANNELS, *x.shape[2:]),
    "a list": lambda m, x: m.a(x).flatten(1).view(list(x.shape)),
    "a comprehension": lambda m, x: F.pad(m.a(x), [0, *(n % 2 for n in x.shape[2:]), 0]),
    "the first and the rest": _first_and_rest,
    "a sum": lambda m, x: m.a(x) / sum(x.size()[2:]),
    "a length": lambda m, x: m.a(x) * len(x.shape),
    "sizes of a result": lambda m, x: (lambda y: torch.cat([y, y.new_zeros(*y.shape)], 1))(m.a(x).relu()),
    "the last two": lambda m, x: F.interpolate(m.a(x).relu(), size=tuple(2 * n for n in x.shape[-2:])),
    "positions that are not there": lambda m, x: m.a(x) + sum(1 for _ in x.shape[3:5]),
}


@pytest.mark.parametrize("name", ITERATED)
def test_sizes_that_a_forward_iterates_over(name: str) -> None:
    xs = images((2, CHANNELS, 6, 5), (1, CHANNELS, 7, 8), (3, CHANNELS, 4, 4), dtype=torch.float32)
    model = ready(Net(ITERATED[name], a=conv_bn())).float()
    fused = fuse_fx(model, xs[0])
    assert (isinstance(fused, torch.fx.GraphModule), counts(fused)) == (True, (1, 0))
    for x in xs:
        assert relative_error(run(fused, x), run(model, x)) < 1e-5


def test_an_example_gives_the_rank_for_later_calls() -> None:
    model = ready(Net(lambda m, x: m.a(x).reshape(*x.shape[:-1], -1), a=nn.Conv2d(CHANNELS, CHANNELS, 1))).float()
    fused = fuse_fx(model, torch.randn(2, CHANNELS, 6, 5))
    with pytest.raises(AssertionError, match="must have 4 axes"):
        fused(torch.randn(CHANNELS, 6, 5))
    with pytest.raises(InputError, match="it iterates over a value whose length is not known"):
        fuse_fx(model)
