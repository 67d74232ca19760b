"""One spelling of each thing, so that the passes behind need to know but one."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import GraphModule, Node

from fastnn.graph import ir
from fastnn.graph.ir import (
    aten,
    constant,
    dtype_of,
    is_call,
    is_constant,
    new_constant,
    only_user,
    replace,
    shape_of,
    single,
)
from fastnn.ops.core import activations
from fastnn.ops.core.numbers import pair
from fastnn.ops.core.op import FLOATS

__all__ = ["fold_constants", "normalise"]

# Constants that nobody folds: larger than this many bytes, and than what they are made of.
_MOST_FOLDED = 1 << 24


def fold_constants(gm: GraphModule) -> None:
    """Compute what depends on constants alone."""
    for node in list(gm.graph.nodes):
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, torch.Tensor) or _is_random(node):
            continue
        if not all(is_constant(n) for n in node.all_input_nodes):
            continue
        read = sum(constant(gm, n).nbytes for n in node.all_input_nodes)
        if val.numel() * val.element_size() > max(_MOST_FOLDED, read):
            continue
        load = {n: constant(gm, n) for n in node.all_input_nodes}
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n, load=load: load[n])
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        if isinstance(value, torch.Tensor):
            # A view would keep all of what it is a view of.
            made = new_constant(gm, node, value.clone() if value._is_view() else value)
            node.replace_all_uses_with(made)
            gm.graph.erase_node(node)


def _is_random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.relu6.default: "relu6",
}


def _activation_of(node: Node) -> str | None:
    """The activation that a node applies to its first argument."""
    if node.target in _ACTIVATIONS:
        return _ACTIVATIONS[node.target]
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if is_call(node, aten.hardtanh.default) and node.args[1:] == (0.0, 6.0):
        return "relu6"
    if is_call(node, aten.clamp.default):
        bounds = (*node.args[1:], None, None)[:2]
        return {(0, None): "relu", (0, 6): "relu6"}.get(bounds)
    if is_call(node, aten.clamp_min.default) and node.args[1] == 0:
        return "relu"
    return None


def normalise(gm: GraphModule) -> None:
    """Bring a captured graph to one spelling of products, activations, poolings and attention."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            _one(gm, node)
    for node in list(gm.graph.nodes):
        if is_call(node, ir.linear):
            _with_leading_dimensions(gm, node)
    for node in list(gm.graph.nodes):
        if is_call(node, aten.mul.Tensor):
            _gated(gm, node)
    ir.clean(gm)


def _one(gm: GraphModule, node: Node) -> None:
    if _is_copy(node):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    elif (name := _activation_of(node)) is not None and dtype_of(node) in FLOATS:
        replace(gm, node, ir.activation, (node.args[0], name))
    elif is_call(node, aten.linear.default):
        x, weight, bias = (*node.args, None)[:3]
        if len(shape_of(weight) or ()) == 2:
            replace(gm, node, ir.linear, (x, weight, bias, None, "none"))
    elif is_call(node, aten.addmm.default):
        bias, x, weight = node.args
        plain = not node.kwargs and len(shape_of(bias) or ()) == 1
        if plain and is_constant(weight):
            replace(gm, node, ir.linear, (x, _transposed(gm, node, weight), bias, None, "none"))
    elif is_call(node, aten.mm.default, aten.matmul.default):
        x, weight = node.args
        if (
            is_constant(weight)
            and len(shape_of(weight)) == 2
            and len(shape_of(x)) >= 2
            and dtype_of(x) in FLOATS
        ):
            replace(gm, node, ir.linear, (x, _transposed(gm, node, weight), None, None, "none"))
    elif is_call(node, aten.conv2d.default, aten.conv2d.padding):
        _convolution(gm, node)
    elif node.target in _OURS:
        _of_ours(gm, node)
    elif is_call(node, aten.scaled_dot_product_attention.default):
        query, key, value, mask, dropout, causal = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])[:6]
        if dropout == 0.0:
            options = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)
            replace(gm, node, ir.attention, (query, key, value, mask, causal, *options))


_RESHAPES = aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints


def _with_leading_dimensions(gm: GraphModule, node: Node) -> None:
    """A product of rows that were one dimension, and are several again behind it, takes them as they are."""
    flat, user = node.args[0], only_user(node)
    if not is_call(flat, *_RESHAPES) or user is None or not is_call(user, *_RESHAPES):
        return
    x = flat.args[0]
    sizes, made = shape_of(x), shape_of(user)
    if sizes[-1] == shape_of(flat)[-1] and made[:-1] == sizes[:-1] and made[-1] == shape_of(node)[-1]:
        replace(gm, user, ir.linear, (x, *node.args[1:]))
        gm.graph.erase_node(node)


def _linear_of_ours(name):
    return lambda x, weight, bias: (ir.linear, (x, weight, bias, None, name))


def _conv2d_of_ours(name):
    return lambda x, weight, bias, *rest: (
        ir.conv2d,
        (x, weight, bias, None, rest[:7], name, rest[7:] or None),
    )


