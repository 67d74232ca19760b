"""The records that a program has for the nodes of a lowered graph."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch.fx import Node

import fastnn.nn.functional as F
from fastnn.graph import lower
from fastnn.graph.emission import COPIES, Emission, Given, Told, is_view, views
from fastnn.graph.ir import aten, single
from fastnn.graph.program import Builder, CannotHold, Place, bits_of, dense_strides, lies
from fastnn.ops.core import activations
from fastnn.ops.core.numbers import pair

__all__ = ["emit"]

_ops = torch.ops.fastnn


def emit(node: Node, builder: Builder, places: dict[Node, Any], given: Given) -> None:
    """Add a node to a program.

    Parameters
    ----------
    node : Node
    builder : Builder
    places : dict
        Of the nodes that it reads a Place each, or a tuple of them; gets that of the node.
    given : Given

    Raises
    ------
    CannotHold
        If a program has no records for it.
    """
    if node.target is operator.getitem:
        places[node] = places[node.args[0]][node.args[1]]
        return
    if is_view(node, given):
        places[node] = views(node, places, given)
        return
    rule = _RULES.get(node.target)
    if rule is None:
        raise CannotHold(f"no record for {node.target}")
    try:
        inspect.signature(rule).bind(None, *node.args, **node.kwargs)
    except TypeError as error:
        raise CannotHold(f"a form of {node.target}: {error}") from None
    places[node] = rule(Emission(node, builder, places, given), *node.args, **node.kwargs)


# ---- products ----


def _linear(e: Emission, x, weight, bias, residual, packed, activation, algorithm=0) -> Place:
    given = e.dense(x), e.dense(weight), e.dense(bias), e.dense(residual), e[packed]
    made = e.new_in(dense_strides(e.value.shape))
    e.record("linear", (*given, made), (activation, algorithm))
    return made


def _linear_activation(e: Emission, x, weight, bias, residual, *options) -> Place:
    return _linear(e, x, weight, bias, residual, None, *options)


def _is_nhwc(place: Place) -> bool:
    """Whether images lie densely as NHWC, and not as NCHW too."""
    return lies(place, dense_strides(place.sizes, True)) and not lies(place, dense_strides(place.sizes))


def _conv(e: Emission, x, weight, bias, residual, packed, options, activation, algorithm, pool=()) -> Place:
    last = any(e.given.values[n].nhwc for n in (x, weight))
    weight_last = _is_nhwc(e[weight])
    given = e.images(x, last), e.images(weight, weight_last), e.dense(bias), e.images(residual, last)
    made = e.new_in(dense_strides(e.value.shape, last))
    numbers = last, weight_last, *options, activation, algorithm, *pool
    e.record("conv2d", (*given, e[packed], made), numbers)
    return made


def _conv2d_packed(e: Emission, x, weight, bias, residual, packed, *options) -> Place:
    return _conv(e, x, weight, bias, residual, packed, options[:7], *options[7:])


def _conv2d_activation(e: Emission, x, weight, bias, residual, *options) -> Place:
    return _conv(e, x, weight, bias, residual, None, options[:7], *options[7:])


def _conv2d_pooled(e: Emission, x, weight, bias, packed, *options) -> Place:
    relu = activations.RELU
    return _conv(e, x, weight, bias, None, packed, options[:7], relu, options[13], options[7:13])


# ---- poolings ----


def _pool(e: Emission, name: str, x, options: tuple[int, ...]) -> Place:
    given = e[x]
    if len(given.sizes) != 4 or 0 in given.sizes:
        raise CannotHold("a pooling of other than images")
    e.check_floats(given)
    last = e.given.values[x].nhwc
    given = e.builder.images(given, last)
    made = e.new_in(dense_strides(e.value.shape, last))
    e.record(name, (given, made), (last, *options))
    return made


def _window(kernel, stride, padding, dilation=1) -> tuple[int, ...]:
    stride = kernel if stride in ([], (), None) else stride
    pairs = [pair(single(n)) for n in (kernel, stride, padding, dilation)]
    if None in pairs:
        raise CannotHold("a window of other than numbers")
    return tuple(itertools.chain(*pairs))


def _max_pool2d(e: Emission, x, kernel, stride=None, padding=0, dilation=1, ceil_mode=False) -> Place:
    return _pool(e, "max_pool2d", x, (*_window(kernel, stride, padding, dilation), ceil_mode))


def _avg_pool2d(
    e: Emission, x, kernel, stride=None, padding=0, ceil_mode=False, include_pad=True, divisor=None
) -> Place:
    if divisor is not None and divisor == 0:
        raise CannotHold("a divisor of 0")
    window = _window(kernel, stride, padding)[:6]
    return _pool(e, "avg_pool2d", x, (*window, ceil_mode, include_pad, divisor or 0))


def _adaptive_avg_pool2d(e: Emission, x, *_) -> Place:
    return _pool(e, "adaptive_avg_pool2d", x, ())


def _max_pool2d_op(e: Emission, x, *options) -> Place:
    return _pool(e, "max_pool2d", x, options)


def _avg_pool2d_op(e: Emission, x, *options) -> Place:
    return _pool(e, "avg_pool2d", x, (*options[:-1], options[-1] or 0))


def _mean(e: Emission, x, dims=None, keepdim=False, *, dtype=None) -> Place:
    """Of images over their pixels: a pooling to one."""
    given = e[x]
    if dtype is not None or dims is None or len(given.sizes) != 4 or 0 in given.sizes:
        raise CannotHold("a mean of other than images")
    if sorted(d % 4 for d in dims) != [2, 3]:
        raise CannotHold("a mean of other than pixels")
    e.check_floats(given)
    last = e.given.values[x].nhwc
    given = e.builder.images(given, last)
    sizes = (*given.sizes[:2], 1, 1)
    pooled = e.builder.new(given.dtype, sizes, dense_strides(sizes, last))
    e.record("adaptive_avg_pool2d", (given, pooled), (last,))
    return Place(pooled.memory, 0, given.dtype, e.value.shape, e.value.strides)


# ---- attention, rows ----


def _attention(e: Emission, query, key, value, mask, dropout, causal, scale, shared) -> Place:
    q, k, v = (e[n] for n in (query, key, value))
    planned = e.given.plans.get(e.node)
    if planned is None or planned.algorithm is None:
        raise CannotHold("attention by torch")
    if dropout or not len(q.sizes) == len(k.sizes) == len(v.sizes) == 4:
        raise CannotHold("attention of other than 4 dimensions")
    if not shared and not (q.sizes[:2] == k.sizes[:2] == v.sizes[:2]):
        raise CannotHold("attention that broadcasts")
    number = planned.numbers[0] if planned.numbers else 0
    return _attention_by(e, (q, k, v, e[mask]), causal, scale, number, e.value)


def _attention_op(e: Emission, query, key, value, mask, causal, scale, algorithm=0) -> tuple:
    given = tuple(e[n] for n in (query, key, value, mask))
    return _attention_by(e, given, causal, scale, algorithm, e.value[0]), None


def _attention_by(e: Emission, given: tuple, causal, scale, algorithm, result: Told) -> Place:
    q, k, v, m = given
    e.check_floats(q, k, v)
    if 0 in q.sizes or 0 in k.sizes or 0 in v.sizes:
        raise CannotHold("attention to nothing")
    q, k, v = (t if t.sizes[3] == 1 or t.strides[3] == 1 else e.builder.dense(t) for t in (q, k, v))
    if m is not None and m.sizes[-1] != 1 and m.strides[-1] > 1:
        m = e.builder.dense(m)
    made = e.new(result)
    if made.strides[3] != 1 and made.sizes[3] != 1:
        raise CannotHold("a result in another layout")
    by = 1 / math.sqrt(q.sizes[3]) if scale is None else float(scale)
    e.record("attention", (q, k, v, m, made), (causal, bits_of(by), algorithm))
    return made


def _layer_norm(e: Emission, x, sizes, weight=None, bias=None, eps=1e-5, *_) -> Place:
    if len(sizes) != 1 or not e[x].sizes or not e[x].sizes[-1]:
        raise CannotHold("a layer norm over several dimensions")
    e.check_floats(e[x], e[weight], e[bias])
    given = e.dense(x), None, e.dense(weight), e.dense(bias)
    made = e.new_in(dense_strides(e.value.shape))
    e.record("layer_norm", (*given, made, None), (bits_of(eps),))
    return made


def _add_layer_norm(e: Emission, x, residual, weight, bias, eps) -> tuple[Place, Place]:
    return _add_layer_norm_op(e, x, residual, weight, bias, eps, True, False)[:2]


def _add_layer_norm_op(e: Emission, x, residual, weight, bias, eps, with_sum, with_statistics) -> tuple:
    if not e[x].sizes or not e[x].sizes[-1] or e[x].sizes != e[residual].sizes:
        raise CannotHold("a sum that broadcasts")
    if with_statistics:
        raise CannotHold("a layer norm with its statistics")
    e.check_floats(e[x], e[residual], e[weight], e[bias])
    given = e.dense(x), e.dense(residual), e.dense(weight), e.dense(bias)
    y, total = e.new(e.value[0]), e.new(e.value[1]) if with_sum else None
    if not all(lies(place, dense_strides(place.sizes)) for place in (y, total) if place is not None):
        raise CannotHold("a result in another layout")
    e.record("layer_norm", (*given, y, total), (bits_of(eps),), results=(4, 5))
    return y, total, None, None


def _softmax(e: Emission, x, dim, dtype=None) -> Place:
    given = e[x]
    # `half_to_float`, of _softmax, or a dtype.
    if dtype not in (None, False) or not given.sizes or dim % len(given.sizes) != len(given.sizes) - 1:
        raise CannotHold("a softmax over another dimension or to another dtype")
    if not given.sizes[-1]:
        raise CannotHold("a softmax of nothing")
    e.check_floats(given)
    made = e.new_in(dense_strides(e.value.shape))
    e.record("softmax", (e.dense(x), made), in_place=True)
    return made


def _embedding(e: Emission, table, indices, *_) -> Place:
    if e[indices].dtype not in (torch.int64, torch.int32) or len(e[table].sizes) != 2:
        raise CannotHold("indices of another dtype")
    made = e.new_in(dense_strides(e.value.shape))
    e.record("embedding", (e.dense(table), e.dense(indices), made))
    return made


# ---- elementwise ----


def _activation(name: str) -> Callable[..., Place]:
    number = activations.NUMBERS[name]

    def rule(e: Emission, x) -> Place:
        e.check_floats(e[x])
        made = e.new()
        e.record("activation", (e[x], made), (number,), in_place=True)
        return made

    return rule


_ADD, _SUBTRACT, _MULTIPLY, _DIVIDE, _SUBTRACTED_FROM = range(5)


def _expanded(place: Place, sizes: tuple[int, ...]) -> Place:
    lead = len(sizes) - len(place.sizes)
    strides = tuple(
        0 if d < lead or place.sizes[d - lead] != sizes[d] else place.strides[d - lead]
        for d in range(len(sizes))
    )
    return Place(place.memory, place.offset, place.dtype, sizes, strides)


def _arithmetic(op: int) -> Callable[..., Place]:
    def rule(e: Emission, a, b, *, alpha=1) -> Place:
        if not isinstance(a, Node):
            if op not in (_ADD, _MULTIPLY) or alpha != 1:
                raise CannotHold("a number less a tensor")
            a, b = b, a
        made = e.new()
        first = e[a]
        if isinstance(b, Node):
            if alpha != 1:
                raise CannotHold("a factor of the second operand")
            second, number = _expanded(e[b], made.sizes), 0.0
        elif isinstance(b, (int, float)) and not isinstance(b, bool):
            second, number = None, float(b) * alpha
            if op not in (_MULTIPLY, _DIVIDE):
                number = torch.tensor(number, dtype=made.dtype).item()  # torch adds it in the tensor's dtype
        else:
            raise CannotHold("an operand that is no number")
        e.check_floats(first, second, made)
        # What a value is the place of, the result may take.
        first = _expanded(first, made.sizes)
        e.record("arithmetic", (first, second, made), (op, bits_of(number)), in_place=True)
        return made

    return rule


def _subtracted_from(e: Emission, a, b, alpha=1) -> Place:
    if alpha != 1:
        raise CannotHold("a factor of the tensor")
    return _arithmetic(_SUBTRACTED_FROM)(e, a, b)


def _copy(e: Emission, x, *_, **options) -> Place:
    if not set(options) <= {"memory_format"}:
        raise CannotHold("a copy with options")
    given, made = e[x], e.new()
    if given.sizes != made.sizes:
        # Of other sizes: it goes by way of one in the order of the dimensions, which the sizes are a view of.
        given = e.builder.dense(given)
        given = Place(given.memory, given.offset, given.dtype, made.sizes, dense_strides(made.sizes))
        if lies(made, given.strides):
            return Place(given.memory, given.offset, given.dtype, made.sizes, made.strides)
    e.record("copy", (given, made))
    return made


def _part(whole: Place, dim: int, start: int, size: int) -> Place:
    sizes = (*whole.sizes[:dim], size, *whole.sizes[dim + 1 :])
    offset = whole.offset + start * whole.strides[dim]
    return Place(whole.memory, offset, whole.dtype, sizes, whole.strides)


def _cat(e: Emission, tensors, dim=0) -> Place:
    parts = [e[n] for n in tensors]
    made = e.new()
    # An empty tensor of one dimension fits any other, and adds nothing.
    parts = [part for part in parts if part.sizes != (0,)]
    dim, at = dim % max(len(made.sizes), 1), 0
    for part in parts:
        if part.dtype is not made.dtype or len(part.sizes) != len(made.sizes):
            raise CannotHold("a concatenation of several dtypes")
        e.record("copy", (part, _part(made, dim, at, part.sizes[dim])))
        at += part.sizes[dim]
    return made


def _pad(e: Emission, x, pad, mode="constant", value=0.0) -> Place:
    if mode != "constant" or any(n < 0 for n in pad):
        raise CannotHold("padding with other than a constant")
    e.check_floats(e[x])
    made = e.new()
    pattern = torch.full((1,), float(value or 0.0), dtype=made.dtype).view(torch.uint8).tolist()
    e.record("fill", (made,), (int.from_bytes(bytes(pattern).ljust(8, b"\0"), "little", signed=True),))
    inner = made
    for i in range(0, len(pad), 2):
        dim = len(made.sizes) - 1 - i // 2
        inner = _part(inner, dim, pad[i], e[x].sizes[dim])
    e.record("copy", (e[x], inner))
    return made


def _constant_pad(e: Emission, x, pad, value=0.0) -> Place:
    return _pad(e, x, pad, "constant", value)


_RULES: dict[Any, Callable] = {
    _ops.linear_packed.raw: _linear,
    _ops.linear_activation.raw: _linear_activation,
    _ops.conv2d_packed.raw: _conv2d_packed,
    _ops.conv2d_activation.raw: _conv2d_activation,
    _ops.conv2d_relu_max_pool2d_packed.raw: _conv2d_pooled,
    _ops.max_pool2d.raw: _max_pool2d_op,
    _ops.avg_pool2d.raw: _avg_pool2d_op,
    _ops.adaptive_avg_pool2d.raw: _adaptive_avg_pool2d,
    _ops.attention.raw: _attention_op,
    _ops.add_layer_norm.raw: _add_layer_norm_op,
    F.max_pool2d: _max_pool2d,
    aten.max_pool2d.default: _max_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    aten.mean.dim: _mean,
    F.scaled_dot_product_attention: _attention,
    aten.layer_norm.default: _layer_norm,
    lower._add_layer_norm: _add_layer_norm,
    aten._softmax.default: _softmax,
    aten.softmax.int: _softmax,
    aten.embedding.default: _embedding,
    aten.add.Tensor: _arithmetic(_ADD),
    aten.sub.Tensor: _arithmetic(_SUBTRACT),
    aten.mul.Tensor: _arithmetic(_MULTIPLY),
    aten.div.Tensor: _arithmetic(_DIVIDE),
    aten.rsub.Scalar: _subtracted_from,
    aten.cat.default: _cat,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _constant_pad,
    **{op: _copy for op in COPIES},
    **{function: _activation(name) for name, function in activations.BY_TORCH.items() if name != "none"},
    TF.softmax: _softmax,
}
