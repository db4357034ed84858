"""Records, and rules that are asked about the kinds of them that they take."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import numpy as np
import pytest

from reparamc.algebra.expr import ONE, ZERO, Conv, Expr, Scale, Source, Sum
from reparamc.algebra.records import entity, record, replace
from reparamc.algebra.rewrite import Pass, simplify


@record
class Pair:
    a: int
    b: int = 2
    note: str = field(default="", compare=False)


@entity
class Thing:
    a: int


@entity
class Listed(Thing):
    parts: list[int] = field(default_factory=list[int])
    last: int = field(kw_only=True)


def test_a_record_is_equal_by_its_fields() -> None:
    assert Pair(1) == Pair(1, 2, "other")
    assert hash(Pair(1)) == hash(Pair(1, 2, "other"))
    assert replace(Pair(1), b=3) != Pair(1)
    assert Pair(1) != (1, 2)
    assert repr(Pair(1)) == "Pair(a=1, b=2, note='')"


def test_an_entity_is_equal_to_itself_alone() -> None:
    thing = Thing(1)
    assert thing != Thing(1)
    assert len({thing, thing, Thing(1)}) == 2


def test_fields_are_given_as_to_a_dataclass() -> None:
    listed = Listed(1, last=2)
    assert (listed.a, listed.parts, listed.last) == (1, [], 2)
    assert listed.parts is not Listed(1, last=2).parts
    assert replace(listed, last=3).parts is listed.parts
    made: Any = Listed
    for wrong in (lambda: made(1), lambda: made(1, [], 2), lambda: replace(listed, other=1)):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize(
    ("annotation", "kinds"), [(Scale, {Scale}), (Scale | Sum, {Scale, Sum}), (Any, {Scale, Sum, Source, Conv})]
)
def test_a_rule_is_asked_about_what_it_takes(annotation: Any, kinds: set[type]) -> None:
    asked: set[type] = set()

    def rule(e: Any) -> Expr | None:
        asked.add(type(e))

    rule.__annotations__ = {"e": annotation}
    x = Source("x", 2, -3)
    ones = (1, 1)
    conv = Conv(x, np.ones((2, 2, 1, 1)), None, ones, ones, (0, 0), (0, 0))
    simplify(Sum((Scale(x, ONE, ZERO), conv)), [Pass("p", "", "", (rule,))])
    assert asked == kinds
