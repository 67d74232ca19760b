"""A lowered graph as what serves calls: programs for what they can hold, torch's ops between them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastnn.graph import lower
from fastnn.graph.emission import Given, Told
from fastnn.graph.ir import PACKED, aten, constant, has_algorithm
from fastnn.graph.program import Builder, CannotHold, Place, Program
from fastnn.graph.records import emit
from fastnn.ops.core import watch

__all__ = ["portable", "serve"]

#: What checks a call that a graph is not for anyway.
_CHECKS = frozenset((aten._assert_tensor_metadata.default,))


def serve(gm: GraphModule, args: Sequence[torch.Tensor]) -> Callable[..., Sequence] | None:
    """What runs a lowered graph in as few steps as there can be.

    Parameters
    ----------
    gm : GraphModule
        Is not changed; its constants are shared.
    args : sequence of Tensor
        What it is called with.

    Returns
    -------
    callable or None
        Takes tensors such as `args` and gives what the graph does; None where programs cannot hold any of it.
    """
    if not all(t.is_cpu for t in args) or not all(_is_plain(node) for node in gm.graph.nodes):
        return None
    parts, programs = _divided(gm, _told(gm, args))
    if not programs:
        return None
    made = {part: program.make() for part, program in programs.items()}
    if _is_whole(gm, parts, programs):
        return made[parts[0]]
    return _served(gm, parts, programs, made).forward


def portable(gm: GraphModule, args: Sequence[torch.Tensor]) -> Builder | None:
    """The program that is all of a graph, for any processor: without packed weights, each product by the library's own choice of algorithm.

    Parameters
    ----------
    gm : GraphModule
        Its calls are changed.
    args : sequence of Tensor

    Returns
    -------
    Builder or None
        None where there is no such program.
    """
    if not all(_is_plain(node) for node in gm.graph.nodes):
        return None
    given = _told(gm, args)
    for node in gm.graph.nodes:
        if node in given.plans:
            given.plans[node] = given.plans[node]._replace(numbers=())
        if node.op == "call_function" and node.target in lower.BY_TORCH:
            # That torch is faster on this processor says nothing of another.
            node.target, node.args = lower.BY_TORCH[node.target], (*node.args, 0)
        if has_algorithm(node.target):
            node.args = (*node.args[:-1], 0)
        if node.op == "call_function" and node.target in PACKED:
            place = PACKED[node.target]
            node.args = (*node.args[:place], None, *node.args[place + 1 :])
    parts, programs = _divided(gm, given)
    if not programs or not _is_whole(gm, parts, programs):
        return None
    return programs[parts[0]].builder


def _divided(gm: GraphModule, given: Given) -> tuple[list[_Part], dict[_Part, _Planned]]:
    """The parts of a graph, and the programs of those that are native."""
    held = {node for node in gm.graph.nodes if _can_hold(gm, node, given)}
    while True:
        parts = _parts(gm, held)
        programs, refused = _programs(gm, parts, given)
        if not refused:
            return parts, programs
        held -= refused


def _is_plain(node: Node) -> bool:
    """Whether a node may be moved past others: it calls a function that writes nothing and draws no numbers."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


# ---- what a call gives ----


class _Teller(torch.fx.Interpreter):
    """Runs a graph and notes what its nodes give."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.given = Given()

    def run_node(self, node: Node) -> Any:
        def note(op, args, plan):
            self.given.plans[node] = plan

        with watch.watching(note):
            made = super().run_node(node)
        self.given.values[node] = _tell(made)
        tensors = [made] if isinstance(made, torch.Tensor) else made
        if node.op == "call_function" and isinstance(tensors, (list, tuple)) and node.args:
            first = self.env.get(node.args[0]) if isinstance(node.args[0], Node) else None
            if isinstance(first, torch.Tensor) and all(_shares(t, first) for t in tensors):
                self.given.views.add(node)
        return made


def _tell(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        nhwc = made.dim() == 4 and torch._prims_common.suggest_memory_format(made) is torch.channels_last
        return Told(made.dtype, tuple(made.shape), tuple(made.stride()), made.storage_offset(), nhwc)
    return tuple(map(_tell, made)) if isinstance(made, (list, tuple)) else made


def _shares(t: Any, other: torch.Tensor) -> bool:
    if not isinstance(t, torch.Tensor) or t.dtype is not other.dtype:
        return False
    return t.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _told(gm: GraphModule, args: Sequence[torch.Tensor]) -> Given:
    teller = _Teller(gm)
    with torch.no_grad():
        teller.run(*args)
    return teller.given


# ---- parts ----


def _leaf(gm: GraphModule, node: Node, builder: Builder, given: Given) -> Any:
    """What a part that does not make a node's value is handed."""
    if node.op == "get_attr":
        return builder.constant(constant(gm, node))

    def place(told: Any) -> Any:
        if not isinstance(told, Told):
            raise CannotHold("what is no tensor")
        return builder.input(told.dtype, told.shape, told.strides)

    return place(given.values[node])


