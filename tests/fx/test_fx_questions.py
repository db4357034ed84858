"""What a forward asks that each run may answer otherwise is in no graph."""

import pytest

pytest.importorskip("torch")

import copy
import os
import pickle
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from fx_checks import CHANNELS, Net, check, conv_bn, counts, images, ready, relative_error, run
from torch import Tensor, is_grad_enabled, nn, zeros
from torch.fx import _symbolic_trace
from torch.jit._trace import is_tracing
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from reparamc import fuse_fx
from reparamc.errors import InputError


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor


def _viewed(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).transpose(2, 3)
    try:
        return y.view(len(x), -1)
    except RuntimeError:
        return y.flatten(1) * 2


def _viewed_or_not(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).transpose(2, 3)
    with suppress(RuntimeError):
        return y.view(1, -1)
    return y * 2


def _rewritten(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.data = y.data * 2
    return y


def _without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.a(x)


def _gradients() -> bool:
    return is_grad_enabled()


def _doubled_if(asked: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.a(x) * (2 if asked(m, x) else 1)


def _closed_over(asked: Callable[[], bool]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.a(x) * (2 if asked() else 1)


QUESTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "type": _doubled_if(lambda m, x: type(x) is Tensor),
    "type, by a helper": _doubled_if(lambda m, x: _is_plain(x)),
    "callable": _doubled_if(lambda m, x: callable(m.same(x))),
    "identity": _doubled_if(lambda m, x: m.same(x) is x),
    "identity of sizes": _doubled_if(lambda m, x: x.shape[2] is x.shape[3]),
    "attribute": _doubled_if(lambda m, x: hasattr(x, "tag")),
    "attribute with a default": _doubled_if(lambda m, x: getattr(x, "tag", None)),
    "attribute that may be None": _doubled_if(lambda m, x: x.grad_fn is None),
    "gradients": _doubled_if(lambda m, x: x.requires_grad),
    "mode": _doubled_if(lambda m, x: torch.is_inference_mode_enabled()),
    "mode, by its own name": _doubled_if(lambda m, x: is_grad_enabled()),
    "mode, by a helper": _doubled_if(lambda m, x: _gradients()),
    "mode, by a default": lambda m, x, asked=is_grad_enabled: m.a(x) * (2 if asked() else 1),
    "mode, by a closure": _closed_over(is_grad_enabled),
    "mode, by a helper of a closure": _closed_over(lambda asked=is_grad_enabled: asked()),
    "mode, by a list": _closed_over(lambda asked=(torch.is_inference_mode_enabled,): asked[0]()),
    "mode, by a dict": lambda m, x, asked={"grad": is_grad_enabled}: m.a(x) * (2 if asked["grad"]() else 1),
    "mode that is set": _without_gradients,
    "tracing": _doubled_if(lambda m, x: is_tracing()),
    "tracing, as torchvision asks": _doubled_if(lambda m, x: torch._C._get_tracing_state() is not None),
    "compiling": _doubled_if(lambda m, x: torch.compiler.is_compiling()),
    "torch.fx": _doubled_if(lambda m, x: _symbolic_trace.is_fx_tracing()),
    "threads": _doubled_if(lambda m, x: torch.get_num_threads() == 1000),
    "setting of products": _doubled_if(lambda m, x: torch.backends.cuda.matmul.allow_tf32),
    "setting of attention": _doubled_if(lambda m, x: not torch.backends.cuda.flash_sdp_enabled()),
    "setting": _doubled_if(lambda m, x: torch.backends.cudnn.enabled),
    "environment": _doubled_if(lambda m, x: os.environ.get("DOUBLED")),
    "environment, by a mapping": _doubled_if(lambda m, x: "DOUBLED" in os.environ),
    "random numbers": lambda m, x: m.a(x) + 0 * torch.rand(1),
    "tensor that is written": lambda m, x: torch.zeros(CHANNELS, 1, 1).add_(m.a(x).mean((0, 2, 3)).view(-1, 1, 1)),
    "autocast": _doubled_if(lambda m, x: torch.is_autocast_enabled("cpu")),
    "dtype of a parameter": _doubled_if(lambda m, x: next(m.parameters()).dtype == torch.float64),
    "dtype of a buffer": _doubled_if(lambda m, x: m.a[1].running_var.dtype == torch.float64),
    "device of a buffer": _doubled_if(lambda m, x: m.a[1].running_var.is_cuda),
    "data that is set": _rewritten,
    "error": _viewed,
    "error that is suppressed": _viewed_or_not,
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_runs_may_answer_otherwise(name: str) -> None:
    model = ready(Net(QUESTIONS[name], a=conv_bn(), same=nn.Identity()))
    with pytest.raises(InputError, match="with example_inputs its parts are fused"):
        fuse_fx(model, verify="off")
    xs = images((2, CHANNELS, 6, 6), (1, CHANNELS, 6, 5), dtype=torch.float32)
    fused = fuse_fx(model, xs[0], verify="off")
    assert counts(fused) == (1, int("of a buffer" in name))  # which has to stay
    for x in xs:
        assert relative_error(run(fused, x), run(model, x)) < 1e-5
        assert relative_error(fused(x), expected := model(x)) < 1e-5
        assert fused(x).requires_grad == expected.requires_grad
        with torch.inference_mode():
            assert relative_error(fused(x), model(x)) < 1e-5
    for one in (model, fused):
        one.double()
    assert relative_error(run(fused, xs[1].double()), run(model, xs[1].double())) < 1e-6


class Asking(Net):
    grad = staticmethod(torch.is_grad_enabled)


def test_a_mode_that_a_class_or_a_module_holds() -> None:
    (x,) = images((2, CHANNELS, 6, 6), dtype=torch.float32)
    model = ready(Asking(lambda m, x: m.a(x) * (2 if m.grad() else 1), a=conv_bn())).float()
    other = ready(Net(lambda m, x: m.a(x) * (2 if m.asked["grad"]() else 1), a=conv_bn())).float()
    other.asked = {"grad": torch.is_grad_enabled}
    for one in (model, other):
        with pytest.raises(InputError, match="is_grad_enabled aside"):
            fuse_fx(one)
        fused = fuse_fx(one, x)
        assert relative_error(run(fused, x), run(one, x)) < 1e-5
        assert relative_error(fused(x), one(x)) < 1e-5


@pytest.mark.parametrize("drawing", [lambda: torch.rand(3), random.random])
def test_random_numbers_of_other_threads_are_theirs(drawing: Callable[[], Any]) -> None:
    ended = threading.Event()

    def draw() -> None:
        while not ended.is_set():
            drawing()

    model, x = ready(Net(lambda m, x: m.a(x), a=conv_bn())).float(), torch.randn(2, CHANNELS, 6, 6)
    asking = ready(Net(lambda m, x: m.a(x) + random.random() * torch.rand(1), a=conv_bn())).float()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert counts(fuse_fx(model)) == counts(fuse_fx(model, x)) == (1, 0)
        with pytest.raises(InputError, match="it draws random numbers"):
            fuse_fx(asking)
    finally:
        ended.set()
        thread.join()


def test_modes_that_are_asked_later() -> None:
    (x,) = images((2, CHANNELS, 6, 6), dtype=torch.float32)
    for name in ("tracing", "tracing, as torchvision asks", "setting", "environment"):
        model = ready(Net(QUESTIONS[name], a=conv_bn()))
        fused, expected = fuse_fx(model, x), run(model, x)
        pair: list[Any] = [model, fused]
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=False), pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOUBLED", "1")
            if "tracing" in name:
                pair = [cast(Any, torch.jit.trace(one, x, check_trace=False)) for one in pair]
            pair = [one(x) for one in pair]
        assert relative_error(pair[1], pair[0]) < 1e-5
        assert relative_error(pair[0], expected) > 0.4


def test_a_mode_that_changes_nothing_is_followed() -> None:
    def telling(m: Any, x: Tensor) -> Tensor:
        factor = 1 if is_tracing() else len("a")
        return m.a(x) if is_tracing() == is_tracing() else m.a(x) * factor

    assert counts(check(Net(telling, a=conv_bn()))) == (1, 0)
    with pytest.raises(InputError, match=r"it asks torch\.jit\.is_tracing"):
        fuse_fx(ready(Net(lambda m, x: m.a(x) if is_tracing() else m.a(x).relu(), a=conv_bn())))


MADE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vector": lambda m, x: m.a(x) * torch.tensor([1.5]),
    "scalar": lambda m, x: m.a(x) * torch.tensor(1.5),
    "range": lambda m, x: m.a(x) + torch.arange(4.0).view(4, 1, 1) / 3,
    "sizes": lambda m, x: m.a(x) + torch.zeros(x.shape[2], x.shape[3]),
    "sizes, by a name": lambda m, x: m.a(x) + zeros(x.shape[2], x.shape[3]),
    "sizes, and a number": lambda m, x: m.a(x) + torch.full((1, x.size(2) - 1 + 1, 1), 2),
    "a whole shape": lambda m, x: m.a(x) + torch.zeros(x.shape),
    "a whole size": lambda m, x: m.a(x) + torch.ones(x.size(), device=x.device),
    "a part of a shape": lambda m, x: m.a(x) + torch.zeros(x.shape[1:], dtype=x.dtype),
    "a shape and a number": lambda m, x: m.a(x) + torch.full(x.shape, 0.5),
    "sizes by name": lambda m, x: m.a(x) + torch.full(size=x.shape, fill_value=2, dtype=None),
    "the shape of a result": lambda m, x: (y := m.a(x).relu()) + torch.zeros(size=(y.shape[0], 1, 1, y.shape[-1])),
    "one size": lambda m, x: m.a(x) + torch.ones(x.shape[-1]),
    "range of a size": lambda m, x: m.a(x) + torch.arange(x.size(3)),
    "dtype": lambda m, x: torch.cat([torch.full((1, x.size(2), x.size(3)), 0.1)[None], m.a(x)[:1]], 1),
    "double": lambda m, x: m.a(x) + torch.ones(1, dtype=torch.float64) / 3,
    "attribute": lambda m, x: m.a(x) * m.kept,
    "computed attribute": lambda m, x: m.a(x) * (m.kept + 1),
    "computed buffer": lambda m, x: m.a(x).relu() * (m.own + 1),
    "cast buffer": lambda m, x: m.a(x).relu() * (m.own.float() + 1),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("examples", [False, True])
def test_what_forward_makes_keeps_its_dtype(name: str, examples: bool) -> None:
    xs = images((2, CHANNELS, 6, 5), (1, CHANNELS, 7, 8), dtype=torch.float32)
    model = ready(Net(MADE[name], a=conv_bn(), own=nn.Buffer(torch.rand(CHANNELS, 1, 1))))
    model.kept = torch.rand(CHANNELS, 1, 1)
    fused = fuse_fx(model, xs[0] if examples else None)
    assert (isinstance(fused, torch.fx.GraphModule), counts(fused)) == (True, (1, 0))
    del fused.run  # which no file can hold
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 0.02)):
        for one in (fused, pickle.loads(pickle.dumps(fused))):
            pair = [copy.deepcopy(m).to(dtype) for m in (one, model)]
            for x in xs:
                assert relative_error(*(run(m, x.to(dtype)) for m in pair)) < tolerance


