"""Lowered graphs as JSON and back: what a file may name, and nothing else, comes out of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module

import fastnn.nn.functional as F
from fastnn.graph import lower
from fastnn.graph.ir import PACKED, algorithms_of
from fastnn.graph.program import reach
from fastnn.ops.core import activations

__all__ = ["Unreadable", "decode", "encode"]

_ops = torch.ops.fastnn

#: What a lowered graph calls beside torch's and fastnn's ops.
_FUNCTIONS: dict[str, Callable] = {
    "getitem": operator.getitem,
    "add_layer_norm": lower._add_layer_norm,
    "conv2d": lower._stock_conv2d,
    "linear": lower._stock_linear,
    "planned_conv2d": lower._conv2d_function,
    "planned_linear": lower._linear_function,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "max_pool2d": F.max_pool2d,
    **{f"activation.{name}": function for name, function in activations.BY_TORCH.items()},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_NAMESPACES = frozenset(("aten", "fastnn"))
#: Ops that make tensors of numbers alone. No other is named without a tensor among its arguments: one reads files.
_FACTORIES = frozenset(("arange", "full", "ones", "zeros", "scalar_tensor", "eye"))
#: Where the groups of a convolution stand, behind its packed weight and six other options.
_GROUPS = 7
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.channels_last, torch.preserve_format)}


class Unreadable(ValueError):
    """Why an encoded graph is none."""


# ---- to JSON ----


def encode(gm: GraphModule, keep: Callable[[torch.Tensor], str]) -> list[dict[str, Any]]:
    """A graph as JSON.

    Parameters
    ----------
    gm : GraphModule
        Lowered, with its weights.
    keep : callable
        Keeps a constant's elements, densely in 1 dimension, and gives the name by which they are found.

    Raises
    ------
    ValueError
        If it holds what no file can.
    """
    numbers: dict[Node, int] = {}
    packs = _packed_weights(gm)
    out = []
    for node in gm.graph.nodes:
        if node in packs:
            weight, groups = packs[node]
            if weight not in numbers:  # a packed weight may stand before the weight itself
                numbers[weight] = len(out)
                out.append(_constant(getattr(gm, weight.target), keep))
            entry = {"op": "pack", "weight": numbers[weight], "groups": groups}
        elif node.op == "placeholder":
            entry = {"op": "input"}
        elif node.op == "get_attr":
            if node in numbers:
                continue
            entry = _constant(getattr(gm, node.target), keep)
        elif node.op == "output":
            entry = {"op": "output", "args": _value(tuple(node.args), numbers)}
        else:
            args, kwargs = node.args, dict(node.kwargs)
            algorithms = algorithms_of(node.target)
            entry = {"op": "call", "target": _target(node.target)}
            if algorithms is not None:
                entry["algorithm"] = algorithms[args[-1]]
                args = args[:-1]
            entry |= {"args": _value(tuple(args), numbers), "kwargs": _value(kwargs, numbers)}
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            entry["layer"] = stack[-1][0] if stack else ""
        numbers[node] = len(out)
        out.append(entry)
    return out


def _packed_weights(gm: GraphModule) -> dict[Node, tuple[Node, int]]:
    found = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in PACKED:
            place = PACKED[node.target]
            groups = 1 if node.target is _ops.linear_packed.raw else node.args[place + _GROUPS]
            if node.args[place] is not None:
                found[node.args[place]] = node.args[1], groups
    return found


def _constant(value: torch.Tensor, keep: Callable[[torch.Tensor], str]) -> dict[str, Any]:
    if not value.is_cpu:
        raise ValueError("a model on a GPU is not saved")
    if reach(value.shape, value.stride()) != value.numel():
        value = value.contiguous()
    flat = value.as_strided((value.numel(),), (1,))
    return {
        "op": "constant",
        "tensor": keep(flat),
        "shape": list(value.shape),
        "stride": list(value.stride()),
    }


def _target(target: Any) -> str:
    if target in _NAMES:
        return _NAMES[target]
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    raise ValueError(f"a call of {target} is not saved")


def _value(value: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": numbers[value]}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_value(v, numbers) for v in value]
    if isinstance(value, dict):
        return {"dict": {name: _value(v, numbers) for name, v in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value)}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    if value is torch.strided:
        return {"layout": "strided"}
    raise ValueError(f"an argument of {type(value).__name__} is not saved")


# ---- from JSON ----


def decode(entries: list, tensors: dict[str, torch.Tensor], same_machine: bool) -> GraphModule:
    """A graph of JSON.

    Parameters
    ----------
    entries : list
        As :func:`encode` gives it.
    tensors : dict
        The constants' elements by their names.
    same_machine : bool
        Whether the algorithms are those of a processor and a level such as these; else the ops choose anew.

    Raises
    ------
    Unreadable
        If it is no such graph.
    """
    root, graph = Module(), Graph()
    nodes: list[Node] = []

    def attribute(value: torch.Tensor) -> Node:
        name = f"constant_{sum(1 for _ in root.buffers())}"
        root.register_buffer(name, value)
        node = graph.get_attr(name)
        node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return node

    ended = False
    for entry in entries:
        if ended:
            raise Unreadable("a graph goes on behind its results")
        kind = entry["op"]
        if kind == "input":
            nodes.append(graph.placeholder(f"input_{len(nodes)}"))
        elif kind == "constant":
            nodes.append(attribute(_stored(entry, tensors)))
        elif kind == "pack":
            weight = getattr(root, _earlier(nodes, entry["weight"], "get_attr").target)
            nodes.append(attribute(_ops._pack_weight(weight, _integer(entry["groups"]))))
        elif kind == "output":
            (results,) = _argument(entry["args"], nodes)
            if not all(isinstance(r, (Node, bool, int, float, str, type(None))) for r in results):
                raise Unreadable("a result that is neither a tensor nor a plain value")
            graph.output(tuple(results))
            ended = True
        elif kind == "call":
            nodes.append(_call(graph, entry, nodes, same_machine))
        else:
            raise Unreadable(f"an unknown kind of node, {kind!r}")
    if not ended:
        raise Unreadable("a graph without results")
    return GraphModule(root, graph, "Frozen")


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise Unreadable(f"{value!r} in place of a number")
    return value


def _earlier(nodes: list[Node], number: Any, op: str | None = None) -> Node:
    if not 0 <= _integer(number) < len(nodes) or (op is not None and nodes[number].op != op):
        raise Unreadable(f"there is no such node before it, {number}")
    return nodes[number]


def _stored(entry: dict, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    flat = tensors[entry["tensor"]]
    shape, stride = ([_integer(n) for n in entry[name]] for name in ("shape", "stride"))
    if len(shape) != len(stride) or min((*shape, *stride), default=0) < 0:
        raise Unreadable("a constant of no such sizes")
    if flat.dim() != 1 or math.prod(shape) != flat.numel() or reach(shape, stride) != flat.numel():
        raise Unreadable("a constant of other sizes than its elements")
    return flat.as_strided(shape, stride)


def _call(graph: Graph, entry: dict, nodes: list[Node], same_machine: bool) -> Node:
    target = _function(entry["target"])
    args, kwargs = _argument(entry["args"], nodes), _argument(entry["kwargs"], nodes)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise Unreadable("arguments that are none")
    algorithms = algorithms_of(target)
    if algorithms is not None:
        if entry["algorithm"] not in algorithms:
            raise Unreadable(f"there is no algorithm {entry['algorithm']!r}")
        args.append(algorithms.index(entry["algorithm"]) if same_machine else 0)
    node = graph.call_function(target, tuple(args), kwargs)
    if isinstance(target, torch._ops.OpOverload) and not node.all_input_nodes:
        if target._opname not in _FACTORIES:
            raise Unreadable(f"{target} without a tensor")
    layer = entry["layer"]
    if not isinstance(layer, str):
        raise Unreadable("a layer's name that is none")
    if layer:
        node.meta["nn_module_stack"] = {layer: (layer, None)}
    return node


def _function(name: Any) -> Callable:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in _NAMESPACES or (parts[0] == "fastnn" and parts[1].startswith("_")):
        raise Unreadable(f"an unknown op, {name!r}")
    found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1], None), parts[2], None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise Unreadable(f"an unknown op, {name!r}")
    return found


def _argument(value: Any, nodes: list[Node]) -> Any:
    if isinstance(value, list):
        return [_argument(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return _earlier(nodes, inner)
    if kind == "dict":
        return {str(name): _argument(v, nodes) for name, v in inner.items()}
    known = {
        "dtype": _DTYPES,
        "memory_format": _FORMATS,
        "device": {"cpu": torch.device("cpu")},
        "layout": {"strided": torch.strided},
        "float": {text: float(text) for text in ("inf", "-inf", "nan")},
    }
    if kind not in known or inner not in known[kind]:
        raise Unreadable(f"an unknown argument, {value!r}")
    return known[kind][inner]
