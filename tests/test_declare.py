"""What every declared op has in common: what it refuses, how its options travel, where its calls go."""

import contextlib
import inspect
import threading
import typing

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnn
import fastnn.nn.functional as fast
from fastnn import _library
from fastnn.ops.core import cpu_choices, route, watch
from fastnn.ops.core.op import OPS
from fastnn.ops.core.options import PackedOptions


def image(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def places(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def packed(weight):
    return torch.ops.fastnn._pack_weight(weight, 1)


WINDOW = (2, 2, 2, 1, 1, 0)
CONV = (1, 2, 1, 0, 1, 1, 1)
WANTED = (True, True, True)

# A call of each op that its kernels take.
CALLS = {
    "linear": (image(5, 3), image(4, 3), image(4)),
    "linear_relu": (image(5, 3), image(4, 3), image(4)),
    "linear_activation": (image(5, 3), image(4, 3), image(4), image(5, 4), 7),
    "linear_activation_backward": (image(5, 4), image(5, 3), image(4, 3), image(5, 4), 8, True, *WANTED),
    "linear_packed": (image(5, 3), image(4, 3), image(4), image(5, 4), packed(image(4, 3)), 1),
    "linear_backward": (image(5, 4), image(5, 3), image(4, 3), *WANTED),
    "linear_relu_backward": (image(5, 4), image(5, 3), image(4, 3), image(5, 4), *WANTED),
    "conv2d": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), *CONV),
    "conv2d_relu": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), *CONV),
    "conv2d_winograd": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), 1, 1, 1, 0, 1, 1, 1, True),
    "conv2d_packed": (
        image(2, 3, 6, 7),
        image(4, 3, 3, 3),
        image(4),
        None,
        packed(image(4, 3, 3, 3)),
        *CONV,
        1,
    ),
    "conv2d_activation": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), image(2, 4, 6, 3), *CONV, 5),
    "conv2d_activation_backward": (
        image(2, 4, 6, 3),
        image(2, 3, 6, 7),
        image(4, 3, 3, 3),
        image(2, 4, 6, 3),
        *CONV,
        5,
        True,
        *WANTED,
    ),
    "conv2d_relu_max_pool2d_packed": (
        image(2, 3, 6, 7),
        image(4, 3, 3, 3),
        image(4),
        packed(image(4, 3, 3, 3)),
        *CONV,
        *WINDOW,
    ),
    "conv2d_relu_max_pool2d": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), *CONV, *WINDOW),
    "conv2d_backward": (image(2, 4, 6, 3), image(2, 3, 6, 7), image(4, 3, 3, 3), *CONV, *WANTED),
    "conv2d_relu_backward": (
        image(2, 4, 6, 3),
        image(2, 3, 6, 7),
        image(4, 3, 3, 3),
        image(2, 4, 6, 3),
        *CONV,
        *WANTED,
    ),
    "conv2d_relu_max_pool2d_backward": (
        image(2, 4, 4, 2),
        image(2, 3, 6, 7),
        image(4, 3, 3, 3),
        places(2, 4, 4, 2),
        *CONV,
        *WINDOW,
        *WANTED,
    ),
    "max_pool2d": (image(2, 3, 6, 7), *WINDOW, 1, 2, False),
    "max_pool2d_with_locations": (image(2, 3, 6, 7), *WINDOW, 1, 2, True),
    "max_pool2d_with_indices": (image(2, 3, 6, 7), *WINDOW, 1, 2, False),
    "max_pool2d_backward": (image(2, 3, 4, 5), places(2, 3, 4, 5), 6, 7, *WINDOW, 1, 2, False),
    "max_pool2d_indices_backward": (
        image(2, 3, 4, 5),
        places(2, 3, 4, 5, dtype=torch.int64),
        6,
        7,
        *WINDOW,
        1,
        2,
        False,
    ),
    "avg_pool2d": (image(2, 3, 6, 7), *WINDOW, False, True, None),
    "avg_pool2d_backward": (image(2, 3, 4, 6), 6, 7, *WINDOW, False, True, 3, False),
    "adaptive_avg_pool2d": (image(2, 3, 6, 7), 3, 2),
    "adaptive_avg_pool2d_backward": (image(2, 3, 3, 2), 6, 7, False),
    "adaptive_max_pool2d": (image(2, 3, 6, 7), 3, 2),
    "add_layer_norm": (image(2, 5, 6), image(2, 5, 6), image(6), image(6), 1e-5, True, True),
    "add_layer_norm_backward": (
        image(2, 5, 6),
        image(2, 5, 6),
        image(10),
        image(10),
        image(2, 5, 6),
        image(6),
        *WANTED,
    ),
    "attention": (
        image(2, 4, 5, 8),
        image(2, 2, 6, 8),
        image(2, 2, 6, 7),
        image(5, 6),
        False,
        None,
    ),
    "attention_backward": (
        image(2, 4, 5, 7),
        image(2, 4, 5, 8),
        image(2, 2, 6, 8),
        image(2, 2, 6, 7),
        image(5, 6),
        image(2, 4, 5, 7),
        image(2, 4, 5, 2),
        False,
        0.25,
    ),
}