def _can_hold(gm: GraphModule, node: Node, given: Given) -> bool:
    """Whether a program may have a node, tried with a program of its own."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(given.values[node], Told) and _can_hold(gm, node.args[0], given)
    builder, places = Builder(), {}
    try:
        for read in node.all_input_nodes:
            places[read] = _leaf(gm, read, builder, given)
        emit(node, builder, places, given)
    except CannotHold:
        return False
    return True


class _Part:
    """Nodes that run one after another, by one program or by torch."""

    def __init__(self, native: bool) -> None:
        self.native = native
        self.nodes: list[Node] = []


def _ordered(gm: GraphModule, held: set[Node], native: bool) -> list[_Part]:
    """Parts in turns, each as long as it can be."""
    done = {node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")}
    left = [n for n in gm.graph.nodes if n.op == "call_function" and n.target not in _CHECKS]
    parts = []
    while left:
        part, later = _Part(native), []
        for node in left:
            if (node in held) is native and done.issuperset(node.all_input_nodes):
                part.nodes.append(node)
                done.add(node)
            else:
                later.append(node)
        left, native = later, not native
        if part.nodes:
            parts.append(part)
    return parts


def _parts(gm: GraphModule, held: set[Node]) -> list[_Part]:
    return min((_ordered(gm, held, native) for native in (False, True)), key=len)


class _Planned:
    """A part's program to be, what it reads, and which nodes' values it gives."""

    def __init__(self, builder: Builder, reads: list[Node], gives: list[Node]) -> None:
        self.builder, self.reads, self.gives = builder, reads, gives

    def make(self) -> Program:
        return self.builder.make()


def _programs(gm: GraphModule, parts: list[_Part], given: Given) -> tuple[dict[_Part, _Planned], set[Node]]:
    """The programs of native parts; else the nodes that had better be torch's."""
    made, refused = {}, set()
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    for part in parts:
        if not part.native:
            continue
        inside = set(part.nodes)
        builder, places = Builder(), {}
        wanted = {read for node in part.nodes for read in node.all_input_nodes} - inside
        # In the order of the graph's arguments and results: a program that is all of a graph then is what a call runs.
        given_nodes = [node for node in gm.graph.nodes if node in wanted]
        reads = [node for node in given_nodes if node.op != "get_attr"]
        results = dict.fromkeys(node for node in output.args[0] if node in inside)
        results.update(dict.fromkeys(n for n in part.nodes if any(user not in inside for user in n.users)))
        gives = []
        for node in given_nodes:
            places[node] = _leaf(gm, node, builder, given)
        for node in part.nodes:
            emit(node, builder, places, given)
        for node in results:
            try:
                if not isinstance(places[node], Place):
                    raise CannotHold("several results at a time")
                builder.output(places[node])
                gives.append(node)
            except CannotHold:
                refused.add(node)
        if not builder.records:
            refused |= inside
        if not refused:
            made[part] = _Planned(builder, reads, gives)
    return made, refused


# ---- what runs ----


def _is_whole(gm: GraphModule, parts: list[_Part], programs: dict[_Part, _Planned]) -> bool:
    """Whether one program is all of a graph, with its inputs and results in order."""
    if len(parts) != 1:
        return False
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    planned = programs[parts[0]]
    return planned.reads == placeholders and planned.gives == list(output.args[0])


def _served(gm: GraphModule, parts: list[_Part], programs: dict, made: dict[_Part, Program]) -> GraphModule:
    """A graph of the programs and of torch's ops."""
    graph, copies = torch.fx.Graph(), {}

    def copied(node: Node) -> Node:
        if node not in copies:
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            copied(node)
    for part in parts:
        if not part.native:
            for node in part.nodes:
                for read in node.all_input_nodes:
                    if read.op == "get_attr":
                        copied(read)
                copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        planned = programs[part]
        call = graph.call_function(made[part].__call__, tuple(copies[node] for node in planned.reads))
        for number, node in enumerate(planned.gives):
            copies[node] = graph.call_function(operator.getitem, (call, number))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if node.op == "get_attr":
            copied(node)
    graph.output(torch.fx.node.map_arg(output.args[0], copies.__getitem__))
    graph.lint()
    served = GraphModule(gm, graph, "Served")
    for name, value in served.named_buffers():
        served.__dict__[name] = value  # read at each call: a module's buffers take half a microsecond
    return served
