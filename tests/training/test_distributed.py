"""The loop of examples/04_digits.py in two processes of gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_digits.py"

PROCESSES = """
import importlib.util, json, os, sys
import torch, torch.distributed as dist

spec = importlib.util.spec_from_file_location("digits", sys.argv[1])
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)
digits.BATCH, digits.SMALL = 8, digits.Config((1,), (8,), mlp_ratio=1, attention=False, layer_scale_init=0.1)
x = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
y = torch.arange(32) % 10

def train(name, *_):
    os.write(1, (json.dumps([name, digits_train(x, y, x[:8], y[:8], epochs=2)[0]]) + "\\n").encode())

digits_train, digits.digits = digits.train, lambda: (x, y)
rank = 0 if os.fork() else 1
if rank == 0:
    train("alone")
os.environ.update(RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo", timeout=digits.timedelta(seconds=30))
train(f"rank {rank}")
digits.train = lambda *_: os._exit(3) if rank else dist.barrier()  # one of them dies
dist.init_process_group = lambda *_, **__: None
digits.main()
"""


def test_two_processes_take_the_steps_of_one() -> None:
    """The results of both are those of one, and when one dies the other says so and ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=os.environ | place)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found.keys() == {"alone", "rank 0", "rank 1"}, done.stderr
    for epochs in zip(*found.values(), strict=True):
        for name in ("loss", "accuracy", "fused accuracy", "searches"):
            assert epochs[1][name] == epochs[2][name] == pytest.approx(epochs[0][name], rel=1e-4)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("process 0 stops, for another one does not answer: ")