def changed(value):
    """Values that do not fit where `value` stood."""
    if isinstance(value, torch.Tensor):
        yield value[0]
        yield value[None]
        for d in range(value.dim()):
            yield value.narrow(d, 0, 0)
            yield torch.cat([value, value.narrow(d, 0, 1)], d)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (-1, 0, 9, 300)


def test_every_op_has_a_call():
    assert set(CALLS) == {name for name, op in OPS.items() if op.on_cpu}


@pytest.mark.parametrize("name", CALLS)
def test_ops_refuse_what_is_unsupported(name):
    """An eager call learns from the op's refusal that it is torch's: a kernel that took it would be wrong."""
    op, call = OPS[name], CALLS[name]
    assert op.unsupported(*call) is None
    op.packet.raw(*call)
    refused = 0
    for i, value in enumerate(call):
        for other in changed(value):
            args = (*call[:i], other, *call[i + 1 :])
            if op.unsupported(*args) is not None:
                refused += 1
                with pytest.raises(RuntimeError):
                    op.packet.raw(*args)
    assert refused > 3


@pytest.mark.parametrize("name", CALLS)
def test_ops_refuse_other_dtypes(name):
    op, call = OPS[name], CALLS[name]
    tensors = [i for i, value in enumerate(call) if isinstance(value, torch.Tensor)]
    alone = sum(call[i].is_floating_point() for i in tensors) == 1
    for i in tensors:
        for dtype in (torch.int32,) if alone else (torch.int32, torch.float64):
            with pytest.raises(RuntimeError):
                op.packet.raw(*call[:i], call[i].to(dtype), *call[i + 1 :])