_fast = torch.ops.fastnn
# fastnn's own ops, as layers and functions of fastnn call them, by what they are: the first of several results.
_OURS = {
    _fast.linear.default: _linear_of_ours("none"),
    _fast.linear_relu.default: _linear_of_ours("relu"),
    _fast.linear_activation.default: lambda *args: (ir.linear, (*args[:4], activations.NAMES[args[4]])),
    _fast.conv2d.default: _conv2d_of_ours("none"),
    _fast.conv2d_relu.default: _conv2d_of_ours("relu"),
    _fast.conv2d_relu_max_pool2d.default: _conv2d_of_ours("relu"),
    _fast.conv2d_activation.default: lambda *args: (
        ir.conv2d,
        (*args[:4], args[4:11], activations.NAMES[args[11]], None),
    ),
    _fast.max_pool2d.default: lambda x, *window: (
        aten.max_pool2d.default,
        (x, *(list(window[i : i + 2]) for i in range(0, 8, 2)), window[8]),
    ),
    _fast.adaptive_avg_pool2d.default: lambda x, *size: (aten.adaptive_avg_pool2d.default, (x, list(size))),
    _fast.attention.default: lambda *args: (ir.attention, (*args, False)),
}


def _of_ours(gm: GraphModule, node: Node) -> None:
    target, args = _OURS[node.target](*node.args)
    if not isinstance(node.meta.get("val"), (tuple, list)):
        replace(gm, node, target, args)
        return
    result = first_of(node)
    if result is not None:
        made = replace(gm, result, target, args)
        made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        gm.graph.erase_node(node)


def _is_copy(node: Node) -> bool:
    """Whether a node gives the values of its argument, which nothing will write to."""
    if is_call(node, aten.clone.default):
        # Not one that the caller gets, or a view of: it is the caller's to write to.
        kept = node.kwargs.get("memory_format") in (None, torch.preserve_format)
        return kept and not any(map(_hands_on_memory, node.users))
    if is_call(node, aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return not node.args[2]
    if is_call(node, aten.expand.default, aten.view.default, aten.reshape.default):
        return shape_of(node) == shape_of(node.args[0])
    return is_call(node, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def _hands_on_memory(node: Node) -> bool:
    """Whether what a node gives may be its argument's memory."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "output" or (schema is not None and any(a.alias_info for a in schema.arguments))


def _transposed(gm: GraphModule, before: Node, weight: Node) -> Node:
    return new_constant(gm, before, constant(gm, weight).t().contiguous())


def _convolution(gm: GraphModule, node: Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = (
        *node.args,
        *(None, 1, 0, 1, 1)[len(node.args) - 2 :],
    )[:7]
    if len(shape_of(x)) != 4 or dtype_of(x) not in FLOATS:
        return
    stride, dilation = pair(single(stride)), pair(single(dilation))
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, shape_of(weight)[2:], strict=True)]
        if any(total % 2 for total in totals):
            return
        padding = [total // 2 for total in totals]
    options = (*stride, *pair(single(padding)), *dilation, groups)
    replace(gm, node, ir.conv2d, (x, weight, bias, None, options, "none", None))


# ---- activations that are written out ----


def _gated(gm: GraphModule, node: Node) -> None:
    """``x * sigmoid(x)`` is SiLU, and GELU by tanh as people write it is GELU."""
    for x, gate in (node.args, node.args[::-1]):
        if is_call(gate, ir.activation) and gate.args == (x, "sigmoid"):
            replace(gm, node, ir.activation, (x, "silu"))
            return
        half = _times(x, 0.5)
        if half is not None and _is_one_plus_tanh(gate, half):
            replace(gm, node, ir.activation, (half, "gelu_tanh"))
            return


def _times(node, factor: float):
    """What a node multiplies by a number; None if it does not."""
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        for value, by in (node.args, node.args[::-1]):
            if isinstance(by, (int, float)) and math.isclose(by, factor, rel_tol=1e-6):
                return value
    return None


def _is_one_plus_tanh(node, x) -> bool:
    """``1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))``."""
    if not is_call(node, aten.add.Tensor, aten.add.Scalar) or 1 not in [
        a for a in node.args if not isinstance(a, Node)
    ]:
        return False
    curve = next(a for a in node.args if isinstance(a, Node))
    if not is_call(curve, ir.activation) or curve.args[1] != "tanh":
        return False
    inner = _times(curve.args[0], math.sqrt(2 / math.pi))
    if not is_call(inner, aten.add.Tensor):
        return False
    for a, b in (inner.args, inner.args[::-1]):
        cube = _times(b, 0.044715)
        if a is x and cube is not None and is_call(cube, aten.pow.Tensor_Scalar) and cube.args == (x, 3.0):
            return True
    return False


def first_of(node: Node) -> Node | None:
    """The node that takes the first of a tuple, where nobody takes another; None otherwise."""
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], operator.getitem) and users[0].args[1] == 0:
        return users[0]
    return None
