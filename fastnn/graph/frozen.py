"""Models for inference as graphs: what :func:`fastnn.freeze` gives."""

from __future__ import annotations

import contextlib
import operator
import os
import shutil
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.nn import Module
from torch.nn.modules import module
from torch.utils import _pytree as pytree

from fastnn import _library, _settings
from fastnn.convert import convert
from fastnn.graph import fuse, ir, layout, lower, normalise, saved, segments, timing, unread
from fastnn.graph.capture import CannotCapture, Captured, capture, in_evaluation
from fastnn.graph.program import Program, run_one
from fastnn.ops.core import watch
from fastnn.ops.core.op import Op
from fastnn.ops.core.plan import Plan, runner

if TYPE_CHECKING:
    from fastnn._explain import Row

__all__ = ["FrozenModel", "optimise"]

# Kinds of calls, by the sizes and dtypes of their tensors, whose graphs a frozen model keeps.
_MOST_KINDS = 8


# Seconds of a call up to which both layouts of images are tried: of larger ones channels_last was always ahead.
_TRY_BOTH = 0.02


def optimise(captured: Captured, args: tuple) -> GraphModule:
    """All passes over a captured graph; `args` are what it is called with."""
    gm = captured.module
    normalise.fold_constants(gm)
    normalise.normalise(gm)
    fuse.fold_batch_norm(gm)
    fuse.fold_scales(gm)
    fuse.fuse(gm)
    layout.keep_results(gm)
    plain = _copied(gm)
    with torch.no_grad(), _without_autocast():
        images = layout.to_nhwc(gm)
        lower.lower(gm, args)
        run = partial(_finished, gm, args)
        if images and min(timing.seconds_of(run) for _ in range(3)) < _TRY_BOTH:
            layout.no_views(plain)
            lower.lower(plain, args)
            if timing.fastest({"channels_last": run, "plain": partial(_finished, plain, args)}) == "plain":
                return plain
    return gm


def _copied(gm: GraphModule) -> GraphModule:
    """Another graph of the same constants."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(gm, graph, "Frozen")


def _finished(gm: GraphModule, args: tuple) -> None:
    """A call with all of its work done."""
    _wait(args)
    gm(*args)
    _wait(args)


def _wait(args: Sequence) -> None:
    """A GPU's work goes on behind the call that starts it."""
    if any(isinstance(t, torch.Tensor) and t.is_cuda for t in args):
        torch.cuda.synchronize()


# Whether somebody sees ops rather than results: they are shown the graph's.
_compiling = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


class _Kind(NamedTuple):
    """What calls of one kind run."""

    graph: GraphModule
    run: Callable[..., Sequence]  # does what the graph does
    places: tuple[int, ...]  # of the graph's inputs among the leaves of a call
    out_spec: pytree.TreeSpec

    @property
    def single(self) -> Program | None:
        """The program that takes a call's only argument and gives its result."""
        whole = isinstance(self.run, Program) and self.run.is_single and self.out_spec.is_leaf()
        return self.run if whole else None


def _key(leaves: Sequence, spec: Any) -> tuple:
    """What tells one kind of call from another."""
    return (
        *[
            (t.shape, t.stride(), t.dtype, t.device) if isinstance(t, torch.Tensor) else (type(t), t)
            for t in leaves
        ],
        spec,
    )


def _served(graph: GraphModule, given: tuple, places: tuple[int, ...], out_spec: pytree.TreeSpec) -> _Kind:
    """A lowered graph with what runs it."""
    unread.drop_unread_weights(graph)
    for name, value in graph.named_buffers():
        graph.__dict__[name] = value  # read at each call: a module's buffers take half a microsecond
    with torch.no_grad(), _without_autocast():
        run = None if _settings.disabled else segments.serve(graph, given)
    return _Kind(graph, run or graph.forward, places, out_spec)


def _made(kind: _Kind, run: Callable[..., Sequence], given: list) -> Sequence:
    """What a kind of call gives; an error of a program in the words of torch's ops."""
    try:
        return run(*given)
    except RuntimeError:
        return kind.graph.forward(*given)


# Graphs are for one instruction-set level.
_alive: weakref.WeakSet[FrozenModel] = weakref.WeakSet()


def _forget_graphs() -> None:
    for model in list(_alive):
        model._kinds.clear()
        model.__dict__["_last"] = None


_library.on_set_isa.append(_forget_graphs)


