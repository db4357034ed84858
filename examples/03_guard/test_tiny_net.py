"""Guard a model in its own test suite: the fused network is the trained one, for every input size.

Run it with `python -m pytest examples/03_guard`. It fails on the commit that breaks the structure (a
padding changed, an activation moved between convolution and BatchNorm), not on the day of deployment.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_net import TinyNet
from torch import fx

import reparamc
from reparamc.testing import randomize_batchnorm


@pytest.fixture(scope="module")
def model() -> TinyNet:
    torch.manual_seed(0)
    net = TinyNet().eval()
    # Fresh BatchNorms do nothing, and would hide a mistake. float64 makes even a small one stand out.
    return randomize_batchnorm(net, seed=0, example_inputs=torch.randn(4, 3, 32, 32)).double()


@pytest.fixture(scope="module")
def fused(model: TinyNet) -> fx.GraphModule:
    return reparamc.fuse_fx(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_fused_equals_unfused(
    model: TinyNet, fused: fx.GraphModule, batch: int, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


def test_everything_linear_is_one_convolution(fused: fx.GraphModule) -> None:
    after = fused.meta["reparamc"].after
    assert (after.conv, after.batchnorm) == (3, 0)


def test_nothing_was_declined(fused: fx.GraphModule) -> None:
    assert fused.meta["reparamc"].kept == []
