"""Multi-head attention and the transformer encoder against torch's, over all their arguments."""

import contextlib
import copy
import itertools
import pickle
import random
import warnings

import pytest
import torch

import fastnn
import fastnn.nn.functional as F
from fastnn import nn

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

E, HEADS, L, S, N = 16, 4, 5, 7, 3


@contextlib.contextmanager
def torchs_plain_way():
    """torch without its shortcut in inference, which differs where a query has no keys and for float masks."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def pair(name, *args, **kwargs):
    """The module and torch's from the same seed, with all biases drawn (torch's start from zero)."""
    torch.manual_seed(0)
    ours = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(0)
    torchs = getattr(torch.nn, name)(*args, **kwargs)
    for parameter in torchs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    return ours, torchs


def close(actual, expected, tolerance=2e-5):
    if expected is None:
        assert actual is None
        return
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def close_gradients(ours, torchs, inputs):
    """Equal gradients of all parameters and inputs, for the same gradients of all outputs."""

    def gradients(module, run):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = [y for y in run(module, *leaves) if y is not None]
        torch.manual_seed(1)
        return torch.autograd.grad(
            outputs,
            [*leaves, *module.parameters()],
            [torch.randn(y.shape) for y in outputs],
            allow_unused=True,
        )

    def compare(run):
        for actual, expected in zip(gradients(ours, run), gradients(torchs, run), strict=True):
            close(actual, expected, 1e-4)

    return compare


def causal(length, dtype=torch.bool):
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (
        mask
        if dtype == torch.bool
        else torch.zeros(length, length, dtype=dtype).masked_fill(mask, -torch.inf)
    )


def padding(keys, batch=N):
    mask = torch.zeros(batch, keys, dtype=torch.bool)
    for i in range(batch):
        mask[i, keys - i :] = True
    return mask


def masks(queries, keys):
    """Attention masks by name."""
    torch.manual_seed(2)
    boolean = torch.rand(queries, keys) < 0.3
    boolean[:, 0] = False
    return {
        "none": None,
        "bool": boolean,
        "float": torch.randn(queries, keys),
        "bool3d": boolean.expand(N * HEADS, -1, -1).clone(),
        "float3d": torch.randn(N * HEADS, queries, keys),
    }


CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 6, "vdim": 10},
    "kdim_batch_first_no_bias": {"kdim": 6, "bias": False, "batch_first": True},
}


def inputs_for(kwargs, attention, batched=True):
    """Query, key and value: the same tensor for self-attention, key and value the same for cross-attention."""
    torch.manual_seed(3)
    kdim, vdim = kwargs.get("kdim", E), kwargs.get("vdim", E)

    def draw(length, width):
        if not batched:
            return torch.randn(length, width)
        return torch.randn(N, length, width) if kwargs.get("batch_first") else torch.randn(length, N, width)

    if kdim == vdim == E and attention == "self":
        x = draw(S, E)
        return x, x, x
    if kdim == vdim == E and attention == "cross":
        memory = draw(S, E)
        return draw(L, E), memory, memory
    return draw(L, E), draw(S, kdim), draw(S, vdim)


@pytest.mark.parametrize("kwargs", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
@pytest.mark.parametrize("attention", ["self", "cross", "separate"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_attention_is_torchs(kwargs, attention, batched):
    ours, torchs = pair("MultiheadAttention", E, HEADS, **kwargs)
    query, key, value = inputs_for(kwargs, attention, batched)
    queries = query.shape[0] if not (batched and kwargs.get("batch_first")) else query.shape[1]
    same = query is key
    run_inputs = [query] if same else [query, key] if key is value else [query, key, value]
    for (kind, attn_mask), padded, need_weights, average in itertools.product(
        masks(queries, S).items(), ("none", "bool", "float"), (True, False), (True, False)
    ):
        if not need_weights and not average:
            continue
        key_padding_mask = None if padded == "none" else padding(S)
        if not batched:
            key_padding_mask = key_padding_mask[1] if key_padding_mask is not None else None
            attn_mask = attn_mask[:HEADS] if kind.endswith("3d") else attn_mask
        if padded == "float":
            key_padding_mask = torch.zeros(key_padding_mask.shape).masked_fill(key_padding_mask, -torch.inf)

        def run(
            module,
            query,
            key=None,
            value=None,
            attn_mask=attn_mask,
            padding=key_padding_mask,
            need=need_weights,
            average=average,
        ):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Support for mismatched")
                key = query if same else key
                return module(
                    query,
                    key,
                    key if value is None else value,
                    key_padding_mask=padding,
                    need_weights=need,
                    attn_mask=attn_mask,
                    average_attn_weights=average,
                )

        close_gradients(ours, torchs, run_inputs)(run)
        with torch.no_grad(), torchs_plain_way():
            for training in (True, False):
                ours.train(training), torchs.train(training)
                out, weights = run(ours, *run_inputs)
                expected, expected_weights = run(torchs, *run_inputs)
                close(out, expected)
                close(weights, expected_weights)
                assert out.shape == expected.shape


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "padding", "both", "bool3d"])
def test_attention_is_torchs_with_its_shortcut(mask, need_weights):
    ours, torchs = pair("MultiheadAttention", E, HEADS, batch_first=True)
    x = torch.randn(N, S, E)
    arguments = {
        "attn_mask": None
        if mask in ("none", "padding")
        else masks(S, S)["bool3d" if mask == "bool3d" else "bool"],
        "key_padding_mask": padding(S) if mask in ("padding", "both") else None,
        "need_weights": need_weights,
    }
    with torch.no_grad():
        for actual, expected in zip(
            ours.eval()(x, x, x, **arguments), torchs.eval()(x, x, x, **arguments), strict=True
        ):
            close(actual, expected)
            assert actual is None or actual.stride() == expected.stride()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_hint(kind, padded, need_weights):
    ours, torchs = pair("MultiheadAttention", E, HEADS, batch_first=True)
    x = torch.randn(N, S, E)
    mask = causal(S, kind)
    key_padding_mask = padding(S) if padded else None
    if padded and kind != torch.bool:
        key_padding_mask = torch.zeros(N, S).masked_fill(key_padding_mask, -torch.inf)
    run = [m(x, x, x, key_padding_mask, need_weights, mask, is_causal=True) for m in (ours, torchs)]
    for actual, expected in zip(*run, strict=True):
        close(actual, expected)


def attention_calls(count):
    """Random modules and calls, which give masks, layouts, modes and what is asked for."""
    draw = random.Random(0)
    for _ in range(count):
        batch_first, bias, batched, training, gradients = (draw.random() < 0.5 for _ in range(5))
        heads, batch, length = draw.choice((1, 4)), draw.choice((1, 3)), draw.choice((1, 5))
        kind = draw.choice(("self", "cross", "separate"))
        keys = length if kind == "self" else 3

        def tokens(n, batched=batched, batch=batch, batch_first=batch_first):
            if not batched:
                return torch.randn(n, E)
            shape = (batch, n, E) if batch_first else (n, batch, E)
            if draw.random() < 0.5:
                return torch.randn(shape[1], shape[0], E).transpose(0, 1)
            return torch.randn(shape)

        query = tokens(length)
        key = query if kind == "self" else tokens(keys)
        value = tokens(keys) if kind == "separate" else key
        options = {"need_weights": draw.random() < 0.5, "average_attn_weights": draw.random() < 0.5}
        mask_kind = draw.choice(("none", "mask", "padding"))
        mask_type = draw.choice((torch.bool, torch.float32))
        if mask_kind == "mask":
            options["attn_mask"] = torch.zeros(length, keys, dtype=mask_type)
        elif mask_kind == "padding":
            options["key_padding_mask"] = torch.zeros((batch, keys) if batched else keys, dtype=mask_type)
        yield (heads, batch_first, bias), training, gradients, (query, key, value), options


def test_strides_of_attention_are_torchs():
    for (heads, batch_first, bias), training, gradients, tensors, options in attention_calls(250):
        made = pair("MultiheadAttention", E, heads, batch_first=batch_first, bias=bias)
        with torch.set_grad_enabled(gradients):
            ours, torchs = (m.train(training)(*tensors, **options) for m in made)
        for actual, expected in zip(ours, torchs, strict=True):
            close(actual, expected)
            assert actual is None or actual.stride() == expected.stride(), (training, gradients, options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_strides_of_the_layer_are_torchs(batch_first, norm_first):
    arguments = {"batch_first": batch_first, "norm_first": norm_first, "dropout": 0.0}
    made = pair("TransformerEncoderLayer", E, HEADS, 32, **arguments)
    for x in (torch.randn(N, S, E), torch.randn(S, N, E).transpose(0, 1), torch.randn(S, E)):
        for training, gradients in itertools.product((True, False), (True, False)):
            with torch.set_grad_enabled(gradients):
                ours, torchs = (m.train(training)(x) for m in made)
            close(ours, torchs)
            assert ours.stride() == torchs.stride(), (x.stride(), training, gradients)
            faked = torch.compile(made[0], backend="aot_eager")
            if x.dim() == 3 and training and gradients:
                torch._dynamo.reset()
                assert faked(x).stride() == torchs.stride()


def small_net(module):
    return module.Sequential(
        module.Linear(E, 32), module.ReLU(), module.Dropout(0.2), module.Linear(32, E), module.Dropout(0.1)
    )


def encoder(module, **options):
    layer = module.TransformerEncoderLayer(E, HEADS, 32, dropout=0.1, **options)
    return module.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class AttentionAlone(torch.nn.Module):
    """Its dropout is torch's, behind what attention gives."""

    def __init__(self, module, need_weights, **options):
        super().__init__()
        self.attention = module.MultiheadAttention(E, HEADS, dropout=0.1, **options)
        self.dropout = module.Dropout(0.2)
        self.need_weights = need_weights

    def forward(self, x):
        return self.dropout(self.attention(x, x, x, need_weights=self.need_weights)[0])


