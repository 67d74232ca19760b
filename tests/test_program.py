"""Native programs: each kind of record, the memory they share, whole models, and descriptions that do not fit."""

from __future__ import annotations

import itertools
import random
import re
import threading

import guarded
import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES
from test_graph import MODELS, Of, leaves, prepared, randn

import fastnn
from fastnn import _library
from fastnn.graph import memory
from fastnn.graph.program import Builder, CannotHold, Place, Program, bits_of, dense_strides
from fastnn.ops.core import activations
from fastnn.ops.core.algorithms import covers_by
from fastnn.ops.core.op import OPS

pytestmark = pytest.mark.usefixtures("quick_choice")
_ops = torch.ops.fastnn


def given(builder, t):
    return builder.input(t.dtype, tuple(t.shape), tuple(t.stride()))


def like(builder, t):
    return builder.new(t.dtype, tuple(t.shape), tuple(t.stride()))


def run(build, expected, *inputs):
    """What a program of one record gives: `build` gets a builder, the inputs' places and the result's."""
    builder = Builder()
    places = [None if t is None else given(builder, t) for t in inputs]
    made = like(builder, expected)
    build(builder, *places, made)
    builder.output(made)
    (out,) = builder.make()(*(t for t in inputs if t is not None))
    assert out.dtype is expected.dtype
    assert out.shape == expected.shape
    return out


def same(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(7, 8, 9), b.nan_to_num(7, 8, 9))


def special(*shape, dtype=torch.float32, seed=0):
    """Numbers of which a few are NaN and infinite."""
    x = randn(*shape, seed=seed) * 3
    flat = x.view(-1)
    for place, value in zip((1, 4, 6), (float("nan"), float("inf"), -float("inf")), strict=True):
        if flat.numel() > place:
            flat[place] = value
    return x.to(dtype)


# ---- elementwise ----

PAIRS = {
    "alike": lambda d: (special(3, 5, 7, dtype=d), special(3, 5, 7, dtype=d, seed=1)),
    "long": lambda d: (special(20_001, dtype=d), special(20_001, dtype=d, seed=1)),
    "a row": lambda d: (special(6, 37, dtype=d), randn(37, seed=1).to(d).expand(6, 37)),
    "a column": lambda d: (special(6, 37, dtype=d), randn(6, 1, seed=1).to(d).expand(6, 37)),
    "one": lambda d: (randn(1, 1, seed=1).to(d).expand(5, 9), special(5, 9, dtype=d)),
    "turned": lambda d: (special(19, 33, dtype=d).t(), special(33, 19, dtype=d, seed=1)),
    "apart": lambda d: (special(4, 60, dtype=d)[:, ::3], special(4, 40, dtype=d, seed=1)[:, ::2]),
    "images": lambda d: (
        special(2, 19, 5, 3, dtype=d).contiguous(memory_format=torch.channels_last),
        randn(2, 19, 1, 1, seed=1).to(d).expand(2, 19, 5, 3),
    ),
    "scalars": lambda d: (randn(1).to(d)[0], randn(1, seed=1).to(d)[0]),
    "nothing": lambda d: (randn(0, 4).to(d), randn(0, 4).to(d)),
}
ARITHMETIC = (torch.add, torch.sub, torch.mul, torch.div, torch.rsub)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("op", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arithmetic(op, dtype, pair, level):
    a, b = PAIRS[pair](dtype)
    expected = ARITHMETIC[op](a, b)
    same(run(lambda s, x, y, z: s.record("arithmetic", (x, y, z), (op, 0)), expected, a, b), expected)
    expected = ARITHMETIC[op](a, 0.3)
    # torch adds a number in the tensor's dtype, and multiplies by it as it is.
    number = bits_of(0.3 if op in (2, 3) else torch.tensor(0.3, dtype=dtype).item())
    same(run(lambda s, x, z: s.record("arithmetic", (x, None, z), (op, number)), expected, a), expected)


@pytest.mark.parametrize("name", activations.NAMES[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(name, dtype, level):
    number = activations.NUMBERS[name]
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14}.get(dtype, 2 * torch.finfo(dtype).eps)
    for x in (special(5, 37, dtype=dtype), special(9, 12, dtype=dtype).t(), special(33, dtype=dtype)[::2]):
        if name == "gelu":
            x = x.nan_to_num(float("nan"), 30, -30)  # torch gives NaN for infinity
        expected = activations.activated(x, number)
        out = run(lambda s, x, y: s.record("activation", (x, y), (number,)), expected, x)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


COPIES = {
    "dense": lambda x: (x, x.clone()),
    "turned": lambda x: (x.transpose(1, 3), torch.empty_like(x.transpose(1, 3).contiguous())),
    "to NHWC": lambda x: (x, x.contiguous(memory_format=torch.channels_last)),
    "from NHWC": lambda x: (x.contiguous(memory_format=torch.channels_last), x),
    "permuted": lambda x: (x.permute(2, 0, 3, 1), x.permute(2, 0, 3, 1).contiguous()),
    "apart": lambda x: (x[:, ::2, 1:, ::3], x[:, ::2, 1:, ::3].contiguous()),
    "expanded": lambda x: (
        x[:, :1].expand(-1, 5, -1, -1),
        x[:, :1].expand(-1, 5, -1, -1).clone(memory_format=torch.contiguous_format),
    ),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 17, 19), (1, 64, 9, 70), (2, 5, 1, 1), (3, 1, 4, 300), (0, 3, 2, 2)]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.bool, torch.uint8], ids=str)
