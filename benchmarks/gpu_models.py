"""Whole models on a GPU: stock against converted, eager and as one CUDA graph, forward and a training step.

``python3 -m benchmarks.gpu_models`` writes a line of JSON for each model as soon as it is measured. Each is tuned first, so that its calls
go to whatever was fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import clock, nets

DEVICE = "cuda"


def _resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(weights=None)


def _mobilenet() -> nn.Module:
    import torchvision

    return torchvision.models.mobilenet_v2(weights=None)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False
    )


#: By name: how it is built, the shape of its input, its dtype.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "small CNN, 64 images, fp32": (nets.NETS["small_cnn"][0], (64, 3, 32, 32), torch.float32),
    "MLP, 64 rows, fp32": (nets.NETS["mlp"][0], (64, 784), torch.float32),
    "VGG-8, 64 images, bf16": (nets.NETS["vgg8"][0], (64, 3, 32, 32), torch.bfloat16),
    "encoder layer, 8 x 512 tokens, bf16": (nets.NETS["encoder_layer"][0], (8, 512, 256), torch.bfloat16),
    "ResNet-50, 64 images, bf16": (_resnet50, (64, 3, 224, 224), torch.bfloat16),
    "MobileNetV2, 64 images, bf16": (_mobilenet, (64, 3, 224, 224), torch.bfloat16),
    "ViT-B/16, 32 images, bf16": (_vit, (32, 3, 224, 224), torch.bfloat16),
}


def _result(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _forward(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call():
        with torch.no_grad():
            return _result(model(x))

    return call


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    wanted = [p for p in model.parameters() if p.requires_grad]

    def call():
        y = _result(model(x))
        return torch.autograd.grad(y.float().square().mean(), wanted, allow_unused=True)

    return call


def _seconds(calls: dict[str, Callable], rounds: int = 9) -> dict[str, float]:
    """Medians of each, by blocks in turn."""
    timer, times = clock.CudaClock(), {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timer.seconds(call, 5))
    return {name: sorted(found)[rounds // 2] for name, found in times.items()}


def measure(name: str) -> dict:
    """What a model took, by variant: forward, and a training step without its optimizer."""
    import fastnn

    build, shape, dtype = MODELS[name]
    torch.manual_seed(0)
    stock = build().to(DEVICE, dtype).eval()
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    images = x.dim() == 4
    if images:
        stock, x = (
            stock.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    ours = fastnn.convert(copy.deepcopy(stock))
    want = _forward(stock, x)().float()
    told: dict = {"model": name, "tuned": {}, "notes": []}
    began = time.perf_counter()
    with torch.no_grad():
        for row in fastnn.tune(ours, x):
            told["tuned"][f"{row.op} ({row.calls})"] = row.chosen
            if row.dropped:
                told["notes"].append(f"{row.op} ({row.calls}): {row.dropped}")
    told["seconds to tune"] = time.perf_counter() - began
    told["error"] = float((_forward(ours, x)().float() - want).abs().max() / want.abs().max())
    variants = {"stock": _forward(stock, x), "converted": _forward(ours, x)}
    for how, make in (
        ("frozen", lambda: fastnn.freeze(stock, x)),
        ("layers frozen", lambda: fastnn.freeze(stock)),
    ):
        try:
            frozen = make()
            variants[how] = _forward(frozen, x)
            told[f"error, {how}"] = float((variants[how]().float() - want).abs().max() / want.abs().max())
        except Exception as error:
            variants.pop(how, None)
            told["notes"].append(f"{how}: {type(error).__name__}: {error}"[:500])
            told["notes"].append("".join(traceback.format_exception(error)[-9:])[-1800:])
    told["forward"] = _seconds(variants)
    graphs = {}
    for variant, call in variants.items():
        try:
            graphs[variant] = clock.captured(call)
        except Exception as error:
            told["notes"].append(f"graph of {variant}: {type(error).__name__}: {error}"[:500])
            torch.cuda.synchronize()
    told["graph"] = {k: v / clock.CALLS_IN_GRAPH for k, v in _seconds(graphs).items()}
    stock.train()
    ours.train()
    began = time.perf_counter()
    for row in fastnn.tune(ours, x):
        told["tuned"][f"{row.op} ({row.calls})"] = row.chosen
    told["seconds to tune training"] = time.perf_counter() - began
    told["step"] = _seconds({"stock": _step(stock, x), "converted": _step(ours, x)})
    return told


def host_costs() -> dict[str, dict[str, float]]:
    """Seconds that the host takes to start a small call: torch's function, fastnn's where torch was measured faster, and its kernel."""
    import torch.nn.functional as F

    import fastnn.nn.functional as ours
    from fastnn.ops.core import choices, route, watch

    def tensors(*shapes):
        return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]

    calls = {
        "linear_relu": (
            tensors((64, 256), (128, 256), (128,)),
            lambda x, w, b: torch.relu(F.linear(x, w, b)),
        ),
        "conv2d": (tensors((2, 8, 12, 12), (16, 8, 3, 3), (16,)), F.conv2d),
        "max_pool2d": ([*tensors((2, 16, 12, 12)), 2], F.max_pool2d),
        "scaled_dot_product_attention": (tensors(*((1, 2, 64, 64),) * 3), F.scaled_dot_product_attention),
    }

    def seconds(call, args, rounds=7, count=100):
        found = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call(*args)
            found.append((time.perf_counter() - start) / count)
        return sorted(found)[rounds // 2]

    made: dict[str, dict[str, float]] = {}
    for name, (args, stock) in calls.items():
        function = getattr(ours, name)
        seen = []
        with watch.watching(lambda op, given, plan, seen=seen: seen.append((op, given)), prefer_kernels=True):
            function(*args)
        made[name] = {"torch": seconds(stock, args)}
        op, given = seen[0]
        for how in (choices.TORCH, *op.candidates):
            choices.measured[op.name, choices.call_class(given)] = how
            route.forget_plans()
            with contextlib.suppress(Exception):
                function(*args)
                made[name][f"fastnn: {how}"] = seconds(function, args)
        choices.measured.clear()
        route.forget_plans()
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--filter", action="append", default=[], help="models whose name holds it; several are joined"
    )
    parser.add_argument("--out", default="-", help="a file for the lines")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder:
        # What is tuned here is not to be the choice of whoever measures.
        os.environ["XDG_CACHE_HOME"] = folder
        return _measure_all(args)


def _measure_all(args: argparse.Namespace) -> int:
    out = sys.stdout if args.out == "-" else open(args.out, "w", encoding="utf-8")
    ok = True
    try:
        print(json.dumps({"host": host_costs()}), file=out, flush=True)
    except Exception as error:
        print(
            json.dumps({"host": None, "failed": f"{type(error).__name__}: {error}"[:800]}),
            file=out,
            flush=True,
        )
    for name in MODELS:
        if args.filter and not any(word in name for word in args.filter):
            continue
        try:
            told = measure(name)
        except Exception as error:
            ok, told = False, {"model": name, "failed": f"{type(error).__name__}: {error}"[:800]}
        print(json.dumps(told), file=out, flush=True)
        torch.cuda.empty_cache()
        if clock.is_lost(DEVICE):
            return 1
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
