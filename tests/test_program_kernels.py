"""The kernels that programs alone call, without torch, at every level this machine can run, under sanitizers too."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from kernel_module import ACTIVATIONS, DTYPES, EPS, behind, kernels
from numpy.lib.stride_tricks import as_strided

EVERY_LEVEL = pytest.mark.parametrize("level", kernels.levels())
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)

# Widths around vectors of 4, 8 and 16 numbers.
WIDTHS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63]
# Loops, and the steps of the output, of a and of b, in elements: what lies side by side, what is repeated, what is apart.
WALKS = [
    *(((n,), (1,), (1,), (1,)) for n in WIDTHS),
    ((19,), (1,), (1,), (0,)),
    ((37,), (1,), (0,), (1,)),
    ((35,), (1,), (0,), (0,)),
    ((5, 19), (19, 1), (19, 1), (0, 1)),  # a row
    ((5, 33), (33, 1), (33, 1), (1, 0)),  # a column
    ((6, 7), (7, 1), (0, 1), (1, 0)),  # a row and a column
    ((4, 21), (21, 1), (1, 4), (21, 1)),  # transposed
    ((3, 18), (40, 2), (60, 3), (18, 1)),  # apart
    ((3, 18), (20, 1), (23, 1), (1, 3)),  # rows apart
    ((2, 3, 4, 5), (60, 20, 5, 1), (20, 0, 5, 1), (1, 2, 6, 24)),
    (
        (2, 1, 2, 1, 2, 1, 1, 3),
        (12, 9, 6, 9, 3, 9, 9, 1),
        (1, 5, 2, 5, 4, 5, 5, 8),
        (0,) * 8,
    ),  # all the loops
    ((1, 1), (1, 1), (1, 1), (1, 1)),
    ((2, 8201), (8201, 1), (8201, 1), (0, 1)),  # several pieces and workers
    ((0,), (1,), (1,), (1,)),
    ((3, 0), (0, 1), (0, 1), (0, 1)),
]
OPS = [operator.add, operator.sub, operator.mul, operator.truediv, lambda a, b: b - a]
SPECIAL = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e38, -6e4]


def span(sizes, steps):
    """How many elements there are from the first to the last."""
    return 0 if 0 in sizes else 1 + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))


def seen(buffer, sizes, steps):
    """What a walk meets of a buffer; it may be written to."""
    return as_strided(buffer, sizes, [step * buffer.itemsize for step in steps])


def numbers(rng, count, kind):
    """Normal ones, and a few that are special, as those of one width meet those of another."""
    out = rng.standard_normal(count)
    places = rng.integers(0, max(count, 1), count // 3)
    out[places] = rng.choice(SPECIAL, len(places))
    with np.errstate(over="ignore"):
        return out.astype(kind)


def poisoned(count, kind):
    """An output whose elements show if they are not written, or may not be."""
    return np.frombuffer(np.full(count * np.dtype(kind).itemsize, 0x5A, np.uint8), kind).copy()


def same(ours, want):
    """Equal to the sign of a zero; of NaN only that it is one."""
    a, b = ours.astype(np.float64), want.astype(np.float64)
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(
        np.signbit(a) & (a == 0), np.signbit(b) & (b == 0)
    )


def untouched(buffer, sizes, steps):
    """Whether what a walk does not meet is still poison."""
    rest = np.ones(len(buffer), bool)
    if len(buffer):
        seen(rest, sizes, steps)[...] = False
    return buffer[rest].tobytes() == poisoned(rest.sum(), buffer.dtype).tobytes()


@pytest.mark.parametrize("walk", WALKS, ids=str)
@EVERY_DTYPE
@EVERY_LEVEL
def test_arithmetic(level, dtype, walk):
    sizes, *steps = walk
    rng = np.random.default_rng(sum(sizes))
    kind, sums = DTYPES[dtype], np.float64 if dtype == "float64" else np.float32
    a, b = (numbers(rng, span(sizes, s), kind) for s in steps[1:])
    number = 0.3
    for op, function in enumerate(OPS):
        for second in (b, None):
            x = seen(a, sizes, steps[1]).astype(np.float64)
            y = (
                sums(number).astype(np.float64)
                if second is None
                else seen(b, sizes, steps[2]).astype(np.float64)
            )
            with np.errstate(all="ignore"):
                want = function(x, y).astype(sums).astype(kind)  # rounded to 53 bits, to 24 is once
            results = []
            for threads in (1, 3):
                out = poisoned(span(sizes, steps[0]), kind)
                kernels.arithmetic(level, threads, op, sizes, steps, a, second, number, out)
                assert same(seen(out, sizes, steps[0]), want)
                assert untouched(out, sizes, steps[0])
                results.append(out.tobytes())
            assert results[0] == results[1]
            for given, s in ((a, steps[1]), (second, steps[2])):
                if given is None or s != steps[0]:
                    continue
                out = given.copy()  # the result in its place
                first, other = (out, second) if given is a else (a, out)
                kernels.arithmetic(level, 1, op, sizes, steps, first, other, number, out)
                assert same(seen(out, sizes, steps[0]), want)


@pytest.mark.parametrize("walk", [*WALKS[:13:2], *WALKS[19:]], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@EVERY_DTYPE
@EVERY_LEVEL
def test_activation(level, dtype, name, walk):
    sizes, *steps = walk[:3]
    rng = np.random.default_rng(sum(sizes))
    kind = DTYPES[dtype]
    x = (3 * rng.standard_normal(span(sizes, steps[1]))).astype(kind)
    nan = np.zeros(x.shape, bool)
    nan[4::5] = True
    x[nan] = np.nan
    x64 = seen(x, sizes, steps[1]).astype(np.float64)
    known = np.where(np.isnan(x64), 0, x64)
    if name == "gelu" and 0 in sizes:
        want, allowed = known, known
    else:
        want, allowed = behind(name, known, None, dtype, 2**-24 if dtype == "float16" else 2**-126)
    results = []
    for threads in (1, 3):
        out = poisoned(span(sizes, steps[0]), kind)
        kernels.activation(level, threads, name, sizes, steps, x, out)
        found = seen(out, sizes, steps[0]).astype(np.float64)
        assert np.array_equal(np.isnan(found), np.isnan(x64))
        assert np.all((np.abs(found - want) <= allowed) | np.isnan(x64))
        assert untouched(out, sizes, steps[0])
        results.append(out.tobytes())
    assert results[0] == results[1]
    if steps[0] == steps[1]:
        kernels.activation(level, 1, name, sizes, steps, x, x)
        assert x.tobytes() == results[0]


@EVERY_DTYPE
@EVERY_LEVEL
def test_activations_of_infinities(level, dtype):
    x = np.tile(np.array([np.inf, -np.inf], DTYPES[dtype]), 10)
    bounded = {"relu": (np.inf, 0), "relu6": (6, 0), "sigmoid": (1, 0), "tanh": (1, -1)}
    for name in ACTIVATIONS:
        out = poisoned(20, x.dtype)
        kernels.activation(level, 1, name, (20,), [(1,), (1,)], x, out)
        high, low = bounded.get(name, (np.inf, None))
        assert np.all(out[::2] == high), name
        assert low is None or np.all(out[1::2] == low), name


# Loops, and the steps of the target and of the source.
COPIES = [
    *(((n,), (1,), (1,)) for n in (1, 7, 16, 33)),
    ((31,), (1,), (2,)),
    ((31,), (3,), (1,)),
    ((9,), (1,), (0,)),  # expanded
    ((4, 9), (9, 1), (0, 1)),
    ((4, 9), (20, 2), (1, 7)),
    *(
        ((n, columns), (columns, 1), (1, n)) for n, columns in ((2, 2), (5, 33), (17, 16), (70, 300))
    ),  # transposed
    ((70, 3), (3, 1), (1, 75)),  # pixels of three channels
    ((6, 3), (5, 1), (1, 6)),
    ((2, 19, 5), (95, 5, 1), (95, 1, 19)),  # images to channels_last
    ((19, 2, 5), (10, 5, 1), (1, 95, 19)),
    ((2, 3, 4, 5), (60, 20, 5, 1), (1, 2, 6, 24)),
    ((5, 4), (4, 1), (1, 2)),  # windows that share elements
    ((6, 5), (5, 1), (1, 1)),
    # Loops of one turn, whose steps mean nothing.
    ((1, 7), (7, 1), (1, 3)),
    ((1, 4, 1, 6), (1, 6, 6, 1), (1, 1, 1, 4)),
    ((4, 1), (1, 1), (1, 9)),
    ((2, 1, 2, 1, 2, 1, 1, 3), (12, 9, 6, 9, 3, 9, 9, 1), (1, 5, 2, 5, 4, 5, 5, 8)),
    ((2, 8201), (8201, 1), (8205, 1)),
    ((90, 120), (120, 1), (1, 91)),
    ((0,), (1,), (1,)),
    ((0, 5), (5, 1), (1, 5)),
]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
EVERY_SIZE = pytest.mark.parametrize("size", UNSIGNED, ids=lambda size: f"{size} bytes")


@pytest.mark.parametrize("walk", COPIES, ids=str)
@EVERY_SIZE
@EVERY_LEVEL
def test_copy(level, size, walk):
    sizes, *steps = walk
    rng = np.random.default_rng(sum(sizes))
    source = np.frombuffer(rng.bytes(span(sizes, steps[1]) * size), UNSIGNED[size])
    if size > 1:
        source = np.where(
            rng.random(len(source)) < 0.2, ~source.dtype.type(0) >> 1, source
        )  # NaN's bits stay
    for threads in (1, 3):
        target = poisoned(span(sizes, steps[0]), source.dtype)
        kernels.copy(level, threads, sizes, steps, source, target)
        assert np.array_equal(seen(target, sizes, steps[0]), seen(source, sizes, steps[1]))
        assert untouched(target, sizes, steps[0])


@pytest.mark.parametrize("walk", COPIES, ids=str)
@EVERY_SIZE
@EVERY_LEVEL
def test_fill(level, size, walk):
    sizes, steps, _ = walk
    pattern = 0xF1E2D3C4B5A69788 & ((1 << 8 * size) - 1)
    for threads in (1, 3):
        target = poisoned(span(sizes, steps), UNSIGNED[size])
        kernels.fill(level, threads, sizes, [steps], pattern, target)
        assert np.all(seen(target, sizes, steps) == pattern)
        assert untouched(target, sizes, steps)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("width", [*WIDTHS, 130, 1001])
@EVERY_DTYPE
@EVERY_LEVEL
def test_softmax(level, dtype, width, rows):
    rng = np.random.default_rng(width)
    kind = DTYPES[dtype]
    x = (4 * rng.standard_normal((rows, width))).astype(kind)
    if rows > 1:
        x[0, width // 2] = -np.inf
        x[1] = 6e4  # no exponential of it is finite
        x[2, -1] = 200
    x64 = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        away = x64.max(1, keepdims=True) - x64
        want = np.exp(-away)
        want /= want.sum(1, keepdims=True)
    # The exponent's rounding, by which its power is off, and the sum's.
    rounding = 2**-52 if dtype == "float64" else 2**-23
    off = rounding * (width + 16 + np.where(np.isinf(away), 0, away))
    least = 2**-24 if dtype == "float16" else 2**-126
    results = []
    for threads in (1, 3):
        out = poisoned(x.size, kind).reshape(x.shape)
        kernels.softmax(level, threads, x, out)
        found = out.astype(np.float64)
        assert np.array_equal(np.isnan(found), np.isnan(want))
        assert np.all((np.abs(found - want) <= (EPS[dtype] + off) * want + least) | np.isnan(want))
        results.append(out.tobytes())
    assert results[0] == results[1]
    kernels.softmax(level, 1, x, x)
    assert x.tobytes() == results[0]


@pytest.mark.parametrize("width", WIDTHS)
@EVERY_DTYPE
@EVERY_LEVEL
def test_softmax_of_what_is_no_number(level, dtype, width):
    """A row's NaN, its positive infinity and negative infinities alone make all of it NaN, and nothing else."""
    x = np.tile(np.linspace(-3, 3, width), (width + 5, 1)).astype(DTYPES[dtype])
    x[np.arange(width), np.arange(width)] = np.nan
    x[width, -1], x[width + 1], x[width + 2, 0] = np.inf, -np.inf, np.inf
    x[width + 3, 1:] = -np.inf
    out = poisoned(x.size, x.dtype).reshape(x.shape)
    kernels.softmax(level, 1, x, out)
    assert np.isnan(out[: width + 3]).all()
    assert np.array_equal(out[width + 3], np.arange(width) == 0)
    assert np.isfinite(out[width + 4]).all()


