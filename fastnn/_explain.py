"""``fastnn.explain``: which kernel runs each layer of a model, and why torch's does where it does."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import Module
from torch.nn.modules import module as torch_module

from fastnn import _rehearsal, nn
from fastnn.nn.container import FUSED, sees_fused
from fastnn.ops.core import watch
from fastnn.ops.core.op import Op
from fastnn.ops.core.plan import Plan, runner

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
    algorithm: str = (
        ""  # of the CPU's kernel, where there are several; of gradients one for each that is wanted
    )
    share: float | None = None  # of the time, of a frozen model's calls


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
        cells = [("layer", "op", "input", "dtype", "where", "algorithm", "reason")]
        cells += [
            (r.layer, r.op, "x".join(map(str, r.shape)), r.dtype, r.where, r.algorithm, r.reason)
            for r in self.rows
        ]
        if any(r.share is not None for r in self.rows):
            shares = ["share", *("" if r.share is None else f"{r.share:.1%}" for r in self.rows)]
            cells = [(*row, share) for row, share in zip(cells, shares, strict=True)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        native = sum(row.where.startswith("fastnn") for row in self.rows)
        return "\n".join([*lines, f"{native} of {len(self.rows)} calls run on fastnn's kernels"])

    __repr__ = __str__


class _Recorder:
    """Collects rows while a model runs in this thread: told of ops by the routing, of layers by hooks of all modules."""

    def __init__(self, names: dict[Module, str]) -> None:
        self.rows: list[Row] = []
        self.names = names
        self.thread = threading.get_ident()
        # The names of the layers being run, and the rows before each.
        self.running: list[tuple[str, int]] = []
        # The layer in which each node of the autograd graph was made.
        self.layers_of_nodes: dict[Any, str] = {}

    def on_op(self, op: Op, args: tuple, plan: Plan) -> None:
        if self.running:
            layer = self.running[-1][0]
        else:
            layer = self.layers_of_nodes.get(torch._C._current_autograd_node(), "")
        where = runner(op, args, plan)
        named = plan.algorithm if plan.algorithm and op.algorithms and args[0].is_cpu else ""
        self.add(layer, op.name, args, where, plan.reason or "", named)

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
        for node in _rehearsal.graph_of(output, known=self.layers_of_nodes):
            self.layers_of_nodes[node] = name
        if len(self.rows) > rows_before:
            return
        if output is FUSED:
            where, reason = "fused", "done by the layer before it"
        elif isinstance(module, _LAYERS):
            where, reason = "torch", "the layer went to torch as a whole"
        else:
            where, reason = "torch", "not a fastnn layer"
        self.add(name, type(module).__name__, args, where, reason)

    def add(self, layer: str, op: str, args: tuple, where: str, reason: str, algorithm: str = "") -> None:
        tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
        shape = () if tensor is None or tensor.is_nested else tuple(tensor.shape)
        dtype = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        self.rows.append(Row(layer, op, shape, dtype, where, reason, algorithm))


def explain(
    model: Module | Callable, *inputs: Any, training: bool | None = None, **kwargs: Any
) -> Explanation:
    """Run a model once and tell, for each layer, which kernel ran or why torch's did.

    What is told is what such a call does: the same grad mode, autocast and number formats. A call that wants gradients may go
    another way than one that does not. The run leaves no trace: no gradients, and the buffers (such as running averages) and
    the state of the random numbers are as before, also where other threads use the model and draw numbers meanwhile.

    Parameters
    ----------
    model : torch.nn.Module or callable
        What to run: a copy of it, with the same parameters and with buffers of its own. Layers compiled by
        :func:`torch.compile` are run as they were before. Of a frozen model the graph of such a call is told of, with the share of
        the time that each of its ops takes.
    *inputs, **kwargs
        What to call it with.
    training : bool, optional
        By default the model is called in the grad mode and in the mode, training or evaluation, that are set. True: in training
        mode and with gradients, and the backward pass is run and told of too; the gradients are dropped. False: in evaluation
        mode and without gradients. A model with an argument of this name is explained through a function that gives it.

    Returns
    -------
    Explanation
        A table when printed, and an iterable of :class:`Row`.

    Notes
    -----
    Calls that the model makes in other threads are not told of. A buffer that other than a module's own code writes through
    Python alone, by assignment to its attribute, stays written. On a GPU the random numbers of ops that draw them inside of one
    kernel (such as a dropout) may be drawn again by another thread.

    Examples
    --------
    >>> print(fastnn.explain(model, torch.randn(1, 3, 32, 32), training=False))  # doctest: +SKIP
    """
    graphs = sys.modules.get("fastnn.graph.frozen")
    if graphs is not None and isinstance(model, graphs.FrozenModel):
        if training:
            model.train()  # which it refuses
        return Explanation(graphs.rows(model, inputs, kwargs))
    copy = _rehearsal.Copy(model)
    if training is not None:
        copy.set_mode(training)
    recorder = _Recorder(copy.names)
    hooks = (
        torch_module.register_module_forward_pre_hook(recorder.before_layer),
        torch_module.register_module_forward_hook(recorder.after_layer, always_call=True),
    )
    try:
        with watch.watching(recorder.on_op), copy.without_trace(), _gradients(training):
            output = copy.model(*inputs, **kwargs)
            if training:
                _rehearsal.run_backward(output)
    finally:
        for hook in hooks:
            hook.remove()
    return Explanation(recorder.rows)


@contextlib.contextmanager
def _gradients(wanted: bool | None) -> Iterator[None]:
    if wanted is None:
        yield
    else:
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            yield
