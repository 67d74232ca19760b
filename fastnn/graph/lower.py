"""From products to fastnn's ops, with packed weights where those are faster, each by the algorithm that is fastest here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import fastnn.nn.functional as F
from fastnn import _library, _settings
from fastnn.graph import ir, timing
from fastnn.graph.ir import aten, constant, is_call, is_constant, new_constant, replace
from fastnn.ops.core import activations
from fastnn.ops.core.algorithms import covers_by
from fastnn.ops.core.op import FLOATS, OPS
from fastnn.ops.core.packed_weight import READ_PACKED

__all__ = ["lower"]

_ops = torch.ops.fastnn

# What it costs a call, in seconds, that a program is left for torch's op and another begun, beside what the op takes; and that a
# byte of the result is new memory, whose pages are found at their first use, not a program's own.
_OUTSIDE, _NEW_BYTE = 5e-6, 1e-10


def lower(gm: GraphModule, args: tuple) -> None:
    """Replace what passes made by ops that run.

    The call is made on the way, so that each product is lowered for what it gets, in the strides in which it gets it. On the CPU
    products are measured, each of a kind once.

    Parameters
    ----------
    gm : GraphModule
    args : tuple
        What the graph is called with.
    """
    lowering = _Lowering(gm)
    values: dict[Node, Any] = {}
    given, done = iter(args), set()
    for node in list(gm.graph.nodes):
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = constant(gm, node)
        else:
            node = lowering(node, values)
            found_args, found_kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*found_args, **found_kwargs)
        done.add(node)
        for read in node.all_input_nodes:
            if read.op != "get_attr" and done.issuperset(read.users):
                values.pop(read, None)
    ir.clean(gm)


def _add_layer_norm(x, residual, weight, bias, eps):
    return F.add_layer_norm(x, residual, weight, bias, eps, with_sum=True)


# ---- products ----


def _stock_conv2d(x, weight, bias, residual, *rest):
    *options, activation = rest
    return activations.with_residual(
        aten.conv2d.default(x, weight, bias, options[:2], options[2:4], options[4:6], options[6]),
        residual,
        activation,
    )


def _stock_linear(x, weight, bias, residual, activation):
    return activations.with_residual(aten.linear.default(x, weight, bias), residual, activation)


#: The ops of fastnn that take what these take, and the number of an algorithm.
BY_TORCH: dict[Callable, Callable] = {
    _stock_conv2d: _ops.conv2d_activation.raw,
    _stock_linear: _ops.linear_activation.raw,
}


class _Lowering:
    """What one graph's products share: what was measured, and their packed weights."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.measured: dict[tuple, str] = {}
        self.packs: dict[Node, Node] = {}

    def __call__(self, node: Node, values: dict[Node, Any]) -> Node:
        """The node that runs in a node's place."""
        gm = self.gm
        if is_call(node, ir.conv2d, ir.linear):
            return self.product(node, values)
        if is_call(node, ir.activation):
            return replace(gm, node, activations.BY_TORCH[node.args[1]], node.args[:1])
        if is_call(node, ir.attention):
            query, key, value, mask, causal, scale, shared = node.args
            args = query, key, value, mask, 0.0, causal, scale, shared
            return replace(gm, node, F.scaled_dot_product_attention, args)
        if is_call(node, ir.add_layer_norm):
            return replace(gm, node, _add_layer_norm, node.args)
        if is_call(node, aten.adaptive_avg_pool2d.default):
            return replace(gm, node, F.adaptive_avg_pool2d, node.args)
        if is_call(node, aten.max_pool2d.default) and not node.kwargs:
            return replace(gm, node, F.max_pool2d, node.args)
        if (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "fastnn"
            and not node.kwargs
        ):
            # The kernel alone, without autograd's help.
            return replace(gm, node, getattr(_ops, node.target._opname).raw, node.args)
        return node

    def product(self, node: Node, values: dict[Node, Any]) -> Node:
        convolution = node.target is ir.conv2d
        tensors = node.args[:4]
        weight = tensors[1]
        options, pool = (node.args[4], node.args[6]) if convolution else ((), None)
        rest = (*options, activations.NUMBERS[node.args[5 if convolution else 4]])
        real = tuple(None if n is None else values[n] for n in tensors)
        x = real[0]
        if _settings.disabled or not x.is_cpu or x.dtype not in FLOATS or x.numel() == 0:
            return _by_function(self.gm, node)
        if pool is not None and not (is_constant(weight) and options[6] == 1):
            return _by_function(self.gm, node)
        packed = self.packed(node, weight, options, values) if is_constant(weight) else None
        if pool is not None:
            return self.pooled(node, values, real, (*tensors[:3], packed, *options, *pool))
        op = OPS["conv2d_activation" if convolution else "linear_activation"]
        stock = _stock_conv2d if convolution else _stock_linear
        calls: dict[str, tuple[Callable, tuple]] = {"torch": (stock, (*tensors, *rest))}
        mask = op.algorithms.results[0].covering(*real, *rest)
        for number, name in enumerate(op.algorithms.names):
            if number == 0 or name == "winograd" or not covers_by(mask, number):
                continue
            if packed is not None and name in READ_PACKED:
                raw = _ops.conv2d_packed.raw if convolution else _ops.linear_packed.raw
                calls[name] = raw, (*tensors, packed, *rest, number)
            else:
                calls[name] = op.packet.raw, (*tensors, *rest, number)
        return self.fastest(node, values, real, rest, calls)

    def pooled(self, node: Node, values: dict[Node, Any], real: tuple, args: tuple) -> Node:
        """With a pooling behind it: torch's ops would store what stands between."""
        op, rest = OPS["conv2d_relu_max_pool2d"], args[4:]
        mask = op.algorithms.results[0].covering(*real[:3], *rest)
        raw = _ops.conv2d_relu_max_pool2d_packed.raw
        calls = {
            name: (raw, (*args, number))
            for number, name in enumerate(op.algorithms.names)
            if number > 0 and covers_by(mask, number)
        }
        return self.fastest(node, values, real, rest, calls)

    def fastest(self, node: Node, values: dict[Node, Any], real: tuple, rest: tuple, calls: dict) -> Node:
        """The fastest of some calls in a node's place; each kind is measured once."""
        alike = ((t.shape, t.stride(), t.dtype) if t is not None else None for t in real)
        key = node.target, *alike, rest
        if key not in self.measured:
            self.measured[key] = _fastest(
                {
                    name: partial(function, *map_arg(args, values.__getitem__))
                    for name, (function, args) in calls.items()
                }
            )
        return replace(self.gm, node, *calls[self.measured[key]])

    def packed(self, before: Node, weight: Node, options: tuple, values: dict[Node, Any]) -> Node:
        """The node of a weight's packed form."""
        if weight not in self.packs:
            data = _ops._pack_weight(constant(self.gm, weight), options[6] if options else 1)
            self.packs[weight] = new_constant(self.gm, before, data)
        values[self.packs[weight]] = constant(self.gm, self.packs[weight])
        return self.packs[weight]