def test_types_of_sizes_are_known() -> None:
    def asking(m: Any, x: Tensor) -> Tensor:
        n, shape = x.shape[0] + 1, x.shape
        known = isinstance(shape, torch.Size), isinstance(x.size(1), int), isinstance(n, int), isinstance(n, float)
        also = isinstance(x.dtype, torch.dtype), isinstance(shape[1:], tuple), torch.is_tensor(x), x.__class__.__name__
        return m.a(x) if (*known, *also) == (True, True, True, False, True, True, True, "Tensor") else x

    (x,) = images((2, CHANNELS, 6, 5), dtype=torch.float32)
    fused = fuse_fx(model := ready(Net(asking, a=conv_bn())))
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x.to(next(m.parameters()).dtype)),
        lambda m, x: m.a(x.to(m.a[1].running_mean.dtype)),
        lambda m, x: m.a(F.conv2d(x.float(), m.c.weight.float()).to(x.dtype)),
        lambda m, x: m.a[1](F.conv2d(x.float(), m.c.weight.to(torch.float32), m.c.bias.float()).to(x.dtype)),
    ],
)
def test_what_follows_the_dtype_of_weights_does_so_in_a_copy(forward: Callable[..., Any], examples: bool) -> None:
    model, (x,) = ready(Net(forward, a=conv_bn(), c=nn.Conv2d(CHANNELS, CHANNELS, 1))), images((2, CHANNELS, 6, 5))
    fused = fuse_fx(model, x.float() if examples else None, verify="off")
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        pair = [copy.deepcopy(one).to(dtype) for one in (model, fused)]
        results = [run(one, x.to(dtype)) for one in pair]
        assert relative_error(*results) < tolerance