@pytest.mark.parametrize("indices", [np.int64, np.int32])
@pytest.mark.parametrize("width", [1, 3, 16, 33])
@EVERY_DTYPE
@EVERY_LEVEL
def test_embedding(level, dtype, width, indices):
    rng = np.random.default_rng(width)
    table = rng.standard_normal((11, width)).astype(DTYPES[dtype])
    for count in (0, 1, 7, 700):
        of = rng.integers(0, 11, count).astype(indices)
        for threads in (1, 3):
            out = poisoned(count * width, table.dtype).reshape(count, width)
            assert not kernels.embedding(level, threads, table, of, out)
            assert np.array_equal(out, table[of])


@pytest.mark.parametrize("indices", [np.int64, np.int32])
@EVERY_LEVEL
def test_embedding_of_indices_outside(level, indices):
    table = np.arange(33, dtype=np.float32).reshape(11, 3)
    wrong = [-1, 11, np.iinfo(indices).min, np.iinfo(indices).max, *([2**32] if indices is np.int64 else ())]
    for threads in (1, 3):
        for index in wrong:
            of = np.tile(np.array([10, index, 0], indices), 900)
            out = poisoned(of.size * 3, table.dtype).reshape(-1, 3)
            assert kernels.embedding(level, threads, table, of, out)
            assert np.all(out[::3] == table[10])
            assert np.all(out[2::3] == table[0])
            assert untouched(out[1::3].ravel(), (0,), (1,))