def test_copies(dtype, shape, how, level):
    bits = torch.randint(0, 256, (*shape[:3], shape[3] * dtype.itemsize), dtype=torch.uint8)
    x = (bits % 2 if dtype is torch.bool else bits).view(dtype)
    source, target = COPIES[how](x)
    made = run(lambda s, x, y: s.record("copy", (x, y)), target, source)
    assert made.stride() == target.stride()
    bytes_of = (
        (lambda t: t.clone(memory_format=torch.contiguous_format).view(torch.uint8))
        if x.numel()
        else (lambda t: t)
    )
    assert torch.equal(bytes_of(made), bytes_of(source))


# ---- rows ----


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (4, 64), (3, 2, 33), (2, 1000), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype, shape, level):
    x = (randn(*shape) * 20).to(dtype)
    if x.numel() > 30:
        x[0, ..., 1], x[-1, ..., 2] = -float("inf"), float("nan")
        x[1] = -float("inf")
    expected = torch.softmax(x, -1)
    made = run(lambda s, x, y: s.record("softmax", (x, y)), expected, x)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("parameters", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 3, 64), (130, 70), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype, shape, parameters, level):
    x = (randn(*shape) + 1).to(dtype)
    w, b = (randn(shape[-1], seed=i).to(dtype) for i in (1, 2)) if parameters else (None, None)
    exact = TF.layer_norm(x.double(), shape[-1:], *(None if t is None else t.double() for t in (w, b)), 1e-3)

    def build(s, x, w, b, y):
        s.record("layer_norm", (x, None, w, b, y, None), (bits_of(1e-3),))

    made = run(build, exact.to(dtype), x, w, b)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(made.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype, index):
    table, indices = randn(11, 7).to(dtype), (torch.arange(12).view(3, 4) % 11).to(index)
    build = lambda s, t, i, y: s.record("embedding", (t, i, y))  # noqa: E731
    assert torch.equal(run(build, table[indices.long()], table, indices), table[indices.long()])
    for wrong in (-1, 11, 1 << 30):
        with pytest.raises(RuntimeError, match="index out of range"):
            run(build, table[indices.long()], table, indices.clone().fill_(wrong))


