"""Tensors that a forward makes of numbers: a graph makes them as well, anew in each run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from reparamc.errors import InputError
from reparamc.fx.memory import Memory

CONSTANT = "_tensor_constant"
"""What torch.fx calls tensors that are no parts of a module, and puts there."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtypes of whole numbers that hold the bits of others, by bytes."""
MOST_NUMBERS = 1024
"""How many numbers a graph writes out."""


def anew(held: fx.Node, a: Tensor) -> tuple[str, str, tuple[Any, ...], dict[str, Any]]:
    """A call that makes ``a`` of numbers: a method of a tensor, as a function of numbers would run in a loaded copy."""
    numbers = a.detach().to(torch.float32 if a.itemsize == 1 and a.is_floating_point() else a.dtype).tolist()
    return "call_method", "new_tensor", (held, numbers), {"dtype": a.dtype, "device": a.device}


def own_constants(graph: fx.Graph, root: nn.Module) -> None:
    """Have each run return tensors of its own, where forward makes them anew in each; refuse what is written into."""
    held = [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith(CONSTANT)]
    if not held:
        return
    memory = Memory(graph, root)
    for node in held:
        if any(map(memory.writers, (node, *(n for n in node.users if n.target == "new_tensor")))):
            raise InputError("it writes into a tensor that it makes")
        value = getattr(root, str(node.target))
        views = {node}
        views.update(n for n in memory.aliases(node) if n.args and n.args[0] in views)
        if any(u.op == "output" for n in views for u in n.users) and value.numel() <= MOST_NUMBERS:
            with graph.inserting_after(node):
                made = graph.create_node(*anew(node, value))
            node.replace_all_uses_with(made)
            made.update_arg(0, node)
