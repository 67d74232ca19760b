"""Fusion: what stands behind a product becomes part of it."""

from __future__ import annotations

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
from fastnn.graph.normalise import first_of
from fastnn.ops.core.numbers import pair

__all__ = ["fold_batch_norm", "fold_scales", "fuse"]


def fold_batch_norm(gm: GraphModule) -> None:
    """Have a convolution's weight and bias do what the batch norm behind it does."""
    for node in list(gm.graph.nodes):
        if not is_call(node, aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default):
            continue
        plain = is_call(node, aten.batch_norm.default)
        x, gamma, beta, mean, var = node.args[:5]
        eps = node.args[7] if plain else node.args[6]
        result = node if plain else first_of(node)
        if (
            result is None
            or (plain and node.args[5])
            or not all(t is None or is_constant(t) for t in node.args[1:5])
        ):
            continue
        if (
            mean is None
            or not is_call(x, ir.conv2d)
            or len(x.users) != 1
            or x.args[3] is not None
            or x.args[5] != "none"
        ):
            continue
        source, weight, bias, _, options, *behind = x.args
        if not is_constant(weight) or not (bias is None or is_constant(bias)):
            continue
        with torch.no_grad():
            # In float64: what is folded is rounded once.
            w, m, v = (constant(gm, t).double() for t in (weight, mean, var))
            scale = torch.rsqrt(v + eps)
            if gamma is not None:
                scale = scale * constant(gm, gamma).double()
            shift = -m * scale if bias is None else (constant(gm, bias).double() - m) * scale
            if beta is not None:
                shift = shift + constant(gm, beta).double()
            dtype = constant(gm, weight).dtype
            folded = (w * scale[:, None, None, None]).to(dtype), shift.to(dtype)
        args = (source, *(new_constant(gm, x, t) for t in folded), None, options, *behind)
        made = replace(gm, x, ir.conv2d, args)
        result.replace_all_uses_with(made)
        gm.graph.erase_node(result)
        if result is not node:
            gm.graph.erase_node(node)
    ir.clean(gm)


def _product_behind(node) -> tuple[Node | None, list[Node]]:
    """A linear layer and the permutations between it and a node that reads it, of which nobody reads anything else."""
    between: list[Node] = []
    while is_call(node, aten.permute.default) and len(node.users) == 1:
        between.append(node)
        node = node.args[0]
    return (node if is_call(node, ir.linear) and len(node.users) == 1 else None), between


def fold_scales(gm: GraphModule) -> None:
    """Have a linear layer's weight and bias do what a constant factor per feature behind it does."""
    for node in list(gm.graph.nodes):
        if not is_call(node, aten.mul.Tensor):
            continue
        for value, factor in (node.args, node.args[::-1]):
            if not is_constant(factor) or not isinstance(value, Node):
                continue
            product, between = _product_behind(value)
            if product is None or product.args[3] is not None or product.args[4] != "none":
                continue
            x, weight, bias, *behind = product.args
            if not is_constant(weight) or not (bias is None or is_constant(bias)):
                continue
            dims, features = len(shape_of(value)), shape_of(weight)[0]
            place = dims - 1
            for permutation in reversed(between):
                place = [d % dims for d in permutation.args[1]].index(place)
            by = constant(gm, factor)
            sizes = (1,) * (dims - by.dim()) + tuple(by.shape)
            if len(sizes) != dims or any(size != 1 for d, size in enumerate(sizes) if d != place):
                continue
            by = by.reshape(-1).double().expand(features)
            w = constant(gm, weight)
            made = [new_constant(gm, product, (w.double() * by[:, None]).to(w.dtype)), None]
            if bias is not None:
                b = constant(gm, bias)
                made[1] = new_constant(gm, product, (b.double() * by).to(b.dtype))
            replace(gm, product, ir.linear, (x, *made, *behind))
            node.replace_all_uses_with(node.args[0] if is_constant(node.args[1]) else node.args[1])
            gm.graph.erase_node(node)
            break
    ir.clean(gm)


