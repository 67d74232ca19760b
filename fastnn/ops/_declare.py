"""One declaration per op, and everything that follows from it.

A family's file states, once per op: what it must equal (its stock form), what the native kernels cover, the shape of the
result, what backward keeps and computes, and how much work it is. :func:`declare` derives the rest: the routed
function, gradients, autocast, the tracing rules of ``torch.compile`` and ``torch.export``, FLOP counting, and the row
that :func:`fastnn.explain` shows. The schema itself stands beside the C++ implementation, so that the library also
works in a process without Python.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
import torch.utils.flop_counter
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value

from fastnn import _settings
from fastnn.ops import _choice, _gpu

log = logging.getLogger("fastnn")

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

# Tensors with sizes that are numbers; and with them the subclasses that the raw ops understand. Any other goes to torch, whose
# ops its author wrote it for.
_REAL = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN = _REAL | {FakeTensor, FunctionalTensor}

_compiler = torch.compiler  # its is_compiling() is these two, but takes 40 ns more
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_in_transform = torch._C._functorch.peek_interpreter_stack
_any_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_watching_modes = torch._C._len_torch_dispatch_stack


class Cost(NamedTuple):
    """The work of one call: floating-point operations, and the least bytes moved to and from memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Op:
    """A declared op. ``packet`` is ``torch.ops.fastnn.<name>``; its ``default`` overload carries the gradients and its
    ``raw`` overload is the kernel alone."""

    name: str
    packet: Any
    stock: Callable
    unsupported: Callable
    fake: Callable
    cost: Callable
    keep: Callable | None
    backward: Callable | None
    autocast: bool
    on_gpus: str | None  # "cuda" or "triton", whatever its kernels for GPUs are written in
    on_cpu: bool
    candidates: dict[str, Callable]  # those kernels by name, the first for a call of which no choice is known
    covers: dict[str, Callable]  # of those that do not take every call: which
    oracle: Callable  # gives the kernels' numbers from torch's ops
    tensors: tuple[int, ...] = field(default=())

    @property
    def schema(self) -> torch.FunctionSchema:
        return self.packet.default._schema

    @property
    def family(self) -> str:
        """The word in the names of its files: ``conv`` of ``conv.py`` as of ``_conv_shapes.py``."""
        module = self.unsupported.__module__.rpartition(".")[2]
        return module.split("_")[1] if module.startswith("_") else module


# Every declared op by name, in the order of declaration.
OPS: dict[str, Op] = {}

# Whether calls for which torch was measured to be faster run on the kernels all the same, in every thread: a setting of the
# process, for tests and the benchmark suite.
prefer_kernels = False


class Watch(NamedTuple):
    """What one thread has set for its own calls."""

    recorder: Callable | None  # called as recorder(op, args, reason) at each routed call
    prefer_kernels: bool  # as the process's setting


# By thread; empty, and so asked about at no cost, while no thread is watched. (A threading.local takes 30 ns to read.)
_watched: dict[int, Watch] = {}
_this_thread = threading.get_ident


@contextlib.contextmanager
def watching(recorder: Callable | None, prefer_kernels: bool = False) -> Iterator[None]:
    """Call `recorder` as ``recorder(op, args, reason)`` at each routed call that this thread makes meanwhile.

    What watched before is back afterwards. A backward pass runs in this thread, on GPUs too, and so is seen.
    """
    thread = _this_thread()
    before = _watched.get(thread)
    _watched[thread] = Watch(recorder, prefer_kernels)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        if before is None:
            del _watched[thread]
        else:
            _watched[thread] = before


def record(op: Op, args: tuple, reason: str | None) -> None:
    """Tell this thread's recorder, if there is one, of a call and why it is torch's."""
    watch = _watched.get(_this_thread())
    if watch is not None and watch.recorder is not None:
        watch.recorder(op, args, reason)


def _prefers_kernels() -> bool:
    if prefer_kernels or not _watched:
        return prefer_kernels
    watch = _watched.get(_this_thread())
    return watch is not None and watch.prefer_kernels


# ---- calls whose sizes are symbols ----

# What stands for a size that is a symbol where a rule asks for it: a tracer would tie the graph to the answer.
_TYPICAL_SIZE = 32


