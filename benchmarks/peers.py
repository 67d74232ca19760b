"""The implementations that are measured against one another.

A new rival is a subclass of :class:`Peer` and an entry in :func:`all_peers`; one that needs a package which is not installed,
or that cannot run a case, says so in ``why_not`` and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.cases import Case, refuse_unknown

# A case with its tensors, ready to be checked and timed.
Bound = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]


class Peer:
    """One implementation: a function per case, and the inputs in the form it likes best.

    `slow`: it takes seconds to prepare a case, so a run that is limited in time has it in the quick selection only.
    `allowed`: the relative error that it may make, if it is not meant to be as exact as stock; its column says so.
    """

    name: str
    title: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow = False
    allowed: float | None = None

    def why_not(self, case: Case) -> str | None:
        """Why this peer has no part in a case, or None."""
        return None

    def bind(self, case: Case) -> Bound:
        """The case's function and its inputs, converted before the clock starts."""
        raise NotImplementedError

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """What is set around its blocks of calls; not timed."""
        yield


class FastNN(Peer):
    """fastnn, in the layout of the case."""

    name, title = "fastnn", "fastnn"

    def bind(self, case):
        return case.call("fastnn")


class Eager(Peer):
    """Stock PyTorch, op after op, in the layout of the case."""

    name, title = "eager", "stock eager"

    def bind(self, case):
        return case.call("stock")


class EagerChannelsLast(Eager):
    """Stock PyTorch with inputs and weights in channels_last, where the case itself is not: the best layout for stock."""

    name, title = "channels_last", "stock channels_last"

    def why_not(self, case):
        if not case.has_layouts:
            return "not images"
        return "the case itself is in channels_last" if case.layout == "channels_last" else None

    def bind(self, case):
        return case.call("stock", layout="channels_last")


class Reduced(Eager):
    """Stock PyTorch that may round fp32 inputs to bfloat16, by torch's own switch. Not the same precision: a column apart."""

    name, title = "reduced", "stock, fp32 inputs rounded to bf16 where torch may"
    devices = ("cpu",)
    allowed = 2.0**-6

    def why_not(self, case):
        if case.dtype != "fp32":
            return "the switch is for fp32"
        if case.workload.family in ("pool", "norm"):
            return "no products"
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not _has_bf16_instructions():
            return "this processor has no bf16 instructions"
        return None

    @contextlib.contextmanager
    def settings(self):
        matmul, conv = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
        before = matmul.fp32_precision, conv.fp32_precision
        matmul.fp32_precision = conv.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision = before


def _has_bf16_instructions() -> bool:
    get = getattr(torch.cpu, "get_capabilities", None)
    return bool(get and get().get("avx512_bf16"))


class Compiled(Eager):
    """Stock PyTorch under ``torch.compile``, compiled for the shape of the case."""

    name, title, slow, mode = "compile", "torch.compile", True, "default"

    def bind(self, case):
        function, tensors = case.call("stock")
        torch._dynamo.reset()
        return torch.compile(function, mode=self.mode, dynamic=False), tensors


class CompiledMaxAutotune(Compiled):
    """Stock PyTorch under ``torch.compile`` that times its candidates first."""

    name, title, mode = "compile-max", "torch.compile, max-autotune", "max-autotune-no-cudagraphs"


class TF32(Eager):
    """Stock PyTorch that may round fp32 inputs to TF32 on a GPU. Not the same precision: a column apart."""

    name, title = "tf32", "stock, fp32 inputs rounded to TF32"
    devices = ("cuda",)
    allowed = 2.0**-9

    def why_not(self, case):
        if case.dtype != "fp32":
            return "the switch is for fp32"
        return "no products" if case.workload.family in ("pool", "norm") else None

    @contextlib.contextmanager
    def settings(self):
        backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        before = [b.fp32_precision for b in backends]
        for b in backends:
            b.fp32_precision = "tf32"
        try:
            yield
        finally:
            for b, precision in zip(backends, before, strict=True):
                b.fp32_precision = precision


class CudnnBenchmark(Eager):
    """Stock PyTorch with the fastest of cuDNN's algorithms for each shape, in channels_last."""

    name, title = "cudnn-benchmark", "stock channels_last, cuDNN benchmark mode"
    devices = ("cuda",)

    def why_not(self, case):
        return None if case.workload.family == "conv" and case.has_layouts else "no images to convolve"

    def bind(self, case):
        return case.call("stock", layout="channels_last")

    @contextlib.contextmanager
    def settings(self):
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


class Attention(Eager):
    """Stock attention on one of torch's backends."""

    devices = ("cuda",)

    def __init__(self, backend: str):
        self.name, self.title = f"sdpa-{backend}", f"stock attention, {backend}"
        self.backend = f"{backend.upper()}_ATTENTION"

    def why_not(self, case):
        return None if case.workload.family == "attention" else "not attention"

    @contextlib.contextmanager
    def settings(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.backend)):
            yield


