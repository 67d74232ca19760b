"""Raw calls of fastnn's ops with hostile arguments, in a process of their own: ``python fuzz_raw_ops.py FAMILY SEED FIRST COUNT``.

Tensors of any dtype, shape and layout end where a page begins that must not be touched, or begin where one ends; options are
mostly small and valid, else numbers at which arithmetic breaks. A call either raises an error of Python's, and then the op's
declaration names a reason too, or agrees with the op's stock form in float64.

What a refusal says has to hold too: that there is not enough memory only where tensors and results take much, and of a forced
algorithm what the library says of it. A call that takes long by the clock or by the processor is ended.

Call number i depends on family, seed and i alone. The process writes which call it is at, and whether in the op or in torch, to
the file named by FUZZ_STATE, so that whoever started it can tell what ended it.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import sys
from pathlib import Path

import guarded
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastnn.nn.functional  # noqa: F401  it declares the ops
from fastnn import _library
from fastnn.ops.core import activations
from fastnn.ops.core.activations import NAMES as ACTIVATIONS
from fastnn.ops.core.algorithms import covers_by
from fastnn.ops.core.op import OPS
from fastnn.ops.core.options import PackedOptions
from fastnn.ops.core.plan import why_unfit

# Of a call: by the clock, for a machine that is busy with other things, and by the processor.
SECONDS_PER_CALL, PROCESSOR_SECONDS_PER_CALL = 120, 30
# What a call may take beside what is loaded already. Nearly all that a call with much memory adds is time; a few have it, and
# so has the oracle.
MEMORY, MUCH_MEMORY = 1 << 26, 1 << 29
# How many times what its dense tensors hold.
MOST_SCRATCH = 16

FAMILIES = {
    "pool": ("max_pool2d", "avg_pool2d", "adaptive"),
    "conv": ("conv2d",),
    "linear": ("linear",),
    "attention": ("attention",),
    "norm": ("add_layer_norm",),
    "told": (),  # ops that are asked about a call, and that pack a weight
}
IN_OP, IN_TORCH = 0, 1
# Of the file: the call's number, where it is, and how many calls before it were answered and compared.
STATE = struct.Struct("<qqqq")
WINOGRAD = torch.ops.fastnn._conv2d_algorithms().split(",").index("winograd")

HOSTILE = [0, -1, -2, 255, 256, 257, 1000, 2**31 - 1, 2**31, 2**31 + 1, 2**62, 2**63 - 1, -(2**63)]
HOSTILE += [-(2**31), 2**30, 2**24 + 1, 2**16, 2**32, 2**40]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int32, torch.uint8, torch.bool, torch.int64)
LEVELS = _library.ISA_LEVELS[: _library.ISA_LEVELS.index(_library.detected_isa()) + 1]


def names(family):
    return [name for name, op in sorted(OPS.items()) if op.on_cpu and name.startswith(FAMILIES[family])]


class Wrong(Exception):
    """An answer that is not stock's, or a refusal that the declaration does not name."""


def statm(field):
    """Bytes of the process: 0 for what it has mapped, 1 for what is resident."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def out_of_memory(error):
    """Whether that is what an error is about; others name memory formats."""
    text = str(error)
    return any(t in text for t in ("allocate", "bad_alloc", "not enough memory", "could not create a"))


def may_take(memory):
    """Bounds the memory of what comes, beside what is there."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (statm(0) + memory, most))