def _typical(n, of_dynamo):
    """What stands for a size or stride: itself, if it is known."""
    if has_static_value(n):
        return n
    if torch.compiler.is_dynamo_compiling():
        return of_dynamo
    # With the symbols that it is made of as typical sizes, so that shapes which follow from others still do.
    expression = n.node.expr
    return int(
        expression.xreplace({symbol: sympy.Integer(_TYPICAL_SIZE) for symbol in expression.free_symbols})
    )


class _Described:
    """Stands in for a tensor with sizes that are symbols, where only a tensor's description is asked for."""

    def __init__(self, tensor):
        self.dtype, self.device, self.layout = tensor.dtype, tensor.device, tensor.layout
        self.is_cpu, self.is_cuda = tensor.is_cpu, tensor.is_cuda
        # What is exported is to be served.
        self.requires_grad = tensor.requires_grad and not torch.compiler.is_exporting()
        self.shape = tuple([_typical(n, _TYPICAL_SIZE) for n in tensor.shape])
        # A stride that is a symbol is the product of some sizes.
        self._strides = tuple([_typical(n, _TYPICAL_SIZE**2) for n in tensor.stride()])
        self._element_size = tensor.element_size()

    def dim(self):
        return len(self.shape)

    def numel(self):
        return math.prod(self.shape)

    def stride(self, dim):
        return self._strides[dim]

    def element_size(self):
        return self._element_size


def _is_static(tensor) -> bool:
    return all([has_static_value(n) for n in tensor.shape])


def _described(args):
    """An op's arguments as they are where their sizes are known, else with descriptions in place of the tensors.

    A decision about a traced call follows from what is static: so it adds no guard, and holds for every size.
    """
    if not torch.compiler.is_exporting() and all(
        [_is_static(a) for a in args if isinstance(a, torch.Tensor)]
    ):
        return args
    return tuple([_Described(a) if isinstance(a, torch.Tensor) else _number(a) for a in args])


def _number(value):
    return _typical(value, _TYPICAL_SIZE) if isinstance(value, torch.SymInt) else value


def tensor_bytes(*tensors) -> int:
    """The bytes that the elements of some tensors take, None counting nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def hand_over(op: Op, args: tuple, reason: str) -> None:
    """Notes that a public function gives torch a call, with the op's arguments, before the op's route sees it."""
    if _is_dynamo_compiling() or _compiler._is_compiling_flag:
        return
    record(op, args, reason)
    if _settings.log:
        log.info("%s runs on torch: %s", op.name, reason)


def _unfit(tensors, own_dtype=(), on_gpus: str | None = None, on_cpu: bool = True) -> str | None:
    """Why no native kernel takes these tensors, whatever the op; None if one may.

    Those at the places `own_dtype` need not have the dtype of the others. `on_gpus` is the kind of the op's
    kernels for GPUs, None where it has none.
    """
    dtype = device = None
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if type(t) not in _PLAIN:
            return f"{type(t).__name__} is not a plain tensor"
        if t.is_cpu:
            if not on_cpu:
                return "no kernel for device cpu"
        else:
            if reason := _gpu.why_not(t, on_gpus):
                return reason
        if device is None:
            device = t.device
        elif t.device != device:
            return f"mixed devices {device} and {t.device}"
        if dtype is None:
            dtype = t.dtype
            if dtype not in FLOATS:
                return f"no kernel for {dtype}"
        elif t.dtype is not dtype and i not in own_dtype:
            return f"mixed dtypes {dtype} and {t.dtype}"
        if t.layout is not torch.strided:
            return f"layout {t.layout}"
        if t.is_nested:
            return "a nested tensor"
    return None


def _cast_for_autocast(args, device: str):
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        a.to(dtype)
        if isinstance(a, torch.Tensor)
        and a.is_floating_point()
        and a.dtype is not torch.float64
        and a.device.type == device
        else a
        for a in args
    )


def _save_as_function(op: Op, raw) -> type[torch.autograd.Function]:
    """The op's gradient as an autograd.Function: half the cost of the dispatcher's Python autograd on a small call."""

    def forward(ctx, *args):
        ctx.set_materialize_grads(False)
        out = raw(*args)
        if isinstance(out, tuple):
            ctx.mark_non_differentiable(
                *(t for t in out if not t.is_floating_point())
            )  # keep() may mark others
        op.keep(ctx, args, out)
        return out

    def backward(ctx, *grads):
        return op.backward(ctx, *grads)

    name = "".join(part.capitalize() for part in op.name.split("_"))
    return type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )


class _Packs(dict):
    """From options to the numbers that an op's packed overload takes, or to None where one does not fit."""

    per_number = 7
    most = 4096

    def __init__(self, is_optional):
        super().__init__()
        self.is_optional = is_optional

    def __missing__(self, options):
        values = []
        for value, optional in zip(options, self.is_optional, strict=True):
            # None is packed as 0, which leaves no place for an optional 0.
            if value is None:
                value = 0
            elif type(value) not in (int, bool) or not optional <= value < 256:
                return None
            values.append(int(value))
        starts = range(0, len(values), self.per_number)
        numbers = tuple(
            sum(v << 8 * i for i, v in enumerate(values[at : at + self.per_number])) for at in starts
        )
        if len(self) < self.most:
            self[options] = numbers
        return numbers


