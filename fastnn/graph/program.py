"""Native programs: records of kernels' calls over one planned block of memory, made once and run by one call.

``csrc/program`` holds what runs them; ``csrc/program/program.h`` says how they are described, ``records.h`` which records there are.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastnn import _library
from fastnn.graph.memory import Span
from fastnn.graph.memory import place as place_in_block

__all__ = ["ELEMENTS", "Builder", "CannotHold", "Memory", "Place", "Program", "bits_of", "run_one"]

_MAGIC, _VERSION = 0x6D6172676F727066, 1
#: The dtypes of values, by their numbers; the first four are floating-point.
ELEMENTS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)
_NUMBERS = {dtype: number for number, dtype in enumerate(ELEMENTS)}
_CODES = (
    "linear",
    "conv2d",
    "max_pool2d",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "attention",
    "layer_norm",
    "activation",
    "arithmetic",
    "copy",
    "fill",
    "softmax",
    "embedding",
)
_MOST_DIMS = 8
_CONSTANT, _INPUT, _OUTPUT, _BLOCK = range(4)


class CannotHold(Exception):
    """Why a program cannot hold a call."""


def bits_of(number: float) -> int:
    """A floating-point number as the int64 of the same bits."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor, both included."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


class Memory:
    """What values lie in: a constant, an input, or memory that records write to.

    Attributes
    ----------
    base, index : int
        As in a description; the index of what lies in the block means nothing.
    bytes : int
    first, last : int
        The records that write and read it first and last.
    """

    def __init__(self, base: int, index: int, bytes: int) -> None:
        self.base, self.index, self.bytes = base, index, bytes
        self.first, self.last = -1, -1
        self.within: Memory | None = None  # whose place it takes


