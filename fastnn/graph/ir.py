"""What passes make of torch's nodes: products with what stands behind them. Each runs by torch's ops, so every stage of a graph does."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fastnn.ops.core import activations
from fastnn.ops.core.op import OPS

aten = torch.ops.aten

__all__ = ["activation", "add_layer_norm", "attention", "conv2d", "linear"]


def conv2d(x, weight, bias, residual, options, activation, pool):
    """``max_pool2d(activation(conv2d(x) + residual))``; `options` are stride, padding, dilation of two each, and groups."""
    out = F.conv2d(x, weight, bias, options[:2], options[2:4], options[4:6], options[6])
    out = activations.with_residual(out, residual, activations.NUMBERS[activation])
    return out if pool is None else F.max_pool2d(out, pool[:2], pool[2:4], pool[4:6])


def linear(x, weight, bias, residual, activation):
    """``activation(linear(x) + residual)``."""
    return activations.with_residual(F.linear(x, weight, bias), residual, activations.NUMBERS[activation])


def activation(x, name):
    """An activation by its name."""
    return activations.activated(x, activations.NUMBERS[name])


def attention(query, key, value, mask, is_causal, scale, enable_gqa):
    """Attention, by the fused op."""
    return F.scaled_dot_product_attention(
        query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def add_layer_norm(x, residual, weight, bias, eps):
    """``layer_norm(x + residual)`` and the sum."""
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


PRODUCTS = (conv2d, linear)

#: The lowered products that read a packed weight, and which of their arguments it is.
PACKED = {
    torch.ops.fastnn.linear_packed.raw: 4,
    torch.ops.fastnn.conv2d_packed.raw: 4,
    torch.ops.fastnn.conv2d_relu_max_pool2d_packed.raw: 3,
}


def has_algorithm(target: Any) -> bool:
    """Whether a call's last argument is the number of an algorithm."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fastnn":
        return False
    arguments = target._schema.arguments
    return bool(arguments) and arguments[-1].name == "algorithm"


def algorithms_of(target: Any) -> tuple[str, ...] | None:
    """The names of the algorithms of which a call's last argument is the number; None where it is none."""
    op = OPS.get(target._opname) if has_algorithm(target) else None
    return None if op is None or op.algorithms is None else op.algorithms.names


# ---- what passes ask of nodes ----


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The sizes of what a node gives; None of what is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def is_call(node: Any, *targets) -> bool:
    """Whether a node calls one of these."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def single(values: Any) -> Any:
    """An option that a graph has as a list: a tuple, or the number where there is one."""
    values = tuple(values) if isinstance(values, (list, tuple)) else values
    return values[0] if isinstance(values, tuple) and len(values) == 1 else values


def only_user(node: Node) -> Node | None:
    """The one node that reads a node's result; None where there are others."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_constant(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def constant(gm: GraphModule, node: Node) -> torch.Tensor:
    return getattr(gm, node.target)


def new_constant(gm: GraphModule, before: Node, value: torch.Tensor) -> Node:
    """A node of a new constant, before another."""
    name = f"made_{sum(1 for _ in gm.buffers())}"
    while hasattr(gm, name):
        name += "_"
    gm.register_buffer(name, value.detach())
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(name)
    # Without its elements: nodes may outlive what they stand for.
    node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return node


def replace(gm: GraphModule, node: Node, target, args: tuple) -> Node:
    """Have a call of another function in a node's place; what it gives is alike."""
    with gm.graph.inserting_before(node):
        made = gm.graph.call_function(target, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    return made


def clean(gm: GraphModule) -> None:
    """Drop what nobody reads, constants too."""
    gm.graph.eliminate_dead_code()
    used = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers() if name not in used]:
        delattr(gm, name)
    gm.graph.lint()
    gm.recompile()


def getitem(gm: GraphModule, node: Node, index: int, val) -> Node:
    with gm.graph.inserting_after(node):
        made = gm.graph.call_function(operator.getitem, (node, index))
    made.meta["val"] = val
    return made