@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (3, 16), (4, 33), (7, 64), (5, 257), (130, 70), (0, 5)], ids=str
)
@EVERY_DTYPE
@EVERY_LEVEL
def test_layer_norm(level, dtype, shape, parameters):
    """Of x alone: there is no residual."""
    rows, width = shape
    rng = np.random.default_rng(rows * 1000 + width)
    kind, sums = DTYPES[dtype], np.float64 if dtype == "float64" else np.float32
    x, w, b = (rng.standard_normal(s).astype(kind) for s in (shape, width, width))
    w, b = w if parameters in ("both", "weight") else None, b if parameters in ("both", "bias") else None
    eps = 1e-3
    x64 = x.astype(np.float64)
    w64 = np.ones(width) if w is None else w.astype(np.float64)
    b64 = np.zeros(width) if b is None else b.astype(np.float64)
    rstd64 = 1 / np.sqrt(x64.var(1, keepdims=True) + eps)
    normal = (x64 - x64.mean(1, keepdims=True)) * rstd64
    want = normal * w64 + b64
    rounding = 2**-52 if dtype == "float64" else 2**-23
    # Cancellation in x - mean costs roundings of the larger of them.
    spread = rounding * (width + 8) * np.abs(x64).max(1, keepdims=True, initial=1) * rstd64
    allowed = EPS[dtype] * np.abs(want) + spread * (1 + np.abs(normal)) * np.abs(w64) + rounding * 8
    results = []
    for threads in (1, 3):
        y, s, alone = (poisoned(x.size, kind).reshape(shape) for _ in range(3))
        mean, rstd = poisoned(rows, sums), poisoned(rows, sums)
        kernels.add_layer_norm(level, threads, x, None, w, b, eps, y, s, mean, rstd)
        assert np.all(np.abs(y.astype(np.float64) - want) <= allowed)
        assert s.tobytes() == x.tobytes()
        kernels.add_layer_norm(level, threads, x, None, w, b, eps, alone, None, None, None)
        assert alone.tobytes() == y.tobytes()
        kernels.add_layer_norm(level, threads, x, np.zeros_like(x), w, b, eps, alone, None, None, None)
        assert alone.tobytes() == y.tobytes()
        results.append([y, mean, rstd])
    for one, three in zip(*results, strict=True):
        assert one.tobytes() == three.tobytes()
