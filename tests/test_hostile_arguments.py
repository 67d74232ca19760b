"""Options and sizes at which arithmetic breaks: the op refuses them, or is right; never a crash, a hang or wild memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, LEVELS

import fastnn.nn.functional as fast

ops = torch.ops.fastnn

X, W = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 3, 3)
POOLED = torch.randn(2, 3, 4, 4)

# A valid call of each op that has options, and the place of the first of them.
CALLS = {
    "max_pool2d": (X, 2, 2, 2, 2, 1, 1, 1, 1, False),
    "max_pool2d_with_locations": (X, 2, 2, 2, 2, 1, 1, 1, 1, False),
    "max_pool2d_with_indices": (X, 2, 2, 2, 2, 1, 1, 1, 1, False),
    "max_pool2d_backward": (POOLED, POOLED.byte(), 8, 8, 2, 2, 2, 2, 0, 0, 1, 1, False),
    "avg_pool2d": (X, 2, 2, 2, 2, 1, 1, False, True, None),
    "avg_pool2d_backward": (POOLED, 8, 8, 2, 2, 2, 2, 0, 0, False, True, None, False),
    "adaptive_avg_pool2d": (X, 2, 2),
    "adaptive_max_pool2d": (X, 2, 2),
    "adaptive_avg_pool2d_backward": (POOLED, 8, 8, False),
    "conv2d": (X, W, None, 1, 1, 1, 1, 1, 1, 1),
    "conv2d_relu": (X, W, None, 1, 1, 1, 1, 1, 1, 1),
    "conv2d_winograd": (X, W, None, 1, 1, 1, 1, 1, 1, 1, True),
    "conv2d_relu_max_pool2d": (X, W, None, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0),
    "conv2d_backward": (torch.randn(2, 4, 8, 9), X, W, 1, 1, 1, 1, 1, 1, 1, True, True, True),
}
PLACES = [
    (name, place) for name, args in CALLS.items() for place, value in enumerate(args) if type(value) is int
]


@pytest.mark.parametrize("value", [2**62, 2**63 - 1, -(2**63), 2**31, -1])
@pytest.mark.parametrize(("name", "place"), PLACES)
def test_an_option_that_no_kernel_holds_is_refused(name, place, value):
    op = getattr(ops, name).raw
    op(*CALLS[name])
    args = list(CALLS[name])
    args[place] = value
    options = [str(a.name) for a in op._schema.arguments]
    if value == 2**31 and options[place].startswith("input_"):
        args[place] = 2**57
    with pytest.raises(RuntimeError):
        op(*args)


@pytest.mark.parametrize("stride", [2**31, 2**62, 2**31 - 1, (9, 2**40), 65536])
def test_stride_past_the_image(stride):
    """There is one output, as with a stride of the image's size; torch's op crashes at the last, so it gets that."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = fast.conv2d(x, w, stride=stride)
    y.sum().backward()
    x2, w2 = X.clone().requires_grad_(), W.clone().requires_grad_()
    y2 = F.conv2d(x2, w2, stride=9)
    y2.sum().backward()
    for ours, stock in ((y, y2), (x.grad, x2.grad), (w.grad, w2.grad)):
        torch.testing.assert_close(ours, stock)


# Windows that reach further than there are elements by far, most of it padding: kernel, dilation, padding, stride.
REACHES = [
    ((2, 2), (6000, 6000), (3000, 3000), (1, 1)),
    ((2, 3), (1, 40000), (0, 40001), (1, 3)),
    ((3, 1), (20000, 1), (20000, 0), (5, 1)),
    ((2, 2), (30000, 30000), (40000, 40000), (40000, 40000)),
]