# ---- products, poolings, attention: what the ops give ----


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("name", ["none", "relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 9), (0,)], ids=str)
def test_linear(rows, dtype, name, packs, level):
    x, w, b, r = (
        randn(*s, seed=i).to(dtype) for i, s in enumerate([(*rows, 40), (33, 40), (33,), (*rows, 33)])
    )
    op, number = OPS["linear_activation"], activations.NUMBERS[name]
    packed = _ops._pack_weight(w, 1) if packs else None
    mask = op.algorithms.results[0].covering(x, w, b, None, number)
    for algorithm, (bias, residual) in itertools.product(
        range(len(op.algorithms.names)), [(b, None), (None, r)]
    ):
        if not covers_by(mask, algorithm):
            continue
        if packs:
            expected = _ops.linear_packed.raw(x, w, bias, residual, packed, number, algorithm)
        else:
            expected = op.packet.raw(x, w, bias, residual, number, algorithm)

        def build(s, x, bias, residual, y, algorithm=algorithm):
            constants = s.constant(w), None if packed is None else s.constant(packed)
            s.record("linear", (x, constants[0], bias, residual, constants[1], y), (number, algorithm))

        assert torch.equal(run(build, expected, x, bias, residual), expected)


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "alone"])
@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("kernel", [(1, 1, 0), (3, 1, 1), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d(dtype, kernel, last, pooled, level):
    size, stride, padding = kernel
    form = torch.channels_last if last else torch.contiguous_format
    x = randn(2, 8, 13, 11).to(dtype).contiguous(memory_format=form)
    w = randn(16, 8, size, size, seed=1).to(dtype).contiguous(memory_format=form)
    b = randn(16, seed=2).to(dtype)
    options = (stride, stride, padding, padding, 1, 1, 1)
    pool = (2, 2, 2, 2, 0, 0)
    packed = _ops._pack_weight(w, 1)
    name = "conv2d_relu_max_pool2d" if pooled else "conv2d_activation"
    op, rest = OPS[name], (*options, *pool) if pooled else (*options, activations.RELU)
    mask = op.algorithms.results[0].covering(x, w, b, *(() if pooled else (None,)), *rest)
    for number in range(len(op.algorithms.names)):
        if not covers_by(mask, number):
            continue
        if pooled:
            expected = _ops.conv2d_relu_max_pool2d_packed.raw(x, w, b, packed, *rest, number)
        else:
            r = _ops.conv2d_activation.raw(x, w, b, None, *rest, 0).mul(2)
            expected = _ops.conv2d_packed.raw(x, w, b, r, packed, *rest, number)

        def build(s, x, residual, y, number=number):
            values = x, s.constant(w), s.constant(b), residual, s.constant(packed), y
            relu = (activations.RELU, number, *(pool if pooled else ()))
            s.record("conv2d", values, (last, last and size > 1, *options, *relu))

        assert torch.equal(run(build, expected, x, None if pooled else r), expected)


@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poolings(dtype, last, level):
    x = special(2, 5, 13, 11, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    window = (3, 2, 2, 1, 1, 0)
    for name, expected, options in (
        ("max_pool2d", _ops.max_pool2d.raw(x, *window, 1, 2, True), (*window, 1, 2, True)),
        ("avg_pool2d", _ops.avg_pool2d.raw(x, *window, False, True, None), (*window, False, True, 0)),
        ("avg_pool2d", _ops.avg_pool2d.raw(x, *window, True, False, 3), (*window, True, False, 3)),
        ("adaptive_avg_pool2d", _ops.adaptive_avg_pool2d.raw(x, 4, 1), ()),
        ("adaptive_avg_pool2d", _ops.adaptive_avg_pool2d.raw(x, 1, 1), ()),
    ):

        def build(s, x, y, name=name, options=options):
            s.record(name, (x, y), (last, *options))

        same(run(build, expected, x), expected)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, heads, mask, level):
    q = randn(2, 9, heads[0], 16).to(dtype).transpose(1, 2)
    k, v = (randn(2, heads[1], 12, 16, seed=i).to(dtype) for i in (1, 2))
    m = {"bool": randn(2, 1, 9, 12, seed=3) > -1, "added": randn(12, seed=3).to(dtype).expand(9, 12)}.get(
        mask
    )
    op = OPS["attention"]
    for number in range(len(op.algorithms.names)):
        if not covers_by(op.algorithms.results[0].covering(q, k, v, m, False, None), number):
            continue
        expected, _ = _ops.attention.raw(q, k, v, m, mask == "causal", None, number)

        def build(s, q, k, v, m, y, number=number):
            s.record("attention", (q, k, v, m, y), (mask == "causal", bits_of(0.25), number))

        assert torch.equal(run(build, expected, q, k, v, m), expected)


# ---- memory ----


def test_tensors_that_live_together_lie_apart():
    choose = random.Random(0)
    for _ in range(60):
        spans = []
        for _ in range(choose.randrange(40)):
            first = choose.randrange(30)
            spans.append(
                memory.Span(choose.choice((0, 1, 64, 100, 4096)), first, first + choose.randrange(8))
            )
        offsets, total = memory.place(spans)
        assert all(offset % memory.ALIGNMENT == 0 for offset in offsets)
        for (a, x), (b, y) in itertools.combinations(zip(offsets, spans, strict=True), 2):
            if x.first <= y.last and y.first <= x.last:
                assert a + x.bytes <= b or b + y.bytes <= a
        alive = [sum(s.bytes for s in spans if s.first <= t <= s.last) for t in range(40)]
        assert total >= max(alive)
    # Of a chain of equal tensors two are there at a time.
    assert memory.place([memory.Span(640, i, i + 1) for i in range(20)])[1] == 1280


def test_results_take_the_place_of_what_dies():
    def chain(steps):
        builder = Builder()
        x = given(builder, randn(1000))
        for _ in range(steps):
            y = like(builder, randn(1000))
            builder.record("arithmetic", (x, None, y), (0, bits_of(1.0)), in_place=True)
            x = y
        builder.output(x)
        return builder

    x = randn(1000)
    before = x.clone()
    assert chain(10).description()[3] == 4032
    torch.testing.assert_close(chain(10).make()(x)[0], before + 10)
    assert torch.equal(x, before)
    # Not of what is read on, nor where another operand is a part of it; what took a place holds it.
    check(lambda m, x: (y := m.a(x)) * (y + 1) - y / 3, randn(3, 6))
    check(lambda m, x: (y := m.a(x)) * y[:, :1] + 1, randn(3, 6))
    check(lambda m, x: (y := m.a(x)) * y.t() + 1, randn(6, 6))
    check(lambda m, x: (y := m.a(x)) - y + 1, randn(3, 6))
    check(lambda m, x: m.a(x) * 2 + torch.softmax(x, -1) * 3, randn(3, 6))


def test_results_are_new_memory():
    model = prepared(MODELS["MLP"][0]())
    x, other = randn(2, 40), randn(2, 40, seed=1)
    frozen = fastnn.freeze(model, x)
    assert isinstance(frozen._of((x,), {})[0].run, Program)
    first = frozen(x)
    kept = first.clone()
    second = frozen(other)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    second.zero_()
    assert torch.equal(frozen(x), kept)


def test_several_threads_run_one_program():
    model = prepared(MODELS["small CNN"][0]())
    frozen = fastnn.freeze(model, randn(2, 3, 32, 32))
    inputs = [randn(2, 3, 32, 32, seed=i) for i in range(4)]
    expected = [frozen(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(40):
            if not torch.equal(frozen(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_workers_give_the_same(threads):
    x = randn(40, 3, 64, 65)
    results = []
    for count in (1, 2):
        threads(count)
        turned = run(lambda s, x, y: s.record("copy", (x, y)), x.to(memory_format=torch.channels_last), x)
        made = run(lambda s, x, y: s.record("arithmetic", (x, x, y), (2, 0)), x, x)
        soft = run(lambda s, x, y: s.record("softmax", (x, y)), x, x)
        results.append((turned, made, soft))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_program_is_dropped_while_it_runs():
    x = randn(64, 64)
    builder = Builder()
    place = given(builder, x)
    for _ in range(50):
        made = like(builder, x)
        builder.record("softmax", (place, made))
        place = made
    builder.output(place)
    program = builder.make()
    stopped = []

    def work():
        try:
            while True:
                _ops._program_run(program.number, [x])
        except RuntimeError as error:
            stopped.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    _ops._program_drop(program.number)
    for thread in threads:
        thread.join()
    assert len(stopped) == 3
    assert all("there is no program" in text for text in stopped)
    _ops._program_drop(program.number)


def test_the_library_forgets_what_nobody_holds():
    program = Builder().make()
    number = program.number
    assert _ops._program_run(number, []) == []
    del program
    with pytest.raises(RuntimeError, match="there is no program"):
        _ops._program_run(number, [])


# ---- whole models ----


def check(function, *x, whole=True, **layers):
    model = prepared(Of(function, **{"a": torch.nn.Linear(6, 6), **layers}))
    with torch.no_grad():
        expected = model(*x)
    frozen = fastnn.freeze(model, *x)
    kind = frozen._of(x, {})[0]
    assert isinstance(kind.run, Program) is whole
    before = [t.clone() for t in x]
    for _ in range(2):
        for a, b in zip(leaves(frozen(*x)), leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
            assert a.stride() == b.stride()
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    return frozen


def test_models_are_one_program(monkeypatch):
    from fastnn.graph import lower

    # Whatever is fastest here: nothing is torch's.
    monkeypatch.setattr(lower, "_fastest", lambda calls: next(n for n in (*calls, "torch") if n != "torch"))
    for make, inputs in MODELS.values():
        model, x = prepared(make()), inputs(2)
        frozen = fastnn.freeze(model, *x)
        kind = frozen._of(x, {})[0]
        assert isinstance(kind.run, Program), str(kind.run.__self__.graph)
        with torch.no_grad():
            for a, b in zip(leaves(frozen(*x)), leaves(model(*x)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_views_and_copies_of_models():
    x = randn(4, 6)
    image = randn(2, 4, 6, 6)
    check(
        lambda m, x: (
            m.a(x).t().contiguous() + m.a(x).reshape(6, 4),
            m.a(x)[1:3, ::2] * 2,
            [t + 1 for t in m.a(x).split(2, 1)],
            [t * 2 for t in m.a(x).chunk(4, 0)],
            m.a(x).unsqueeze(1).expand(4, 3, 6) - x[:, None],
        ),
        x,
    )
    check(
        lambda m, x: (
            torch.cat([m.a(x), x, x[:0]], 0),
            torch.cat([m.a(x), x[:, 1:3]], 1),
            TF.pad(m.a(x), (1, 2, 0, 3), value=1.5),
            m.a(x).softmax(-1),
            (1 - m.a(x)) / (2.5 - x),
        ),
        x,
    )
    check(lambda m, x: (m.c(x).mean((2, 3)), TF.pad(m.c(x), (1, 1, 2, 0))), image, c=torch.nn.Conv2d(4, 8, 3))
    check(lambda m, i: m.a(m.e(i)), torch.arange(5).view(1, 5), e=torch.nn.Embedding(9, 6))


def test_results_that_are_parts_of_others():
    x = randn(4, 6)
    check(lambda m, x: (y := m.a(x), y[:, :2], y.t()), x)
    check(lambda m, x: (y := m.a(x), y), x, whole=False)
    check(lambda m, x: m.a(x)[:, 0], x)
    check(lambda m, x: (m.a(x), torch.ones(2, 3)), x)
    # What is handed over comes back itself, and views of it are views.
    frozen = check(lambda m, x: (x, m.a(x), x.view(-1)), x, whole=False)
    given_back, _, view = frozen(x)
    assert given_back.data_ptr() == view.data_ptr() == x.data_ptr()
    check(lambda m, x: m.a(x)[:, :1].expand(4, 3), x, whole=False)


def test_torchs_ops_stand_between_programs():
    x = randn(4, 6)
    check(lambda m, x: torch.relu(m.a(torch.cumsum(m.a(x), 0))), x, whole=False)
    check(lambda m, x: m.a(x).sort(-1)[0] + m.a(x), x, whole=False)
    check(lambda m, x: torch.erf(m.a(x)) + torch.exp(m.a(x + 1)), x, whole=False)
    check(lambda m, x: m.a(x) + x.double(), x, whole=False)
    check(lambda m, x: m.a(x).to(torch.complex64), x, whole=False)
    check(lambda m, x: torch.cumsum(x, 0), x, whole=False)


def test_errors_are_torchs():
    model = prepared(Of(lambda m, i: m.a(m.e(i)), a=torch.nn.Linear(6, 6), e=torch.nn.Embedding(9, 6)))
    frozen = fastnn.freeze(model, torch.arange(5))
    for wrong in (torch.full((5,), 9), torch.full((5,), -1)):
        with pytest.raises(IndexError):
            frozen(wrong)
    torch.testing.assert_close(frozen(torch.arange(5)), model(torch.arange(5)))


def test_what_looks_on_is_called():
    model, x = prepared(MODELS["MLP"][0]()), randn(2, 40)
    frozen = fastnn.freeze(model, x)
    seen = []
    handle = frozen.register_forward_hook(lambda module, args, out: seen.append(out))
    out = frozen(x)
    assert seen[0] is out
    handle.remove()
    assert not frozen(x.clone().requires_grad_()).requires_grad
    traced = torch.jit.trace(frozen, (x,))
    assert "_program" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), out)
    compiled = torch.compile(frozen, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), out)
    # Other sizes in turns.
    for rows in (2, 3, 2, 3):
        assert frozen(randn(rows, 40)).shape == (rows, 10)


def test_weights_that_nobody_reads_take_no_memory(monkeypatch):
    from fastnn.graph import lower, unread

    model = prepared(
        torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Flatten(1, 2), torch.nn.Linear(6, 7))
    )
    x = randn(2, 16, 8, 8)

    def by(names):
        choose = lambda calls: next(n for n in (*names, *calls) if n in calls)  # noqa: E731
        monkeypatch.setattr(lower, "_fastest", choose)
        frozen = fastnn.freeze(model, x)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
        graph = frozen.graph_of(x)[0]
        products = [n for n in graph.graph.nodes if "packed" in str(n.target)]
        assert bool(products) is (names[0] != "planes")
        return [getattr(graph, n.args[1].target).abs().sum().item() == 0 for n in products]

    assert by(("pixels", "blocked")) == [True, True]
    assert not any(by(("planes", "dot")))
    monkeypatch.setattr(unread, "_FEW_ROWS", 1000)
    assert not any(by(("pixels", "blocked")))


# ---- descriptions that do not fit ----


def small():
    """A program of several kinds of records, its inputs and constants."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 4, 3, 3, generator=generator)
    head = torch.randn(5, 8, generator=generator)
    packed = _ops._pack_weight(head, 1)
    builder = Builder()
    x = builder.input(torch.float32, (2, 4, 6, 6), dense_strides((2, 4, 6, 6)))
    y = builder.new(torch.float32, (2, 8, 6, 6), dense_strides((2, 8, 6, 6)))
    builder.record("conv2d", (x, builder.constant(w), None, None, None, y), (0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0))
    z = builder.new(torch.float32, (2, 8, 1, 1), (8, 1, 1, 1))
    builder.record("adaptive_avg_pool2d", (y, z), (0,))
    flat = Place(z.memory, 0, torch.float32, (2, 8), (8, 1))
    out = builder.new(torch.float32, (2, 5), (5, 1))
    values = flat, builder.constant(head), None, None, builder.constant(packed), out
    builder.record("linear", values, (0, 0))
    soft = builder.new(torch.float32, (2, 5), (5, 1))
    builder.record("softmax", (out, soft), in_place=True)
    turned = builder.new(torch.float32, (5, 2), (2, 1))
    builder.record("copy", (Place(soft.memory, 0, torch.float32, (5, 2), (1, 5)), turned))
    builder.output(turned)
    return builder.description(), builder.constants, torch.randn(2, 4, 6, 6, generator=generator)


def test_descriptions_that_do_not_fit_are_refused():
    numbers, constants, x = small()

    def make(numbers, constants=constants):
        return _ops._program_make(torch.tensor(numbers, dtype=torch.int64), constants)

    number = make(numbers)
    expected = _ops._program_run(number, [x])
    for length in range(len(numbers)):
        with pytest.raises(RuntimeError, match="fastnn"):
            make(numbers[:length])
    with pytest.raises(RuntimeError, match="goes on"):
        make([*numbers, 0])
    for wrong in (constants[:-1], [*constants, x], [t[:1] for t in constants]):
        with pytest.raises(RuntimeError, match="fastnn"):
            make(numbers, wrong)
    with pytest.raises(RuntimeError, match="int64"):
        _ops._program_make(torch.zeros(4), constants)
    with pytest.raises(RuntimeError, match="got 0"):
        _ops._program_run(number, [])
    for wrong in (x.double(), x[:1], x.transpose(2, 3), x[..., None]):
        with pytest.raises(RuntimeError, match="other sizes"):
            _ops._program_run(number, [wrong])
        assert _ops._program_run_one(number, wrong) is None
    assert torch.equal(_ops._program_run(number, [x])[0], expected[0])
    _ops._program_drop(number)


def test_hostile_descriptions_crash_nothing():
    """One and two numbers at a time become others: it is refused, or it is a program that runs within its memory.

    What it is handed ends where memory does: a read past the end would end the process.
    """
    numbers, constants, x = small()
    *constants, x = (torch.from_numpy(guarded.array(t.numpy(), at_end=True)) for t in (*constants, x))
    choose = random.Random(0)
    extremes = (
        -1,
        0,
        1,
        2,
        3,
        7,
        12,
        13,
        64,
        255,
        1 << 20,
        1 << 31,
        1 << 40,
        1 << 62,
        (1 << 63) - 1,
        -(1 << 63),
    )
    trials = [((i, value),) for i in range(len(numbers)) for value in extremes]
    trials += [
        tuple(
            (choose.randrange(len(numbers)), choose.choice((*extremes, choose.randrange(40)))) for _ in "12"
        )
        for _ in range(3000)
    ]
    made = 0
    for trial in trials:
        hostile = list(numbers)
        for place, value in trial:
            hostile[place] = value
        if hostile[3] > 1 << 30:
            continue  # so large a block may be there
        try:
            number = _ops._program_make(torch.tensor(hostile, dtype=torch.int64), constants)
        except RuntimeError as error:
            assert "fastnn" in str(error)  # noqa: PT017
            continue
        made += 1
        try:
            _ops._program_run(number, [x])
        except RuntimeError as error:
            assert re.search("fastnn|memory", str(error))  # noqa: PT017
        _ops._program_drop(number)
    assert made > 10


@pytest.mark.skipif(_library.detected_isa() == "portable", reason="there is one level")
def test_a_program_is_for_one_level(level):
    x = randn(3, 4)
    builder = Builder()
    made = like(builder, x)
    builder.record("softmax", (given(builder, x), made))
    builder.output(made)
    program, description = builder.make(), torch.tensor(builder.description())
    program(x)
    other = "portable" if level != "portable" else _library.detected_isa()
    _library.set_isa(other)
    with pytest.raises(RuntimeError, match="level"):
        program(x)
    with pytest.raises(RuntimeError, match="level"):
        _ops._program_make(description, [])


def test_what_a_program_cannot_hold():
    builder = Builder()
    x = builder.input(torch.float32, (3,), (1,))
    for refused in (
        lambda: builder.input(torch.complex64, (3,), (1,)),
        lambda: builder.new(torch.float32, (1,) * 9, (1,) * 9),
        lambda: builder.constant(randn(3, 3).to_sparse()),
        lambda: builder.constant(torch.empty(3, device="meta")),
        lambda: builder.constant(torch.randn(3, dtype=torch.complex64).conj().imag),
        lambda: builder.output(x),
        lambda: builder.output(builder.constant(randn(3))),
        lambda: builder.output(
            Place(builder.new(torch.float32, (3,), (1,)).memory, 0, torch.float32, (3, 2), (1, 0))
        ),
    ):
        with pytest.raises(CannotHold):
            refused()
