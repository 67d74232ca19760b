"""Where calls on a GPU go, and why: on fake tensors, so that there need not be one."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import look_ups
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastnn.ops import attention, conv, linear, pool
from fastnn.ops.core import activations, choices, gpu, on_gpus, route, watch
from fastnn.ops.core.op import OPS, ROUTES


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Tensors on a GPU of compute capability 9.0 that there need not be."""
    monkeypatch.setattr(gpu, "architectures", lambda: "80-real 90a-real")
    monkeypatch.setattr(gpu, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(gpu, "_has_triton", lambda: True)
    monkeypatch.setattr(choices, "gpu", lambda index: {"key": "a GPU", "capability": (9, 0)})
    # The choices of whoever runs the tests are not to count.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = choices._tables, gpu._unusable
    for cached in caches:
        cached.cache_clear()
    with FakeTensorMode():
        yield lambda *shape: torch.empty(shape, device="cuda")
    for cached in caches:
        cached.cache_clear()


def test_call_goes_to_the_cuda_kernel(fake_gpu, native):
    assert pool.max_pool2d(fake_gpu(2, 3, 8, 8), 2).device.type == "cuda"
    assert pool.adaptive_avg_pool2d(fake_gpu(2, 3, 8, 8), 1).shape == (2, 3, 1, 1)
    assert native == [("max_pool2d", None), ("adaptive_avg_pool2d", None)]


def test_kernel_that_is_not_measured_stays_with_torch(fake_gpu, native, monkeypatch):
    monkeypatch.setattr(watch, "prefer_kernels", False)
    pool.max_pool2d(fake_gpu(2, 3, 8, 8), 2)
    assert native == [("max_pool2d", "not measured on this GPU: fastnn.tune measures")]
    native.clear()
    monkeypatch.setattr(choices, "SHIPPED", {(9, 0): {"max_pool2d": {"*": "kernel"}}})
    choices._tables.cache_clear()
    pool.max_pool2d(fake_gpu(2, 3, 8, 8), 2)
    assert native == [("max_pool2d", None)]


def test_old_gpu_and_build_without_cuda(fake_gpu, native, monkeypatch):
    monkeypatch.setattr(gpu, "_capability", lambda index: (7, 5))
    with pytest.warns(UserWarning, match=r"compute capability 8\.0, this GPU has 7\.5"):
        pool.avg_pool2d(fake_gpu(2, 3, 8, 8), 2)
    gpu._unusable.cache_clear()
    monkeypatch.setattr(gpu, "architectures", lambda: "")
    with pytest.warns(UserWarning, match="holds no CUDA kernels"):
        pool.avg_pool2d(fake_gpu(2, 3, 8, 8), 2)
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.max_pool2d(fake_gpu(2, 3, 8, 8), 2)
    assert native.pop() == ("max_pool2d", "this build holds no CUDA kernels")
    assert [reason for _, reason in native] == [
        "GPU kernels need compute capability 8.0, this GPU has 7.5",
        "this build holds no CUDA kernels",
    ]


def test_image_that_is_too_large(fake_gpu, native):
    pool.max_pool2d(fake_gpu(1, 1, 1 << 15, 1 << 14), 2)
    pool.max_pool2d(fake_gpu(4, 1, 1 << 14, 1 << 14), 2)
    pool.adaptive_avg_pool2d(fake_gpu(1, 1, 1, 1 << 20), (1, 1 << 10))
    pool.adaptive_avg_pool2d(fake_gpu(1, 1, 1, 1 << 20), 1)
    reason = "an image or a window of too many elements for the CUDA kernel"
    assert [r for _, r in native] == [reason, None, reason, None]


def test_triton(fake_gpu, native, monkeypatch):
    x, w = fake_gpu(2, 3), fake_gpu(4, 3)
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        linear.linear(x, w)
    gpu._unusable.cache_clear()
    monkeypatch.setattr(gpu, "_has_triton", lambda: True)
    assert linear.linear_relu(x, w).shape == (2, 4)
    linear.linear_relu(x.double(), w.double())
    # The reason is fastnn's, the error torch's.
    with pytest.raises(RuntimeError, match=r"same device|different devices"):
        linear.linear_relu(x, torch.empty(4, 3))
    reasons = [
        "Triton is not installed",
        None,
        "no Triton kernel for torch.float64",
        "mixed devices cuda:0 and cpu",
    ]
    assert [reason for _, reason in native] == reasons


def test_linear_without_features(fake_gpu, native):
    x, w = fake_gpu(2, 0), fake_gpu(4, 0)
    for function in (linear.linear, linear.linear_relu, linear.linear_gelu):
        assert function(x, w).shape == (2, 4)
    assert [reason for _, reason in native] == ["no input features"] * 3


def test_linear_gelu(fake_gpu, native):
    x, w = fake_gpu(2, 3), fake_gpu(4, 3)
    assert linear.linear_gelu(x, w).shape == (2, 4)
    linear.linear_gelu(x.double(), w.double())
    assert native == [
        ("linear_activation", None),
        ("linear_activation", "no Triton kernel for torch.float64"),
    ]


class InPlaceOfKernels(TorchDispatchMode):
    """Notes which candidate each op would run, as its kernel on a GPU asks."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        if space == "fastnn":
            self.ran.append((name, on_gpus.candidate_of(OPS[name], args)))
        return function(*args, **(kwargs or {}))


def test_choice_is_looked_up_once(fake_gpu, monkeypatch):
    x, w = fake_gpu(2, 3), fake_gpu(4, 3)
    images, kernels = fake_gpu(2, 8, 6, 6), fake_gpu(4, 8, 3, 3)
    looked_up = look_ups(
        monkeypatch, {"linear": "plain", "linear_relu": "torch", "conv2d": "64 x 64", "max_pool2d": "kernel"}
    )
    with InPlaceOfKernels() as kernels_run:
        linear.linear(x, w)
        linear.linear(x, w)
        linear.linear_relu(x, w)
        conv.conv2d(images, kernels)
        pool.max_pool2d(images, 2)
        assert looked_up == ["linear", "linear", "linear_relu", "conv2d", "max_pool2d"]
        # A call that does not come from the routing has nothing to go by but its arguments.
        torch.ops.fastnn.linear(x, w, None)
        assert looked_up[5:] == ["linear"]
    assert kernels_run.ran == [
        ("linear", "plain"),
        ("linear", "plain"),
        ("conv2d", "64 x 64"),
        ("max_pool2d", "kernel"),
        ("linear", "plain"),
    ]


def test_eager_call_remembers_its_plan(fake_gpu, monkeypatch):
    """Fake tensors in place of a GPU's: one look-up for calls alike, and the chosen kernel without the dispatcher."""
    monkeypatch.setattr(route, "REAL", frozenset((*route.REAL, FakeTensor)))
    monkeypatch.setattr(route, "_watching_modes", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x, w = fake_gpu(2, 3), fake_gpu(4, 3)
    ran = []
    run = OPS["linear"].candidates["plain"]
    candidates = {**OPS["linear"].candidates, "plain": lambda *args: ran.append(args) or run(*args)}
    monkeypatch.setattr("fastnn.triton.linear._multiply", lambda *args, **rest: None)
    function = route.route_of(replace(OPS["linear"], candidates=candidates))
    looked_up = look_ups(monkeypatch, {"linear": "plain", "max_pool2d": "torch"})
    for _ in range(3):
        assert function(x, w, None).shape == (2, 4)
        assert pool.max_pool2d(fake_gpu(2, 3, 8, 8), 2).shape == (2, 3, 4, 4)
    assert looked_up == ["linear", "max_pool2d"]
    assert len(ran) == 3
    # Another shape, layout or dtype is another kind of call.
    for a in (fake_gpu(5, 3), fake_gpu(3, 2).t(), x.half().float().bfloat16()):
        function(a, w.to(a.dtype), None)
    assert looked_up.count("linear") == 4
    route.forget_plans()
    function(x, w, None)
    assert looked_up.count("linear") == 5
    # What sees every op has the call pass through the dispatcher.
    monkeypatch.setattr(route, "_watching_modes", lambda: 1)
    ran.clear()
    with InPlaceOfKernels() as kernels_run:
        function(x, w, None)
    assert kernels_run.ran == [("linear", "plain")]
    assert not ran


def test_chosen_kernel_takes_only_what_it_covers(fake_gpu, monkeypatch):
    """The class of a call does not tell of all that a kernel asks for."""
    look_ups(monkeypatch, {"attention": "warpgroups", "linear": "persistent"})
    q, x = fake_gpu(1, 2, 64, 64), fake_gpu(64, 64)
    halves = q.half(), x.half()
    attended = [
        (t, t, t, mask, False, None) for t in (q, halves[0]) for mask in (None, fake_gpu(1, 1, 64, 64))
    ]
    op = OPS["attention"]
    assert [on_gpus.candidate_of(op, args) for args in attended] == [
        "kernel",
        "kernel",
        "warpgroups",
        "kernel",
    ]
    op = OPS["linear"]
    assert [on_gpus.candidate_of(op, (t, t, None)) for t in (x, halves[1])] == ["kernel", "persistent"]
    monkeypatch.setattr(gpu, "_capability", lambda index: (8, 0))
    assert on_gpus.candidate_of(op, (halves[1], halves[1], None)) == "kernel"


def test_what_is_slower_on_the_cpu_is_not_asked_about_a_gpu(fake_gpu, monkeypatch, rules_of):
    rules_of("portable", "avx2", "avx512")
    look_ups(monkeypatch, {"linear": "kernel", "conv2d": "kernel"})
    with InPlaceOfKernels() as kernels_run:
        linear.linear(fake_gpu(300, 70), fake_gpu(50, 70))
        conv.conv2d(fake_gpu(8, 256, 56, 56), fake_gpu(256, 256, 3, 3))
    assert kernels_run.ran == [("linear", "kernel"), ("conv2d", "kernel")]


def test_attention_of_more_heads_than_a_grid_has(fake_gpu, native):
    for batch in (4095, 4096):
        q = fake_gpu(batch, 16, 4, 32)
        assert attention.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert native == [("attention", None), ("attention", "more than 65535 heads of all sequences on a GPU")]


def test_attention_with_dropout(fake_gpu, native):
    q = fake_gpu(2, 4, 16, 32)
    y = attention.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    assert y.shape == q.shape
    assert attention.scaled_dot_product_attention(q, q, q, dropout_p=1.0).shape == q.shape
    assert native == [("attention_dropout", None)]


def test_conv(fake_gpu, native):
    x, w = fake_gpu(2, 8, 6, 6), fake_gpu(4, 8, 3, 3)
    assert conv.conv2d_relu(x, w).shape == (2, 4, 4, 4)
    assert conv.conv2d_relu_max_pool2d(x, w).shape == (2, 4, 2, 2)
    conv.conv2d(x.double(), w.double())
    conv.conv2d_relu_max_pool2d(x, w, kernel_size=3, pool_stride=2)
    conv.conv2d(fake_gpu(1, 1, 1 << 15, 1 << 15), fake_gpu(1, 1, 1, 1))
    assert native == [
        ("conv2d_relu", None),
        ("conv2d_relu_max_pool2d", None),
        ("conv2d", "no CUDA kernel for torch.float64"),
        ("conv2d_relu_max_pool2d", None),
        ("conv2d", "too many elements for the CUDA kernel"),
    ]


def test_conv_with_activation(fake_gpu, native):
    x, w, residual = fake_gpu(2, 8, 6, 6), fake_gpu(4, 8, 3, 3), fake_gpu(2, 4, 4, 4)
    assert conv.conv2d_activation(x, w, activation="gelu", residual=residual).shape == residual.shape
    assert conv.conv2d_activation(x, w, activation="silu").shape == residual.shape
    conv.conv2d_activation(*(t.double() for t in (x, w)), activation="silu")
    conv.conv2d_activation(fake_gpu(1, 1, 1 << 15, 1 << 15), fake_gpu(1, 1, 1, 1), activation="tanh")
    # One that broadcasts is torch's.
    conv.conv2d_activation(x, w, activation="relu", residual=fake_gpu(1, 4, 4, 4))
    assert native == [
        ("conv2d_activation", None),
        ("conv2d_activation", None),
        ("conv2d_activation", "no CUDA kernel for torch.float64"),
        ("conv2d_activation", "too many elements for the CUDA kernel"),
        ("conv2d_activation", "a residual that is not of the output's shape"),
    ]


def test_gradients_of_a_conv_with_activation(fake_gpu, native):
    x, w, y = fake_gpu(2, 8, 6, 6), fake_gpu(4, 8, 3, 3), fake_gpu(2, 4, 4, 4)
    options = (1, 1, 0, 0, 1, 1, 1)
    wanted = (True, True, True, True)
    backward = ROUTES["conv2d_activation_backward"]
    made = backward(y, x, w, y, *options, activations.NUMBERS["relu6"], *wanted)
    assert [g.shape for g in made] == [t.shape for t in (x, w, fake_gpu(4), y)]
    backward(*(t.double() for t in (y, x, w, y)), *options, activations.NUMBERS["tanh"], *wanted)
    x, w, y = fake_gpu(1, 1, 1 << 15, 1 << 15), fake_gpu(1, 1, 1, 1), fake_gpu(1, 1, 1 << 15, 1 << 15)
    backward(y, x, w, y, *options, activations.NUMBERS["sigmoid"], *wanted)
    assert [reason for _, reason in native] == [
        None,
        "no CUDA kernel for torch.float64",
        "too many elements for the CUDA kernel",
    ]


def test_chosen_kernels_of_a_conv_with_activation(fake_gpu, monkeypatch):
    x, w, residual = fake_gpu(2, 8, 6, 6), fake_gpu(4, 8, 3, 3), fake_gpu(2, 4, 4, 4)
    chosen = {"conv2d_activation": "torch, then one pass", "conv2d_activation_backward": "64 x 64"}
    looked_up = look_ups(monkeypatch, chosen)
    options = (1, 1, 0, 0, 1, 1, 1)
    with InPlaceOfKernels() as kernels_run:
        conv.conv2d_activation(x, w, activation="silu", residual=residual)
        torch.ops.fastnn.conv2d_activation_backward(
            residual, x, w, residual, *options, 8, True, True, True, True
        )
    assert kernels_run.ran == list(chosen.items())
    assert looked_up == list(chosen)
    # By warpgroups where they take the call: elements of 2 bytes, channels in eights, forward and back.
    look_ups(monkeypatch, dict.fromkeys(chosen, "warpgroups"))
    for t, covered in ((x, "kernel"), (x.half(), "warpgroups")):
        args = (t, w.to(t), None, residual.to(t), *options, 4)
        assert on_gpus.candidate_of(OPS["conv2d_activation"], args) == covered
        args = (residual.to(t), t, w.to(t), residual.to(t), *options, 8, True, True, True, True)
        assert on_gpus.candidate_of(OPS["conv2d_activation_backward"], args) == "kernel"
        wide = torch.empty(8, 8, 3, 3, device="cuda").to(t)
        args = (residual.to(t), t, wide, residual.to(t), *args[4:])
        assert on_gpus.candidate_of(OPS["conv2d_activation_backward"], args) == covered


def test_registered_where_there_are_kernels():
    for name, op in OPS.items():
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{name}", "CUDA")
        assert has == (op.on_gpus == "triton" or (op.on_gpus == "cuda" and bool(gpu.architectures())))


def test_autocast_on_a_gpu(fake_gpu, native):
    x, w = fake_gpu(2, 3), fake_gpu(4, 3)
    # The context manager refuses without a device.
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert linear.linear_relu(x, w).dtype is torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.linear_relu(x, w).dtype is torch.float32
    assert native == [("linear_relu", None)] * 2


def test_tracer_takes_the_answers_as_constants(monkeypatch):
    monkeypatch.setattr(gpu, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(gpu, "_has_triton", lambda: True)
    monkeypatch.setattr(choices, "_tables", lambda index: ({}, {"linear": {"*": "kernel"}}))

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        usable = gpu._unusable("triton", 0) is None
        if (
            usable
            and choices._chosen_for("linear", 0, "*") == "kernel"
            and choices._chosen_for("conv2d", 0, "*") is None
        ):
            return x + 1
        return x

    assert torch.equal(f(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_tracer_asks_for_the_class_of_fixed_sizes(monkeypatch, dynamic):
    """Where sizes are symbols, what holds for the whole op counts, and another batch is not traced again."""
    tables = {"linear": {"float32 64x32 16x32 None": "class"}}, {"linear": {"*": "all"}}
    monkeypatch.setattr(choices, "_tables", lambda index: tables)
    traced, device = [], torch.device("cuda", 0)

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=dynamic)
    def f(x, w):
        return x.sum() * 0 + {"class": 1, "all": 2}[choices.chosen("linear", (x, w, None), device)]

    w = torch.zeros(16, 32)
    assert f(torch.zeros(40, 32), w) == (2 if dynamic else 1)
    assert f(torch.zeros(50, 32), w) == (2 if dynamic else 1)
    if dynamic:
        assert len(traced) == 1
