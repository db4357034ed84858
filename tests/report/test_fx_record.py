"""The record of a fused torch module."""

import copy
import json
from typing import Any

import torch
from torch import nn

import reparamc
from reparamc import fuse_fx
from reparamc.report.data import Report
from reparamc.testing import randomize_batchnorm


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
    return randomize_batchnorm(layers).eval()


def report(module: nn.Module) -> Report:
    return fuse_fx(module, torch.randn(1, 3, 8, 8)).meta["reparamc"]


def test_a_module_says_what_it_was_made_from() -> None:
    record = report(network()).record()
    assert record["reparamc"] == reparamc.__version__
    assert record["input"]["of"] == "parameters and buffers"
    assert len(record["input"]["sha256"]) == 64
    assert record["passes"] == {"bn-folding": 1}
    assert record["verified"] == "full"
    (output,) = record["outputs"]
    assert output["max_rel"] <= output["allowed"]
    assert json.loads(json.dumps(record)) == record


def test_the_hash_is_that_of_the_values() -> None:
    digest = report(network()).record()["input"]
    assert report(network()).record()["input"] == digest
    others = [network(), network(), network(), network()]
    with torch.no_grad():
        others[0][0].weight[0, 0, 0, 0] += 1e-6
        others[1][1].running_var[2] += 1e-6
        others[2][1].num_batches_tracked += 1
    others[3].double()
    double = fuse_fx(others[3]).meta["reparamc"].record()["input"]
    hashes = [digest["sha256"], double["sha256"], *(report(m).record()["input"]["sha256"] for m in others[:3])]
    assert len(set(hashes)) == 5


def test_other_dtypes_have_a_hash() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert fuse_fx(network().to(dtype)).meta["reparamc"].origin is not None


def test_a_copy_keeps_it() -> None:
    fused = fuse_fx(network(), torch.randn(1, 3, 8, 8))
    record = fused.meta["reparamc"].record()
    assert copy.deepcopy(fused).meta["reparamc"].record() == record
    assert copy.copy(fused).meta["reparamc"].record() == record


def test_a_second_fusion_keeps_the_first_record() -> None:
    once = fuse_fx(network())
    assert once.meta["reparamc"].records == [once.meta["reparamc"].record()]
    same = fuse_fx(once)
    assert same.meta["reparamc"].records == [once.meta["reparamc"].record()]  # nothing was done
    wide = nn.Sequential(*network()[:3], nn.Conv2d(4, 64, 1), nn.Conv2d(64, 4, 1)).eval()
    folded = fuse_fx(wide, passes=["bn-folding"])
    merged = fuse_fx(folded).meta["reparamc"]
    first, second = merged.records
    assert first == folded.meta["reparamc"].record()
    assert (first["passes"], second["passes"]) == ({"bn-folding": 1}, {"sequence-merging": 1})
    assert first["input"] != second["input"]