class CublasLt(Eager):
    """cuBLASLt's product with bias and ReLU in its epilogue."""

    name, title = "cublaslt", "cuBLASLt, fused epilogue"
    devices = ("cuda",)

    def why_not(self, case):
        if case.workload.op != "linear_relu" or case.backward:
            return "not a linear layer with ReLU, forward"
        return None

    def bind(self, case):
        _, tensors = case.call("stock")

        def function(x, weight, bias):
            out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t())
            return out.view(*x.shape[:-1], weight.shape[0])

        return function, tensors


class FlashAttention(Eager):
    """The FlashAttention package."""

    name, title = "flash-attn", "FlashAttention"
    devices = ("cuda",)

    def why_not(self, case):
        if case.workload.family != "attention":
            return "not attention"
        if case.dtype == "fp32" or len(case.workload.inputs) > 3:
            return "takes 16-bit inputs without a mask"
        return None if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"

    def bind(self, case):
        from flash_attn import flash_attn_func

        causal = case.workload.options.get("is_causal", False)
        _, tensors = case.call("stock")

        def function(*given):
            # Its layout is (batch, length, heads, size).
            return flash_attn_func(*(t.transpose(1, 2) for t in given), causal=causal).transpose(1, 2)

        return function, tensors


class _Exported(Peer):
    """A runtime for inference: the stock function with its weights inside."""

    devices = ("cpu",)
    slow = True
    package: str

    def why_not(self, case):
        if case.backward:
            return "inference only"
        if case.dtype != "fp32":
            return "measured in fp32 only"
        if case.layout == "channels_last":
            return "takes NCHW"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def bind(self, case):
        function, tensors = case.call("stock")
        count = case.data_count
        data, weights = tensors[:count], tensors[count:]
        module = _Weighted(function, weights) if case.module is None else case.module
        with _silence():
            call = self.compile(module.eval(), data)
        return (lambda *given: call(*given[:count])), tensors

    def compile(self, module: torch.nn.Module, data: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The module, ready for inputs of this form."""
        raise NotImplementedError


class _Weighted(torch.nn.Module):
    """A function whose last arguments are fixed."""

    def __init__(self, function, weights):
        super().__init__()
        self.function = function
        for i, w in enumerate(weights):
            self.register_buffer(f"weight{i}", w.detach())

    def forward(self, *data):
        return self.function(*data, *self.buffers(recurse=False))


class OnnxRuntime(_Exported):
    """ONNX Runtime on the CPU, all graph optimisations on."""

    name, title, package = "onnxruntime", "ONNX Runtime", "onnxruntime"

    def why_not(self, case):
        if reason := super().why_not(case):
            return reason
        missing = [p for p in ("onnx", "onnxscript") if importlib.util.find_spec(p) is None]
        return f"{missing[0]} is not installed, which the export needs" if missing else None

    def compile(self, module, data):
        import onnxruntime

        program = torch.onnx.export(module, tuple(data), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Its threads would otherwise spin on, and take the cores from whoever is measured next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [i.name for i in session.get_inputs()]
        output = session.get_outputs()[0].name
        binding = session.io_binding()

        def call(*tensors):
            for name, t in zip(names, tensors, strict=True):
                binding.bind_input(name, "cpu", 0, _NUMPY[t.dtype], tuple(t.shape), t.data_ptr())
            binding.bind_output(output, "cpu")
            session.run_with_iobinding(binding)
            return torch.from_numpy(binding.get_outputs()[0].numpy())

        return call


class OpenVINO(_Exported):
    """OpenVINO on the CPU, for latency, in the precision of the case."""

    name, title, package = "openvino", "OpenVINO", "openvino"

    def compile(self, module, data):
        import openvino

        # Traced op by op: torch's one op for a whole encoder layer is unknown to the converter.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model = openvino.convert_model(module, example_input=tuple(data))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        model.reshape({i: list(t.shape) for i, t in enumerate(data)})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": "NO",
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

        def call(*tensors):
            request.infer([t.detach().numpy() for t in tensors], share_inputs=True, share_outputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data)

        return call


_NUMPY = {torch.float32: np.float32, torch.bool: np.bool_, torch.int64: np.int64}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporters print and warn about what the user did not ask."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def all_peers() -> list[Peer]:
    """Who is measured (first) and against whom."""
    return [
        FastNN(),
        Eager(),
        EagerChannelsLast(),
        Reduced(),
        TF32(),
        CudnnBenchmark(),
        *map(Attention, ("flash", "efficient", "cudnn")),
        CublasLt(),
        FlashAttention(),
        Compiled(),
        CompiledMaxAutotune(),
        OnnxRuntime(),
        OpenVINO(),
    ]


def select_peers(wanted=(), device: str = "cpu") -> list[Peer]:
    """fastnn and the rivals that are `wanted` by name, of those for a device; all if none is."""
    ours, *rivals = (p for p in all_peers() if device in p.devices)
    refuse_unknown("peer", wanted, [p.name for p in rivals])
    return [ours, *(p for p in rivals if not wanted or p.name in wanted)]