@dataclass
class Held(OrderedDict[str, Any]):
    """As transformers has it."""

    first: Any = None

    def __post_init__(self) -> None:
        self["first"] = self.first


class Own(dict[str, Any]):
    pass


def _ordered(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return OrderedDict(first=y, others=[y])


def _nested(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return {"first": y, "others": (OrderedDict(y=y), [OrderedDict(y=-y)])}


def _held(m: Any, x: Tensor) -> Any:
    return Held(first=m.a(x))


def _own(m: Any, x: Tensor) -> Any:
    return Own(first=m.a(x))


@pytest.mark.parametrize("examples", [False, True])
def test_containers_are_of_their_class(examples: bool) -> None:
    x, other = images((2, CHANNELS, 6, 5), (3, CHANNELS, 9, 4), dtype=torch.float32)
    for forward in (_ordered, _nested, _held, _own):
        model = ready(Net(forward, a=conv_bn()))
        if forward is _own and not examples:
            with pytest.raises(InputError, match="it makes a Own, which no graph holds"):
                fuse_fx(model)
            continue
        fused = fuse_fx(model, x if examples else None)
        for one in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            for given in (x, other):
                found, wanted = run(one, given), run(model, given)
                assert (counts(one), type(found)) == ((1, 0), type(wanted))
                (found, kinds_found), (wanted, kinds_wanted) = (pytree.tree_flatten({**r}) for r in (found, wanted))
                assert kinds_found == kinds_wanted
                assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_random_numbers_of_python_are_drawn_in_each_run() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = conv_bn()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * (1 if random.random() < 0.5 else 2)

    fused, x = fuse_fx(ready(Drawing()), torch.randn(1, CHANNELS, 7, 6)), torch.randn(1, CHANNELS, 7, 6)
    random.seed(0)
    with torch.no_grad():
        assert len({float(fused(x).sum()) for _ in range(20)}) == 2
