"""Exported programs, fused."""

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import CHANNELS, Net, conv_bn, images, ready, relative_error, run
from torch import nn

from reparamc import fuse_exported
from reparamc.errors import InputTypeError


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_comes_back_as_one(decomposed: bool) -> None:
    model, x = ready(nn.Sequential(conv_bn(), nn.ReLU())), images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    fused = fuse_exported(program.run_decompositions() if decomposed else program)
    assert isinstance(fused, torch.export.ExportedProgram)
    assert not any("batch_norm" in str(n.target) for n in fused.graph.nodes)
    assert set(fused.state_dict) == set(fused.graph_signature.parameters) | set(fused.graph_signature.buffers)
    for batch in images((2, CHANNELS, 7, 6), (5, CHANNELS, 7, 6), dtype=torch.float32):
        assert relative_error(run(fused.run_decompositions().module(), batch), run(model, batch)) < 1e-5
    assert "_dynamo" not in " ".join(vars(x))


@pytest.mark.parametrize("names", [("x",), ("x", "y")])
def test_results_have_the_types_that_they_had(names: tuple[str, ...]) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.part(x)
        return [y, {name: (y, [y * 2]) for name in names}]

    model, x = ready(Net(forward, part=conv_bn())), images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]
    program = torch.export.export(model, (x,))
    fused = fuse_exported(program)
    assert fused.call_spec == program.call_spec
    assert fused.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert relative_error(run(fused.module(), x), run(model, x)) < 1e-5


def test_other_types() -> None:
    with pytest.raises(InputTypeError, match="takes an ExportedProgram, not Sequential"):
        fuse_exported(ready(conv_bn()))
