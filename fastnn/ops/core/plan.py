"""Who does a call: one of fastnn's algorithms or torch's op. The only place that decides it.

Eager, autocast, compiled and exported calls ask :func:`plan`, and so do ``explain``, ``tune`` and the benchmark suite. It is asked
about the call as it then runs: after autocast's cast, with the gradients that are wanted, with the layouts of all tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fastnn import _settings
from fastnn.ops.core import choices, gpu, watch
from fastnn.ops.core.described import described
from fastnn.ops.core.op import FLOATS, Op

# Tensors with sizes that are numbers; and with them the subclasses that the raw ops understand. Any other goes to torch, whose
# ops its author wrote it for.
REAL = frozenset((torch.Tensor, torch.nn.Parameter))
PLAIN = REAL | {FakeTensor, FunctionalTensor}

in_transform = torch._C._functorch.peek_interpreter_stack


class Plan(NamedTuple):
    """Who does a call.

    Attributes
    ----------
    algorithm : str or None
        The kernel's name; None for torch's op. On the CPU "kernel" is what the library itself takes.
    reason : str or None
        Why it is torch's; None where it is not.
    """

    algorithm: str | None
    reason: str | None


#: What the CPU's kernels are called where the library chooses among them.
KERNEL = "kernel"
_BY_KERNEL = Plan(KERNEL, None)


def torchs(reason: str) -> Plan:
    """The plan of a call that is torch's."""
    return Plan(None, reason)


def plan(op: Op, args: tuple) -> Plan:
    """Who does a call of an op.

    Parameters
    ----------
    op : Op
    args : tuple
        All of the op's arguments, in the order of its schema.

    Returns
    -------
    Plan
    """
    if _settings.disabled:
        return torchs("FASTNN_DISABLE is set")
    tracing = torch.compiler.is_compiling()
    if not tracing and (in_transform() is not None or forward_ad._current_level >= 0):
        return torchs("inside a torch.func transform or forward-mode AD")
    on_gpu = op.on_gpus is not None and isinstance(args[0], torch.Tensor) and args[0].is_cuda
    chosen, preferred = None, watch.prefers_kernels()
    if on_gpu and not preferred:
        # First: of a call that nobody measured it does not count what else is missing on its GPU.
        chosen = choices.chosen(op.name, args, args[0].device)
        if chosen is None:
            return torchs("not measured on this GPU: fastnn.tune measures")
        if chosen == choices.TORCH:
            return torchs("torch measured faster on this GPU")
    reason = why_unfit(op, args) or why_constant(op, args)
    if reason is None:
        args = described(args)
        reason = why_uncovered(op, args)
    if reason is not None:
        return torchs(reason)
    if not on_gpu:
        return fastest(op, args)
    first = next(iter(op.candidates))
    if tracing or len(op.candidates) == 1:
        return Plan(first, None)
    if preferred:
        chosen = choices.chosen(op.name, args, args[0].device)
    return Plan(candidate(op, chosen, args), None)


def fastest(op: Op, args: tuple) -> Plan:
    """The plan of a call on the CPU that may be taken to be covered: who was measured to be fastest."""
    if op.slower is not None and not watch.prefers_kernels():
        reason = op.slower(*args)
        if reason is not None:
            return torchs(reason)
    return _BY_KERNEL


def candidate(op: Op, chosen: str | None, args: tuple) -> str:
    """The kernel for GPUs that takes a call: the chosen one, if it covers the call."""
    return chosen if chosen in op.candidates and covers(op, chosen, args) else next(iter(op.candidates))


def covers(op: Op, name: str, args: tuple) -> bool:
    """Whether a kernel for GPUs takes a call itself."""
    return name not in op.covers or op.covers[name](*args)


# ---- what no kernel takes ----


def why_unfit(op: Op, args: tuple) -> str | None:
    """Why no kernel takes tensors such as these, whatever the op makes of them; None if one may."""
    if any([args[i] is None for i in op.required]):
        return "None in place of a tensor"
    dtype = device = None
    for i, t in enumerate(args[: op.tensors]):
        if t is None:
            continue
        if type(t) not in PLAIN:
            return f"{type(t).__name__} is not a plain tensor"
        if t.is_cpu:
            if not op.on_cpu:
                return "no kernel for device cpu"
        else:
            if reason := gpu.why_not(t, op.on_gpus):
                return reason
        if device is None:
            device = t.device
        elif t.device != device:
            return f"mixed devices {device} and {t.device}"
        if dtype is None:
            dtype = t.dtype
            if dtype not in FLOATS:
                return f"no kernel for {dtype}"
        elif t.dtype is not dtype and i not in op.own_dtype:
            return f"mixed dtypes {dtype} and {t.dtype}"
        if t.layout is not torch.strided:
            return f"layout {t.layout}"
        if t.is_nested:
            return "a nested tensor"
    return None


def why_constant(op: Op, args: tuple) -> str | None:
    """Which gradient a call wants that backward does not give, or None."""
    for i in op.constant:
        if args[i] is not None and args[i].requires_grad and torch.is_grad_enabled():
            return f"a gradient of the {op.schema.arguments[i].name}"
    return None


def why_uncovered(op: Op, args: tuple) -> str | None:
    """Why the op's kernels do not take these arguments, or None."""
    reason = op.unsupported(*args)
    if reason is None and op.unsupported_on_gpus is not None and not args[0].is_cpu:
        return op.unsupported_on_gpus(*args)
    return reason