@pytest.mark.parametrize("name", [name for name in CALLS if "packed" in OPS[name].packet.overloads()])
def test_packed_options(name):
    op, call = OPS[name], CALLS[name]
    tensors, options = call[: op.tensors], call[op.tensors :]
    arguments = op.schema.arguments[op.tensors :]
    packs = PackedOptions([str(a.type) == "Optional[int]" for a in arguments])
    numbers = packs[options]
    assert len(numbers) == -(-len(options) // 7)
    expected, got = op.packet.raw(*call), op.packet.packed(*tensors, *numbers)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_options_that_do_not_fit_a_byte():
    packs = PackedOptions([False, True])
    assert packs[(255, None)] == (255,)
    assert packs[(True, 3)] == (1 + 3 * 256,)
    for options in ((256, 3), (-1, 3), (2.0, 3), (1, 0), (1, -2)):
        assert packs[options] is None
    x = torch.randn(1, 2, 300, 300)
    torch.testing.assert_close(fast.max_pool2d(x, 300), F.max_pool2d(x, 300), rtol=0, atol=0)
    torch.testing.assert_close(
        fast.avg_pool2d(x, 3, divisor_override=300), F.avg_pool2d(x, 3, divisor_override=300)
    )


def test_a_refused_call_is_torchs():
    """To do, where torch can, and to refuse in its own words where it cannot."""
    empty = torch.randn(0, 3, 8, 8)
    assert fast.max_pool2d(empty, 2).shape == (0, 3, 4, 4)
    integers = torch.ones(2, 3, dtype=torch.int64)
    assert fast.linear(integers, integers).dtype is torch.int64
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast.linear(torch.randn(2, 3), torch.randn(4, 5))


def test_a_failure_of_a_covered_call_is_not_hidden():
    def fail(tensor):
        raise ValueError("no room")

    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    with torch.autograd.graph.saved_tensors_hooks(fail, fail), pytest.raises(ValueError, match="no room"):
        fast.linear(x, w)


def test_a_gradient_that_the_kernels_do_not_give_is_torchs():
    q, mask = torch.randn(1, 2, 5, 8), torch.randn(5, 5, requires_grad=True)
    grads = [
        torch.autograd.grad(f(q, q, q, mask).square().sum(), mask)
        for f in (fast.scaled_dot_product_attention, F.scaled_dot_product_attention)
    ]
    torch.testing.assert_close(*grads)


# ---- one decision, whoever asks ----


class OpsThatRun(TorchDispatchMode):
    """Notes the names of fastnn's ops that reach a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))  # an op that refuses a call did not run
        space, name = function._schema.name.split("::")
        if space == "fastnn":
            self.names.append(name)
        return made


def last(*shape):
    return image(*shape).contiguous(memory_format=torch.channels_last)


# Calls of the public functions on either side of the rules by which torch's ops are faster.
ROUTED = {
    "linear": (fast.linear, image(3, 40), image(50, 40), image(50)),
    "linear of many rows": (fast.linear, image(300, 40), image(50, 40), image(50)),
    "linear in tile registers": (fast.linear, image(256, 256), image(256, 256), image(256)),
    "linear_relu": (fast.linear_relu, image(300, 40), image(50, 40), image(50)),
    "linear_gelu": (fast.linear_gelu, image(300, 40), image(50, 40), image(50)),
    "conv2d of few": (fast.conv2d, image(2, 3, 8, 8), image(4, 3, 3, 3), image(4)),
    "conv2d of many": (fast.conv2d, image(1, 64, 8, 8), image(64, 64, 3, 3), image(64)),
    "conv2d of a batch": (fast.conv2d, image(2, 64, 8, 8), image(64, 64, 3, 3), image(64)),
    "conv2d on channels_last": (fast.conv2d, last(2, 64, 9, 9), image(64, 64, 3, 3), image(64)),
    "points on channels_last": (fast.conv2d, last(2, 64, 9, 9), image(64, 64, 1, 1), image(64)),
    "conv2d_relu": (fast.conv2d_relu, image(1, 64, 8, 8), image(64, 64, 1, 1), image(64)),
    "conv2d_relu on channels_last": (fast.conv2d_relu, last(2, 64, 9, 9), image(64, 64, 3, 3), image(64)),
    "pooled": (fast.conv2d_relu_max_pool2d, image(2, 96, 8, 8), image(64, 96, 3, 3), image(64)),
    "conv1d": (fast.conv1d, image(2, 3, 40), image(4, 3, 3), image(4)),
    "add_layer_norm of few": (fast.add_layer_norm, image(4, 8), image(4, 8), image(8), image(8)),
    "add_layer_norm of some": (fast.add_layer_norm, image(300, 64), image(300, 64), image(64), image(64)),
    "attention": (fast.scaled_dot_product_attention, image(1, 2, 6, 8), image(1, 2, 6, 8), image(1, 2, 6, 8)),
    "attention with a mask": (fast.scaled_dot_product_attention, *[image(1, 2, 6, 8)] * 3, image(6, 6)),
    "max_pool2d": (lambda x: fast.max_pool2d(x, 2), image(2, 3, 8, 8)),
    "avg_pool2d": (lambda x: fast.avg_pool2d(x, 2), image(2, 3, 8, 8)),
    "adaptive_max_pool2d": (lambda x: fast.adaptive_max_pool2d(x, 2), image(2, 3, 8, 8)),
    "empty": (fast.linear, image(0, 40), image(50, 40), image(50)),
    "complex": (fast.linear, image(2, 4, dtype=torch.complex64), image(3, 4, dtype=torch.complex64)),
    "mixed": (fast.linear, image(2, 4), image(3, 4, dtype=torch.bfloat16)),
}


LEVELS = {
    "portable": ["portable"],
    "Intel": ["portable", "avx2", "avx512"],
    "AMX": ["portable", "avx2", "avx512", "avx512_bf16", "amx"],
    "Zen 5": ["amd-26-2"],
}


@pytest.fixture(params=LEVELS)
def processor(request, rules_of):
    """The rules of several processors, whatever this one is."""
    rules_of(*LEVELS[request.param])


def native_ops(function, *args):
    with OpsThatRun() as ran, contextlib.suppress(RuntimeError):
        function(*args)
    return ran.names


def compiled_ops(function, *args):
    """fastnn's ops in the graph of the forward pass."""
    names = []

    def collect(graph, inputs):
        names.extend(
            node.target._schema.name.split("::")[1]
            for node in graph.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fastnn"
        )
        return graph

    torch.compiler.reset()
    compiled = torch.compile(
        function,
        backend=aot_autograd(fw_compiler=collect, bw_compiler=lambda graph, inputs: graph),
        fullgraph=True,
    )
    compiled(*args)
    return names


def routed(name, dtype, gradients):
    function, *args = ROUTED[name]
    args = [a if name in ("complex", "mixed") else a.to(dtype) for a in args]
    return function, *(a.clone().requires_grad_(gradients) for a in args)


GRADIENTS = pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
AUTOCAST = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])


