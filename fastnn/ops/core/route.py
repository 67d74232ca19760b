"""The way of a call from a public function to a kernel or to torch's op, by its plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from fastnn import _library, _settings
from fastnn.ops.core import autocast, autograd, watch
from fastnn.ops.core.autocast import any_autocast
from fastnn.ops.core.described import are_known
from fastnn.ops.core.op import Op
from fastnn.ops.core.options import PackedOptions, with_algorithms
from fastnn.ops.core.plan import BY_TORCH, REAL, Plan, fastest, in_transform, plan, torchs, why_constant

_compiler = torch.compiler  # its is_compiling() is these two, but takes 40 ns more
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state
_watching_modes = torch._C._len_torch_dispatch_stack

# Kinds of calls whose plans an op remembers; with more, it begins anew.
_MOST_PLANS = 4096

_remembered: list[dict] = []


def forget_plans() -> None:
    """Have every plan made anew: the choices, or the instruction set, are others."""
    for plans in _remembered:
        plans.clear()


_library.on_set_isa.append(forget_plans)


def hand_over(op: Op, args: tuple, reason: str) -> None:
    """Notes that a public function gives torch a call, with the op's arguments, before the op's route sees it."""
    if not (_is_dynamo_compiling() or _compiler._is_compiling_flag):
        watch.record(op, args, torchs(reason))


def _kernel_of(op: Op) -> Callable:
    """The kernel alone, called as ``run(args, numbers)``, `numbers` being those of the plan."""
    count, kernel = op.tensors, op.packet.raw._op
    if "packed" not in op.packet.overloads():
        return lambda args, numbers: kernel(*args, *numbers)
    packed = op.packet.packed._op
    options = PackedOptions([str(a.type) == "Optional[int]" for a in op.schema.arguments[count:]])
    # With the numbers of algorithms, which are the same few.
    known: dict[tuple, tuple[int, ...]] = {}

    def run(args, numbers):
        if args[0].is_cpu and not _watching_modes():
            words = options[args[count:]]
            if words is not None:
                if numbers:
                    words = known.get((words, numbers)) or remember(words, numbers)
                return packed(*args[:count], *words)
        return kernel(*args, *numbers)

    def remember(words, numbers):
        made = with_algorithms(words, numbers)
        if len(known) < PackedOptions.most:
            known[words, numbers] = made
        return made

    return run


def _kernel_on_gpus(op: Op, kernel: Callable) -> Callable:
    """The same on a GPU: where there are several kernels, in Python, a call need not pass through the dispatcher to them."""
    if len(op.candidates) == 1:
        return kernel
    candidates = list(op.candidates.values())

    def run(args, numbers):
        device = args[0].device
        if len(numbers) != 1 or _watching_modes() or torch.cuda.current_device() != device.index:
            return kernel(args, numbers)
        return candidates[numbers[0] - 1](*args)

    return run


def _parts(op: Op, run: Callable, args: tuple, numbers: tuple[int, ...]):
    """A call of an op of gradients of which torch does one, that of the input or those of weight and bias."""
    *call, of_input, of_weight, of_bias = args
    by_torch = tuple(number == BY_TORCH for number in numbers)
    ours = tuple(0 if torch_does else number for torch_does, number in zip(by_torch, numbers, strict=True))

    def only(input_too, weight_too):
        return (*call, of_input and input_too, of_weight and weight_too, of_bias and weight_too)

    theirs = op.stock(*only(*by_torch))
    made = run(only(not by_torch[0], not by_torch[1]), ours)
    return theirs[0] if by_torch[0] else made[0], *(theirs if by_torch[1] else made)[1:]


def _kind_of(op: Op) -> Callable:
    """From the arguments of an eager call, and whether it wants gradients, to all that its plan on the CPU depends on."""
    count = op.tensors
    if len(op.required) != 2:

        def kind(args, wants):
            given = [None if t is None else (t.shape, t.stride()) for t in args[:count]]
            return args[0].dtype, args[count:], wants, *given

    elif op.by_layout:

        def kind(args, wants):
            a, b = args[0], args[1]
            return a.shape, b.shape, a.dtype, a.stride(), b.stride(), args[count:], wants

    else:

        def kind(args, wants):
            a = args[0]
            return a.shape, args[1].shape, a.dtype, args[count:], wants

    return kind


def route_of(op: Op) -> Callable:
    """The function that has a call of an op done by whom its plan names."""
    count, otherwise, kernel = op.tensors, op.otherwise, _kernel_of(op)
    casts, constants, kind = op.autocast, op.constant, _kind_of(op)
    chooses = op.algorithms is not None
    on_gpus = op.on_gpus is not None
    run_on_gpu = _kernel_on_gpus(op, kernel)
    function_on_gpu = autograd.as_function(op, run_on_gpu)
    plans: dict[tuple, Plan] = {}
    _remembered.append(plans)

    def run(args, numbers):
        return _parts(op, kernel, args, numbers) if numbers and BY_TORCH in numbers else kernel(args, numbers)

    function = autograd.as_function(op, run)

    def route(*args):
        if (
            _tracing_state() is not None
            or _is_dynamo_compiling()
            or _compiler._is_compiling_flag
            or watch.watched
            or _settings.log
            or _settings.disabled
            or in_transform() is not None
            or forward_ad._current_level >= 0
        ):
            return without_memory(args)
        if casts and any_autocast():
            return under_autocast(args)
        wants, enabled = False, _is_grad_enabled()
        for t in args[:count]:
            if t is not None:
                if type(t) not in REAL:
                    return carefully(args)
                if enabled and t.requires_grad:
                    wants = True
        if args[0] is None or not args[0].is_cpu:
            return as_planned(args, wants) if on_gpus else carefully(args)
        numbers = ()
        if chooses:
            try:
                key = kind(args, wants), watch.prefer_kernels
                known = plans.get(key)
                if known is None:
                    known = remember(key, fastest(op, args))
            except Exception:
                known = None  # the rules make no sense of the arguments: the op will refuse them
            if known is not None:
                if known.algorithm is None:
                    return otherwise(*args)
                numbers = known.numbers
        try:
            if not wants:
                return run(args, numbers)
            if not constants or why_constant(op, args) is None:
                return function.apply(*args, numbers)
        except Exception:
            # The op refuses what it does not cover: that is torch's, to do or to refuse in its own words.
            if plan(op, args).algorithm is not None:
                raise
        return otherwise(*args)

    def under_autocast(args):
        if any([t is not None and type(t) not in REAL for t in args[:count]]) or args[0] is None:
            return carefully(args)
        wants = _is_grad_enabled() and any([t is not None and t.requires_grad for t in args[:count]])
        return as_planned(args, wants, autocast.dtype_of(args[0]))

    def as_planned(args, wants, dtype=None):
        """By the plan that is remembered for the call's kind, after a cast to autocast's dtype."""
        try:
            # Which of its tensors wants a gradient counts for those that get none.
            needs = wants and [args[i] is not None and args[i].requires_grad for i, _ in constants]
            given = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in args[:count]]
            key = (*given, args[count:], wants, *(needs or ()), dtype, watch.prefer_kernels)
            known = plans.get(key)
        except Exception:
            # What has no strides, or None in place of a tensor: the plan says why it is torch's.
            return carefully(args)
        if known is None:
            known = remember(key, plan(op, args if dtype is None else autocast.as_called(op, args)))
        if known.algorithm is None:
            return otherwise(*args)
        if dtype is not None:
            args = autocast.as_called(op, args)
        if args[0].is_cpu:
            return function.apply(*args, known.numbers) if wants else run(args, known.numbers)
        return function_on_gpu.apply(*args, known.numbers) if wants else run_on_gpu(args, known.numbers)

    def remember(key, known):
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = known
        return known

    def without_memory(args):
        if _tracing_state() is not None:
            # torch.jit.trace takes no autograd.Function, and has to find the same ops without gradients.
            return otherwise(*args)
        if _is_dynamo_compiling() or _compiler._is_compiling_flag:
            # The tracer sees one op; gradients are the dispatcher's. The cast is here, for the plan is about what it gives.
            cast = autocast.as_called(op, args)
            made = plan(op, cast)
            if made.algorithm is None:
                return otherwise(*args)
            wants = _is_grad_enabled() and any([t is not None and t.requires_grad for t in cast[:count]])
            if not made.numbers or wants or not cast[0].is_cpu or not are_known(cast):
                # The op with gradients takes no algorithm; and one for sizes that are symbols may not cover all of them.
                return op.packet.default(*cast)
            if BY_TORCH in made.numbers:
                return _parts(op, lambda args, numbers: op.packet.raw(*args, *numbers), cast, made.numbers)
            return op.packet.raw(*cast, *made.numbers)
        return carefully(args)

    def carefully(args):
        original = args
        if in_transform() is None and forward_ad._current_level < 0:
            args = autocast.as_called(op, args)
        made = plan(op, args)
        if made.algorithm is not None or otherwise is op.stock:
            watch.record(op, args, made)
        if made.algorithm is None:
            return otherwise(*original)
        if _is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:count]):
            return function.apply(*args, made.numbers)
        return run(args, made.numbers)

    route.__name__ = route.__qualname__ = op.name
    route.op = op
    return route