class FrozenModel(Module):
    """A model for inference, whose calls run a graph of fused ops with packed weights; :func:`fastnn.freeze` makes it.

    Each kind of call, by the sizes, strides and dtypes of its tensors and by its other arguments, has a graph, which the first such
    call captures; a few are kept. A call that cannot be captured runs the model itself. There are no parameters to change or to move: the weights are those of the model that it was made
    of. It gives no gradients, and runs in the dtypes of its weights under autocast too.

    Parameters
    ----------
    model : torch.nn.Module
        Is not changed.
    args : tuple
    kwargs : dict
        The arguments of a call.

    Raises
    ------
    CannotCapture
        If the model has no graph.
    """

    def __init__(self, model: Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.training = False
        state = self.__dict__
        state["_source"] = convert(in_evaluation(model))
        state["_kinds"], state["_lock"] = OrderedDict(), threading.RLock()
        state["_last"] = None  # the program of the last call of one tensor, where it was all there is
        state["_file"] = None  # that it was loaded from
        self._of(args, kwargs)
        _alive.add(self)

    @classmethod
    def load(cls, path: str | os.PathLike) -> FrozenModel:
        """As :func:`fastnn.load`."""
        model = cls.__new__(cls)
        Module.__init__(model)
        model.training = False
        state = model.__dict__
        state["_source"], state["_file"] = None, os.path.abspath(path)
        state["_kinds"], state["_lock"], state["_last"] = OrderedDict(), threading.RLock(), None
        model._read()
        _alive.add(model)
        return model

    def _read(self) -> None:
        """The kinds of calls of the file."""
        with torch.inference_mode(False), torch.no_grad(), _without_autocast():
            for kind in saved.read(self._file):
                given = tuple(kind.leaves[i] for i in kind.places)
                try:
                    made = _served(kind.graph, given, kind.places, kind.out_spec)
                except Exception as error:
                    raise ValueError(f"{self._file} cannot be read as a frozen model: {error}") from error
                self._kinds[_key(kind.leaves, kind.spec)] = made

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to a file, which :func:`fastnn.load` reads without the model's code.

        The file holds the weights and the graphs of the kinds of calls that were captured so far, in the safetensors format. On a
        processor such as this each product is done as it was measured here; on others the library chooses.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        ValueError
            If the model is on a GPU, or a call takes or does what JSON cannot tell.
        """
        if self._source is None:
            if os.path.abspath(path) != self._file:
                shutil.copyfile(self._file, path)
            return

        def lowered(args: tuple, kwargs: dict[str, Any]):
            captured = capture(self._source, args, kwargs)
            leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda leaf: leaf is None)
            graph = optimise(captured, tuple(leaves[i] for i in captured.places))
            return graph, captured.places, captured.out_spec

        with self._lock, torch.inference_mode(False), torch.no_grad(), _without_autocast():
            saved.write(self, path, lowered)

    def _of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Kind, Sequence]:
        """What a call runs, and its leaves."""
        if not kwargs and all([type(t) is torch.Tensor for t in args]):
            leaves, spec = args, len(args)  # as most calls are: the tree of them is known
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
        key = _key(leaves, spec)
        try:
            found = self._kinds.get(key)
        except TypeError as error:
            raise CannotCapture(f"an argument tells of no kind of call: {error}") from None
        if found is None:
            with self._lock:
                if (found := self._kinds.get(key)) is not None:  # another thread's work
                    return found, leaves
                if self._source is None:
                    if not self._kinds:
                        self._read()
                    if key not in self._kinds:
                        raise CannotCapture(
                            "a model from a file takes the kinds of calls that it was saved with"
                        )
                    return self._kinds[key], leaves
                captured = capture(self._source, args, kwargs)
                given = tuple(leaves[i] for i in captured.places)
                graph = optimise(captured, given)
                found = _served(graph, given, captured.places, captured.out_spec)
                self._kinds[key] = found
                while len(self._kinds) > _MOST_KINDS:
                    self._kinds.popitem(last=False)
        return found, leaves

    def graph_of(self, *args, **kwargs) -> tuple[GraphModule, list[torch.Tensor]]:
        """The graph that a call runs, and what it is handed."""
        kind, leaves = self._of(args, kwargs)
        return kind.graph, [leaves[i] for i in kind.places]

    def __call__(self, *args, **kwargs):
        """As any module's call; short where a program takes the only tensor and nobody looks on."""
        last = self._last
        if last is not None and len(args) == 1 and not kwargs and not _compiling():
            x = args[0]
            watched = (
                self._forward_hooks
                or self._forward_pre_hooks
                or module._global_forward_hooks
                or module._global_forward_pre_hooks
                or _dispatch_modes()
                or _tracing()
            )
            if type(x) is torch.Tensor and not watched and not x.requires_grad:
                try:
                    made = run_one(last.number, x)
                except RuntimeError:
                    made = None  # the long way tells of it
                if made is not None:
                    return made
        return super().__call__(*args, **kwargs)

    def forward(self, *args, **kwargs):
        try:
            kind, leaves = self._of(args, kwargs)
        except CannotCapture as error:
            if self._source is None:
                raise ValueError(str(error)) from None
            # The model's own answer, or its own error.
            with torch.no_grad(), _without_autocast():
                return self._source(*args, **kwargs)
        given = [leaves[i] for i in kind.places]
        traced = torch.compiler.is_compiling() or _tracing() or _dispatch_modes()
        run = kind.graph.forward if traced else kind.run
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            with torch.no_grad(), _without_autocast():
                made = _made(kind, run, given)
        else:
            made = _made(kind, run, given)
        if not traced and len(leaves) == 1 and not kwargs:
            self.__dict__["_last"] = kind.single
        return made[0] if kind.out_spec.is_leaf() else pytree.tree_unflatten(made, kind.out_spec)

    def train(self, mode: bool = True):
        """Frozen models are for inference.

        Raises
        ------
        RuntimeError
            If `mode` is True.
        """
        if mode:
            raise RuntimeError(
                "a frozen model is for inference: train the model that it was made of, and freeze it again"
            )
        return self

    def _apply(self, fn, recurse=True):
        raise RuntimeError(
            "a frozen model keeps its dtype and its device: move or cast the model that it was made of, and freeze it again"
        )

    def __deepcopy__(self, memo):
        other = type(self).__new__(type(self))
        Module.__init__(other)
        other.training = False
        # What graphs hold never changes.
        state = {
            "_source": self._source,
            "_kinds": OrderedDict(self._kinds),
            "_lock": threading.RLock(),
            "_last": None,
            "_file": self._file,
        }
        other.__dict__.update(state)
        _alive.add(other)
        return other

    def __reduce__(self):
        raise TypeError(
            "a frozen model is not pickled: keep the model that it was made of, and freeze it again"
        )

    def extra_repr(self) -> str:
        return f"{self._file or type(self._source).__name__}, {len(self._kinds)} kinds of calls"


@contextlib.contextmanager
def _turned_off():
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


_as_it_is = contextlib.nullcontext()


def _without_autocast():
    return _turned_off() if torch._C._is_any_autocast_enabled() else _as_it_is


# ---- what fastnn.explain shows ----


class _Timed(torch.fx.Interpreter):
    """Runs a graph node by node, and notes how long each takes."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.seconds: dict[Node, list[float]] = {}
        self.views: set[Node] = set()  # what gives its argument's memory moves nothing
        self.ran: dict[Node, tuple[str, str]] = {}  # of what plans its calls itself: by whom, or why by torch
        self.node: Node | None = None

    def on_op(self, op: Op, args: tuple, plan: Plan) -> None:
        where = runner(op, args, plan)
        self.ran[self.node] = where, plan.reason or ""

    def run_node(self, node: Node):
        self.node = node
        given = [self.env[n] for n in node.all_input_nodes if n in self.env]
        _wait(given)
        start = time.perf_counter()
        made = super().run_node(node)
        _wait(given)
        self.seconds.setdefault(node, []).append(time.perf_counter() - start)
        if isinstance(made, torch.Tensor) and node.op == "call_function":
            at = made.untyped_storage().data_ptr()
            if any(isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() == at for t in given):
                self.views.add(node)
        return made


_ROUNDS = 5


def rows(model: FrozenModel, args: tuple, kwargs: dict[str, Any]) -> list[Row]:
    """A row for each op of the graph that a call runs."""
    from fastnn._explain import Row

    gm, given = model.graph_of(*args, **kwargs)
    timed = _Timed(gm)
    with torch.no_grad(), _without_autocast():
        with watch.watching(timed.on_op):
            timed.run(*given)
        timed.seconds.clear()
        for _ in range(_ROUNDS):
            timed.run(*given)
    calls = [
        node
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem and node not in timed.views
    ]
    seconds = {node: min(timed.seconds[node]) for node in calls}
    total = sum(seconds.values())
    found = []
    for node in calls:
        name, where, reason, algorithm = lower.told(node)
        where, reason = timed.ran.get(node, (where, reason))
        read = next((n for n in node.all_input_nodes if ir.shape_of(n) is not None), None)
        shape = () if read is None else ir.shape_of(read)
        dtype = "" if read is None else str(ir.dtype_of(read)).removeprefix("torch.")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        layer = stack[-1][0] if stack else ""
        found.append(Row(layer, name, shape, dtype, where, reason, algorithm, seconds[node] / total))
    return found
