"""Faults put into fastnn on purpose: ``make mutants`` builds and tests each, and every one has to be noticed.

A mutant is a piece of a source file, what takes its place, and the tests that are to fail. It says that those tests look at what
that line does: a test that passes with the line broken is no test of it. ``tests/test_mutants.py`` checks that the list still
fits the sources.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
#: pytest's exit status where tests ran and some failed.
TESTS_FAILED = 1
#: A mutant may make a loop that does not end.
MOST_SECONDS = 900


class Mutant(NamedTuple):
    """A fault."""

    file: str
    text: str  # stands in the file once
    becomes: str
    tests: str  # as pytest's command line has them


MUTANTS = (
    # Public functions: arguments and layouts.
    Mutant(
        "fastnn/ops/pool/functional.py",
        "return _batched(_max_pool, input, return_indices, *window, ceil_mode)",
        "return _batched(_max_pool, input, return_indices, *window, False)",
        "tests/test_pool.py -k without_batch",
    ),
    Mutant(
        "fastnn/ops/core/numbers.py",
        "return value is False or value is True",
        "return isinstance(value, (int, float, str))",
        "tests/test_arguments.py -k takes_and_refuses",
    ),
    Mutant(
        "fastnn/ops/attention/functional.py",
        "or type(scale) is float or type(scale) is int",
        "or hasattr(scale, '__float__')",
        "tests/test_arguments.py -k scale",
    ),
    Mutant(
        "fastnn/ops/attention/functional.py",
        "if not (_fused_allowed() and _formula_allowed()):",
        "if not _formula_allowed():",
        "tests/test_attention.py -k choice_of_backends",
    ),
    Mutant(
        "fastnn/ops/pool/functional.py",
        "        return maximum.max_pool2d_with_indices(input, *window)[0]\n    return maximum.max_pool2d(input, *window)",
        "        return F.max_pool2d(input, *shapes.pairs(window), ceil_mode=window[-1])\n    return maximum.max_pool2d(input, *window)",
        "tests/test_pool.py",
    ),
    # Routes, threads and devices.
    Mutant(
        "fastnn/ops/core/autocast.py",
        "        and a.dtype is not torch.float64\n",
        "",
        "tests/test_linear.py tests/test_conv.py tests/test_modules.py -k autocast",
    ),
    Mutant(
        "fastnn/ops/core/watch.py",
        "            watched[thread] = before",
        "            del watched[thread]",
        "tests/test_explain.py -k within_another",
    ),
    Mutant(
        "fastnn/ops/core/declare.py",
        "if any([device != devices[0] for device in devices]):",
        "if False:",
        "tests/test_declare.py -k mixed_devices",
    ),
    Mutant(
        "fastnn/ops/core/watch.py",
        "    watch = watched.get(_this_thread())\n    if watch is not None and watch.recorder is not None:",
        "    watch = next(iter(watched.values()), None)\n    if watch is not None and watch.recorder is not None:",
        "tests/test_explain.py -k threads",
    ),
    Mutant(
        "fastnn/ops/core/described.py",
        "    return all([is_static(n) for n in tensor.shape])",
        "    return True",
        "tests/test_export.py -k ask_for_no_size",
    ),
    Mutant(
        "fastnn/ops/core/user_file.py",
        "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC",
        "tests/test_tune.py -k lock",
    ),
    Mutant(
        "fastnn/ops/core/user_file.py",
        "except (ValueError, RecursionError) as error:",
        "except ValueError as error:",
        "tests/test_tune.py",
    ),
    # The plan, by rules.
    Mutant(
        "fastnn/ops/core/plan.py",
        "        if covers_by(mask, number):\n            return number\n",
        "        return number\n",
        "tests/test_rules.py -k first_that_covers",
    ),
    Mutant(
        "fastnn/ops/core/rules.py",
        "sizes[rule.size] <= rule.most",
        "sizes[rule.size] < rule.most",
        "tests/test_rules.py -k by_size",
    ),
    Mutant(
        "fastnn/ops/core/route.py",
        "    return theirs[0] if by_torch[0] else made[0], *(theirs if by_torch[1] else made)[1:]",
        "    return made",
        "tests/test_rules.py -k each_gradient",
    ),
    Mutant(
        "fastnn/ops/core/cpu_choices.py",
        "for *_, path in sorted(relatives)",
        "for *_, path in sorted(relatives, reverse=True)",
        "tests/test_rules.py -k order_of_files",
    ),
    Mutant(
        "fastnn/ops/core/route.py",
        "_library.on_set_isa.append(forget_plans)\n",
        "",
        "tests/test_declare.py -k remembered",
    ),
    # Gradients by Python.
    Mutant(
        "fastnn/ops/core/bilinear.py",
        "    return torch.ops.aten.threshold_backward(grad, output, 0)",
        "    return grad * (output > 0)",
        "tests/test_linear.py -k 'nan or second or zeros or gradients'",
    ),
    Mutant(
        "fastnn/ops/core/second_derivative.py",
        "create_graph=again",
        "create_graph=False",
        "tests/test_attention.py tests/test_layer_norm.py -k 'hessian or second'",
    ),
    # Layers and their containers.
    Mutant(
        "fastnn/nn/conv.py",
        "Fusion((torch.nn.ReLU, MaxPool2d), _with_relu_max_pool, _is_plain_pool)",
        "Fusion((torch.nn.ReLU, MaxPool2d), _with_relu_max_pool)",
        "tests/test_convert.py -k 'pool or ceil'",
    ),
    Mutant(
        "fastnn/nn/_layer.py",
        'lambda layer: layer.approximate == "none"',
        "lambda layer: True",
        "tests/test_activations.py -k sequentials",
    ),
    # Whole models.
    # Programs and files.
    Mutant(
        "fastnn/graph/memory.py",
        "if other.first <= span.last and span.first <= other.last",
        "if other.first < span.last and span.first < other.last",
        "tests/test_program.py -k 'live_together'",
    ),
    Mutant(
        "fastnn/graph/program.py",
        "            if any((v.dtype, v.sizes, v.strides) != alike or v.offset for v in others):\n                continue\n",
        "",
        "tests/test_program.py -k take_the_place",
    ),
    Mutant(
        "fastnn/graph/program.py",
        "            old.last = new.last\n",
        "",
        "tests/test_program.py -k take_the_place",
    ),
    Mutant(
        "fastnn/graph/unread.py",
        "> _FEW_ROWS",
        "> 0",
        "tests/test_program.py -k nobody_reads",
    ),
    Mutant(
        "fastnn/graph/encoded.py",
        " or found._schema.is_mutable",
        "",
        "tests/test_saved.py -k may_name",
    ),
    Mutant(
        "csrc/program/program.cpp",
        "FASTNN_CHECK(t.bytes <= bytes[at] - offset,",
        "FASTNN_CHECK(t.bytes <= bytes[at],",
        "tests/test_program.py -k hostile",
    ),
    Mutant(
        "fastnn/graph/fuse.py",
        "if not alike or other is node or is_constant(other):",
        "if other is node or is_constant(other):",
        "tests/test_graph.py -k several_places",
    ),
    Mutant(
        "fastnn/graph/fuse.py",
        "shift = -m * scale if bias is None else",
        "shift = -m if bias is None else",
        "tests/test_graph.py -k 'ResNet or each_pass'",
    ),
    Mutant(
        "fastnn/graph/ir.py",
        "return next(iter(node.users)) if len(node.users) == 1 else None",
        "return next(iter(node.users), None)",
        "tests/test_graph.py -k done_once",
    ),
    Mutant(
        "fastnn/graph/layout.py",
        "if is_call(node, aten.view.default, aten._unsafe_view.default):",
        "if False:",
        "tests/test_graph.py -k 'layouts or small or layout_of_a_result'",
    ),
    Mutant(
        "fastnn/nn/_layer.py",
        "        or module._forward_hooks\n",
        "",
        "tests/test_convert.py -k hooks",
    ),
    Mutant(
        "fastnn/nn/container.py",
        "                fused = len(found[1])",
        "                fused = 1",
        "tests/test_convert.py",
    ),
    Mutant(
        "fastnn/ops/core/packed_weight.py",
        "self._memory = weight.detach()",
        "self._memory = weight.detach().clone()",
        "tests/test_freeze.py -k memory",
    ),
    Mutant(
        "fastnn/ops/core/packed_weight.py",
        "        if weight.requires_grad:\n            self._weight = None  # for good\n            self._forget()\n            return False\n",
        "        if weight.requires_grad and _is_grad_enabled():\n            return False\n",
        "tests/test_freeze.py -k 'optimizer or let_go'",
    ),
    # Kernels.
    Mutant(
        "csrc/cpu/max_pool.cpp",
        "        if (x > best || x != x) {",
        "        if (x >= best || x != x) {",
        "tests/test_pool.py",
    ),
    Mutant(
        "csrc/cpu/max_pool.cpp",
        "            const auto more = (x > best) | is_nan(x);",
        "            const auto more = x > best;",
        "tests/test_pool.py -k nan",
    ),
    Mutant(
        "csrc/cpu/avg_pool.cpp",
        "if (axis.adaptive || !count_include_pad)",
        "if (axis.adaptive || count_include_pad)",
        "tests/test_pool.py",
    ),
    Mutant(
        "csrc/cpu/conv_rows.h",
        "          chains.take(tile);\n",
        "",
        "tests/test_conv.py -k deep_sums",
    ),
    Mutant(
        "csrc/cpu/layer_norm.cpp",
        "V x = scale[r] * ((d * w - total[r]) - normal * by_normal[r]);",
        "V x = scale[r] * (d * w - normal * by_normal[r]);",
        "tests/test_layer_norm.py",
    ),
    Mutant(
        "csrc/cpu/mask_and_sum.h",
        "through<kActivation>(x, load(output + at, count));",
        "through<kActivation>(x, load(output + at, count) + splat(A(1)));",
        "tests/test_linear.py",
    ),
    Mutant(
        "csrc/cpu/gemm.h",
        "if (g.residual != nullptr) part.residual += i * g.c_m;",
        "",
        "tests/test_activations.py -k linear",
    ),
    Mutant(
        "csrc/cpu/conv_depthwise.cpp",
        "  return {first, max_of(first, last)};\n}\nInside outputs_inside",
        "  return {0, max_of(first, last)};\n}\nInside outputs_inside",
        "tests/test_activations.py -k conv2d",
    ),
    Mutant(
        "csrc/cpu/attention_block.h",
        "max_of(0, min_of(n, q + 1 - first))",
        "max_of(0, min_of(n, q + 2 - first))",
        "tests/test_attention.py",
    ),
    Mutant(
        "csrc/cpu/attention_backward.cpp",
        "const V w = exp_negative(load(x + c) - most) * over;",
        "const V w = exp_negative(load(x + c) - most) * over * over;",
        "tests/test_attention.py",
    ),
    Mutant(
        "csrc/cpu/attention_backward.cpp",
        "  const bool few = algorithm == AttentionAlgorithm::few_queries;",
        "  const bool few = false;",
        "tests/test_attention.py -k 'logits or weights_of_the_forward'",
    ),
    # What stands between torch and the kernels.
    Mutant(
        "csrc/checks/checks.cpp",
        "  stride = stride < padded ? stride : padded;\n",
        "",
        "tests/test_hostile_arguments.py tests/test_arguments.py -k 'stride or huge'",
    ),
    Mutant(
        "csrc/checks/checks.cpp",
        "  FASTNN_CHECK(values.h <= kMostOption && values.w <= kMostOption, name,",
        "  FASTNN_CHECK(values.h <= kMostOption || values.w <= kMostOption, name,",
        "tests/test_hostile_arguments.py -k option",
    ),
    Mutant(
        "csrc/ops/linear.cpp",
        "(bias->dim() == 1 && bias->size(0) == n)",
        "(bias->dim() == 1 && bias->size(0) <= n)",
        "tests/test_declare.py tests/test_linear.py tests/test_fuzz_raw_ops.py",
    ),
    Mutant(
        "csrc/ops/conv.cpp",
        "[&](ConvAlgorithm a) { return uncovered_gradient(call, a); };\n  const auto input_algorithm",
        "[&](ConvAlgorithm) -> const char* { return nullptr; };\n  const auto input_algorithm",
        "tests/test_fuzz_raw_ops.py -k conv",
    ),
    Mutant(
        "csrc/ops/common.cpp",
        "    const size_t rounded = (bytes + 63) / 64 * 64;",
        "    bytes *= 2048;\n    const size_t rounded = (bytes + 63) / 64 * 64;",
        "tests/test_fuzz_raw_ops.py -k conv",
    ),
    Mutant(
        "csrc/ops/packed.cpp",
        "weight.numel() > 0",
        "weight.dim() > 0",
        "tests/test_hostile_arguments.py -k without_elements",
    ),
)


def _copy_of_the_sources(to: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def _build(tree: Path) -> subprocess.CompletedProcess:
    """The library, by the compiler's cache where there is one; without CUDA, of which these tests run nothing."""
    configure = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
    commands = [[*configure, "-DFASTNN_CUDA=OFF"], ["ninja", "-C", "build"]]
    environment = {**os.environ, "FASTNN_CUDA": "OFF"}
    for command in commands:
        made = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if made.returncode != 0:
            break
    return made


