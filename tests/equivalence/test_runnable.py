"""Values inside the results of models, whatever holds them."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reparamc.equivalence.runnable import leaves


@dataclass
class Boxes:
    scores: Any
    names: Any = None


class Kept:
    def __init__(self, x: Any) -> None:
        self.x = x


Pair = namedtuple("Pair", "first second")
A, B = np.zeros(2), np.ones(3)


@pytest.mark.parametrize(
    ("tree", "places"),
    [
        (A, ["output"]),
        ((A, [B, 3]), ["output[0]", "output[1][0]", "output[1][1]"]),
        ({"a": A, 2: (B,)}, ["output['a']", "output[2][0]"]),
        (OrderedDict(a=A), ["output['a']"]),
        (Pair(A, B), ["output[0]", "output[1]"]),
        (deque([A]), ["output[0]"]),
        (Boxes(A, ["x"]), ["output.scores", "output.names[0]"]),
        (SimpleNamespace(a=Kept((A, B))), ["output.a.x[0]", "output.a.x[1]"]),
        ([Boxes(None)], ["output[0].scores", "output[0].names"]),
        ("text", ["output"]),
        (Boxes, ["output"]),
        ([], []),
    ],
)
def test_everything_that_holds_values_is_entered(tree: Any, places: list[str]) -> None:
    assert [place for place, _ in leaves(tree)] == places


def test_the_same_value_may_be_returned_twice() -> None:
    assert [place for place, _ in leaves(([A], [A]))] == ["output[0][0]", "output[1][0]"]
    shared = [A]
    assert [place for place, _ in leaves((shared, shared))] == ["output[0][0]", "output[1][0]"]


def test_what_holds_itself_is_entered_once() -> None:
    tree: list[Any] = [A]
    tree.append(tree)
    assert [place for place, _ in leaves(tree)] == ["output[0]"]
