"""What every declared op has in common: what it refuses, how its options travel, where its calls go."""

import pytest
import torch
import torch.nn.functional as F

import fastnn.nn.functional as fast
from fastnn.ops import _declare


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
    "linear_gelu": (image(5, 3), image(4, 3), image(4)),
    "linear_packed": (image(5, 3), image(4, 3), image(4), packed(image(4, 3)), 1),
    "linear_backward": (image(5, 4), image(5, 3), image(4, 3), *WANTED),
    "linear_relu_backward": (image(5, 4), image(5, 3), image(4, 3), image(5, 4), *WANTED),
    "conv2d": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), *CONV),
    "conv2d_relu": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), *CONV),
    "conv2d_winograd": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), 1, 1, 1, 0, 1, 1, 1, True),
    "conv2d_packed": (image(2, 3, 6, 7), image(4, 3, 3, 3), image(4), packed(image(4, 3, 3, 3)), *CONV, True),
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
        image(2, 4, 5),
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
    assert set(CALLS) == {name for name, op in _declare.OPS.items() if op.on_cpu}


@pytest.mark.parametrize("name", CALLS)
def test_ops_refuse_what_is_unsupported(name):
    """An eager call learns from the op's refusal that it is torch's: a kernel that took it would be wrong."""
    op, call = _declare.OPS[name], CALLS[name]
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
    op, call = _declare.OPS[name], CALLS[name]
    tensors = [i for i, value in enumerate(call) if isinstance(value, torch.Tensor)]
    alone = sum(call[i].is_floating_point() for i in tensors) == 1
    for i in tensors:
        for dtype in (torch.int32,) if alone else (torch.int32, torch.float64):
            with pytest.raises(RuntimeError):
                op.packet.raw(*call[:i], call[i].to(dtype), *call[i + 1 :])


@pytest.mark.parametrize(
    "name", [name for name in CALLS if "packed" in _declare.OPS[name].packet.overloads()]
)
def test_packed_options(name):
    op, call = _declare.OPS[name], CALLS[name]
    tensors, options = call[: len(op.tensors)], call[len(op.tensors) :]
    arguments = op.schema.arguments[len(op.tensors) :]
    packs = _declare._Packs([str(a.type) == "Optional[int]" for a in arguments])
    numbers = packs[options]
    assert len(numbers) == -(-len(options) // 7)
    expected, got = op.packet.raw(*call), op.packet.packed(*tensors, *numbers)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_options_that_do_not_fit_a_byte():
    packs = _declare._Packs([False, True])
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