@GRADIENTS
@AUTOCAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_explain_says_what_runs(processor, dtype, autocast, gradients):
    """Both ask about the call as it will run: after autocast's cast, with the gradients that are wanted."""
    wheres = set()
    for name in ROUTED:
        function, *args = routed(name, dtype, gradients)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ran = native_ops(function, *args)
            rows = []
            with contextlib.suppress(RuntimeError):
                rows = fastnn.explain(function, *args).rows
        assert [row.op for row in rows if row.where.startswith("fastnn")] == ran, name
        wheres.update(row.where.split()[0] for row in rows)
    assert wheres == {"fastnn", "torch"}


@GRADIENTS
@AUTOCAST
@pytest.mark.parametrize(
    "name",
    [
        "linear of many rows",
        "linear in tile registers",
        "conv2d of many",
        "conv2d on channels_last",
        "conv2d_relu",
        "add_layer_norm of few",
        "attention",
    ],
)
@pytest.mark.parametrize("processor", ["Intel", "AMX"], indirect=True)
def test_compiled_calls_have_the_same_route(processor, name, autocast, gradients):
    function, *args = routed(name, torch.float32, gradients)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert compiled_ops(function, *args) == native_ops(function, *args)


# ---- functional transforms ----

HESSIANS = {
    "linear": lambda of, x: of.linear(x, x[:3].detach()),
    "conv2d": lambda of, x: of.conv2d(x.view(1, 1, 6, 4), x[:3].detach().view(1, 1, 3, 4)[..., :3]),
    "max_pool2d": lambda of, x: of.max_pool2d(x.view(1, 1, 6, 4), 2),
    "max_pool2d with indices": lambda of, x: of.max_pool2d(x.view(1, 1, 6, 4), 2, return_indices=True)[0],
    "max_pool1d": lambda of, x: of.max_pool1d(x.view(1, 6, 4), 2),
    "adaptive_max_pool2d": lambda of, x: of.adaptive_max_pool2d(x.view(1, 1, 6, 4), 2),
    "avg_pool2d": lambda of, x: of.avg_pool2d(x.view(1, 1, 6, 4), 2),
    "adaptive_avg_pool2d": lambda of, x: of.adaptive_avg_pool2d(x.view(1, 1, 6, 4), 2),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", HESSIANS)
def test_hessians(name, vectorize):
    """Vectorized ones run the backward pass under a vmap that torch.func does not know of."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    ours, torchs = (
        torch.autograd.functional.hessian(
            lambda x, of=of: HESSIANS[name](of, x.pow(3)).square().sum(), x, vectorize=vectorize
        )
        for of in (fast, F)
    )
    torch.testing.assert_close(ours, torchs)


# ---- devices ----


def places_of_tensors(call):
    return [i for i, value in enumerate(call) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("overload", ["default", "raw"])
@pytest.mark.parametrize("name", CALLS)
def test_ops_refuse_mixed_devices(name, overload):
    """The dispatcher takes such a call to the op's fake, whose result would be memory that nothing was written to."""
    op, call = OPS[name], CALLS[name]
    tensors = places_of_tensors(call)
    for i in tensors if len(tensors) > 1 else ():
        for one_on_meta in (True, False):
            args = [
                v.to("meta") if j in tensors and (j == i) == one_on_meta else v for j, v in enumerate(call)
            ]
            with pytest.raises((RuntimeError, NotImplementedError), match=r"same device|expected.*(cpu|CPU)"):
                getattr(op.packet, overload)(*args)


MIXED = {
    "linear": (fast.linear, F.linear, 3),
    "linear_relu": (fast.linear_relu, lambda *args: F.relu(F.linear(*args)), 3),
    "linear_gelu": (fast.linear_gelu, lambda *args: F.gelu(F.linear(*args)), 3),
    "conv1d": (fast.conv1d, F.conv1d, 3),
    "conv2d": (fast.conv2d, F.conv2d, 3),
    "conv2d_relu": (fast.conv2d_relu, lambda *args: F.relu(F.conv2d(*args)), 3),
    "conv2d_relu_max_pool2d": (
        fast.conv2d_relu_max_pool2d,
        lambda *args: F.max_pool2d(F.relu(F.conv2d(*args)), 2),
        3,
    ),
    "attention": (fast.scaled_dot_product_attention, F.scaled_dot_product_attention, 4),
    "add_layer_norm": (
        fast.add_layer_norm,
        lambda x, y, w, b: F.layer_norm(x + y, (8,), w, b),
        4,
    ),
}
ARGS = {
    "linear": (image(5, 8), image(4, 8), image(4)),
    "conv1d": (image(2, 3, 9), image(4, 3, 3), image(4)),
    "conv2d": (image(2, 3, 8, 9), image(4, 3, 3, 3), image(4)),
    "attention": (*[image(1, 2, 6, 8)] * 3, image(6, 6)),
    "add_layer_norm": (image(4, 8), image(4, 8), image(8), image(8)),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MIXED)
def test_functions_refuse_mixed_devices_as_torch(name, gradients):
    ours, torchs, count = MIXED[name]
    base = ARGS[name if name in ARGS else name.split("_")[0]]
    for on_meta in range(1, 2**count - 1):
        args = [a.to("meta") if on_meta >> i & 1 else a for i, a in enumerate(base)]
        args = [a.detach().clone().requires_grad_(gradients) for a in args]
        errors = []
        for function in (ours, torchs):
            try:
                made = function(*args)
            except Exception as error:
                errors.append(type(error))
            else:
                errors.append(made.device)
        assert errors[0] == errors[1], (on_meta, errors)


@pytest.mark.parametrize("name", MIXED)
def test_functions_on_meta_alone(name):
    ours, torchs, _ = MIXED[name]
    args = [a.to("meta") for a in ARGS[name if name in ARGS else name.split("_")[0]]]
    made, want = ours(*args), torchs(*args)
    assert (made.device, made.shape, made.dtype, made.stride()) == (
        want.device,
        want.shape,
        want.dtype,
        want.stride(),
    )


@pytest.mark.parametrize("name", CALLS)
def test_ops_on_meta_alone(name):
    op, call = OPS[name], CALLS[name]
    made = op.packet.raw(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in call))
    want = op.packet.raw(*call)
    for on_meta, there in zip(*((t if isinstance(t, tuple) else (t,)) for t in (made, want)), strict=True):
        assert on_meta.is_meta
        assert (on_meta.shape, on_meta.dtype, on_meta.stride()) == (there.shape, there.dtype, there.stride())


