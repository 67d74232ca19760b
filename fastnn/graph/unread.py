"""Weights that only their packed forms stand for: their memory goes, their sizes stay."""

from __future__ import annotations

import math
import mmap

import torch
from torch.fx import GraphModule, Node

from fastnn.graph import ir
from fastnn.graph.ir import PACKED, constant, is_call, is_constant, new_constant
from fastnn.graph.program import reach
from fastnn.ops.core.packed_weight import READ_PACKED

__all__ = ["drop_unread_weights"]

#: Rows up to which a product may read the weight itself, packed or not (csrc/cpu/linear_choice.h).
_FEW_ROWS = 4


def drop_unread_weights(gm: GraphModule) -> None:
    """Put zeros that take no memory in the place of weights that no kernel reads.

    An op still checks its weight's sizes. The zeros are pages of the operating system that nobody ever touches.
    """
    found: dict[Node, list[Node]] = {}
    for node in gm.graph.nodes:
        if _reads_packed(gm, node) and is_constant(node.args[1]):
            found.setdefault(node.args[1], []).append(node)
    if not found:
        return
    most = max(_bytes(constant(gm, weight)) for weight in found)
    nothing = torch.frombuffer(mmap.mmap(-1, most), dtype=torch.uint8)
    for weight, readers in found.items():
        value = constant(gm, weight)
        zeros = nothing[: _bytes(value)].view(value.dtype).as_strided(value.shape, value.stride())
        made = new_constant(gm, readers[0], zeros)
        for node in readers:
            node.args = (node.args[0], made, *node.args[2:])
    ir.clean(gm)


def _bytes(t: torch.Tensor) -> int:
    return reach(t.shape, t.stride()) * t.itemsize


def _reads_packed(gm: GraphModule, node: Node) -> bool:
    if not is_call(node, *PACKED) or node.args[PACKED[node.target]] is None:
        return False
    if ir.algorithms_of(node.target)[node.args[-1]] not in READ_PACKED:
        return False
    sizes = ir.shape_of(node)
    if sizes is None:
        return False
    return math.prod(sizes) // constant(gm, node.args[1]).shape[0] > _FEW_ROWS
