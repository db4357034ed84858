"""Hypothesis: the network on random inputs, and what this repository does to models on random models."""

import torch
from hypothesis import given, settings
from tiny_net import TinyNet

import reparamc
from reparamc.testing import assert_equivalent, branches, inputs_for, randomize_batchnorm

# Fresh BatchNorms do nothing, and would hide a mistake. float64 makes even a small one stand out.
MODEL = randomize_batchnorm(TinyNet().eval(), seed=0, example_inputs=torch.randn(4, 3, 32, 32)).double()
IMAGES = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
FUSED = reparamc.fuse_fx(MODEL, IMAGES)


@settings(max_examples=8, deadline=None)
@given(inputs_for(MODEL, IMAGES))
def test_fused_equals_unfused_for_every_size(inputs: tuple[torch.Tensor, ...]) -> None:
    assert_equivalent(MODEL, FUSED, inputs, tolerance=1e-12)


@settings(max_examples=5, deadline=None)
@given(branches(channels=4, count=3))
def test_any_three_branches_fuse(example: tuple[torch.nn.Module, tuple[torch.Tensor, ...]]) -> None:
    """Before a new kind of block is designed: do parallel branches of these operators collapse at all?"""
    model, inputs = example
    assert_equivalent(model, reparamc.fuse_fx(model, inputs), inputs)