TRAINED = {
    "net": small_net,
    **{
        f"attention-{batch_first}-{need_weights}": lambda module, b=batch_first, w=need_weights: (
            AttentionAlone(module, w, batch_first=b)
        )
        for batch_first, need_weights in itertools.product((True, False), (True, False))
    },
    **{
        f"layer-{activation}-{norm_first}-{batch_first}": lambda module, a=activation, n=norm_first, b=batch_first: (
            module.TransformerEncoderLayer(
                E, HEADS, 32, dropout=0.1, activation=a, norm_first=n, batch_first=b
            )
        )
        for activation, norm_first, batch_first in itertools.product(
            ("relu", "gelu"), (True, False), (True, False)
        )
    },
    "encoder": lambda module: encoder(module, batch_first=True),
    "encoder-norm_first": lambda module: encoder(module, norm_first=True),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_one_seed_is_one_training(name, layout):
    """The same losses and parameters as torch's after some steps, with dropout."""
    results = []
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        model = TRAINED[name](module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(S, N, E).transpose(0, 1) if layout == "transposed" else torch.randn(N, S, E)
        target, losses = torch.randn(N, S, E), []
        for _ in range(3):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append((torch.stack(losses), *(p.detach() for p in model.parameters())))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, 1e-5)


def test_query_without_keys():
    ours, torchs = pair("MultiheadAttention", E, HEADS)
    x = torch.randn(S, N, E)
    key_padding_mask = padding(S)
    key_padding_mask[1] = True
    for need_weights in (True, False):
        for actual, expected in zip(
            *(m(x, x, x, key_padding_mask, need_weights) for m in (ours, torchs)), strict=True
        ):
            close(actual, expected)


def test_dropout_with_weights_is_torchs():
    ours, torchs = pair("MultiheadAttention", E, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(N, S, E)
    results = []
    for module in (ours, torchs):
        torch.manual_seed(4)
        results.append(module(x, x, x))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    close(ours.eval()(x, x, x)[0], torchs.eval()(x, x, x)[0])


def test_dropout_without_weights():
    ours, _ = pair("MultiheadAttention", E, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(64, S, E)
    outputs = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(200)])
    assert not torch.equal(outputs[0], outputs[1])
    expected = ours.eval()(x, x, x, need_weights=False)[0]
    error = (outputs.mean(0) - expected).abs().mean() / outputs.std(0).mean()
    assert error < 3 / 200**0.5


@pytest.mark.parametrize(
    ("query", "key", "value", "arguments"),
    [
        ((2, 3, 4, E), (S, N, E), (S, N, E), {}),
        ((L, N, E), (S, E), (S, E), {}),
        ((L, N, E + 1), (S, N, E), (S, N, E), {}),
        ((L, N, E), (S, N, E), (S + 1, N, E), {}),
        ((L, N, E), (S, N + 1, E), (S, N + 1, E), {}),
        ((L, N, E), (S, N, E + 1), (S, N, E + 1), {}),
        ((L, N, E), (S, N, E), (S, N, E), {"is_causal": True}),
        ((L, N, E), (S, N, E), (S, N, E), {"is_causal": True, "need_weights": False}),
        ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(L, S + 1)}),
        ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(N, L, S)}),
        ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(L, S, dtype=torch.int64)}),
        ((L, N, E), (S, N, E), (S, N, E), {"attn_mask": torch.zeros(S, dtype=torch.bool)}),
        ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)}),
        ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}),
        ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(S, dtype=torch.bool)}),
        ((L, N, E), (S, N, E), (S, N, E), {"key_padding_mask": torch.zeros(N, S, dtype=torch.int32)}),
        ((L, E), (S, E), (S, E), {"attn_mask": torch.zeros(HEADS + 1, L, S)}),
        ((L, E), (S, E), (S, E), {"key_padding_mask": torch.zeros(1, S, dtype=torch.bool)}),
    ],
)
def test_attention_refuses_what_torch_refuses(query, key, value, arguments):
    ours, torchs = pair("MultiheadAttention", E, HEADS)
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(value)
    with pytest.raises(Exception) as expected:
        torchs(q, k, v, **arguments)
    with pytest.raises(expected.type):
        ours(q, k, v, **arguments)


