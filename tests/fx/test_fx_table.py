"""The table of torch operators is complete: whatever is read can be proven, is tested, and is documented."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import Net
from test_fx_gathering import Same
from test_fx_norms import NORMS
from test_fx_operators import FUNCTIONS, MODULES, _parts
from torch import fx

import reparamc.certificate.fx_operators as certificate
from reparamc.fx.calls import operation
from reparamc.fx.operators import OPERATORS, TABLE
from reparamc.fx.readers import READERS
from reparamc.fx.trace import trace

DOCS = Path(__file__).parents[2] / "docs"


def test_every_operator_has_one_record() -> None:
    assert len(OPERATORS) == len(TABLE)
    assert set(READERS) <= {o.name for o in TABLE if o.arguments}
    spelled = [m for o in TABLE for m in (*o.methods, *o.functions, *o.modules)]
    assert len(spelled) == len(set(spelled))


@pytest.mark.parametrize("name", READERS)
def test_what_is_read_is_proven(name: str) -> None:
    assert name in {*certificate.READERS, *certificate.NORMS}


def operators(graph: fx.GraphModule) -> set[str]:
    return {call.op for node in graph.graph.nodes if (call := operation(node, graph)) is not None}


def test_what_is_read_is_tested() -> None:
    models = [Net(lambda m, x: m.part(x), part=make()) for make, _ in MODULES.values()]
    for run, _ in FUNCTIONS.values():
        models.append(_parts())
        models[-1].run = run
    models.append(Net(lambda m, x: m.part(x), part=Same(6, 4, 3)))
    found = {op for model in models for op in operators(trace(model.eval()))} | {*NORMS}
    for (_, shape), model in zip(FUNCTIONS.values(), models[len(MODULES) : -1], strict=True):
        if not found.issuperset(READERS):  # some are in graphs of torch.export alone, which takes its time
            exported = torch.export.export(model, (torch.ones(shape),), strict=False).module()
            assert isinstance(exported, fx.GraphModule)
            found |= operators(exported)
    assert found.issuperset(READERS)


def test_what_is_read_is_documented() -> None:
    scope: dict[str, object] = {}
    exec((DOCS / "operators.py").read_text(), scope)
    page = scope["page"]
    assert callable(page)
    assert (DOCS / "operators.md").read_text() == page(), "run: python docs/operators.py"