class Call:
    """One call: `args` as the overload takes them, and `full` as the schema has them, without algorithms."""

    def __init__(self, family, seed, number):
        self.rng = random.Random(f"{family} {seed} {number}")
        self.hostile = self.rng.choice((0.0, 0.0, 0.05, 0.3))
        self.memory = MUCH_MEMORY if self.rng.random() < 0.005 else MEMORY
        may_take(self.memory)
        self.comparable, self.compared = True, False
        # Whether a call that is refused needs a reason: of a backward op, where a forward pass may lead to it.
        self.led = True
        self.level = self.rng.choice(LEVELS)
        self.threads = 1 if self.rng.random() < 0.9 else 2
        _library.set_isa(self.level)
        torch.set_num_threads(self.threads)
        self.dtype = self.rng.choice(FLOATS)
        self.draw(family)

    def draw(self, family):
        self.name = self.rng.choice(names(family))
        self.full = getattr(self, family)()
        self.overload, self.args, self.algorithms = "raw", self.full, []
        packet = getattr(torch.ops.fastnn, self.name)
        tensors = sum("Tensor" in str(a.type) for a in packet.raw._schema.arguments)
        kind = self.rng.random()
        if kind < 0.2:
            self.overload = "default"
            return
        if kind < 0.4 and "packed" in packet.overloads():
            self.pack(packet, tensors)
        count = len(packet.raw._schema.arguments) - len(packet.default._schema.arguments)
        if count and self.rng.random() < 0.3:
            self.force([self.rng.choice((*range(8), *HOSTILE)) for _ in range(count)])

    def force(self, algorithms):
        """By number, as often as not of algorithms that do not cover the call, or of none."""
        if self.overload == "raw":
            self.args = [*self.args, *algorithms]
        else:
            algorithms = [a & 7 for a in algorithms]
            first = len(self.args) - self.words
            self.args[first] += sum(a << 56 + 4 * i for i, a in enumerate(algorithms))
        self.algorithms = algorithms

    def pack(self, packet, tensors):
        """Options as the overload `packed` takes them, or numbers that nobody packed."""
        arguments = packet.default._schema.arguments[tensors:]
        optional = [str(a.type) == "Optional[int]" for a in arguments]
        numbers = PackedOptions(optional)[tuple(self.full[tensors:])]
        if numbers is None or self.rng.random() < self.hostile:
            count = -(-len(arguments) // 7)
            numbers = [
                self.rng.choice([*HOSTILE, self.rng.getrandbits(55)]) & 2**56 - 1 for _ in range(count)
            ]
            # Places are those of other windows.
            self.comparable &= not self.name.startswith("max_pool2d") or "backward" not in self.name
            self.led &= "backward" not in self.name
        options = [numbers[i // 7] >> i % 7 * 8 & 255 for i in range(len(arguments))]
        for i, a in enumerate(arguments):
            if str(a.type) == "bool":
                options[i] = bool(options[i])
            elif optional[i]:
                options[i] = options[i] or None
        self.overload, self.words = "packed", len(numbers)
        self.args = [*self.full[:tensors], *numbers]
        self.full = [*self.full[:tensors], *options]

    # ---- what calls are made of ----

    def odd(self, factor=1.0):
        return self.rng.random() < self.hostile * factor

    def option(self, low, high):
        return self.rng.choice(HOSTILE) if self.odd(0.5) else self.rng.randint(low, high)

    def pair(self, low, high):
        return [self.option(low, high), self.option(low, high)]

    def flag(self):
        return self.rng.random() < 0.5

    def size(self, most=9):
        if self.odd(0.1):
            return self.rng.choice((0, 1, 33, 100))
        return self.rng.randint(1, most)

    def shape(self, *sizes):
        if self.odd(0.1):
            sizes = [self.size() for _ in range(self.rng.randint(0, 5))]
        return tuple(max(0, s) for s in sizes)

    def tensor(self, *sizes, dtype=None, values=None):
        """Small whole numbers, whose sums are exact, in any layout."""
        shape = self.shape(*sizes)
        dtype = dtype or self.dtype
        if self.odd(0.1):
            dtype = self.rng.choice(FLOATS + OTHERS)
        order = list(range(len(shape)))
        layout = self.rng.random()
        if layout < 0.3 and len(shape) == 4:
            order = [0, 2, 3, 1]
        elif layout < 0.45:
            self.rng.shuffle(order)
        step = 2 if self.rng.random() < 0.1 else 1
        strides = [0] * len(shape)
        for d in reversed(order):
            strides[d] = step
            step *= max(shape[d], 1)
        if shape and self.rng.random() < 0.05:
            strides[self.rng.randrange(len(shape))] = 0
        if self.rng.random() < 0.02 and self.hostile:
            # More than any memory, by strides of 0; or none, of so many rows of nothing.
            shape = [0 if self.rng.random() < 0.1 else n for n in shape]
            for d in self.rng.sample(range(len(shape)), min(2, len(shape))):
                shape[d] = self.rng.choice((2**20, 2**24))
            strides = [0] * len(shape)
        out = self.guarded(shape, strides, dtype)
        if out.numel():
            flat = self.flat(out)
            low, high = values or (0 if dtype in (torch.uint8, torch.bool) else -3, 4)
            flat.copy_(torch.randint(low, high, flat.shape, generator=self.generator()))
        return out

    def scramble(self, t):
        self.flat(t).random_(generator=self.generator())

    def flat(self, t):
        """The memory of a tensor, of which several elements may be one."""
        return t.as_strided((self.span(t.shape, t.stride()),), (1,))

    def generator(self):
        return torch.Generator().manual_seed(self.rng.getrandbits(31))

    @staticmethod
    def span(shape, strides):
        return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))

    def guarded(self, shape, strides, dtype):
        span = self.span(shape, strides)
        if span == 0:
            return torch.empty(shape, dtype=dtype)
        bytes = guarded.memory(span * dtype.itemsize, at_end=self.rng.random() < 0.7)
        return torch.frombuffer(bytes, dtype=dtype).as_strided(shape, strides)

    def gradient(self, made):
        """Of what a forward pass made, or of what stands in for it."""
        grad = self.tensor(*made.shape)
        self.led &= grad.shape == made.shape
        return grad

    def placed(self, t):
        """A copy in guarded memory."""
        if t.numel() > 1 << 24:
            return t
        t = t.clone()
        out = self.guarded(t.shape, t.stride(), t.dtype)
        return out.copy_(t)

    # ---- the families ----

    def pool(self):
        x = self.tensor(self.size(3), self.size(20), self.size(14), self.size(40))
        if self.rng.random() < 0.1 and x.is_floating_point() and x.dim() and 0 not in x.stride():
            x[..., -1:] = float("nan")
        kernel, stride = self.pair(1, 4), self.pair(1, 4)
        padding = [self.option(0, max(0, min(k, 8) // 2)) for k in kernel]
        dilation, ceil_mode = self.pair(1, 2), self.flag()
        window = (*kernel, *stride, *padding, *dilation, ceil_mode)
        average = (*kernel, *stride, *padding, ceil_mode, self.flag())
        average += (None if self.flag() else self.option(-3, 9),)
        outputs = self.pair(1, 9)
        if self.name.startswith("adaptive"):
            if "backward" not in self.name:
                return [x, *outputs]
            grad = self.tensor(*x.shape[:2], *[min(o, 50) for o in outputs])
            self.led = False
            return [grad, *self.sizes(x), self.flag()]
        if "backward" not in self.name:
            return [x, *(average if self.name.startswith("avg") else window)]
        options = average if self.name.startswith("avg") else window
        if self.name.startswith("avg"):
            forward = torch.ops.fastnn.avg_pool2d.raw
        elif "indices" in self.name:
            forward = torch.ops.fastnn.max_pool2d_with_indices.raw
        else:
            forward = torch.ops.fastnn.max_pool2d_with_locations.raw
        try:
            made = forward(x, *options)
        except Exception:
            self.led = False
            self.comparable = self.name.startswith("avg")  # places may be any numbers
            made = [self.tensor(2, 3, 4, 5), self.tensor(2, 3, 4, 5, dtype=torch.uint8)]
        made = [made] if isinstance(made, torch.Tensor) else list(made)
        grad = self.gradient(made[0])
        if self.name.startswith("avg"):
            return [grad, *self.sizes(x), *options, self.flag()]
        places = self.placed(made[1])
        if self.odd(0.5):
            # What no forward pass wrote: nothing to compare with, but nothing may be touched that is not there.
            self.comparable = False
            self.scramble(places)
        if x.dim() != 4 or made[0].numel() == 0:
            self.comparable = False
        elif torch.isnan(x.float()).any() or places.dtype is not torch.uint8:
            pass
        sizes = self.sizes(x)
        if sizes != list(x.shape[2:4]):
            self.comparable = False
        # A window that holds no element has its place outside of the image.
        self.comparable &= all(p == 0 for p in padding) or all(d == 1 for d in dilation)
        return [grad, places, *sizes, *options]

    def sizes(self, x):
        if x.dim() == 4 and not self.odd():
            return list(x.shape[2:4])
        self.led = False
        return self.pair(1, 30)

    def conv(self):
        groups = self.rng.choice((1, 1, 1, 2, 3))
        channels = self.rng.choice((self.size(5), self.size(40)))
        outputs = self.rng.choice((self.size(5), self.size(40)))
        kernel = [self.size(3), self.size(3)]
        x = self.tensor(self.size(3), channels * groups, self.size(12) + 2, self.size(20) + 2)
        w = self.tensor(outputs * groups, channels, *kernel)
        b = None if self.flag() else self.tensor(outputs * groups)
        options = [*self.pair(1, 3), *self.pair(0, 2), *self.pair(1, 2), self.option(groups, groups)]
        pool = [*self.pair(1, 3), *self.pair(1, 3), *self.pair(0, 0)]
        if "pool" in self.name:
            # Millions of rows of padding between the two are minutes of work, and no memory that a limit would refuse.
            options[2:4] = [1 if 1000 < p < 2**31 else p for p in options[2:4]]
        wanted = [self.flag() for _ in range(3)]
        if "winograd" in self.name and not self.odd():
            x, w = self.tensor(2, channels, 9, 11, dtype=torch.float32), None
            w = self.tensor(outputs, channels, 3, 3, dtype=torch.float32)
            b = None if b is None else self.tensor(outputs, dtype=torch.float32)
            options = [1, 1, *self.pair(0, 2), 1, 1, 1]
        out = {
            "conv2d": (x, w, b, *options),
            "conv2d_relu": (x, w, b, *options),
            "conv2d_winograd": (x, w, b, *options, self.flag()),
            "conv2d_relu_max_pool2d": (x, w, b, *options, *pool),
        }
        if self.name in out:
            return list(out[self.name])
        pooled, activation = "pool" in self.name, self.option(0, len(ACTIVATIONS) - 1)
        if pooled and self.name.endswith("packed"):
            return [x, w, b, self.packed(w, groups), *options, *pool]
        if self.name in ("conv2d_activation", "conv2d_packed"):
            packed = [self.packed(w, groups)] if "packed" in self.name else []
            shape = self.shape_of(lambda: torch.ops.fastnn.conv2d.raw(x, w, None, *options))
            return [x, w, b, self.beside(shape), *packed, *options, activation]
        try:
            forward = torch.ops.fastnn.conv2d_relu_max_pool2d if pooled else torch.ops.fastnn.conv2d_relu
            made = forward.raw(x, w, None, *options, *(pool if pooled else ()))
        except Exception:
            self.led = False
            made = (self.tensor(2, 3, 4, 5), self.tensor(2, 3, 4, 5, dtype=torch.uint8))
            made = made if pooled else made[0]
        y = made[0] if pooled else made
        grad = self.gradient(y)
        middle = []
        if pooled:
            middle = [self.placed(made[1])]
            if self.odd(0.5):
                self.comparable = False
                self.scramble(middle[0])
        elif "relu" in self.name or "activation" in self.name:
            middle = [self.placed(self.behind(y, activation) if "activation" in self.name else y)]
        behind = [activation, self.flag()] if "activation" in self.name else []
        return [grad, x, w, *middle, *options, *(pool if pooled else ()), *behind, *wanted]

    def shape_of(self, call):
        """The sizes of what a call gives; some sizes if it is refused."""
        try:
            return tuple(call().shape)
        except Exception:
            return (2, 3, 4, 5)

    def behind(self, y, activation):
        """What an activation makes of a tensor: its derivative is told by that."""
        known = y.is_floating_point() and 0 <= activation < len(ACTIVATIONS)
        return activations.activated(y, activation) if known else y

    def beside(self, shape):
        """A residual for an output of a shape, or none."""
        return None if self.flag() else self.tensor(*shape)

    def packed(self, w, groups):
        try:
            if self.flag():
                _library.set_isa(self.rng.choice(LEVELS))
            packed = torch.ops.fastnn._pack_weight(w, groups)
        except Exception:
            packed = torch.zeros(self.rng.choice((0, 1, 63, 64, 65, 1000)), dtype=torch.uint8)
        finally:
            _library.set_isa(self.level)
        packed = packed.clone()
        if self.odd() and packed.numel():
            kind = self.rng.randrange(4)
            if kind == 0:
                packed = packed[: self.rng.randrange(packed.numel() + 1)]
            elif kind == 1:
                packed[self.rng.randrange(min(64, packed.numel()))] ^= 1 << self.rng.randrange(8)
            elif kind == 2:
                packed = torch.cat([packed, packed])
            else:
                self.scramble(packed[:64])
        return self.placed(packed.contiguous())

    def linear(self):
        features, outputs = self.size(self.rng.choice((5, 70))), self.size(self.rng.choice((5, 70)))
        leading = [self.size(self.rng.choice((3, 40))) for _ in range(self.rng.randint(0, 2))]
        x, w = self.tensor(*leading, features), self.tensor(outputs, features)
        b = None if self.flag() else self.tensor(outputs)
        activation = self.option(0, len(ACTIVATIONS) - 1)
        if self.name in ("linear_activation", "linear_packed"):
            packed = [self.packed(w, 1)] if "packed" in self.name else []
            return [x, w, b, self.beside((*leading, outputs)), *packed, activation]
        if "backward" not in self.name:
            return [x, w, b]
        grad = self.tensor(*leading, outputs)
        y = [self.tensor(*leading, outputs)] if "relu" in self.name or "activation" in self.name else []
        if "activation" in self.name:
            y = [self.placed(self.behind(y[0], activation))]
        behind = [activation, self.flag()] if "activation" in self.name else []
        return [grad, x, w, *y, *behind, *[self.flag() for _ in range(3)]]

    def norm(self):
        leading, width = [self.size(9) for _ in range(self.rng.randint(0, 2))], self.size(70)
        x, r = self.tensor(*leading, width), self.tensor(*leading, width)
        w, b = (None if self.flag() else self.tensor(width) for _ in range(2))
        if "backward" not in self.name:
            eps = self.rng.choice((float("nan"), -1.0, float("inf"))) if self.odd() else 1e-5
            return [x, r, w, b, eps, self.flag(), self.flag()]
        try:
            _, total, mean, rstd = torch.ops.fastnn.add_layer_norm.raw(x, r, None, None, 1e-5, True, True)
        except Exception:
            self.led = False
            total, mean, rstd = self.tensor(3, 4), self.tensor(3), self.tensor(3)
        grad = self.gradient(total)
        grad_sum = None if self.flag() else self.tensor(*x.shape)
        kept = [self.placed(t) for t in (total, mean, rstd)]
        return [grad, *kept, grad_sum, w, *[self.flag() for _ in range(3)]]

    def attention(self):
        batch, key_heads = self.size(2), self.size(3)
        heads = key_heads * self.rng.choice((1, 1, 2))
        queries, keys, width = self.size(self.rng.choice((4, 40))), self.size(40), self.size(40)
        value_width = width if self.flag() else self.size(72)
        q = self.tensor(batch, heads, queries, width, values=(-1, 2))
        k = self.tensor(batch, key_heads, keys, width, values=(-1, 2))
        v = self.tensor(batch, key_heads, keys, value_width)
        mask, kind = None, self.rng.random()
        if kind < 0.4:
            full = [self.rng.choice((1, n)) for n in (batch, heads)] + [queries, keys]
            full = full[self.rng.randint(0, 2) :]
            mask = self.tensor(*full, dtype=torch.bool if self.flag() else None)
            if mask.dtype is torch.bool and mask.numel() and mask.dim() and 0 not in mask.stride():
                mask[..., 0] = True
        causal = self.rng.random() < 0.3 and (mask is None or self.odd())
        scale = None if self.flag() else self.rng.choice((0.5, 0.0, -0.3))
        if self.odd():
            scale = self.rng.choice((float("nan"), float("inf"), 1e308, -float("inf")))
            self.comparable = False
        if "backward" not in self.name:
            return [q, k, v, mask, causal, scale]
        try:
            y, statistics = torch.ops.fastnn.attention.raw(q, k, v, mask, causal, scale)
        except Exception:
            self.led = False
            y, statistics = self.tensor(2, 3, 4, 5), self.tensor(2, 3, 4, 2)
        grad = self.gradient(y)
        return [grad, q, k, v, mask, self.placed(y), self.placed(statistics), causal, scale]

    # ---- what may come of them ----

    def __str__(self):
        def text(a):
            if not isinstance(a, torch.Tensor):
                return repr(a)
            return f"{str(a.dtype)[6:]}{list(a.shape)}/{list(a.stride())}"

        args = ", ".join(text(a) for a in self.args)
        return f"{self.name}.{self.overload}({args}) at {self.level}, {self.threads} threads"

    def reason(self):
        """Why the declaration leaves the call to torch, or None."""
        op = OPS[self.name]
        return why_unfit(op, self.full) or op.unsupported(*self.full)

    def covered(self):
        """Whether the forced algorithms, if any, are said to cover the call; None of an op that says nothing of its own."""
        numbers, algorithms = self.algorithms, OPS[self.name].algorithms
        if not any(numbers):
            return True
        if algorithms is None:
            return None
        if not all(0 <= n < len(algorithms.names) for n in numbers):
            return False
        masks = [result.covering(*self.full) for result in algorithms.results]
        return all(map(covers_by, masks, numbers))

    def needed(self):
        """Bytes that dense inputs and the results take; infinity where there are no such results."""
        try:
            meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in self.full]
            made = OPS[self.name].fake(*meta)
        except Exception:
            return float("inf")
        made = [made] if isinstance(made, torch.Tensor) else made
        tensors = [t for t in (*meta, *made) if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def run(self, state):
        overload = getattr(getattr(torch.ops.fastnn, self.name), self.overload)
        try:
            out = overload(*self.args)
        except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
            state(IN_TORCH)
            text = str(error)
            if out_of_memory(error):
                if self.needed() < self.memory / MOST_SCRATCH:
                    raise Wrong(f"more memory than such a call needs: {text}") from error
                return False
            if "more than" in text or "overflow" in text.lower():
                return False
            try:
                reason, covered = self.reason(), self.covered()
            except Exception:
                return False
            if covered is None:
                covered = "algorithm" not in text
            if reason is None and covered and self.led:
                raise Wrong(f"refused, and the declaration has no reason: {text}") from error
            return False
        state(IN_TORCH)
        may_take(MUCH_MEMORY)
        reason = self.reason()
        if reason is not None:
            raise Wrong(f"taken, though the declaration says: {reason}")
        if self.covered() is False:
            raise Wrong("taken, by an algorithm that does not cover it")
        if self.comparable:
            try:
                self.compared = self.compare(out)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        return True

    def compare(self, out):
        """Whether the oracle, which takes more memory, had enough."""

        def exact(a):
            # Dense: torch refuses some layouts of gradients.
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                return a.detach().double().contiguous()
            return a

        try:
            # torch's other path makes NaN of a negative scale with is_causal.
            with sdpa_kernel(SDPBackend.MATH):
                want = OPS[self.name].stock(*[exact(a) for a in self.full])
        except Exception as error:
            if out_of_memory(error):
                return False
            raise Wrong(f"taken, though torch raises {type(error).__name__}: {error}") from error
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        want = [want] if isinstance(want, torch.Tensor) else list(want)
        dtype = next(a for a in self.full if isinstance(a, torch.Tensor)).dtype
        for i, (ours, theirs) in enumerate(zip(out, want, strict=True)):
            if theirs is None or not (ours.numel() or theirs.numel()):
                continue
            if self.name == "add_layer_norm" and not ours.numel():
                continue  # not asked for
            if not ours.is_floating_point():
                if ours.dtype is torch.int64 and not torch.equal(ours, theirs):
                    raise Wrong(f"result {i}: other indices")
                continue
            if ours.shape != theirs.shape:
                raise Wrong(f"result {i}: shape {list(ours.shape)}, stock's {list(theirs.shape)}")
            if ours.dtype not in FLOATS:
                continue
            ours, theirs = ours.double(), theirs.double()
            finite = torch.isfinite(theirs)
            if not torch.equal(torch.isnan(ours), torch.isnan(theirs)):
                raise Wrong(f"result {i}: NaN elsewhere")
            if not finite.any():
                continue
            scale = theirs[finite].abs().max().item() + 1 + self.cancelled(dtype)
            error = (ours - theirs)[finite].abs().max().item()
            if not error <= self.tolerance(dtype) * scale:
                raise Wrong(f"result {i}: off by {error:.3g} where values are up to {scale:.3g}")
        return True

    def cancelled(self, dtype):
        """How large the numbers are that may cancel to nothing."""
        if self.name != "attention_backward" or dtype.itemsize < 4:
            return 0
        # The gradients of a query's scores, less their mean.
        grad, _, _, value = self.full[:4]
        return (grad.abs().max() * value.abs().max()).item() * value.shape[-1] ** 0.5

    def tolerance(self, dtype):
        eps = torch.finfo(dtype).eps
        if self.name.startswith(("attention", "add_layer_norm")) or "gelu" in self.name:
            return 64 * eps if dtype.itemsize >= 4 else 16 * eps
        if "winograd" in self.name or (self.name.startswith("conv2d") and WINOGRAD in self.algorithms):
            return 256 * eps
        return 8 * eps if dtype.itemsize >= 4 else 2 * eps


QUESTIONS = [
    f"_{call}_{asked}"
    for call in ("conv2d", "conv2d_backward", "linear", "linear_backward", "attention")
    for asked in ("covering", "automatic")
]


class Question(Call):
    """Of an op that is told a call in numbers, or that packs a weight."""

    def draw(self, family):
        self.overload, self.name = "default", self.rng.choice((*QUESTIONS, "_pack_weight"))
        if self.name == "_pack_weight":
            sizes = [self.size(40), self.size(40), self.size(3), self.size(3)]
            self.args = [self.tensor(*sizes[: self.rng.choice((2, 4))]), self.option(1, 3)]
            return
        if "conv" in self.name:
            sizes = [self.flag(), self.flag(), self.numbers(16), self.numbers(self.rng.choice((0, 8)))]
        elif "linear" in self.name:
            sizes = [*self.numbers(3, False), *([self.flag()] if self.name == "_linear_automatic" else ())]
        else:
            sizes = [self.numbers(7)]
        self.args = [self.option(0, 3), *sizes]

    def numbers(self, count, of_any_count=True):
        if of_any_count and self.odd(0.1):
            count = self.rng.randint(0, 20)
        most = self.rng.choice((9, 300, 2**31, 2**56))
        return [self.option(self.rng.randint(0, 1), most) for _ in range(count)]

    def run(self, state):
        ops = torch.ops.fastnn
        try:
            out = getattr(ops, self.name)(*self.args)
        except RuntimeError:
            return False
        finally:
            state(IN_TORCH)
        if self.name == "_pack_weight":
            return out.dtype is torch.uint8 and out.dim() == 1
        args = self.args[: 4 if "linear" in self.name else None]
        masks = getattr(ops, self.name.replace("automatic", "covering"))(*args)
        names = getattr(ops, f"_{self.name.split('_')[1]}_algorithms")().split(",")
        # Both gradients of a convolution have one mask.
        masks, out = (answer if type(answer) is tuple else (answer,) for answer in (masks, out))
        for mask, answer in zip(masks * (len(out) // len(masks)), out, strict=True):
            if not mask & 1 or mask >> len(names):
                raise Wrong(f"covered by {mask:#x} of {len(names)} algorithms")
            if "automatic" in self.name and not covers_by(mask, answer):
                raise Wrong(f"{answer} does not cover it, but {mask:#x} do")
        return True


def made(family, seed, number):
    return (Question if family == "told" else Call)(family, seed, number)


def bound_time():
    """From now on; by signals that end the process."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CALL)
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS_PER_CALL)


def main(family, seed, first, count):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    state_file = open(os.environ["FUZZ_STATE"], "r+b", buffering=0)
    answered = compared = 0
    loaded = statm(1)
    for number in range(first, first + count):

        def state(where, number=number, answered=answered, compared=compared):
            os.pwrite(state_file.fileno(), STATE.pack(number, where, answered, compared), 0)

        state(IN_OP)
        bound_time()
        try:
            call = made(family, seed, number)
        except (OSError, RuntimeError) as error:
            if not (out_of_memory(error) or "numel: integer multiplication overflow" in str(error)):
                raise
            continue  # its own tensors are too large
        try:
            answered += call.run(state)
            compared += call.compared
        except Wrong as wrong:
            print(f"{call}: {wrong}", flush=True)
            sys.exit(3)
        del call
    state(IN_TORCH, answered=answered, compared=compared)
    more = statm(1) - loaded
    if more > MUCH_MEMORY / 2:
        print(f"{more >> 20} MiB resident that were not there {count} calls ago", flush=True)
        sys.exit(3)


if __name__ == "__main__":
    if sys.argv[1] == "describe":
        bound_time()  # a forward pass may be what did not end
        print(made(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
