"""Weights that only their packed forms stand for: their memory goes, their sizes stay."""

from __future__ import annotations

import math
import mmap

import torch
from torch.fx import GraphModule, Node

from fastnn.graph import ir
from fastnn.graph.ir import PACKED, constant, is_call, is_constant, new_constant
from fastnn.graph.program import reach
from fastnn.ops.core.op import OPS

__all__ = ["drop_unread_weights"]

_ops = torch.ops.fastnn
#: The op that names the algorithms, and those that read the packed weight in place of the weight.
_READ_PACKED = {
    _ops.linear_packed.raw: ("linear_activation", ("blocked", "registers")),
    _ops.conv2d_packed.raw: ("conv2d_activation", ("rows", "pixels", "linear")),
    _ops.conv2d_relu_max_pool2d_packed.raw: ("conv2d_relu_max_pool2d", ("rows", "pixels")),
}
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
    if not is_call(node, *_READ_PACKED):
        return False
    op, names = _READ_PACKED[node.target]
    packed = node.args[PACKED[node.target]]
    if packed is None or OPS[op].algorithms.names[node.args[-1]] not in names:
        return False
    sizes = ir.shape_of(node)
    if sizes is None:
        return False
    return math.prod(sizes) // constant(gm, node.args[1]).shape[0] > _FEW_ROWS