def test_fakes_refuse_mixed_devices():
    with FakeTensorMode():
        x, w = torch.empty(2, 3), torch.empty(4, 3, device="meta")
        with pytest.raises(RuntimeError, match="same device"):
            torch.ops.fastnn.linear.raw(x, w, None)


def test_settings_of_one_thread(monkeypatch):
    """What a thread has set is seen by its own calls alone."""
    monkeypatch.setattr(watch, "prefer_kernels", False)
    x = torch.ones(1, 4)
    seen = []
    kernels = []

    def call():
        fast.linear(x, x)
        kernels.append(watch.prefers_kernels())

    with watch.watching(lambda op, args, plan: seen.append(op.name), prefer_kernels=True):
        call()
        other = threading.Thread(target=call)
        other.start()
        other.join()
    assert seen == ["linear"]
    assert kernels == [True, False]


@pytest.mark.parametrize("name", fast.ACCELERATED)
def test_public_functions_are_typed(name):
    function = getattr(fast, name)
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_plans_are_remembered_until_the_rules_change(monkeypatch):
    """A call of a known kind asks no rule; another level, or other gradients, is another kind."""
    monkeypatch.setattr(watch, "prefer_kernels", False)
    asked = []

    def chosen(op, kind, sizes):
        asked.append(dict(sizes)["rows"])
        return ("torch",) if asked[-1] == 3 else ("blocked", "torch")

    monkeypatch.setattr(cpu_choices, "chosen", chosen)
    route.forget_plans()
    try:
        w = torch.randn(5, 4)
        for _ in range(3):
            for rows in (2, 3):
                x = torch.randn(rows, 4)
                torch.testing.assert_close(fast.linear(x, w), torch.nn.functional.linear(x, w))
        assert asked == [2, 3]
        fast.linear(torch.randn(2, 4), w.requires_grad_())
        fast.linear(torch.randn(2, 4).double(), w.detach().double())
        assert len(asked) == 4
        _library.set_isa(_library.current_isa())
        fast.linear(torch.randn(2, 4), w)
        assert len(asked) == 5
        for rows in range(5000):  # no leak: of so many kinds none is kept for good
            fast.linear(torch.empty(rows, 4), w)
        assert sum(map(len, route._remembered)) <= route._MOST_PLANS
    finally:
        route.forget_plans()
