"""A model as a graph of torch's ops without side effects, by :func:`torch.export.export`."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule
from torch.nn import Module
from torch.utils import _pytree as pytree

__all__ = ["CannotCapture", "Captured", "capture", "in_evaluation"]


class CannotCapture(RuntimeError):
    """Why a model has no graph."""


class Captured(NamedTuple):
    """A graph and what its calls take and give.

    Attributes
    ----------
    module : GraphModule
        Its placeholders are the tensors among a call's leaves, its constants attributes; it gives a tuple of leaves. Each node has
        what it gives, as a fake tensor, in ``meta["val"]``.
    places : tuple of int
        Which of the leaves of ``(args, kwargs)`` the placeholders are.
    out_spec : TreeSpec
        Of what the model returns.
    """

    module: GraphModule
    places: tuple[int, ...]
    out_spec: pytree.TreeSpec


def in_evaluation(model: Module) -> Module:
    """A copy of a model in evaluation mode, with tensors of its own: the model may be trained on."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def capture(model: Module, args: tuple, kwargs: dict[str, Any]) -> Captured:
    """Capture a model's call.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode.
    args : tuple
    kwargs : dict
        The arguments of the call. What is no tensor is a constant of the graph, and so is every size.

    Raises
    ------
    CannotCapture
        If `torch.export` cannot, or the call writes to buffers or to its arguments.
    """
    leaves, _ = pytree.tree_flatten((args, kwargs))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CannotCapture(f"torch.export: {type(error).__name__}: {reason}") from error
    outputs = program.graph_signature.output_specs
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in outputs):
        raise CannotCapture("a call of it writes to its buffers or its arguments")
    return Captured(_with_constants(program), _places(program, leaves), program.call_spec.out_spec)


def _places(program, leaves: list) -> tuple[int, ...]:
    """Which leaves are inputs of the graph: of the others torch.export made constants."""
    inputs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if len(inputs) != len(leaves):
        raise CannotCapture("the graph takes other arguments than the call")
    return tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))


def _with_constants(program) -> GraphModule:
    """The program's graph with parameters, buffers and constants as attributes in place of inputs."""
    root, graph, copies = Module(), Graph(), {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors = {**program.state_dict, **program.constants}
    names: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.target]
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(node.meta.get("val"), torch.Tensor):
                    copies[node] = graph.placeholder(node.name)
                    copies[node].meta = dict(node.meta)
                else:
                    copies[node] = node.meta.get("val")
                continue
            if spec.target not in tensors or not isinstance(tensors[spec.target], torch.Tensor):
                raise CannotCapture(f"{spec.target} is no tensor")
            if spec.target not in names:
                names[spec.target] = f"constant_{len(names)}"
                root.register_buffer(names[spec.target], tensors[spec.target].detach())
            copies[node] = graph.get_attr(names[spec.target])
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(root, graph, "Frozen")
