"""The algorithms of convolutions on the CPU, as ``csrc/cpu/conv.h`` names them, and what decides among them."""

from __future__ import annotations

import torch

from fastnn.ops.conv import shapes
from fastnn.ops.core.activations import NONE
from fastnn.ops.core.algorithms import NAMES, NUMBERS, Algorithms, Result, ask
from fastnn.ops.core.rules import Call

_BY_NUMBER = tuple(ask("_conv2d_algorithms").split(","))


def _is_nhwc(t) -> bool:
    """Whether a tensor counts as NHWC, as in torch: strides grow from channels over width and height to batch, without a tie."""
    least = 0
    if t.stride(1) == 0:
        return False
    for d in (1, 3, 2, 0):
        size, stride = t.shape[d], t.stride(d)
        if size == 0 or stride < least or (d == 0 and least == t.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def _told(input, weight, options, pool):
    """A call in numbers, as the library asks for it."""
    nhwc = _is_nhwc(input) or _is_nhwc(weight)
    shape = shapes.output_shape(input, weight, *options)
    sizes = (*input.shape, weight.shape[0], *weight.shape[2:], *options, *shape[2:])
    window = (*pool, *shapes.pooled_shape(shape, *pool)[2:]) if pool else ()
    return NUMBERS[input.dtype], nhwc, _is_nhwc(weight), sizes, window


def _breaks_torch(layout: str, channels: int, taps: int, options) -> bool:
    """Whether torch's gradient of the weight writes past its end.

    oneDNN in torch 2.13: NHWC, 1 x 1, stride 2, 6 channels of 200 x 200 in bfloat16, with AVX2 4 channels of 20 x 20 in float32.
    """
    return layout == "nhwc" and taps == 1 and channels < 16 and max(options[:2]) > 1


def _call(input, weight, options, what) -> Call:
    n, outputs, height, width = shapes.output_shape(input, weight, *options)
    _, channels, kernel_h, kernel_w = weight.shape
    groups = options[6]
    layout = "nhwc" if _is_nhwc(input) or _is_nhwc(weight) else "nchw"
    kind = f"{NAMES[input.dtype]} {layout} {what}"
    if groups > 1:
        kind += " depthwise" if channels == 1 else " grouped"
    return Call(
        kind,
        {
            "batch": n,
            "image": height * width,
            "pixels": n * height * width,
            "row": width,
            "channels": channels,
            "outputs": outputs // groups,
            "groups": groups,
            "taps": kernel_h * kernel_w,
            "depth": channels * kernel_h * kernel_w,
            "stride": max(options[:2]),
            "result": n * outputs * height * width,
            "work": n * outputs * height * width * channels * kernel_h * kernel_w,
        },
        what in ("training", "weight") and _breaks_torch(layout, channels, kernel_h * kernel_w, options),
    )


def _wants(*tensors) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def _describe(input, weight, bias, *rest) -> Call:
    return _call(input, weight, rest[:7], "training" if _wants(input, weight, bias) else "inference")


def _covering(input, weight, bias, *rest) -> int:
    return ask("_conv2d_covering", *_told(input, weight, rest[:7], rest[7:13]))


def _automatic(input, weight, bias, *rest) -> int:
    return ask("_conv2d_automatic", *_told(input, weight, rest[:7], rest[7:13]))


FORWARD = Algorithms(_BY_NUMBER, (Result(_covering, _automatic, _describe),))


def _without_residual(function):
    def asked(input, weight, bias, residual, *rest):
        return function(input, weight, bias, *rest[:7])

    return asked


def _describe_activation(input, weight, bias, residual, *rest):
    what = "training" if _wants(input, weight, bias, residual) else "inference"
    return _call(input, weight, rest[:7], what)


ACTIVATION = Algorithms(
    _BY_NUMBER,
    (Result(_without_residual(_covering), _without_residual(_automatic), _describe_activation),),
)


def _describe_packed(input, weight, bias, residual, packed, *rest):
    call = _call(input, weight, rest[:7], "inference")
    # What torch would pass over the result for once more.
    return call if rest[7] == NONE else call._replace(kind=call.kind + " activation")


def _pooled(function):
    def asked(input, weight, bias, packed, *rest):
        return function(input, weight, bias, *rest)

    return asked


# Torch's op stands for the call without the packed form, planned by itself.
PACKED = Algorithms(
    _BY_NUMBER,
    (
        Result(
            lambda input, weight, bias, residual, packed, *rest: _covering(input, weight, bias, *rest[:7]),
            lambda input, weight, bias, residual, packed, *rest: _automatic(input, weight, bias, *rest[:7]),
            _describe_packed,
        ),
    ),
)

POOLED_PACKED = Algorithms(_BY_NUMBER, (Result(_pooled(_covering), _pooled(_automatic), _pooled(_describe)),))


def of_gradients(split) -> Algorithms:
    """Those of an op of gradients, whose arguments `split` takes apart as in :mod:`fastnn.ops.conv.ops`."""

    def told(args):
        _, input, weight, _, _, options, pool, _ = split(*args)
        return _told(input, weight, options, pool)

    def result(place, what):
        def covering(*args):
            return ask("_conv2d_backward_covering", *told(args))

        def automatic(*args):
            return ask("_conv2d_backward_automatic", *told(args))[place]

        def describe(*args):
            _, input, weight, _, _, options, _, _ = split(*args)
            return _call(input, weight, options, what)

        return Result(covering, automatic, describe)

    return Algorithms(_BY_NUMBER, (result(0, "input"), result(1, "weight")))