def far_reaches(level):
    """Each forward and backward, in a process that may take no more than half a gigabyte for a call."""
    import itertools
    import resource

    from fastnn import _library

    _library.set_isa(level)
    torch.manual_seed(0)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29),) * 2)
    layouts = (torch.contiguous_format, torch.channels_last)
    for (kernel, dilation, padding, stride), channels, layout in itertools.product(REACHES, (2, 30), layouts):
        x = torch.randint(-3, 4, (1, channels, 3, 4)).float().to(memory_format=layout)
        w = torch.randint(-3, 4, (30, channels, *kernel)).float()
        options = (*stride, *padding, *dilation, 1)
        y = ops.conv2d.raw(x, w, None, *options)
        grads = ops.conv2d_backward.raw(torch.ones_like(y), x, w, *options, True, True, False)
        # Element by element of the image: where its taps are outputs.
        want = [torch.zeros(t.shape) for t in (y, x, w)]
        for r, s, i, j in itertools.product(*map(range, (*kernel, 3, 4))):
            u, v = i + padding[0] - r * dilation[0], j + padding[1] - s * dilation[1]
            if u % stride[0] or v % stride[1]:
                continue
            u, v = u // stride[0], v // stride[1]
            if 0 <= u < y.shape[2] and 0 <= v < y.shape[3]:
                want[0][0, :, u, v] += w[:, :, r, s] @ x[0, :, i, j]
                want[1][0, :, i, j] += w[:, :, r, s].sum(0)
                want[2][:, :, r, s] += x[0, :, i, j]
        for ours, exact in zip((y, *grads[:2]), want, strict=True):
            assert torch.equal(ours, exact), (kernel, dilation, padding, stride, channels, layout)


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("at", LEVELS)
def test_memory_of_a_window_that_reaches_far(at):
    """Planes of such padding would take gigabytes for each channel."""
    run(f"import sys; sys.path.insert(0, '.'); import test_hostile_arguments as t; t.far_reaches({at!r})")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_places_of_windows_of_more_elements_than_floats_tell_apart(layout):
    """2^24 is the last whole number before floats skip one."""
    x = torch.zeros(1, 2, 4099, 4099, dtype=torch.bfloat16)
    x[0, 0, 4096, 4096] = x[0, 1, 4097, 4095] = 2.0
    x = x.to(memory_format=layout)
    index = [4096 * 4099 + 4096, 4097 * 4099 + 4095]
    assert ops.adaptive_max_pool2d.raw(x, 1, 1)[1].flatten().tolist() == index
    for window in ((4098, 4098, 1, 1, 0, 0, 1, 1), (2, 2, 1, 1, 1, 1, 4096, 4096)):
        values, indices = ops.max_pool2d_with_indices.raw(x, *window, False)
        stock, stock_indices = F.max_pool2d(
            x, window[:2], window[2:4], window[4:6], window[6:8], return_indices=True
        )
        assert torch.equal(values, stock)
        assert torch.equal(indices, stock_indices)
    # Windows of many taps that are fewer than what lies between them.
    grad = ops.max_pool2d_indices_backward.raw(
        torch.ones(1, 2, 1, 1, dtype=x.dtype),
        torch.tensor(index).view(1, 2, 1, 1),
        4099,
        4099,
        *(0,) * 8,
        False,
    )
    assert grad.flatten(2).argmax(2).flatten().tolist() == index


def test_memory_of_indices():
    """No table of the window's elements: 128 MB here, 1.1 GB for an image of 12000 x 12000."""
    run("""
    import resource, torch, fastnn
    x = torch.zeros(1, 1, 4000, 4000, dtype=torch.float16)
    x[0, 0, 3000, 17] = 1
    ops = torch.ops.fastnn
    ops.adaptive_max_pool2d.raw(x[:, :, :8, :8], 1, 1)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20),) * 2)
    assert ops.adaptive_max_pool2d.raw(x, 1, 1)[1].item() == 3000 * 4000 + 17
    window = (4000, 4000, 1, 1, 0, 0, 1, 1, False)
    assert ops.max_pool2d_with_indices.raw(x, *window)[1].item() == 3000 * 4000 + 17
    """)


@pytest.mark.skipif(not FULL, reason="takes 9 GB of memory: FASTNN_FULL=1")
def test_gradient_of_a_tap_past_31_bits():
    width = 2**31 + 2
    grad = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    locations = torch.ones(1, 1, 1, 2, dtype=torch.uint8)
    out = ops.max_pool2d_backward.raw(grad, locations, 1, width, 1, 2, 1, 1, 0, 0, 1, 2**31 - 1, False)
    assert out[0, 0, 0, 2**31 - 1] == 1
    assert out[0, 0, 0, :8].abs().sum() == 0


@pytest.mark.parametrize("shape", [(2**40, 0), (2**40, 0, 1, 1), (2, 0, 2**20, 2**20), (0, 2, 2**40, 2**40)])
def test_packing_of_a_weight_without_elements(shape):
    """Its other sizes are more than a loop can count."""
    run(f"""
    import signal, torch, fastnn
    signal.alarm(30)
    try:
        torch.ops.fastnn._pack_weight(torch.empty(0).as_strided({shape}, (1,) * {len(shape)}), 1)
    except RuntimeError as error:
        assert "a weight with elements" in str(error)
    else:
        raise AssertionError("packed")
    """)


def test_divisor_that_floats_round():
    for divisor in (2**63 - 1, -(2**63), 2**62 + 1):
        y = ops.avg_pool2d.raw(X, 2, 2, 2, 2, 0, 0, False, True, divisor)
        assert torch.equal(y, F.avg_pool2d(X, 2, divisor_override=divisor))