def _no_gradient(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastnn::{name} has no gradient of its own, so the op that it is the backward of cannot be differentiated "
            f"twice; set FASTNN_DISABLE=1 to use torch's op, where torch has a second derivative"
        )

    return backward


def declare(
    name: str,
    *,
    stock: Callable,
    unsupported: Callable,
    fake: Callable,
    cost: Callable,
    keep: Callable | None = None,
    backward: Callable | None = None,
    autocast: bool = False,
    own_dtype: tuple[str, ...] = (),
    constant: tuple[str, ...] = (),
    slower: Callable | None = None,
    on_cpu: bool = True,
    on_gpus: str | None = None,
    candidates: dict[str, Callable] | None = None,
    covers: dict[str, Callable] | None = None,
    unsupported_on_gpus: Callable | None = None,
    oracle: Callable | None = None,
) -> Callable:
    """Declare the op ``fastnn::<name>`` and return the function that routes a call to it or to torch.

    Every callable takes the op's arguments in the order of its schema.

    Parameters
    ----------
    name
        Name of an op that the library defines.
    stock
        The same result from torch's own ops: the oracle of the tests, the rival of the benchmarks, and where a call
        goes that no kernel covers. It also raises torch's own error for arguments that torch refuses.
    unsupported
        None if the native kernels take these arguments, else the reason why not, in a few words. It is asked only about
        plain strided tensors of one floating dtype on a device with kernels. The op itself must refuse all that this
        does: an eager call asks only where the op raised.
    fake
        The result's shape, dtype and strides, as empty tensors.
    cost
        A :class:`Cost`.
    keep
        ``keep(ctx, inputs, output)`` saves what backward needs.
    backward
        ``backward(ctx, *grads)`` returns a gradient, or None, per argument. A grad is None where nothing flows back.
    autocast
        Whether autocast lowers the op's inputs to its dtype.
    own_dtype
        Names of tensor arguments whose dtype is not that of the first one, such as indices; the op checks it.
    constant
        Names of tensor arguments for which backward gives no gradient; a call that wants one is torch's.
    slower
        None if the kernels are to take a call that they support, else the reason why torch's op does better.
        It may raise where `unsupported` has a reason.
    on_cpu
        Whether there are kernels for the CPU.
    on_gpus
        "cuda" or "triton": what its kernels for GPUs are written in, if there are any.
    candidates
        The same result from those kernels, by their names, for tensors on a GPU that `unsupported` and
        `unsupported_on_gpus` have nothing against. Without it, the library itself has the one that there is.
    covers
        By the name of a candidate that does not take all of those, but the first, whether it takes a call.
    unsupported_on_gpus
        As `unsupported`, of the kernels for GPUs alone.
    oracle
        The kernels' numbers from torch's ops, where `stock` gives others, since it draws its own random ones.
    """
    packet = getattr(torch.ops.fastnn, name)
    default, raw = packet.default, packet.raw
    arguments = default._schema.arguments
    positions = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
    count = len(positions)
    required = tuple(i for i in positions if "Optional" not in str(arguments[i].type))
    free = tuple(place for place, i in enumerate(positions) if arguments[i].name in own_dtype)
    constants = tuple(place for place, i in enumerate(positions) if arguments[i].name in constant)
    op = Op(
        name,
        packet,
        stock,
        unsupported,
        fake,
        cost,
        keep or (lambda ctx, inputs, output: None),
        backward or _no_gradient(name),
        autocast,
        on_gpus,
        on_cpu,
        candidates or ({"kernel": raw} if on_gpus else {}),
        covers or {},
        oracle or stock,
        positions,
    )
    OPS[name] = op

    def uncovered(args):
        reason = unsupported(*args)
        if reason is None and unsupported_on_gpus is not None and not args[0].is_cpu:
            return unsupported_on_gpus(*args)
        return reason

    if candidates and (on_gpus == "triton" or _gpu.architectures()):
        _register_on_gpus(op, lambda args: _unfit(args[:count], free, on_gpus, on_cpu) or uncovered(args))

    def fake_on_one_device(*args):
        # The dispatcher comes here too with some tensors on the meta device and others not, whatever the op's kernels check.
        devices = [t.device for t in args[:count] if t is not None]
        if any([device != devices[0] for device in devices]):
            found = " and ".join(sorted({str(device) for device in devices}))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {found}!"
            )
        return fake(*args)

    for overload in ("", ".raw"):
        torch.library.register_fake(f"fastnn::{name}{overload}", fake_on_one_device)

    def keep_from_dispatcher(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        op.keep(ctx, inputs, output)

    torch.library.register_autograd(f"fastnn::{name}", op.backward, setup_context=keep_from_dispatcher)
    if autocast:
        _register_autocast(name, default)
    torch.utils.flop_counter.register_flop_formula(packet, get_raw=True)(
        lambda *args, out_val=None, **kwargs: int(cost(*args).flops)
    )

    assert positions == tuple(range(count)), f"the tensors of {name} do not come first"
    kernel, packed, pack = raw._op, None, None
    if "packed" in packet.overloads():
        packed = packet.packed._op
        pack = _Packs([str(a.type) == "Optional[int]" for a in arguments[count:]])

    def run(*args):
        if packed is not None and args[0].is_cpu and not _watching_modes():
            numbers = pack[args[count:]]
            if numbers is not None:
                return packed(*args[:count], *numbers)
        return kernel(*args)

    function = _save_as_function(op, run)

    def route(*args):
        if _tracing_state() is not None:
            # torch.jit.trace takes no autograd.Function, and has to find the same ops without gradients.
            return stock(*args)
        if _is_dynamo_compiling() or _compiler._is_compiling_flag:
            return route_traced(args)
        if _watched or _settings.log or _settings.disabled or (autocast and _any_autocast()):
            return route_carefully(args)
        first = args[0]
        if slower is not None and not prefer_kernels:
            if type(first) not in _REAL:
                return route_carefully(args)
            try:
                # The reasons are the CPU's; on a GPU decide() asks what was chosen.
                reason = slower(*args) if first.is_cpu else None
            except Exception:
                reason = None  # it makes no sense of the arguments: the op will refuse them
            if reason is not None:
                return stock(*args)
        if _in_transform() is not None or forward_ad._current_level >= 0:
            return route_carefully(args)
        wants_gradient = False
        for t in args[:count]:
            if t is not None:
                if type(t) not in _REAL:
                    return route_carefully(args)
                if t.requires_grad:
                    wants_gradient = True
        if first is None or not first.is_cpu:
            return route_carefully(args)
        try:
            if not (wants_gradient and _is_grad_enabled()):
                return run(*args)
            if not constants or wanted_constant(args) is None:
                return function.apply(*args)
        except Exception:
            # The op refuses what it does not cover: that is torch's, to do or to refuse in its own words.
            if why_stock(args) is None:
                raise
        return stock(*args)

    def route_traced(args):
        # The tracer sees one op; gradients are the dispatcher's. The cast is here, for the decision is about what it gives.
        cast = cast_as_called(args)
        return default(*cast) if why_stock(cast) is None else stock(*args)

    def route_carefully(args):
        original, chosen = args, None
        if _in_transform() is not None or forward_ad._current_level >= 0:
            reason = "inside a torch.func transform or forward-mode AD"
        else:
            args = cast_as_called(args)
            reason, chosen = decide(args)
        record(op, args, reason)
        if reason is not None:
            if _settings.log:
                log.info("%s runs on torch: %s", name, reason)
            return stock(*original)
        call = run
        if _is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:count]):
            call = function.apply
        if chosen is None:
            return call(*args)
        with _routed.to(name, chosen):
            return call(*args)

    def cast_as_called(args):
        """The arguments as autocast has them."""
        if autocast and _any_autocast() and isinstance(args[0], torch.Tensor):
            device = args[0].device.type
            if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
                return _cast_for_autocast(args, device)
        return args

    def wanted_constant(args):
        for i in constants:
            if args[i] is not None and args[i].requires_grad and _is_grad_enabled():
                return f"a gradient of the {arguments[i].name}"
        return None

    def why_stock(args):
        return decide(args)[0]

    def decide(args):
        """Why a call is torch's, or None; and what was chosen for its class on a GPU, where that was looked up."""
        if _settings.disabled:
            return "FASTNN_DISABLE is set", None
        chosen, preferred = None, _prefers_kernels()
        on_gpu = op.on_gpus is not None and isinstance(args[0], torch.Tensor) and args[0].is_cuda
        if on_gpu and not preferred:
            chosen = _choice.chosen(name, args, args[0].device)
            if reason := _gpu.slower(chosen):
                return reason, chosen
        if any([args[i] is None for i in required]):
            return "None in place of a tensor", chosen
        reason = _unfit(args[:count], free, op.on_gpus, on_cpu) or wanted_constant(args)
        if reason is None:
            args = _described(args)
            reason = uncovered(args)
            if reason is None and slower is not None and not preferred and not on_gpu:
                reason = slower(*args)
        return reason, chosen

    route.__name__ = route.__qualname__ = name
    route.op = op
    return route


