"""Frozen models in files: weights, and graphs as JSON, in the safetensors format. No code and no pickles."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fastnn import _library
from fastnn.graph import encoded, segments
from fastnn.graph.program import reach
from fastnn.ops.core import processor

if TYPE_CHECKING:
    from fastnn.graph.frozen import FrozenModel

__all__ = ["Kind", "read", "write"]

_VERSION = 1
_PLAIN = (bool, int, float, str, type(None))


class Kind(NamedTuple):
    """A kind of call of a file.

    Attributes
    ----------
    leaves : list
        Of a call: tensors of zeros, and what is no tensor.
    spec : int or TreeSpec
        Of ``(args, kwargs)``; the number of arguments where all are tensors.
    graph : GraphModule
    places : tuple of int
    out_spec : TreeSpec
    """

    leaves: list
    spec: Any
    graph: GraphModule
    places: tuple[int, ...]
    out_spec: pytree.TreeSpec


def _machine() -> dict[str, str | None]:
    this = processor.this()
    return {"level": _library.current_isa(), "processor": None if this is None else this.key}


def _bytes(t: torch.Tensor) -> ctypes.Array:
    """The elements of a dense tensor, where they lie."""
    return (ctypes.c_char * t.nbytes).from_address(t.data_ptr()) if t.nbytes else (ctypes.c_char * 0)()


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        found.update(f"\0{name}\0{t.dtype}\0{list(t.shape)}\0".encode())
        found.update(_bytes(t))
    return found.hexdigest()


# ---- writing ----


def write(model: FrozenModel, path: str | os.PathLike, lowered: Callable) -> None:
    """Write a frozen model's kinds of calls, each graph lowered anew with its weights."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    known: dict[tuple, str] = {}

    def keep(flat: torch.Tensor) -> str:
        key = str(flat.dtype), hashlib.sha256(_bytes(flat)).digest()
        if key not in known:
            known[key] = f"constant_{len(tensors)}"
            tensors[known[key]] = flat.clone()
        return known[key]

    kinds = []
    for key in list(model._kinds):
        *leaf_keys, spec = key
        leaves = [_zeros(*leaf[:3]) if len(leaf) == 4 else leaf[1] for leaf in leaf_keys]
        if any(len(leaf) == 4 and leaf[3].type != "cpu" for leaf in leaf_keys):
            raise ValueError("a model on a GPU is not saved")
        graph, places, out_spec = lowered(*_call_of(leaves, spec))
        kinds.append(
            {
                "leaves": [_leaf(leaf) for leaf in leaves],
                "spec": spec if isinstance(spec, int) else pytree.treespec_dumps(spec),
                "graph": encoded.encode(graph, keep),
                "places": list(places),
                "out_spec": pytree.treespec_dumps(out_spec),
                "program": _program(graph, [leaves[i] for i in places], keep),
            }
        )
    text = json.dumps({"version": _VERSION, **_machine(), "kinds": kinds}, allow_nan=False)
    metadata = {"format": "pt", "fastnn": text, "sha256": _digest(text, tensors)}
    save_file(tensors, os.fspath(path), metadata)


def _program(graph: GraphModule, given: list[torch.Tensor], keep: Callable) -> dict[str, Any] | None:
    """What runs without Python (``examples/run_saved.cpp``), where a program is all there is. Nothing here reads it."""
    builder = segments.portable(graph, given)
    if builder is None:
        return None
    description = builder.description()
    spans = [t.as_strided((reach(t.shape, t.stride()),), (1,)) for t in builder.constants]
    return {"description": description, "constants": [keep(span) for span in spans]}


def _zeros(shape, stride, dtype) -> torch.Tensor:
    return torch.zeros(max(reach(shape, stride), 1), dtype=dtype).as_strided(shape, stride)


def _call_of(leaves: list, spec: Any) -> tuple[tuple, dict[str, Any]]:
    return (tuple(leaves), {}) if isinstance(spec, int) else pytree.tree_unflatten(leaves, spec)


def _leaf(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, torch.Tensor):
        return {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "stride": list(leaf.stride())}
    if not isinstance(leaf, _PLAIN) or (isinstance(leaf, float) and not math.isfinite(leaf)):
        raise ValueError(f"a call with an argument of {type(leaf).__name__} is not saved")
    return {"value": leaf}


# ---- reading ----


def read(path: str | os.PathLike) -> list[Kind]:
    """The kinds of calls of a file.

    Raises
    ------
    ValueError
        If it is no such file, naming it: cut off, altered, of another version, with ops that it may not name.
    OSError
        If it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            if "fastnn" not in metadata or "sha256" not in metadata:
                raise encoded.Unreadable("it holds no frozen model")
            found = json.loads(metadata["fastnn"])
            version = found["version"]
            if version != _VERSION:
                raise encoded.Unreadable(f"its version is {version}, this reads {_VERSION}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if _digest(metadata["fastnn"], tensors) != metadata["sha256"]:
            raise encoded.Unreadable("it was altered")
        same = _machine() == {key: found[key] for key in ("level", "processor")}
        return [_kind(kind, tensors, same) for kind in found["kinds"]]
    except OSError:
        raise
    except (
        SafetensorError,
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise ValueError(f"{name} cannot be read as a frozen model: {error}") from error


def _kind(found: dict, tensors: dict[str, torch.Tensor], same: bool) -> Kind:
    leaves = []
    for leaf in found["leaves"]:
        if "value" in leaf:
            if not isinstance(leaf["value"], _PLAIN):
                raise encoded.Unreadable("an argument that is no plain value")
            leaves.append(leaf["value"])
            continue
        shape, stride = ([encoded._integer(n) for n in leaf[key]] for key in ("shape", "stride"))
        if min((*shape, *stride), default=0) < 0:
            raise encoded.Unreadable("an argument of no such sizes")
        leaves.append(_zeros(shape, stride, encoded._DTYPES[leaf["dtype"]]))
    spec = found["spec"] if isinstance(found["spec"], int) else pytree.treespec_loads(found["spec"])
    places = tuple(encoded._integer(place) for place in found["places"])
    graph = encoded.decode(found["graph"], tensors, same)
    inputs = sum(node.op == "placeholder" for node in graph.graph.nodes)
    if inputs != len(places) or not all(
        0 <= p < len(leaves) and isinstance(leaves[p], torch.Tensor) for p in places
    ):
        raise encoded.Unreadable("a graph of other inputs than its call's")
    return Kind(leaves, spec, graph, places, pytree.treespec_loads(found["out_spec"]))