def test_attention_refuses_other_dtypes_as_torch_does():
    ours, torchs = pair("MultiheadAttention", E, HEADS)
    x = torch.randn(S, N, E, dtype=torch.float64)
    with pytest.raises(Exception) as expected:
        torchs(x, x, x)
    with pytest.raises(expected.type):
        ours(x, x, x)


@pytest.mark.parametrize("arguments", [(0, 1), (8, 0), (8, 3)])
def test_attention_constructor_refuses_what_torchs_refuses(arguments):
    with pytest.raises(Exception) as expected:
        torch.nn.MultiheadAttention(*arguments)
    with pytest.raises(expected.type):
        nn.MultiheadAttention(*arguments)


def test_function_with_static_keys():
    ours, _ = pair("MultiheadAttention", E, HEADS)
    q, x = torch.randn(L, N, E), torch.randn(S, N, E)
    static = torch.randn(2, N * HEADS, S, E // HEADS)
    arguments = [q, x, x, E, HEADS, ours.in_proj_weight, ours.in_proj_bias, None, None, False, 0.0]
    arguments += [ours.out_proj.weight, ours.out_proj.bias]
    results = [
        function(*arguments, static_k=static[0], static_v=static[1])
        for function in (F.multi_head_attention_forward, torch.nn.functional.multi_head_attention_forward)
    ]
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_function_takes_transposed_inputs():
    ours, _ = pair("MultiheadAttention", E, HEADS)
    x = torch.randn(N, S, E).transpose(0, 1)
    arguments = [x, x, x, E, HEADS, ours.in_proj_weight, ours.in_proj_bias, None, None, False, 0.0]
    arguments += [ours.out_proj.weight, ours.out_proj.bias]
    for need_weights in (True, False):
        actual = F.multi_head_attention_forward(*arguments, need_weights=need_weights)
        expected = torch.nn.functional.multi_head_attention_forward(*arguments, need_weights=need_weights)
        for a, b in zip(actual, expected, strict=True):
            close(a, b)
            assert a is None or a.stride() == b.stride()


# ---- the encoder ----

LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "norm_first": {"norm_first": True, "batch_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
    "callable": {"activation": torch.tanh},
    "module": {"activation": torch.nn.ReLU(), "batch_first": True},
    "gelu_module": {"activation": torch.nn.GELU()},
    "gelu_tanh": {"activation": torch.nn.GELU("tanh")},
    "eps_no_bias": {"layer_norm_eps": 1e-2, "bias": False},
}
each_layer = pytest.mark.parametrize("kwargs", LAYERS.values(), ids=LAYERS)


def layer_pair(kwargs, dropout=0.0):
    return pair("TransformerEncoderLayer", E, HEADS, 32, dropout, **kwargs)


def source(kwargs, batched=True):
    torch.manual_seed(3)
    if not batched:
        return torch.randn(S, E)
    return torch.randn(N, S, E) if kwargs.get("batch_first") else torch.randn(S, N, E)


MASKS = {
    "none": {},
    "mask": {"src_mask": causal(S)},
    "float_mask": {"src_mask": torch.linspace(-1, 1, S * S).reshape(S, S)},
    "padding": {"src_key_padding_mask": padding(S)},
    "both": {"src_mask": causal(S), "src_key_padding_mask": padding(S)},
    "causal": {"src_mask": causal(S, torch.float32), "is_causal": True},
}


@each_layer
@pytest.mark.parametrize("arguments", MASKS.values(), ids=MASKS)
def test_layer_is_torchs(kwargs, arguments):
    ours, torchs = layer_pair(kwargs)
    x = source(kwargs)
    close_gradients(ours, torchs, [x])(lambda module, x: [module(x, **arguments)])
    ours.eval(), torchs.eval()
    with torch.no_grad():
        with torchs_plain_way():
            expected = torchs(x, **arguments)
        close(ours(x, **arguments), expected)
        if "float" not in str(arguments.get("src_mask", torch.zeros(0, dtype=torch.bool)).dtype):
            close(ours(x, **arguments), torchs(x, **arguments))


@each_layer
def test_layer_takes_inputs_without_a_batch(kwargs):
    ours, torchs = layer_pair(kwargs)
    x = source(kwargs, batched=False)
    arguments = {"src_mask": causal(S), "src_key_padding_mask": padding(S)[1]}
    close_gradients(ours, torchs, [x])(lambda module, x: [module(x, **arguments)])


@each_layer
def test_layer_holds_what_torchs_holds(kwargs):
    torch.manual_seed(0)
    ours = nn.TransformerEncoderLayer(E, HEADS, 32, **kwargs)
    torch.manual_seed(0)
    torchs = torch.nn.TransformerEncoderLayer(E, HEADS, 32, **kwargs)
    assert isinstance(ours, torch.nn.TransformerEncoderLayer)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in torchs.named_modules()]
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    assert type(ours.self_attn) is nn.MultiheadAttention
    assert type(ours.linear1) is type(ours.linear2) is nn.Linear


