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

from fastnn import _library, _settings
from fastnn.ops.core import choices, cpu_choices, gpu, rules, watch
from fastnn.ops.core.algorithms import AUTOMATIC, Result, covers_by
from fastnn.ops.core.described import Described, described
from fastnn.ops.core.op import FLOATS, Op

# Tensors with sizes that are numbers; and with them the subclasses that the raw ops understand. Any other goes to torch, whose
# ops its author wrote it for.
REAL = frozenset((torch.Tensor, torch.nn.Parameter))
PLAIN = REAL | {FakeTensor, FunctionalTensor}

in_transform = torch._C._functorch.peek_interpreter_stack

#: In place of an algorithm's number: the gradient is torch's.
BY_TORCH = -1


class Plan(NamedTuple):
    """Who does a call.

    Attributes
    ----------
    algorithm : str or None
        The algorithm's name, or the kernel's on a GPU; of an op of gradients one for each that is wanted, of which one may be
        torch's: ``"planes, torch"``. None where all is torch's.
    reason : str or None
        Why it is torch's; None where it is not.
    numbers : tuple of int
        The algorithm as the op takes it, one number for each result that has algorithms of its own; none where there are no
        algorithms, or all are the library's own choice. :data:`BY_TORCH` for a gradient that is torch's.
    """

    algorithm: str | None
    reason: str | None
    numbers: tuple[int, ...] = ()


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
    names = list(op.candidates)
    if tracing or len(names) == 1:
        return Plan(names[0], None)
    if preferred:
        chosen = choices.chosen(op.name, args, args[0].device)
    name = candidate(op, chosen, args)
    return Plan(name, None, (names.index(name) + 1,))


def runner(op: Op, args: tuple, plan: Plan) -> str:
    """What runs a call, as ``explain`` says it: torch, alone or with fastnn's pass behind it, or fastnn's kernel by its instruction set,
    or for a GPU by its language and, where there are several, its name."""
    if plan.algorithm is None:
        return choices.TORCH
    if args[0].is_cpu:
        return f"fastnn {_library.current_isa()}"
    if plan.algorithm.startswith(choices.TORCH):
        return plan.algorithm
    if len(op.candidates) == 1:
        return f"fastnn {op.on_gpus}"
    return f"fastnn {'cuda' if plan.algorithm.startswith(gpu.WARPGROUPS) else op.on_gpus}: {plan.algorithm}"


# ---- on the CPU ----


def fastest(op: Op, args: tuple) -> Plan:
    """The plan of a call on the CPU that may be taken to be covered: who was measured to be fastest."""
    preferred = watch.prefers_kernels()
    if op.algorithms is None:
        return Plan(AUTOMATIC, None)
    results = op.algorithms.results
    # Of an op of gradients, that of the input, and those of weight and bias.
    wanted = (True,) if len(results) == 1 else (args[-3], args[-2] or args[-1])
    names, numbers = [], []
    for result, want in zip(results, wanted, strict=True):
        number = _fastest_for(op, result, args, preferred) if want else 0
        numbers.append(number)
        if want:
            named = number or result.automatic(*args)
            names.append(rules.TORCH if number == BY_TORCH else op.algorithms.names[named])
    if names and all([name == rules.TORCH for name in names]):
        return torchs("torch measured faster on this processor")
    told = op.algorithms.takes_number and any(numbers)
    return Plan(", ".join(names) or AUTOMATIC, None, tuple(numbers) if told else ())


def _fastest_for(op: Op, result: Result, args: tuple, preferred: bool) -> int:
    """The number of the algorithm for one result, or BY_TORCH."""
    call = result.describe(*args)
    named = None
    if cpu_choices.has_tuned(op.name) and not isinstance(args[0], Described):
        mine = cpu_choices.tuned(op.name, cpu_class(op, call, args))
        named = None if mine is None else (mine,)
    if named is None:
        named = cpu_choices.chosen(op.name, call.kind, tuple(call.sizes.items()))
    mask = None
    for name in named or ():
        if name == rules.TORCH:
            if preferred or call.only_kernels:
                continue
            return BY_TORCH
        if name not in op.algorithms.names:
            continue  # of a user's file that another version wrote
        number = op.algorithms.names.index(name)
        if mask is None:
            mask = result.covering(*args)
        if covers_by(mask, number):
            return number
    return 0


def cpu_class(op: Op, call: rules.Call, args: tuple) -> str:
    """The class of a call on the CPU for which a choice of the user's holds: of one gradient, whichever others are wanted."""
    return f"{call.kind}: {choices.call_class(args if len(op.algorithms.results) == 1 else args[:-3])}"


# ---- on GPUs ----


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
    for i, name in op.constant:
        if args[i] is not None and args[i].requires_grad and torch.is_grad_enabled():
            return f"a gradient of the {name}"
    return None


def why_uncovered(op: Op, args: tuple) -> str | None:
    """Why the op's kernels do not take these arguments, or None."""
    reason = op.unsupported(*args)
    if reason is None and op.unsupported_on_gpus is not None and not args[0].is_cpu:
        return op.unsupported_on_gpus(*args)
    return reason
