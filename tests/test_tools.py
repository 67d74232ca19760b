"""Tools of torch's that know layers by their class: fx, TorchScript, quantization; on fastnn's layers and on converted models."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations

import fastnn
import fastnn.nn.functional as F
from fastnn import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
]


def cnn():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 24, 3), torch.nn.BatchNorm2d(24), torch.nn.ReLU(inplace=True)),
        *(torch.nn.Conv2d(24, 24, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(96, 8), torch.nn.GELU()),
        torch.nn.Linear(8, 4),
    )


class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        attended, _ = self.attention(x, x, x)
        return self.second(torch.nn.functional.gelu(self.first(x + attended)))


def encoder_layer(norm_first=False):
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=norm_first)


class Encoder(torch.nn.Module):
    """A layer of either order."""

    def __init__(self):
        super().__init__()
        self.first, self.second = encoder_layer(), encoder_layer(norm_first=True)

    def forward(self, x):
        return self.second(self.first(x))


class Pooling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv1d(3, 4, 3)
        self.most, self.average = torch.nn.MaxPool1d(2), torch.nn.AvgPool1d(2)
        self.two = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.AdaptiveMaxPool2d(3))

    def forward(self, x):
        row = self.conv(x[:, :, 0])
        return self.two(x).sum() + (self.most(row) * self.average(row)).sum()


IMAGE, SEQUENCE = (2, 3, 14, 13), (2, 5, 16)
MODELS = {
    "plain cnn": (lambda: cnn()[3:], (2, 24, 14, 13)),  # whose layers ask nothing of what they are given
    "cnn": (cnn, IMAGE),
    "attention": (Attending, SEQUENCE),
    "encoder": (Encoder, SEQUENCE),
    "pooling": (Pooling, IMAGE),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_way = pytest.mark.parametrize("change", [fastnn.convert, fastnn.freeze], ids=["convert", "freeze"])


def make(name, change, training=False):
    build, shape = MODELS[name]
    torch.manual_seed(1)
    x = torch.randn(shape).contiguous(
        memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format
    )
    stock = build().train(training)
    return change(copy.deepcopy(stock)), stock, x


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- torch.fx ----


def nodes(graph):
    return [(node.op, str(node.target)) for node in graph.nodes]


@each_model
@each_way
def test_fx_records_what_it_does_of_torchs(name, change):
    ours, stock, x = make(name, change)
    traced = torch.fx.symbolic_trace(ours)
    assert nodes(traced.graph) == nodes(torch.fx.symbolic_trace(stock).graph)
    close(traced(x), stock(x))
    wider = torch.cat([x, x])
    close(traced(wider), stock(wider))
    if name == "cnn":
        with torch.no_grad():
            ran = [row.op for row in fastnn.explain(traced, x)]
        assert "conv2d" in [op.removesuffix("_packed") for op in ran]


class Through(torch.fx.Tracer):
    """Traces through every layer."""

    def is_leaf_module(self, m, module_qualified_name):
        return False


@pytest.mark.parametrize("name", ["plain cnn", "pooling"])
@each_way
def test_a_tracer_without_leaves(name, change):
    ours, stock, x = make(name, change)
    graphs = [Through().trace(model) for model in (ours, stock)]
    assert nodes(graphs[0]) == nodes(graphs[1])
    close(torch.fx.GraphModule(ours, graphs[0])(x), stock(x))


@pytest.mark.parametrize("tracer", [torch.fx.Tracer, Through])
def test_layers_that_torch_has_not(tracer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(nn.ConvReLUMaxPool2d(3, 4, 3, pool_kernel_size=2), nn.ConvReLU2d(4, 4, 3), torch.nn.Flatten(1)),
        *(nn.LinearReLU(4 * 4 * 3, 5), nn.LinearGELU(5, 5)),
    )
    x = torch.randn(2, 3, 14, 13)
    close(torch.fx.GraphModule(model, tracer().trace(model))(x), model(x))


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def set_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x) * 3


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.__setitem__(0, Doubled(4, 4)),
        lambda m: set_forward(m[0]),
        lambda m: m[0].register_forward_hook(lambda module, args, output: output * 2) and None,
        lambda m: m[1].register_forward_hook(lambda module, args, output: output * 2) and None,
        lambda m: m[0].register_forward_pre_hook(lambda module, args: args[0] + 1) and None,
    ],
    ids=["subclass", "forward", "hook", "hook of a relu", "pre-hook"],
)
def test_fx_runs_nothing_twice(edit):
    model = fastnn.convert(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    edit(model)
    x = torch.randn(3, 4)
    close(torch.fx.symbolic_trace(model)(x), model(x))


def test_fx_of_a_parametrized_layer():
    for change in (fastnn.convert, lambda m: m):
        model = change(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
        parametrizations.weight_norm(model[0])
        x = torch.randn(3, 4)
        close(torch.fx.symbolic_trace(model)(x), model(x))


def test_fx_fuse_is_told():
    ours, stock, x = make("cnn", fastnn.convert)
    with pytest.warns(UserWarning, match=r"fastnn\.revert"):
        fused = optimization.fuse(ours)
    close(fused(x), stock(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.fx.symbolic_trace(ours)
        optimization.remove_dropout(ours)
        fused = optimization.fuse(fastnn.revert(ours))
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    close(fused(x), stock(x))
    close(fastnn.convert(fused)(x), stock(x))


# ---- TorchScript ----


@each_model
@each_way
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(name, change, training, monkeypatch):
    ours, stock, x = make(name, change, training=training and change is fastnn.convert)
    # In evaluation torch's own attention records another way with gradients than without, and refuses the trace.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    with warnings.catch_warnings(record=True) as told:
        traced = torch.jit.trace(ours, x)
    assert not [warning for warning in told if "fastnn" in warning.filename]
    if change is fastnn.convert:
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        grads = [
            torch.autograd.grad(model(t).square().sum(), [t, *model.parameters()])
            for model, t in ((traced, a), (stock, b))
        ]
        for ours_grad, stock_grad in zip(*grads, strict=True):
            torch.testing.assert_close(ours_grad, stock_grad, rtol=1e-3, atol=1e-3)
    close(traced(x), stock(x))
    if name != "attention":  # whose heads are a number of torch's trace
        close(traced(x[:1]), stock(x[:1]))


def test_jit_trace_of_a_layer_with_a_forward_of_its_own():
    for change in (fastnn.convert, lambda m: m):
        model = change(torch.nn.Sequential(torch.nn.Linear(4, 4), Doubled(4, 4), torch.nn.ReLU()))
        model[0].forward = lambda x, layer=model[0]: type(layer).forward(layer, x) * 3
        x = torch.randn(3, 4)
        close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_of_functions(grad):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(24, 24, 3), torch.nn.Linear(24, 24)

        def forward(self, x):
            y = F.conv2d_relu_max_pool2d(x, self.conv.weight, self.conv.bias)
            y = F.conv2d(y, self.conv.weight) + F.conv2d_relu(y, self.conv.weight)
            y = F.avg_pool2d(F.max_pool2d(y, 2), 2).flatten(1)
            y = F.linear_gelu(F.linear_relu(y, self.linear.weight, self.linear.bias), self.linear.weight)
            y = F.add_layer_norm(y, F.linear(y, self.linear.weight), self.linear.bias, None, 1e-5)
            heads = y.view(2, 3, 2, 4)
            return F.scaled_dot_product_attention(heads, heads, heads)

    model, x = Own().requires_grad_(grad), torch.randn(2, 24, 14, 14)
    for prefer in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastnn.ops.core.watch.prefer_kernels", prefer)
            traced = torch.jit.trace(model, x)
        close(traced(x), model(x))
        if grad:
            for a, b in zip(
                torch.autograd.grad(traced(x).square().sum(), list(traced.parameters()), allow_unused=True),
                torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_trace_needs_no_fastnn(tmp_path):
    ours, stock, x = make("cnn", fastnn.freeze)
    torch.jit.trace(ours, x).save(tmp_path / "traced.pt")
    torch.save((x, stock(x).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch; x, y = torch.load('expected.pt'); m = torch.jit.load('traced.pt');"
        "torch.testing.assert_close(m(x), y, rtol=1e-4, atol=1e-4); assert 'fastnn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", ["cnn", "attention", "pooling"])
@each_way
def test_jit_script(name, change):
    ours, stock, x = make(name, change)
    scripted = torch.jit.script(ours)
    close(scripted(x), stock(x))
    close(ours(x), stock(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)


# ---- quantization ----


@pytest.mark.parametrize("kind", ["dynamic", "static", "by name"])
def test_quantization_is_told(kind):
    ours, _, x = make("cnn", fastnn.convert)
    ao = torch.ao.quantization
    quantize = {
        "dynamic": ao.quantize_dynamic,
        "by name": lambda model: ao.quantize_dynamic(model, {"8"}),
        "static": ao.prepare,
    }
    ours.qconfig = ao.default_qconfig
    with pytest.warns(UserWarning, match=r"fastnn\.revert"):
        quantize[kind](ours)
    ours(x)


def test_quantization_of_a_reverted_model():
    ours, stock, x = make("cnn", fastnn.convert)
    ao = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.ao.quantization knows layers")
        quantized = ao.quantize_dynamic(fastnn.revert(ours))
        expected = ao.quantize_dynamic(stock)
        assert [type(m) for m in quantized.modules()] == [type(m) for m in expected.modules()]
        assert isinstance(quantized[8], torch.ao.nn.quantized.dynamic.Linear)
        close(quantized(x), expected(x))
        # What is left is converted afterwards.
        fastnn.convert(quantized)
        assert [type(quantized[i]) for i in (0, 5, 8)] == [nn.Conv2d, nn.MaxPool2d, type(expected[8])]
        close(quantized(x), expected(x))


def test_the_static_flow_on_a_reverted_model():
    ours, stock, x = make("cnn", fastnn.convert)
    ao = torch.ao.quantization
    results = []
    for model in (fastnn.revert(ours), stock):
        fused = ao.fuse_modules(model, [["0", "1", "2"], ["3", "4"]])
        wrapped = ao.QuantWrapper(fused)
        wrapped.qconfig = ao.default_qconfig
        prepared = ao.prepare(wrapped)
        prepared(x)
        results.append(prepared)
    close(results[0](x), results[1](x))
    assert [type(m) for m in results[0].modules()] == [type(m) for m in results[1].modules()]


def test_layers_that_quantization_has_marked_stay():
    ao = torch.ao.quantization
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model.qconfig = ao.default_qconfig
    model[2].qconfig = None
    before = ao.prepare(model)
    classes = [type(m) for m in before]
    fastnn.convert(before)
    assert [type(m) for m in before][:2] == classes[:2]
    assert type(before[2]) is nn.Linear


def test_qconfig_is_an_attribute_like_others():
    layer = nn.MaxPool2d(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.qconfig = 3  # torch quantizes no layer of this kind by its class
    assert layer.qconfig == copy.deepcopy(layer).qconfig == 3
    del layer.qconfig
    assert not hasattr(layer, "qconfig")
    with pytest.raises(AttributeError):
        del layer.qconfig
    linear = nn.Linear(2, 2)
    assert getattr(linear, "qconfig", None) is None
    with pytest.warns(UserWarning, match=r"Linear of fastnn as it is: call fastnn\.revert"):
        linear.qconfig = None


def test_fuse_modules_raises():
    ours, _, _ = make("cnn", fastnn.convert)
    with pytest.raises(AssertionError, match=r"fastnn\.nn\.conv\.Conv2d"):
        torch.ao.quantization.fuse_modules(ours, [["0", "1", "2"]])