def test_layer_runs_what_replaces_its_parts():
    ours, torchs = layer_pair({})
    x = source({})
    seen = []
    ours.linear1.register_forward_hook(lambda module, args, out: seen.append(bool((out < 0).any())))
    close(ours(x), torchs(x))
    assert seen == [True]
    ours.linear1 = torchs.linear1 = torch.nn.Sequential(torch.nn.Linear(E, 32), torch.nn.Tanh())
    close(ours(x), torchs(x))
    ours.activation = torchs.activation = torch.sigmoid
    close(ours(x), torchs(x))


@pytest.mark.parametrize(
    ("activation", "op"),
    [
        ("relu", "linear_relu"),
        ("gelu", "linear_activation"),
        (torch.nn.GELU(), "linear_activation"),
        (torch.nn.GELU("tanh"), "linear_activation"),
        (torch.nn.LeakyReLU(), "linear"),
        (torch.tanh, "linear"),
    ],
    ids=["relu", "gelu", "gelu_module", "gelu_tanh", "leaky_relu", "callable"],
)
def test_the_activation_is_part_of_the_product(activation, op):
    ours, _ = layer_pair({"activation": activation})
    with torch.no_grad():
        ops = [row.op for row in fastnn.explain(ours.eval(), source({})) if "linear" in row.op]
    assert ops == ["linear", "linear", op, "linear"]


