"""Rows for a GPU of sizes that fill it: every kernel that covers a call against the best of what torch offers.

``python3 -m benchmarks.gpu_rows`` writes a line of JSON for each op of each row, as soon as it is measured. A process of its own
measures them; where a kernel hangs or leaves the GPU useless, another one goes on without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

#: Seconds without a word from the process that measures, until it is ended: what is compiled at a first call included.
PATIENCE = 40.0
#: Milliseconds of calls that each measurement repeats, twice in turns.
REPEAT_MS = 30
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

DEVICE = "cuda"

Call = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A call of fastnn, what torch offers for it, and the work there is.

    `shapes` are those of its tensors, images in channels_last if `last`. `least`: the ratios over the best of torch's that are
    the goal, forward and backward, or None. `flops` are of the forward pass.
    """

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    call: Call
    stock: dict[str, Call]
    flops: float = 0.0
    last: bool = True
    backward: bool = True
    least: tuple[float | None, float | None] = (None, None)

    def tensors(self) -> list[torch.Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        made = []
        for place, shape in enumerate(self.shapes):
            scale = 1.0 if place == 0 or self.name.startswith("attention") else math.prod(shape[1:]) ** -0.5
            t = torch.randn(shape, generator=generator, device=DEVICE).mul_(scale).to(_DTYPES[self.dtype])
            if self.last and t.dim() == 4:
                t = t.contiguous(memory_format=torch.channels_last)
            made.append(t.requires_grad_(self.backward))
        return made


def _pool(name, stock, shape, least=(1.6, 2.0)) -> Iterator[Row]:
    import fastnn.nn.functional as ours

    def of(function, args):
        return lambda x: function(x, *args)

    kind, args = stock
    call, theirs = of(getattr(ours, kind), args), of(getattr(F, kind), args)
    for dtype in ("bf16", "fp32"):
        for last in (True, False):
            layout = "channels_last" if last else "nchw"
            yield Row(
                f"pool {name} {dtype} {layout}",
                dtype,
                (shape,),
                call,
                {"torch": theirs},
                last=last,
                least=least,
            )


def _conv_flops(x, w, stride, padding):
    height, width = ((x[i] + 2 * padding - w[i]) // stride + 1 for i in (2, 3))
    return 2.0 * x[0] * height * width * math.prod(w)


def _conv(
    name, x, w, *, stride=1, padding=0, groups=1, kind="conv2d", least=None, dtypes=("bf16",)
) -> Iterator[Row]:
    import fastnn.nn.functional as ours

    options = {"stride": stride, "padding": padding, "groups": groups}

    def stock(x, w, b):
        y = F.conv2d(x, w, b, **options)
        if kind != "conv2d":
            y = torch.relu(y)
        return F.max_pool2d(y, 2) if kind.endswith("pool2d") else y

    def mine(x, w, b):
        return getattr(ours, kind)(x, w, b, **options)

    for dtype in dtypes:
        shapes = (x, w, w[:1])
        yield Row(
            f"{kind} {name} {dtype}",
            dtype,
            shapes,
            mine,
            {"torch": stock, "torch nchw": _in_nchw(stock)},
            _conv_flops(x, w, stride, padding),
            least=(least, None),
        )


def _in_nchw(function: Call) -> Call:
    """The same on images in torch's default layout, which are made outside of the time."""
    function_of = lambda *tensors: function(*tensors)  # noqa: E731
    function_of.nchw = True
    return function_of


def _linear(rows, width, features, op="linear_relu", dtype="bf16", least=1.0) -> Iterator[Row]:
    import fastnn.nn.functional as ours

    def addmm(x, w, b):
        y = torch.addmm(b, x, w.t())
        return torch.relu(y) if op == "linear_relu" else y

    stock = {"torch": addmm}
    if op == "linear_relu":
        stock["cublaslt"] = lambda x, w, b: torch._addmm_activation(b, x, w.t())
    shapes = (rows, width), (features, width), (features,)
    flops = 2.0 * rows * width * features
    yield Row(
        f"{op} {rows}x{width}x{features} {dtype}",
        dtype,
        shapes,
        getattr(ours, op),
        stock,
        flops,
        least=(least, None),
    )


def _attention(heads, length, width, causal, batch=1, dtype="bf16", least=1.0) -> Iterator[Row]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import fastnn.nn.functional as ours

    def by(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return call

    stock = {
        name: by(getattr(SDPBackend, f"{name.upper()}_ATTENTION")) for name in ("cudnn", "flash", "efficient")
    }
    stock["default"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    shape = (batch, heads, length, width)
    flops = 4.0 * batch * heads * length * length * width / (2 if causal else 1)
    yield Row(
        f"attention {batch}x{heads}x{length}x{width}{' causal' if causal else ''} {dtype}",
        dtype,
        (shape,) * 3,
        lambda q, k, v: ours.scaled_dot_product_attention(q, k, v, is_causal=causal),
        stock,
        flops,
        last=False,
        least=(least, least),
    )


def rows() -> Iterator[Row]:
    """All of them, the goals' first."""
    yield from _attention(16, 8192, 128, False)
    yield from _attention(16, 8192, 128, True)
    yield from _pool("max 2", ("max_pool2d", (2,)), (256, 64, 112, 112))
    yield from _pool("max 3/2", ("max_pool2d", (3, 2, 1)), (256, 64, 112, 112))
    yield from _pool("avg 2", ("avg_pool2d", (2,)), (512, 128, 56, 56))
    yield from _pool("mean", ("adaptive_avg_pool2d", (1,)), (1024, 2048, 7, 7))
    yield from _linear(4096, 1024, 4096)
    yield from _linear(8192, 4096, 4096)
    yield from _linear(8192, 4096, 4096, "linear")
    for k, c, size in ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)):
        yield from _conv(f"3x3 {c} at {size}", (128, c, size, size), (k, c, 3, 3), padding=1, least=0.95)
    yield from _conv(
        "3x3 64 at 56", (128, 64, 56, 56), (64, 64, 3, 3), padding=1, kind="conv2d_relu_max_pool2d", least=1.5
    )
    yield from _conv(
        "3x3 64 at 224",
        (16, 64, 224, 224),
        (64, 64, 3, 3),
        padding=1,
        kind="conv2d_relu_max_pool2d",
        least=1.5,
    )
    yield from _conv("stem 7x7/2", (128, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, least=1.5)
    yield from _conv("stem 3x3", (32, 3, 224, 224), (64, 3, 3, 3), padding=1, kind="conv2d_relu", least=1.5)
    yield from _conv("depthwise 3x3", (128, 144, 56, 56), (144, 1, 3, 3), padding=1, groups=144, least=1.5)
    yield from _conv(
        "depthwise 5x5/2", (128, 240, 28, 28), (240, 1, 5, 5), padding=2, stride=2, groups=240, least=1.5
    )
    yield from _conv(
        "1x1 256 to 64 at 56", (128, 256, 56, 56), (64, 256, 1, 1), kind="conv2d_relu", least=0.95
    )
    yield from _conv("1x1 512 to 2048 at 7", (128, 512, 7, 7), (2048, 512, 1, 1), least=0.95)
    yield from _conv("3x3/2 128 at 56", (128, 128, 56, 56), (128, 128, 3, 3), padding=1, stride=2, least=0.95)
    yield from _conv(
        "3x3 256 at 14",
        (128, 256, 14, 14),
        (256, 256, 3, 3),
        padding=1,
        kind="conv2d_relu",
        least=0.95,
        dtypes=("fp32", "fp16"),
    )
    yield from _attention(16, 4096, 64, False, batch=4)
    yield from _attention(16, 4096, 64, True, batch=4)
    yield from _attention(12, 512, 64, False, batch=32)
    yield from _attention(12, 197, 64, False, batch=64)
    yield from _attention(16, 2048, 128, True, batch=4, dtype="fp16")
    yield from _linear(16384, 784, 128)
    yield from _linear(4096, 1024, 4096, dtype="fp32")
    yield from _linear(4096, 1024, 4096, "linear_gelu", least=None)


# ---- one process that measures ----


def _median(call: Callable[[], object]) -> float:
    """Seconds, by the device's events, with the caches swept before each call."""
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=REPEAT_MS, return_mode="median") / 1e3


def _in_turns(calls: dict[str, Callable[[], object]], tell: Callable[[str], None]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in (1, -1):
        for name in list(calls)[::turn]:
            tell(name)
            times[name].append(_median(calls[name]))
    return {name: statistics.mean(found) for name, found in times.items()}


def _caught(call: Callable[[], object]) -> tuple[object, str | None]:
    try:
        return call(), None
    except Exception as error:
        if _is_lost():
            raise
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _moved(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def measure(
    row: Row, say: Callable[[dict], None], once: bool = False, without: frozenset[str] = frozenset()
) -> None:
    """Say what each op of a row's call took on each kernel, and what torch's ways took forward and backward; `without` some kernels."""
    from fastnn import _tune
    from fastnn.ops.core import choices, on_gpus, watch
    from fastnn.ops.core.plan import covers

    tensors = row.tensors()
    say({"row": row.name, "trying": "forward and backward"})
    seen = []

    def record(op, args, plan):
        seen.append((op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args), plan.reason))

    def both():
        with watch.watching(record, prefer_kernels=True):
            y = row.call(*tensors)
            if not row.backward:
                return y.detach(), None
            g = torch.randn_like(y)  # with its strides
            return y.detach(), torch.autograd.grad(y, tensors, g)

    (made, reason) = _caught(both)
    if reason:
        say({"row": row.name, "failed": reason})
    theirs = {}
    for name, function in row.stock.items():
        given = tensors
        if getattr(function, "nchw", False):
            given = [t.detach().contiguous().requires_grad_(row.backward) for t in tensors]
        theirs[name] = (function, given)
    if not once:
        forward, refused = {}, {}
        for name, (function, given) in theirs.items():
            run = lambda function=function, given=given: function(*(t.detach() for t in given))  # noqa: E731
            _, why = _caught(run)
            if why:
                refused[name] = why
            else:
                forward[name] = run
        backward = {}
        for name in forward if row.backward else ():
            function, given = theirs[name]
            y, why = _caught(lambda function=function, given=given: function(*given))
            g = torch.randn_like(y)
            run = lambda y=y, given=given, g=g: torch.autograd.grad(y, given, g, retain_graph=True)  # noqa: E731
            _, why = _caught(run)
            if why is None:
                backward[name] = run
        stock = _in_turns(forward, lambda name: say({"row": row.name, "trying": name}))
        stock_back = _in_turns(backward, lambda name: say({"row": row.name, "trying": f"{name} backward"}))
        say(
            {
                "row": row.name,
                "stock": stock,
                "stock_backward": stock_back,
                "refused": refused,
                "flops": row.flops,
                "least": row.least,
            }
        )
    for op, args, why_torch in seen:
        want, reason = (None, None) if once else _caught(lambda op=op, args=args: op.oracle(*args))
        calls, dropped, errors = {choices.TORCH: functools.partial(op.stock, *args)}, {}, {}
        for name in op.candidates:
            if f"{op.name}:{name}" in without or not covers(op, name, args):
                continue
            say({"row": row.name, "op": op.name, "trying": name})
            run = lambda op=op, name=name, args=args: on_gpus.call_candidate(op, name, args)  # noqa: E731
            result, failed = _caught(run)
            if failed is None and want is not None:
                failed = _tune._disagreement(result, want)
                if failed is None:
                    errors[name] = _error(result, want)
            if failed:
                dropped[name] = failed
            else:
                calls[name] = run
            del result
        del want
        if once:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            for name, run in calls.items():
                if name != choices.TORCH:
                    run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            continue
        with torch.no_grad():
            seconds = _in_turns(
                calls, lambda name, op=op: say({"row": row.name, "op": op.name, "trying": name})
            )
        say(
            {
                "row": row.name,
                "op": op.name,
                "calls": choices.call_class(args),
                "seconds": seconds,
                "dropped": dropped,
                "errors": errors,
                "torch": why_torch,
                "bytes": _moved(args),
                "bytes_made": _moved(made[0:1] if "backward" not in op.name else made[1] or ())
                if made
                else 0,
            }
        )


def _error(ours, want) -> float:
    """The largest difference over the largest value, of all results."""
    ours, want = (made if isinstance(made, tuple) else (made,) for made in (ours, want))
    worst = 0.0
    for mine, theirs in zip(ours, want, strict=False):
        if (
            theirs is not None
            and theirs.is_floating_point()
            and theirs.numel()
            and mine.shape == theirs.shape
        ):
            worst = max(
                worst,
                float((mine.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1e-6)),
            )
    return worst


def _ceilings(say: Callable[[dict], None]) -> None:
    """A large copy, and large products."""
    pair = torch.randn(2, 1 << 29, device=DEVICE)
    copied = pair.numel() * 4 / _median(lambda: pair[0].copy_(pair[1]))
    rates = {}
    for name, dtype in _DTYPES.items():
        x, w = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
        rates[name] = 2.0 * 8192**3 / _median(lambda x=x, w=w: x @ w)
    properties = torch.cuda.get_device_properties(0)
    say(
        {
            "ceilings": {"copy": copied, **rates},
            "gpu": torch.cuda.get_device_name(0),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
        }
    )


def _work(chosen: list[Row], first: int, once: bool, without: frozenset[str]) -> None:
    index = first

    def say(what):
        print(json.dumps({"index": index, **what}), flush=True)

    torch.backends.cudnn.benchmark = True
    if first == 0 and not once:
        _, failed = _caught(lambda: _ceilings(say))
        if failed:
            say({"ceilings": {}, "failed": failed})
    while index < len(chosen):
        row = chosen[index]
        try:
            measure(row, say, once, without)
        except Exception as error:
            say({"row": row.name, "failed": f"{type(error).__name__}: {error}"[:600]})
            if _is_lost():
                os._exit(1)
        torch.cuda.empty_cache()
        index += 1
    say({"done": True})


# ---- the process that watches it ----


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_rows", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--filter", action="append", default=[], help="rows whose name holds it; several are joined"
    )
    parser.add_argument(
        "--once", action="store_true", help="each kernel once, between the profiler's start and stop"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="at most (default: %(default)s)")
    parser.add_argument("--out", default="-", help="a file for the lines")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)
    parser.add_argument(
        "--without", action="append", default=[], metavar="OP:KERNEL", help="leave out a kernel of an op"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device", file=sys.stderr)
        return 1
    chosen = [r for r in rows() if not args.filter or any(f in r.name for f in args.filter)]
    if args.first is not None or args.once:
        _work(chosen, args.first or 0, args.once, frozenset(args.without))
        return 0
    with contextlib.ExitStack() as stack:
        out = sys.stdout if args.out == "-" else stack.enter_context(open(args.out, "w", encoding="utf-8"))
        command = [sys.executable, "-m", "benchmarks.gpu_rows"]
        for word in args.filter:
            command += ["--filter", word]
        return 0 if watch_rows(command, len(chosen), out, time.monotonic() + args.seconds) else 1


def watch_rows(command: list[str], count: int, out, end: float) -> bool:
    """Have a process measure the rows, and another one the rest where it hangs or dies: without the kernel that it died of, or else
    without the row. Whether all of it was measured by the first."""
    first, left_out, ok = 0, [], True
    while first < count and time.monotonic() < end:
        done, first, last = _watch([*command, "--from", str(first), *left_out], first, out, end)
        if done:
            return ok
        ok = False
        if time.monotonic() >= end:
            break
        print(json.dumps({"row": last.get("row"), "lost": last}), file=out, flush=True)
        culprit = f"{last.get('op')}:{last.get('trying')}"
        if "op" in last and "trying" in last and culprit not in left_out:
            left_out += ["--without", culprit]
        else:
            first += 1
    return False


def _watch(command: list[str], at: int, out, end: float) -> tuple[bool, int, dict]:
    """Whether a process measured all of it; else the row it was at, and its last word."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    said: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen():
        for line in process.stdout:
            said.put(line)
        said.put(None)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    last: dict = {}
    try:
        while True:
            try:
                line = said.get(timeout=max(0.0, min(PATIENCE, end - time.monotonic())))
            except queue.Empty:
                return False, at, last
            if line is None:
                return False, at, last
            if not line.startswith("{"):
                continue
            last = json.loads(line)
            at = last["index"]
            if last.get("done"):
                return True, at, last
            if "trying" not in last:
                print(line, end="", file=out, flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listener.join()
        process.stdout.close()


if __name__ == "__main__":
    raise SystemExit(main())