def _sinks_permutations(gm: GraphModule) -> None:
    """A residual that is added to a permuted product is added before the permutation, permuted back."""
    for node in list(gm.graph.nodes):
        if not is_call(node, aten.add.Tensor) or node.kwargs:
            continue
        for value, other in (node.args, node.args[::-1]):
            if (
                not isinstance(other, Node)
                or shape_of(other) != shape_of(node)
                or not is_call(value, aten.permute.default)
            ):
                continue
            product, between = _product_behind(value)
            if (
                product is None
                or len(between) != 1
                or product.args[3] is not None
                or product.args[4] != "none"
            ):
                continue
            dims = [d % len(shape_of(value)) for d in value.args[1]]
            back = [dims.index(d) for d in range(len(dims))]
            with gm.graph.inserting_before(node):
                turned = gm.graph.call_function(aten.permute.default, (other, back))
                turned.meta["val"] = product.meta["val"]
                total = gm.graph.call_function(aten.add.Tensor, (product, turned))
                total.meta = dict(product.meta)
            replace(gm, node, aten.permute.default, (total, list(value.args[1])))
            break
    ir.clean(gm)


def fuse(gm: GraphModule) -> None:
    """Bias, residual, activation and pooling behind products; residual and layer norm."""
    _sinks_permutations(gm)
    for node in list(gm.graph.nodes):
        if is_call(node, *ir.PRODUCTS):
            _behind(gm, node)
    for node in list(gm.graph.nodes):
        if is_call(node, aten.layer_norm.default):
            _norm(gm, node)
    ir.clean(gm)


# Where in a product's arguments the residual and the activation stand.
_RESIDUAL, _ACTIVATION = 3, {ir.conv2d: 5, ir.linear: 4}


def _behind(gm: GraphModule, node: Node) -> None:
    at = _ACTIVATION[node.target]
    while (user := only_user(node)) is not None:
        args = list(node.args)
        if args[at] != "none":
            if node.target is ir.conv2d and args[at] == "relu" and args[3] is None and args[6] is None:
                pool = _pool_of(user)
                if pool is not None:
                    args[6] = pool
                    result = (
                        user if not is_call(user, aten.max_pool2d_with_indices.default) else first_of(user)
                    )
                    if result is not None:
                        node = _merge(gm, node, result, args)
                        continue
            return
        if is_call(user, ir.activation):
            args[at] = user.args[1]
        elif is_call(user, aten.add.Tensor) and not user.kwargs and args[_RESIDUAL] is None:
            other = user.args[1] if user.args[0] is node else user.args[0]
            alike = (
                isinstance(other, Node)
                and shape_of(other) == shape_of(node)
                and dtype_of(other) == dtype_of(node)
            )
            if not alike or other is node or is_constant(other):
                return
            args[_RESIDUAL] = other
        else:
            return
        node = _merge(gm, node, user, args)


def _merge(gm: GraphModule, node: Node, user: Node, args: list) -> Node:
    """A call of the product in the place of the node behind it."""
    made = replace(gm, user, node.target, tuple(args))
    made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    while node is not made and not node.users:
        behind = [n for n in node.all_input_nodes if is_call(n, aten.max_pool2d_with_indices.default)]
        gm.graph.erase_node(node)
        node = behind[0] if behind else made
    gm.graph.eliminate_dead_code()
    return made


def _pool_of(node: Node) -> tuple[int, ...] | None:
    """Window, step and padding of a max-pooling without dilation that fits behind a convolution."""
    if not is_call(node, aten.max_pool2d.default, aten.max_pool2d_with_indices.default):
        return None
    _, kernel, stride, padding, dilation, ceil = (*node.args, *([], 0, 1, False)[len(node.args) - 2 :])[:6]
    kernel, padding, dilation = pair(single(kernel)), pair(single(padding)), pair(single(dilation))
    stride = kernel if stride in ([], (), None) else pair(single(stride))
    if ceil or dilation != (1, 1) or kernel[0] * kernel[1] >= 255:
        return None
    return (*kernel, *stride, *padding)


def _norm(gm: GraphModule, node: Node) -> None:
    x, sizes, weight, bias, eps = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    if not is_call(x, aten.add.Tensor) or x.kwargs or len(sizes) != 1:
        return
    a, b = x.args
    if not all(
        isinstance(t, Node) and shape_of(t) == shape_of(x) and dtype_of(t) == dtype_of(x) for t in (a, b)
    ):
        return
    with gm.graph.inserting_before(x):
        both = gm.graph.call_function(ir.add_layer_norm, (a, b, weight, bias, eps))
    both.meta["val"] = (node.meta["val"], x.meta["val"])
    total = ir.getitem(gm, both, 1, x.meta["val"])
    x.replace_all_uses_with(total)
    gm.graph.erase_node(x)
    normed = ir.getitem(gm, both, 0, node.meta["val"])
    node.replace_all_uses_with(normed)
    gm.graph.erase_node(node)