def test_layer_refuses_what_torchs_refuses():
    with pytest.raises(RuntimeError, match="relu/gelu"):
        nn.TransformerEncoderLayer(E, HEADS, activation="tanh")
    ours, torchs = layer_pair({})
    for x, arguments in [
        (torch.randn(S, N, E + 1), {}),
        (torch.randn(2, S, N, E), {}),
        (source({}), {"src_mask": torch.zeros(S, S, dtype=torch.int64)}),
        (source({}), {"src_mask": torch.zeros(S, S + 1)}),
        (source({}), {"src_key_padding_mask": torch.zeros(S, N, dtype=torch.bool)}),
        (source({}), {"is_causal": True}),
    ]:
        with pytest.raises(Exception) as expected:
            torchs(x, **arguments)
        with pytest.raises(expected.type):
            ours(x, **arguments)


def encoder_pair(kwargs, number=2, norm=True, **encoder):
    ours, torchs = layer_pair(kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor")
        ours, torchs = (
            module.TransformerEncoder(layer, number, torch.nn.LayerNorm(E) if norm else None, **encoder)
            for module, layer in ((nn, ours), (torch.nn, torchs))
        )
    return ours, torchs


@each_layer
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
def test_encoder_is_torchs(kwargs, norm):
    ours, torchs = encoder_pair(kwargs, norm=norm)
    assert isinstance(ours, torch.nn.TransformerEncoder)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    x = source(kwargs)
    for arguments in (
        {},
        {"mask": causal(S)},
        {"mask": causal(S, torch.float32)},
        {"mask": causal(S), "is_causal": True},
        {"mask": causal(S), "src_key_padding_mask": padding(S)},
        {"src_key_padding_mask": padding(S)},
    ):
        ours.train(), torchs.train()
        close_gradients(ours, torchs, [x])(lambda module, x, arguments=arguments: [module(x, **arguments)])
        ours.eval(), torchs.eval()
        close(ours(x, **arguments), torchs(x, **arguments))
        with torch.no_grad():
            close(ours(x, **arguments), torchs(x, **arguments))


@pytest.mark.parametrize("mask_check", [True, False])
@pytest.mark.parametrize("enable_nested_tensor", [True, False])
def test_encoder_leaves_padding_out_where_torch_does(mask_check, enable_nested_tensor):
    ours, torchs = encoder_pair(
        {"batch_first": True}, enable_nested_tensor=enable_nested_tensor, mask_check=mask_check, norm=False
    )
    ours.eval(), torchs.eval()
    x = source({"batch_first": True})
    left_out = padding(S)
    with torch.no_grad():
        close(ours(x, src_key_padding_mask=left_out), torchs(x, src_key_padding_mask=left_out))
        zeros = ours(x, src_key_padding_mask=left_out)[left_out] == 0
        assert bool(zeros.all()) == enable_nested_tensor
        if mask_check:  # padding before the sequence, which torch does not pack
            close(
                ours(x, src_key_padding_mask=left_out.flip(1)),
                torchs(x, src_key_padding_mask=left_out.flip(1)),
            )
    close(ours(x, src_key_padding_mask=left_out), torchs(x, src_key_padding_mask=left_out))


def test_encoder_takes_torchs_layers():
    torchs = torch.nn.TransformerEncoderLayer(E, HEADS, 32, 0.0, batch_first=True)
    ours, expected = nn.TransformerEncoder(torchs, 2), torch.nn.TransformerEncoder(torchs, 2)
    x = source({"batch_first": True})
    for training in (True, False):
        ours.train(training), expected.train(training)
        close(ours(x, src_key_padding_mask=padding(S)), expected(x, src_key_padding_mask=padding(S)))


def test_encoder_takes_nested_tensors():
    ours, torchs = encoder_pair({"batch_first": True}, norm=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
        results = [torch.nested.to_padded_tensor(m.eval()(x), 0.0) for m in (ours, torchs)]
    close(*results)


def test_encoder_refuses_other_masks():
    ours, _ = encoder_pair({})
    with pytest.raises(AssertionError):
        ours(source({}), mask=torch.zeros(S, S, dtype=torch.int64))


def test_dropout_is_drawn_and_only_in_training():
    ours, torchs = layer_pair({}, dropout=0.3)
    x = source({})
    assert not torch.equal(ours(x), ours(x))
    close(ours.eval()(x), torchs.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports(training):
    ours, torchs = encoder_pair({"batch_first": True})
    ours.train(training), torchs.train(training)
    x = source({"batch_first": True})
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for arguments in ({}, {"mask": causal(S)}, {"src_key_padding_mask": padding(S)}):
        close_gradients(compiled, torchs, [x])(
            lambda module, x, arguments=arguments: [module(x, **arguments)]
        )
        exported = torch.export.export(ours, (x,), arguments).module()
        close(exported(x, **arguments), torchs(x, **arguments))


def test_attention_compiles():
    ours, torchs = pair("MultiheadAttention", E, HEADS, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, S, E)
    for need_weights in (True, False):
        for actual, expected in zip(
            *(m(x, x, x, padding(S), need_weights) for m in (compiled, torchs)), strict=True
        ):
            close(actual, expected)


def test_copies_dtype_and_meta():
    ours, _ = encoder_pair({"batch_first": True})
    x = source({"batch_first": True})
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other.layers[0]) is nn.TransformerEncoderLayer
        close(other(x), ours(x), 0)
    close(copy.deepcopy(ours).double()(x.double()).float(), ours(x))
    half = copy.deepcopy(ours).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    close(half.float(), ours(x), 0.1)
    with torch.device("meta"):
        meta = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True)
    assert meta(torch.empty(N, S, E, device="meta")).shape == (N, S, E)
