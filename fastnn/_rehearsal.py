"""Running a model without a trace: on a copy whose buffers are its own, with random numbers of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Copy", "graph_of", "run_backward"]


class Copy:
    """A model to be run in place of another: the same parameters, other buffers.

    Attributes
    ----------
    model : callable
        The copy.
    names : dict
        From the modules, of the copy and of the model itself, to their names.
    """

    def __init__(self, model: Callable) -> None:
        self._made: dict[int, Any] = {}
        # The model's tensors by their id, which keeps its meaning as long as they are held.
        self._held: list[torch.Tensor] = []
        self.model = self._copied(model)
        self.names = _names(model) | _names(self.model)
        if isinstance(model, types.FunctionType):
            found = inspect.getclosurevars(model)
            for module in (*found.nonlocals.values(), *found.globals.values()):
                if isinstance(module, Module):
                    for buffer in module.buffers():
                        self._copied(buffer)

    def set_mode(self, training: bool) -> None:
        """Set the training or evaluation mode of a module that is not in it; parts of one that is keep theirs."""
        if isinstance(self.model, Module) and self.model.training != training:
            self.model.train(training)

    @contextlib.contextmanager
    def without_trace(self) -> Iterator[None]:
        """Draw other random numbers, and leave alone the model's own tensors where its code reaches those."""
        # Not by the mode's __enter__(): it sets flags of the whole process, which two threads would leave wrong.
        torch._C._push_on_torch_dispatch_stack(_Apart({id(t): self._made[id(t)] for t in self._held}))
        try:
            yield
        finally:
            torch._C._pop_torch_dispatch_stack(None)

    def _copied(self, value: Any) -> Any:
        if id(value) in self._made:
            return self._made[id(value)]
        kind = type(value)
        # There are no compiled modules where nobody has imported what makes them.
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        if dynamo is not None and isinstance(value, dynamo.OptimizedModule):
            return self._copied(value._orig_mod)
        if isinstance(value, torch.jit.ScriptModule):
            made = self._made[id(value)] = copy.deepcopy(value)
            return made
        if isinstance(value, Module):
            made = self._made[id(value)] = object.__new__(kind)
            made.__dict__.update({name: self._copied(held) for name, held in value.__dict__.items()})
            made.__dict__.pop("_compiled_call_impl", None)
            return made
        if isinstance(value, torch.Tensor):
            if isinstance(value, Parameter) or value.requires_grad or is_lazy(value):
                return value
            made = self._made[id(value)] = value.detach().clone()
            self._held.append(value)
            return made
        if kind is list or kind is set:
            made = self._made[id(value)] = kind()
            (made.extend if kind is list else made.update)([self._copied(held) for held in value])
            return made
        if kind is tuple:
            return tuple([self._copied(held) for held in value])
        if kind is dict or kind is OrderedDict or kind is defaultdict:
            made = self._made[id(value)] = kind(value.default_factory) if kind is defaultdict else kind()
            made.update({key: self._copied(held) for key, held in value.items()})
            return made
        if kind is types.MethodType and isinstance(value.__self__, Module):
            return types.MethodType(value.__func__, self._copied(value.__self__))
        if kind is functools.partial:
            args = [self._copied(held) for held in value.args]
            named = {name: self._copied(held) for name, held in value.keywords.items()}
            return functools.partial(self._copied(value.func), *args, **named)
        return value


def _names(model: Any) -> dict[Module, str]:
    return {m: name for name, m in model.named_modules()} if isinstance(model, Module) else {}


class _Apart(TorchDispatchMode):
    """Gives ops other tensors in place of some, and has the random ones draw from generators of this run."""

    supports_higher_order_operators = True

    def __init__(self, others: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.others = others
        self.generators: dict[torch.Generator, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.others:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: self.others.get(id(t), t), (args, kwargs))
        if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        seedable = _with_generator(func)
        device = _device_of(args, kwargs)
        if device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        if seedable is not None:
            bound = dict(zip([a.name for a in func._schema.arguments], args, strict=False))
            mine = self._generator(
                bound.pop("generator", None) or kwargs.get("generator") or _default(device)
            )
            return seedable(**bound, **(kwargs | {"generator": mine}))
        theirs = _default(device)
        state = theirs.get_state()
        try:
            return func(*args, **kwargs)
        finally:
            theirs.set_state(state)

    def _generator(self, theirs: torch.Generator) -> torch.Generator:
        if theirs not in self.generators:
            mine = self.generators[theirs] = torch.Generator(theirs.device)
            mine.set_state(theirs.get_state())
        return self.generators[theirs]


def _device_of(args, kwargs) -> torch.device:
    tensor = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), None)
    if tensor is not None:
        return tensor.device
    return torch.device(kwargs.get("device") or "cpu")


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


@functools.cache
def _with_generator(func):
    """The overload of a random op that takes a generator beside the same arguments, or None."""
    names = [a.name for a in func._schema.arguments]
    if "generator" in names:
        return func
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        if sorted(a.name for a in other._schema.arguments) == sorted([*names, "generator"]):
            return other
    return None


# ---- the graph of a run ----


def graph_of(output: Any, known: Container = ()) -> list[Any]:
    """The nodes of the autograd graph behind some outputs, but those known already and what is behind them."""
    found: dict[Any, None] = {}
    waiting = [t.grad_fn for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node not in known:
            found[node] = None
            waiting += [behind for behind, _ in node.next_functions]
    return list(found)


def run_backward(output: Any) -> None:
    """Run the backward pass of some outputs as ``backward()`` would, with all gradients dropped."""
    outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    leaves = [node.variable for node in graph_of(outputs) if hasattr(node, "variable")]
    if outputs and leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
