"""Layouts of images: channels_last through chains of convolutions, changed only where a chain begins."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fastnn.graph import ir
from fastnn.graph.ir import aten, constant, is_call, is_constant, new_constant, replace, shape_of

__all__ = ["keep_results", "no_views", "to_nhwc"]

_NHWC = torch.channels_last

# What reads memory, not elements: such a graph keeps torch's layouts.
_BY_STRIDES = (
    aten.as_strided.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    aten.view_as_real.default,
)


def to_nhwc(gm: GraphModule) -> bool:
    """Have convolutions work on channels_last images; whether there are any.

    Weights are laid out once, images where they come from something else than another convolution: what stands between two
    convolutions keeps the layout that it is given. What the model gives has been seen to by :func:`keep_results`.
    """
    found = False
    if any(is_call(node, *_BY_STRIDES) for node in gm.graph.nodes):
        return False
    for node in list(gm.graph.nodes):
        if is_call(node, ir.conv2d):
            found = True
            _convolution(gm, node)
    if found:
        no_views(gm)
        for node in list(gm.graph.nodes):
            _tokens(gm, node)
        ir.clean(gm)
    return found


def no_views(gm: GraphModule) -> None:
    """Let shapes change whatever the layout: a view of one layout may be none of another, which a kernel may give."""
    for node in list(gm.graph.nodes):
        if is_call(node, aten.view.default, aten._unsafe_view.default):
            replace(gm, node, aten.reshape.default, node.args)


def _convolution(gm: GraphModule, node: Node) -> None:
    x, weight, *rest = node.args
    if is_constant(weight):
        weight = new_constant(gm, node, constant(gm, weight).contiguous(memory_format=_NHWC))
    if not _is_nhwc(x):
        with gm.graph.inserting_before(node):
            turned = gm.graph.call_function(aten.contiguous.default, (x,), {"memory_format": _NHWC})
        turned.meta = dict(x.meta)
        x = turned
    node.args = (x, weight, *rest)


# Nodes that give the layout that they are given.
_KEEP = frozenset(
    (
        ir.activation,
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.cat.default,
        aten.constant_pad_nd.default,
        aten.pad.default,
    )
)


def _is_nhwc(node, depth: int = 0) -> bool:
    """Whether what a node gives is surely channels_last where convolutions are."""
    if is_call(node, ir.conv2d):
        return True
    if is_call(node, aten.contiguous.default):
        return node.kwargs.get("memory_format") is _NHWC
    if not isinstance(node, Node) or node.target not in _KEEP or depth > 20:
        return False
    first = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    return len(shape_of(first) or ()) == 4 and _is_nhwc(first, depth + 1)


def _tokens(gm: GraphModule, node: Node) -> None:
    """Pixels as rows: ``(N, C, H * W)`` with its last dimensions exchanged is a view of a channels_last image."""
    if not is_call(node, aten.transpose.int, aten.permute.default):
        return
    flat = node.args[0]
    if not is_call(flat, aten.reshape.default, aten.flatten.using_ints) or len(flat.users) != 1:
        return
    image, dims = flat.args[0], shape_of(flat)
    sizes = shape_of(image)
    if len(sizes) != 4 or len(dims) != 3 or dims != (*sizes[:2], sizes[2] * sizes[3]) or not _is_nhwc(image):
        return
    order = node.args[1] if is_call(node, aten.permute.default) else None
    if order is not None and [d % 3 for d in order] != [0, 2, 1]:
        return
    if order is None and {d % 3 for d in node.args[1:3]} != {1, 2}:
        return
    with gm.graph.inserting_before(node):
        turned = gm.graph.call_function(aten.permute.default, (image, [0, 2, 3, 1]))
    turned.meta["val"] = image.meta["val"].permute(0, 2, 3, 1)
    replace(gm, node, aten.reshape.default, (turned, [dims[0], dims[2], dims[1]]))


def keep_results(gm: GraphModule) -> None:
    """What the model gives: images in the layout in which it would give them, constants as copies, which callers may write to."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    made = []
    for value in output.args[0]:
        if is_constant(value):
            with gm.graph.inserting_before(output):
                copied = gm.graph.call_function(aten.clone.default, (value,))
            copied.meta = dict(value.meta)
            value = copied
        sizes = shape_of(value)
        if (
            sizes is not None
            and len(sizes) == 4
            and value.op == "call_function"
            and value.meta["val"].is_contiguous()
        ):
            with gm.graph.inserting_before(output):
                turned = gm.graph.call_function(aten.contiguous.default, (value,))
            turned.meta = dict(value.meta)
            value = turned
        made.append(value)
    output.args = (tuple(made),)
