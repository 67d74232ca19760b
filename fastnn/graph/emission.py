"""What a lowered graph's node is to a program: what it gave in one call, and where that is to lie."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fastnn.graph.ir import aten
from fastnn.graph.program import Builder, CannotHold, Place, lies
from fastnn.ops.core.op import FLOATS
from fastnn.ops.core.plan import Plan

__all__ = ["COPIES", "Emission", "Given", "Told", "is_view", "views"]


class Told(NamedTuple):
    """A tensor without its elements; the offset is that in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    nhwc: bool  # whether torch takes its strides for channels_last


class Given:
    """What the nodes of a graph gave in one call.

    Attributes
    ----------
    values : dict
        Of each node a Told, or a tuple of them; of what is no tensor itself.
    views : set
        The nodes whose tensors all lie in the memory of their first argument.
    plans : dict
        Of the nodes that planned their call: the plan.
    """

    def __init__(self) -> None:
        self.values: dict[Node, Any] = {}
        self.views: set[Node] = set()
        self.plans: dict[Node, Plan] = {}


#: Ops that give their argument's memory, always or where its strides allow it.
_VIEWS = frozenset(
    (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.narrow.default,
    )
)
#: Those that copy where no view will do, and what always copies; with memory of the strides that torch gave it.
COPIES = frozenset(
    (
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.clone.default,
    )
)


def is_view(node: Node, given: Given) -> bool:
    """Whether a node needs no record: it tells of its argument's memory in other strides."""
    return node.target is operator.getitem or (node.target in _VIEWS and node in given.views)


def views(node: Node, places: dict[Node, Any], given: Given) -> Any:
    """Where a view lies, or each of several."""
    base, first = places[node.args[0]], given.values[node.args[0]]

    def of(value: Told) -> Place:
        offset = base.offset + value.offset - first.offset
        return Place(base.memory, offset, value.dtype, value.shape, value.strides)

    made = given.values[node]
    return of(made) if isinstance(made, Told) else tuple(of(value) for value in made)


class Emission:
    """One node's part of a program."""

    def __init__(self, node: Node, builder: Builder, places: dict[Node, Any], given: Given) -> None:
        self.node, self.builder, self.places, self.given = node, builder, places, given
        self.value = given.values[node]
        self.record = builder.record

    def __getitem__(self, node: Any) -> Place | None:
        if node is None:
            return None
        place = self.places.get(node) if isinstance(node, Node) else None
        if not isinstance(place, Place):
            raise CannotHold("an argument that is no tensor")
        return place

    def dense(self, node: Any) -> Place | None:
        place = self[node]
        return None if place is None else self.builder.dense(place)

    def images(self, node: Any, channels_last: bool) -> Place | None:
        place = self[node]
        return None if place is None else self.builder.images(place, channels_last)

    def new(self, value: Told | None = None) -> Place:
        """The node's result, in the strides that torch gave it."""
        value = self.value if value is None else value
        return self.builder.new(value.dtype, value.shape, value.strides)

    def new_in(self, strides: tuple[int, ...]) -> Place:
        """The node's result, which a kernel gives in these strides; refused where torch gave others."""
        made = self.new()
        if not lies(made, strides):
            raise CannotHold("a result in another layout")
        return made

    def check_floats(self, *places: Place | None) -> None:
        dtypes = {place.dtype for place in places if place is not None}
        if len(dtypes) != 1 or not dtypes <= FLOATS:
            raise CannotHold(f"tensors of {', '.join(map(str, dtypes))}")