def _fate(tree: Path, mutant: Mutant) -> str:
    """What became of a mutant: that it was caught, or what else."""
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.text, mutant.becomes))
    try:
        if path.suffix != ".py":
            made = _build(tree)
            if made.returncode != 0:
                return f"does not build:\n{made.stdout[-2000:]}{made.stderr[-2000:]}"
        try:
            tests = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    *shlex.split(mutant.tests),
                ],
                cwd=tree,
                capture_output=True,
                text=True,
                timeout=MOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "caught: the tests do not end"
        if tests.returncode < 0:
            return f"caught: signal {-tests.returncode}"
        if tests.returncode == TESTS_FAILED:
            return "caught"
        if tests.returncode == 0:
            return "SURVIVED"
        return f"pytest ended with {tests.returncode}:\n{tests.stdout[-2000:]}"
    finally:
        path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", type=int, help="which mutants, counted from 1; all without")
    parser.add_argument("--python", action="store_true", help="only those that need no compiler")
    chosen = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        _copy_of_the_sources(tree)
        made = _build(tree)
        if made.returncode != 0:
            print(made.stdout, made.stderr)
            return 1
        for number, mutant in enumerate(MUTANTS, 1):
            if chosen.numbers and number not in chosen.numbers:
                continue
            if chosen.python and not mutant.file.endswith(".py"):
                continue
            fate = _fate(tree, mutant)
            missed += not fate.startswith("caught")
            becomes = " ".join(mutant.becomes.split()) or "nothing"
            print(
                f"{number:3} {mutant.file}: {' '.join(mutant.text.split())} -> {becomes}: {fate}", flush=True
            )
    print(f"{missed} not caught" if missed else "all caught")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