_library = torch.library.Library("fastnn", "FRAGMENT")


class _Routed(threading.local):
    """By op, what the routing found chosen for the call that is on its way to a kernel, in this thread."""

    def __init__(self):
        self.choices: dict[str, str] = {}

    @contextlib.contextmanager
    def to(self, op: str, chosen: str) -> Iterator[None]:
        before = self.choices.get(op)
        self.choices[op] = chosen
        try:
            yield
        finally:
            if before is None:
                del self.choices[op]
            else:
                self.choices[op] = before


# The dispatcher between the two has no place for it, and to look it up again takes some microseconds.
_routed = _Routed()


def candidate(op: Op, args) -> str:
    """The name of the kernel for GPUs that takes a call."""
    chosen = None
    if len(op.candidates) > 1:
        chosen = _routed.choices.get(op.name) or _choice.chosen(op.name, args, args[0].device)
    return chosen if chosen in op.candidates and covers(op, chosen, args) else next(iter(op.candidates))


def covers(op: Op, name: str, args) -> bool:
    """Whether a candidate takes a call itself."""
    return name not in op.covers or op.covers[name](*args)


def call_candidate(op: Op, name: str, args):
    """A call on a GPU by one of its kernels, through the dispatcher as all calls are."""
    with _routed.to(op.name, name):
        return op.packet.raw(*args)


def _register_on_gpus(op: Op, unfit: Callable) -> None:
    def kernel(*args):
        if reason := unfit(args):
            raise RuntimeError(f"fastnn::{op.name} on a GPU: {reason}")
        # Triton launches on the current device, whichever its arguments lie on.
        with torch.cuda.device(args[0].device):
            return op.candidates[candidate(op, args)](*args)

    for overload in ("", ".raw"):
        _library.impl(op.name + overload, kernel, "CUDA")


def _register_autocast(name: str, default) -> None:
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, device=device, exclude=exclude):
            with torch._C._ExcludeDispatchKeyGuard(exclude):
                return default(*_cast_for_autocast(args, device))

        _library.impl(name, kernel, key)
