"""``fastnn.explain``: which kernel runs each layer of a model, and why torch's does where it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import Module
from torch.nn.modules import module as torch_module

from fastnn import _library, nn
from fastnn.nn.container import FUSED, sees_fused
from fastnn.ops import _declare, _gpu

__all__ = ["Explanation", "Row", "explain"]

# The accelerated modules themselves: a subclass of one with a forward of its own may do anything.
_LAYERS = tuple(getattr(nn, name) for name in nn.ACCELERATED)


class Row(NamedTuple):
    """One call of an op of fastnn, or of a layer that called none."""

    layer: str  # its name in the model, as named_modules() gives it
    op: str  # the op of fastnn, or the class of the layer
    shape: tuple[int, ...]  # of the first tensor among the arguments
    dtype: str
    where: str  # "fastnn <isa>", on a GPU "fastnn cuda" or "fastnn triton", "torch", or "fused"
    reason: str  # why torch; empty where fastnn's kernel ran


class Explanation:
    """The rows of a run, in the order of the calls; printed as a table.

    Attributes
    ----------
    rows : list of Row
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __str__(self) -> str:
        cells = [("layer", "op", "input", "dtype", "where", "reason")]
        cells += [(r.layer, r.op, "x".join(map(str, r.shape)), r.dtype, r.where, r.reason) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        native = sum(row.where.startswith("fastnn") for row in self.rows)
        return "\n".join([*lines, f"{native} of {len(self.rows)} calls run on fastnn's kernels"])

    __repr__ = __str__


def _kernel(op: _declare.Op, args: tuple) -> str:
    """What runs a call: the instruction set, or for a GPU the language and, where there are several, the kernel's name."""
    if args[0].is_cpu:
        return _library.current_isa()
    if len(op.candidates) == 1:
        return op.on_gpus
    name = _declare.candidate(op, args)
    return f"{'cuda' if name == _gpu.WARPGROUPS else op.on_gpus}: {name}"


class _Recorder:
    """Collects rows while a model runs in this thread: told of ops by the routing, of layers by global hooks."""

    def __init__(self, model: Module | None) -> None:
        self.rows: list[Row] = []
        self.names = {} if model is None else {module: name for name, module in model.named_modules()}
        self.thread = threading.get_ident()
        self.running: list[
            tuple[str, int]
        ] = []  # the names of the layers being run, and the rows before each

    def on_op(self, op: _declare.Op, args: tuple, reason: str | None) -> None:
        if threading.get_ident() == self.thread:
            where = "torch" if reason is not None else f"fastnn {_kernel(op, args)}"
            self.add(self.running[-1][0] if self.running else "", op.name, args, where, reason or "")

    @sees_fused
    def before_layer(self, module: Module, args: tuple) -> None:
        if threading.get_ident() == self.thread:
            name = self.names.get(module, type(module).__name__)
            self.running.append((name, len(self.rows)))

    @sees_fused
    def after_layer(self, module: Module, args: tuple, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        name, rows_before = self.running.pop()
        if len(self.rows) > rows_before:
            return
        if output is FUSED:
            where, reason = "fused", "done by the layer before it"
        elif isinstance(module, _LAYERS):
            where, reason = "torch", "the layer went to torch as a whole"
        else:
            where, reason = "torch", "not a fastnn layer"
        self.add(name, type(module).__name__, args, where, reason)

    def add(self, layer: str, op: str, args: tuple, where: str, reason: str) -> None:
        tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
        shape = () if tensor is None or tensor.is_nested else tuple(tensor.shape)
        dtype = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        self.rows.append(Row(layer, op, shape, dtype, where, reason))


def explain(model: Module | Callable, *inputs: Any, **kwargs: Any) -> Explanation:
    """Run a model once and tell, for each layer, which kernel ran or why torch's did.

    The run leaves no trace: no gradients, the buffers (such as running averages) and the state of the random numbers
    are as before. The model stays in the mode it is in, training or evaluation.

    Parameters
    ----------
    model : torch.nn.Module or callable
        What to run. A model compiled by :func:`torch.compile` is run as it was before.
    *inputs, **kwargs
        What to call it with.

    Returns
    -------
    Explanation
        A table when printed, and an iterable of :class:`Row`.

    Examples
    --------
    >>> print(fastnn.explain(model, torch.randn(1, 3, 32, 32)))  # doctest: +SKIP
    """
    model = getattr(model, "_orig_mod", model)
    is_module = isinstance(model, Module)
    recorder = _Recorder(model if is_module else None)
    buffers = {name: b.clone() for name, b in model.named_buffers()} if is_module else {}
    gpus = {p.get_device() for p in model.parameters() if p.is_cuda} if is_module else set()
    hooks = (
        torch_module.register_module_forward_pre_hook(recorder.before_layer),
        torch_module.register_module_forward_hook(recorder.after_layer, always_call=True),
    )
    previous, _declare.recorder = _declare.recorder, recorder.on_op
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(gpus)):
            if buffers:
                torch.func.functional_call(model, buffers, inputs, kwargs)
            else:
                model(*inputs, **kwargs)
    finally:
        _declare.recorder = previous
        for hook in hooks:
            hook.remove()
    return Explanation(recorder.rows)