def _fastest(calls: dict[str, Callable]) -> str:
    """The call that takes the least time in a program, or between two."""
    besides = {}
    if "torch" in calls and len(calls) > 1:
        besides["torch"] = _OUTSIDE + _NEW_BYTE * calls["torch"]().nbytes
    return timing.fastest(calls, besides)


def _by_function(gm: GraphModule, node: Node) -> Node:
    """By the public functions, which plan each call."""
    if node.target is ir.linear:
        x, weight, bias, residual, name = node.args
        return replace(gm, node, _linear_function, (x, weight, bias, residual, name))
    return replace(gm, node, _conv2d_function, node.args)


def _linear_function(x, weight, bias, residual, name):
    return F.linear_activation(x, weight, bias, name, residual=residual)


def _conv2d_function(x, weight, bias, residual, options, name, pool):
    where = (x, weight, bias, options[:2], options[2:4], options[4:6], options[6])
    if pool is not None:
        return F.conv2d_relu_max_pool2d(
            *where, kernel_size=pool[:2], pool_stride=pool[2:4], pool_padding=pool[4:]
        )
    return F.conv2d_activation(*where, activation=name, residual=residual)


# ---- what fastnn.explain tells of a node ----


def told(node: Node) -> tuple[str, str, str, str]:
    """The op that a lowered node calls, what runs it, why torch if torch does, and the algorithm where there are several."""
    target = node.target
    name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    native = f"fastnn {_library.current_isa()}"
    if target in (_stock_conv2d, _stock_linear):
        return name.removeprefix("_stock_"), "torch", "torch measured faster here", ""
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace != "fastnn":
            return name, "torch", "no kernel of fastnn", ""
        names = ir.algorithms_of(target)
        return name, native, "", "" if names is None else names[node.args[-1]]
    if getattr(target, "__module__", "").startswith("fastnn."):
        return name.strip("_"), native, "", ""
    return name, "torch", "no kernel of fastnn", ""