class Place(NamedTuple):
    """A tensor of a program.

    Attributes
    ----------
    memory : Memory
    offset : int
        In elements.
    """

    memory: Memory
    offset: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its memory, each element once."""
        count = 1
        for size in self.sizes:
            count *= size
        if self.offset or count * self.dtype.itemsize != self.memory.bytes:
            return False
        return count == 0 or reach(self.sizes, self.strides) == count


class _Record(NamedTuple):
    code: int
    values: tuple[Place | None, ...]
    arguments: tuple[int, ...]
    results: tuple[int, ...]  # which of the values it writes
    in_place: bool  # whether the result may take the place of the first value


class Builder:
    """A program in the making: memory, and records in the order in which they run."""

    def __init__(self) -> None:
        self.constants: list[torch.Tensor] = []
        self.inputs: list[Place] = []
        self.outputs: list[Place] = []
        self.records: list[_Record] = []
        self._places: dict[int, Memory] = {}

    def constant(self, value: torch.Tensor) -> Place:
        """A tensor that the program keeps."""
        if id(value) not in self._places:
            if not value.is_cpu or value.layout is not torch.strided or value.is_neg():
                raise CannotHold("a constant that does not lie in the CPU's memory as it is")
            _check(value.dtype, value.shape, value.stride())
            size = reach(value.shape, value.stride()) * value.itemsize
            self._places[id(value)] = Memory(_CONSTANT, len(self.constants), size)
            self.constants.append(value)
        return Place(self._places[id(value)], 0, value.dtype, tuple(value.shape), tuple(value.stride()))

    def input(self, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Place:
        """A tensor that each run is handed."""
        _check(dtype, sizes, strides)
        memory = Memory(_INPUT, len(self.inputs), reach(sizes, strides) * dtype.itemsize)
        place = Place(memory, 0, dtype, sizes, strides)
        self.inputs.append(place)
        return place

    def new(self, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Place:
        """Memory for a result."""
        _check(dtype, sizes, strides)
        return Place(Memory(_BLOCK, 0, reach(sizes, strides) * dtype.itemsize), 0, dtype, sizes, strides)

    def record(
        self,
        name: str,
        values: Sequence[Place | None],
        arguments: Sequence[int] = (),
        results: Sequence[int] = (-1,),
        in_place: bool = False,
    ) -> None:
        """Add a call."""
        number = len(self.records)
        results = tuple(r % len(values) for r in results)
        for value in values:
            if value is not None:
                memory = value.memory
                memory.first = number if memory.first < 0 else memory.first
                memory.last = number
        self.records.append(
            _Record(_CODES.index(name), tuple(values), tuple(map(int, arguments)), results, in_place)
        )

    def dense(self, value: Place) -> Place:
        """The same values in the order of the dimensions: the tensor itself where it lies so."""
        strides = dense_strides(value.sizes)
        return value if lies(value, strides) else self.copied(value, strides)

    def images(self, value: Place, channels_last: bool) -> Place:
        """The same images in a layout."""
        strides = dense_strides(value.sizes, channels_last)
        return value if lies(value, strides) else self.copied(value, strides)

    def copied(self, value: Place, strides: tuple[int, ...]) -> Place:
        made = self.new(value.dtype, value.sizes, strides)
        self.record("copy", (value, made))
        return made

    def output(self, value: Place) -> int:
        """Have a run give a tensor; its number among the results.

        Raises
        ------
        CannotHold
            If it is a view of what the run is handed, or its elements share memory.
        """
        if value.memory.base in (_CONSTANT, _INPUT):
            raise CannotHold("a result that is what a run is handed")
        if any(stride == 0 for size, stride in zip(value.sizes, value.strides, strict=True) if size > 1):
            raise CannotHold("a result whose elements share memory")
        if value.memory.base == _OUTPUT or not value.is_whole:
            value = self.copied(value, value.strides)
        value.memory.base, value.memory.index = _OUTPUT, len(self.outputs)
        self.outputs.append(value)
        return len(self.outputs) - 1

    def make(self) -> Program:
        """The program."""
        return Program(self)

    # ---- what is planned once all is there ----

    def _share(self) -> None:
        """Results take the place of what dies at their record, where that is possible."""
        for number, record in enumerate(self.records):
            if not record.in_place:
                continue
            made, given = record.values[record.results[0]], record.values[0]
            old, new = _root(given.memory), made.memory
            # What is handed back has no memory of this block, and so has what is handed over.
            if old.base != _BLOCK or new.base != _BLOCK or new.first != number:
                continue
            if old is new or old.last != number or not (given.is_whole and made.is_whole):
                continue
            alike = (given.dtype, given.sizes, given.strides)
            others = [v for v in record.values if v is not None and v is not made and _root(v.memory) is old]
            if old.bytes != new.bytes or alike != (made.dtype, made.sizes, made.strides):
                continue
            if any((v.dtype, v.sizes, v.strides) != alike or v.offset for v in others):
                continue
            new.within = old
            old.last = new.last

    def _plan(self) -> tuple[dict[Memory, int], int]:
        """Offsets in the block, and its bytes."""
        self._share()
        blocks: dict[Memory, None] = {}
        for record in self.records:
            for value in record.values:
                if value is not None and value.memory.base == _BLOCK:
                    blocks[_root(value.memory)] = None
        spans = [Span(m.bytes, m.first, m.last) for m in blocks]
        offsets, total = place_in_block(spans)
        return dict(zip(blocks, offsets, strict=True)), total

    def description(self) -> list[int]:
        """As ``csrc/program/program.h`` has it."""
        offsets, total = self._plan()
        values: dict[Place, int] = {}
        encoded: list[int] = []
        for record in self.records:
            for value in record.values:
                if value is None or value in values:
                    continue
                values[value] = len(values)
                root = _root(value.memory)
                start = offsets[root] if root.base == _BLOCK else 0
                at = start + value.offset * value.dtype.itemsize
                encoded += root.base, 0 if root.base == _BLOCK else root.index, at, *_type(value)
        level = _library.ISA_LEVELS.index(_library.current_isa())
        counts = (
            len(self.constants),
            len(self.inputs),
            len(self.outputs),
            len(values),
            len(self.records),
        )
        out = [_MAGIC, _VERSION, level, total, *counts]
        for place in (*self.inputs, *self.outputs):
            out += _type(place)
        out += encoded
        for record in self.records:
            numbers = [-1 if value is None else values[value] for value in record.values]
            out += record.code, len(numbers), *numbers, len(record.arguments), *record.arguments
        return out


def _root(memory: Memory) -> Memory:
    while memory.within is not None:
        memory = memory.within
    return memory


def _type(place: Place) -> tuple[int, ...]:
    return _NUMBERS[place.dtype], len(place.sizes), *place.sizes, *place.strides


def _check(dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int]) -> None:
    if dtype not in _NUMBERS:
        raise CannotHold(f"a tensor of {dtype}")
    if len(sizes) > _MOST_DIMS:
        raise CannotHold(f"a tensor of {len(sizes)} dimensions")


def dense_strides(sizes: Sequence[int], channels_last: bool = False) -> tuple[int, ...]:
    """Strides of a new tensor."""
    strides, step = [0] * len(sizes), 1
    for d in (1, 3, 2, 0) if channels_last else reversed(range(len(sizes))):
        strides[d] = step
        step *= max(sizes[d], 1)
    return tuple(strides)


def lies(value: Place, strides: Sequence[int]) -> bool:
    """Whether a tensor's elements lie as those of the strides; dimensions of size 1 may have any."""
    if 0 in value.sizes:
        return True
    return all(a == b for a, b, n in zip(value.strides, strides, value.sizes, strict=True) if n != 1)


# The functions themselves: an overload's own call adds a frame of Python.
run_one = torch.ops.fastnn._program_run_one.default._op
_run = torch.ops.fastnn._program_run.default._op


class Program:
    """A program that can be run, by any number of threads at a time.

    Attributes
    ----------
    number : int
        By which the library knows it, as long as this object lives.
    is_single : bool
        Whether there is one input and one output: then :func:`run_one` takes the number and the input, and gives the output, or
        None for an input of another kind.
    """

    def __init__(self, builder: Builder) -> None:
        description = torch.tensor(builder.description(), dtype=torch.int64)
        self.number: int = torch.ops.fastnn._program_make(description, builder.constants)
        self.is_single = len(builder.inputs) == len(builder.outputs) == 1
        weakref.finalize(self, torch.ops.fastnn._program_drop, self.number).atexit = False

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """The outputs, new memory at each call.

        Raises
        ------
        RuntimeError
            If the inputs are not those that the program is for, or an index is outside of an embedding's table.
        """
        return _run(self.number, inputs)
