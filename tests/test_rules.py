"""Rules as data: who is fastest by a processor's file, and what becomes of files that are none."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as TF
from conftest import assert_as_good

import fastnn
import fastnn.nn.functional as fast
from benchmarks import algorithms, fit, layers
from benchmarks import cpu_choices as measured
from benchmarks.algorithms import Sample
from fastnn import _library
from fastnn.ops.core import cpu_choices, processor, route, rules, watch
from fastnn.ops.core.op import OPS
from fastnn.ops.core.plan import plan

ISA = _library.current_isa()
CONV = OPS["conv2d"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of choices, and calls that go by them."""
    monkeypatch.setattr(cpu_choices, "FOLDER", tmp_path)
    monkeypatch.setattr(watch, "prefer_kernels", False)
    monkeypatch.setattr(processor, "this", lambda: processor.Processor("amd", 26, 2))

    def write(name, rules_by_op, isa=ISA, version=cpu_choices.VERSION):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"version": version, "isa": isa, "rules": rules_by_op}))
        forget()
        return path

    def forget():
        cpu_choices._tables.cache_clear()
        route.forget_plans()

    forget()
    yield write
    forget()


def images(layout="nchw", channels=16, size=9, dtype=torch.float32):
    x, w = torch.randn(2, channels, size, size, dtype=dtype), torch.randn(8, channels, 3, 3, dtype=dtype)
    if layout == "nhwc":
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    return x, w, torch.randn(8, dtype=dtype)


def conv_args(*tensors):
    return (*tensors, 1, 1, 1, 1, 1, 1, 1)


KIND = "float32 nchw inference"


def test_a_rule_by_size():
    rule = rules.parse(
        ["depth <= 160", ["pixels <= 10.5", "planes", "rows, torch"], "torch"], CONV.algorithms.names
    )
    assert rules.decide(rule, {"depth": 160, "pixels": 10}) == ("planes",)
    assert rules.decide(rule, {"depth": 160, "pixels": 11}) == ("rows", "torch")
    assert rules.decide(rule, {"depth": 161, "pixels": 0}) == ("torch",)
    assert rules.parse(fit.as_json(rule), CONV.algorithms.names) == rule


@pytest.mark.parametrize(
    "found",
    [
        "plains",
        "planes; torch",
        "",
        3,
        None,
        [],
        ["depth <= 160", "planes"],
        ["depth < 160", "planes", "torch"],
        ["depth <= -1", "planes", "torch"],
        ["depth <= 1", "planes", ["x", "torch", "torch"]],
        [7, "planes", "torch"],
    ],
    ids=str,
)
def test_what_is_no_rule(found):
    with pytest.raises(ValueError, match=r"algorithm|rule|comparison"):
        rules.parse(found, CONV.algorithms.names)


def test_rules_in_one_another_end():
    rule = "torch"
    for _ in range(100):
        rule = ["depth <= 1", rule, "torch"]
    with pytest.raises(ValueError, match="in one another"):
        rules.parse(rule, ())


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CONV.algorithms.names
        if n not in ("automatic", "rows", "pixels", "linear", "winograd", "depthwise")
    ],
)
def test_calls_go_by_the_file(folder, name):
    folder("amd-26-2", {"conv2d": {KIND: name}})
    x, w, b = images()
    assert plan(CONV, conv_args(x, w, b)).algorithm == name
    assert_as_good(
        fast.conv2d(x, w, b, padding=1),
        TF.conv2d(x, w, b, padding=1),
        TF.conv2d(*(t.double() for t in (x, w, b)), padding=1),
    )
    (row,) = fastnn.explain(lambda x: fast.conv2d(x, w, b, padding=1), x)
    assert (row.where, row.algorithm) == (f"fastnn {ISA}", name)
    assert name in str(fastnn.explain(lambda x: fast.conv2d(x, w, b, padding=1), x))


def test_torch_by_the_file(folder):
    folder("amd-26-2", {"conv2d": {KIND: ["depth <= 100", "planes", "torch"]}})
    x, w, b = images()
    assert plan(CONV, conv_args(x, w, b)).reason == "torch measured faster on this processor"
    (row,) = fastnn.explain(lambda x: fast.conv2d(x, w, b, padding=1), x)
    assert (row.where, row.algorithm) == ("torch", "")


def test_first_that_covers(folder):
    """A rule may name algorithms that do not take the call; the last word is torch's or the library's."""
    folder("amd-26-2", {"conv2d": {KIND: "rows, transposed, torch"}})
    assert plan(CONV, conv_args(*images())).algorithm == "transposed"
    folder("amd-26-2", {"conv2d": {KIND: "rows, pixels"}})
    assert plan(CONV, conv_args(*images())).algorithm == "planes"  # the library's own choice
    assert plan(CONV, conv_args(*images())).numbers == ()


def test_layout_of_image_or_weight(folder):
    """The kernels go by either; so do the rules."""
    folder("amd-26-2", {"conv2d": {KIND: "planes", "float32 nhwc inference": "pixels"}})
    x, w, b = images()
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, w)]
    for image, weight, name in (
        (x, w, "planes"),
        (last[0], w, "pixels"),
        (x, last[1], "pixels"),
        (*last, "pixels"),
    ):
        assert plan(CONV, conv_args(image, weight, b)).algorithm == name
        y = fast.conv2d(image, weight, b, padding=1)
        torch.testing.assert_close(y, TF.conv2d(image, weight, b, padding=1))
        assert y.stride() == TF.conv2d(image, weight, b, padding=1).stride()


@pytest.mark.parametrize(
    ("input", "weight"), [("planes", "torch"), ("torch", "transposed"), ("planes", "transposed")]
)
@pytest.mark.parametrize("relu", [False, True])
def test_each_gradient_by_itself(folder, input, weight, relu):
    name = "conv2d_relu" if relu else "conv2d"
    folder(
        "amd-26-2",
        {
            name: {"float32 nchw training": "planes"},
            f"{name}_backward": {"float32 nchw input": input, "float32 nchw weight": weight},
        },
    )
    function, stock = (
        (fast.conv2d_relu, lambda *a, **k: TF.conv2d(*a, **k).relu()) if relu else (fast.conv2d, TF.conv2d)
    )
    leaves = [t.requires_grad_() for t in images()]
    seen = []
    with watch.watching(lambda op, args, plan: seen.append((op.name, plan.algorithm))):
        grads = torch.autograd.grad(function(*leaves, padding=1).square().sum(), leaves)
    assert seen == [(name, "planes"), (f"{name}_backward", f"{input}, {weight}")]
    unwatched = torch.autograd.grad(function(*leaves, padding=1).square().sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for ours, again, theirs, right in zip(
        grads,
        unwatched,
        torch.autograd.grad(stock(*leaves, padding=1).square().sum(), leaves),
        torch.autograd.grad(stock(*exact, padding=1).square().sum(), exact),
        strict=True,
    ):
        assert torch.equal(ours, again)
        assert_as_good(ours, theirs, right, roundings=8, depth=200)
    # One alone.
    (alone,) = torch.autograd.grad(function(*leaves, padding=1).square().sum(), leaves[:1])
    assert torch.equal(alone, grads[0])


def test_gradients_that_are_all_torchs(folder):
    folder("amd-26-2", {"linear_backward": {"float32 input": "torch", "float32 weight": "torch"}})
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    seen = []
    with watch.watching(lambda op, args, plan: seen.append((op.name, plan.algorithm, plan.reason))):
        fast.linear(x, w).sum().backward()
    assert seen[-1] == ("linear_backward", None, "torch measured faster on this processor")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "amd-26-2"),
        ("[]", "version"),
        ("[" * 100_000, "lists in lists"),
        ('{"version": 99, "isa": "avx2", "rules": {}}', "version"),
        ('{"version": 1, "isa": "sse9", "rules": {}}', "level"),
        ('{"version": 1, "isa": "avx2"}', "rules by op"),
        ('{"version": 1, "isa": "avx2", "rules": {"conv2d": 3}}', "rules by op"),
        ('{"version": 1, "isa": "avx2", "rules": {"conv9d": {}}}', "conv9d"),
        ('{"version": 1, "isa": "avx2", "rules": {"conv2d": {"a": "plains"}}}', "plains"),
        ('{"version": 1, "isa": "avx2", "rules": {"linear": {"a": "planes"}}}', "planes"),
        (b"\xff\xfe", "amd-26-2"),
    ],
    ids=lambda value: str(value[:50]),
)
def test_a_file_that_is_none(folder, tmp_path, content, match):
    """One warning that names it, and the next file counts."""
    folder(ISA, {"conv2d": {KIND: "transposed"}})
    path = tmp_path / "amd-26-2.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(
        UserWarning, match=rf"amd-26-2\.json.*{match}" if match != "amd-26-2" else match
    ) as warned:
        named = [plan(CONV, conv_args(*images())).algorithm for _ in range(3)]
    assert named == ["transposed"] * 3
    assert len(warned) == 1


def test_a_folder_in_a_files_place(folder, tmp_path):
    folder(ISA, {"conv2d": {KIND: "transposed"}})
    (tmp_path / "amd-26-2.json").mkdir()
    with pytest.warns(UserWarning, match=r"amd-26-2\.json"):
        assert plan(CONV, conv_args(*images())).algorithm == "transposed"


def test_order_of_files(folder, tmp_path):
    """This processor, its relatives from the nearest on, the level, the levels below."""

    def algorithm():
        return plan(CONV, conv_args(*images())).algorithm

    assert algorithm() == "planes"  # the library's own choice
    folder("portable", {"conv2d": {KIND: "torch"}}, isa="portable")
    assert algorithm() is None
    folder(ISA, {"conv2d": {KIND: "transposed"}})
    assert algorithm() == "transposed"
    folder("amd-26-90", {"conv2d": {KIND: "planes"}})
    assert algorithm() == "planes"
    folder("amd-26-7", {"conv2d": {KIND: "transposed"}})
    assert algorithm() == "transposed"
    folder("amd-25-2", {"conv2d": {KIND: "planes"}})
    folder("intel-26-2", {"conv2d": {KIND: "planes"}})
    assert algorithm() == "transposed"
    folder("amd-26-2", {"conv2d": {"float32 nhwc inference": "pixels"}})
    assert algorithm() == "transposed"  # a kind that it does not know
    folder("amd-26-2", {"conv2d": {KIND: "planes"}})
    assert algorithm() == "planes"


@pytest.mark.skipif(ISA == "portable", reason="the lowest level")
def test_a_processor_at_another_level(folder):
    folder("amd-26-2", {"conv2d": {KIND: "transposed"}})
    before = _library.current_isa()
    _library.set_isa("portable")
    try:
        assert plan(CONV, conv_args(*images())).algorithm == "planes"
    finally:
        _library.set_isa(before)
    assert plan(CONV, conv_args(*images())).algorithm == "transposed"


def test_processor():
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A: B\n\nprocessor\t: 1\n"
    assert processor.read(text) == ("amd", 26, 2)
    assert processor.read(text).key == "amd-26-2"
    assert processor.read("processor: 0\nFeatures: fp\n") is None
    assert processor.read("") is None
    assert processor.read(text.replace("26", "x")) is None


def test_shipped_files(no_shipped_rules):
    """Each is read without a warning, holds rules, and compares only sizes that calls have."""
    paths = sorted(no_shipped_rules.glob("*.json"))
    assert paths
    for path in paths:
        _, table = cpu_choices.read(path.read_bytes())
        assert table
        for name, kinds in table.items():
            for rule in kinds.values():
                used = set(_sizes_of(rule))
                assert used <= set(SIZES[OPS[name].family]), (path, name)


def _sizes_of(rule):
    if isinstance(rule, rules.Node):
        yield rule.size
        yield from _sizes_of(rule.low)
        yield from _sizes_of(rule.high)


SIZES = {
    "conv": (
        "batch",
        "image",
        "pixels",
        "row",
        "channels",
        "outputs",
        "groups",
        "taps",
        "depth",
        "stride",
        "result",
        "work",
    ),
    "norm": ("elements", "rows", "width"),
    "linear": ("rows", "features", "width", "work"),
    "attention": ("heads", "queries", "keys", "width", "work"),
}


# ---- how they are made ----


def samples(count=60, seed=0, networks=("a", "b", "c")):
    """Of a machine on which small calls are fastest by planes, deep ones by transposed, and the largest by torch."""
    random_ = random.Random(seed)
    made = []
    for i in range(count):
        depth, work = random_.choice((16, 64, 256, 1024)), random_.choice((1e4, 1e6, 1e8))
        fastest = "torch" if work > 1e7 else "transposed" if depth > 100 else "planes"
        seconds = {n: [1.0 if n == fastest else 1.5] * 3 for n in ("planes", "transposed", "torch")}
        sizes = {"depth": depth, "work": work}
        made.append(Sample("conv2d", KIND, networks[i % len(networks)], sizes, 1, "planes", seconds))
    return made


def test_fit():
    made = fit.fit(samples())
    assert max(made.regrets["conv2d", KIND]) == 1.0
    assert fit.mean(made.held_out["conv2d", KIND]) < 1.02
    rule = rules.parse(made.rules["conv2d"][KIND], CONV.algorithms.names)
    assert rules.decide(rule, {"depth": 16, "work": 1e6})[0] == "planes"
    assert rules.decide(rule, {"depth": 1024, "work": 1e6})[0] == "transposed"
    assert rules.decide(rule, {"depth": 16, "work": 1e8})[0] == "torch"


def test_no_split_for_noise():
    """What does not pay for a comparison is one leaf."""
    noisy = [
        s._replace(seconds={"planes": [1.0], "torch": [1.0 + (i % 2) * 0.001]})
        for i, s in enumerate(samples())
    ]
    assert fit.fit(noisy).rules["conv2d"][KIND].startswith("planes")


def test_an_algorithm_that_covers_few_calls_is_not_the_only_one():
    made = [
        s._replace(seconds={"rows": [1.0], **s.seconds}) if i % 4 else s
        for i, s in enumerate(samples(networks=("a",)))
    ]
    flat = fit.grow([s._replace(sizes={"depth": 1.0}) for s in made])
    assert isinstance(flat, tuple)
    assert flat[0] == "rows"
    assert len(flat) > 1


def test_calls_with_gradients_follow_from_their_parts():
    sizes = {"depth": 9.0}
    parts = [
        Sample("conv2d", KIND, "a", sizes, 1, "planes", {"planes": [2.0], "torch": [1.0]}),
        Sample(
            "conv2d_backward",
            "float32 nchw input",
            "a",
            sizes,
            1,
            "planes",
            {"planes": [3.0], "torch": [5.0]},
        ),
        Sample(
            "conv2d_backward",
            "float32 nchw weight",
            "a",
            sizes,
            1,
            "planes",
            {"planes": [7.0], "torch": [4.0]},
        ),
    ]
    (whole,) = fit.derived(parts)
    assert (whole.op, whole.kind) == ("conv2d", "float32 nchw training")
    assert whole.seconds == {"planes": [9.0], "torch": [10.0]}


def test_what_is_measured(tmp_path):
    """A layer of each sort: every sample has torch's op and an algorithm that covers it, and comes back as it was kept."""
    small = (
        layers.Conv("a", 4, 6, 8, 3, 1, 1, pool=2),
        layers.Conv1d("a", 4, 9, 8, 3),
        layers.Linear("a", 3, 5, 7, "relu"),
        layers.Linear("a", 3, 5, 7, "gelu"),
        layers.Attention("a", 2, 3, 3, 8),
    )
    made = [
        algorithms.sample(trial, 1)
        for layer in small
        for layout in algorithms.LAYOUTS
        for trial in algorithms.trials(layer, 2, "float32", layout)
    ]
    assert {s.op for s in made} >= {
        "conv2d",
        "conv2d_relu",
        "conv2d_relu_max_pool2d",
        "conv2d_backward",
        "conv2d_relu_backward",
        "linear",
        "linear_relu",
        "linear_activation",
        "linear_relu_backward",
        "attention",
    }
    for s in made:
        assert "torch" in s.seconds
        assert len(s.seconds) > 1
        assert "winograd" not in s.seconds
        assert all(t > 0 for times in s.seconds.values() for t in times)
        assert set(s.sizes) == set(SIZES[OPS[s.op].family])
    algorithms.write(tmp_path / "a.jsonl", {"isa": ISA}, made)
    machine, again = algorithms.read(tmp_path / "a.jsonl")
    assert machine == {"isa": ISA}
    assert [s._replace(seconds={}) for s in again] == [s._replace(seconds={}) for s in made]
    found = fit.fit(made * fit.LEAST_OF_A_KIND)
    head = dict.fromkeys(("cpu", "torch", "fastnn", "commit", "created"), "")
    isa, table = cpu_choices.read(measured.as_text({"isa": ISA, **head}, made, found))
    assert isa == ISA
    assert set(table) >= {s.op for s in made}
    (tmp_path / "b.jsonl").write_text('{}\n{"op": 1}\n')
    with pytest.raises(ValueError, match="no sample"):
        algorithms.read(tmp_path / "b.jsonl")
    algorithms.write(tmp_path / "c.jsonl", {"processor": "x", "created": "2"}, made[:2])
    algorithms.write(tmp_path / "d.jsonl", {"processor": "x", "created": "1"}, made[2:3])
    assert algorithms.read_all([tmp_path / "c.jsonl", tmp_path / "d.jsonl"])[0]["created"] == "2"
    assert len(algorithms.read_all([tmp_path / "c.jsonl", tmp_path / "d.jsonl"])[1]) == 3
    algorithms.write(tmp_path / "e.jsonl", {"processor": "y", "created": "1"}, made[:1])
    with pytest.raises(ValueError, match="several processors"):
        algorithms.read_all([tmp_path / "c.jsonl", tmp_path / "e.jsonl"])


def test_layers_are_those_of_networks():
    found = layers.every()
    assert len(found) == len({(type(layer), *layer[1:], batch) for layer, batch in found})
    every = list(dict.fromkeys(layer for layer, _ in found))
    assert {batch for layer, batch in found if layer.network == "small CNN"} == {1, 8, 32, 64}
    assert {layer.network for layer in every} >= {
        "ResNet-50",
        "VGG-16",
        "MobileNetV2",
        "EfficientNet-B0",
        "ConvNeXt-T",
    }
    # Of ResNet-50 the stem, and in each of four stages six convolutions, of which some occur twice.
    resnet = [layer for layer in every if layer.network == "ResNet-50" and isinstance(layer, layers.Conv)]
    assert layers.Conv("ResNet-50", 3, 224, 64, 7, 2, 3) in resnet
    assert layers.Conv("ResNet-50", 512, 7, 2048, 1) in resnet
    assert 18 <= len(resnet) <= 25


def test_layers_of_the_suite():
    found = layers.suite()
    assert (layers.Conv("small CNN", 6, 14, 16, 5, pool=2), 64) in found
    assert (layers.Linear("BERT-base", 1024, 3072, 768, "gelu"), 1) in found
    families = {type(layer) for layer, _ in found}
    assert families == {layers.Conv, layers.Conv1d, layers.Linear, layers.Attention, layers.Norm}


def test_layers_of_random_sizes():
    found = layers.sweep(90, seed=3)
    assert found == layers.sweep(90, seed=3) != layers.sweep(90, seed=4)
    kinds = Counter(type(layer) for layer, _ in found)
    assert kinds == {layers.Conv: 50, layers.Linear: 20, layers.Attention: 10, layers.Norm: 10}
    assert sum(layer.groups > 1 for layer, _ in found if isinstance(layer, layers.Conv)) == 10
    assert len({layer.network for layer, _ in found}) == 10


def test_layouts_as_the_library_sees_them():
    """An algorithm that covers a call by the plan is not refused by the op: both see the same layout."""
    raw = torch.ops.fastnn.conv2d.raw
    shapes = [
        (2, 3, 5, 5),
        (1, 3, 5, 5),
        (2, 1, 5, 5),
        (2, 3, 1, 1),
        (1, 1, 1, 1),
        (2, 3, 1, 5),
        (1, 4, 5, 1),
        (3, 2, 1, 1),
    ]
    for shape in shapes:
        n, c, h, w = shape
        base = torch.randn(shape)
        nhwc = base.contiguous(memory_format=torch.channels_last)
        views = [base, nhwc, base.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), base.expand(shape)]
        views += [torch.randn(n, h, w, c).permute(0, 3, 1, 2), torch.randn(c, n, h, w).transpose(0, 1)]
        views += [
            torch.randn(n, h, w, 2 * c)[..., ::2].permute(0, 3, 1, 2),
            torch.randn(n, 1, h, w).expand(shape),
        ]
        for x in views:
            for weight in (torch.randn(4, c, 1, 1), torch.randn(1, h, w, c).permute(0, 3, 1, 2)):
                args = (x, weight, None, 1, 1, 0, 0, 1, 1, 1)
                mask = CONV.algorithms.results[0].covering(*args)
                for number in range(1, len(CONV.algorithms.names)):
                    if mask >> number & 1:
                        raw(*args, number)
                    else:
                        with pytest.raises(RuntimeError, match="does not cover"):
                            raw(*args, number)
                assert mask >> CONV.algorithms.results[0].automatic(*args) & 1


def test_no_rule_of_a_few_samples():
    assert not fit.fit(samples(fit.LEAST_OF_A_KIND - 1)).rules
    assert fit.fit(samples(fit.LEAST_OF_A_KIND)).rules


STORED = sorted({path.parent for path in measured.RESULTS.glob("*/algorithms-*.jsonl")})


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored.name)
def test_regret_of_what_is_shipped(stored, no_shipped_rules):
    """Of the samples that a file was made from, with the derived ones: who is chosen takes at most 3% longer in the mean."""
    machine, made = algorithms.read_all(sorted(stored.glob("algorithms-*.jsonl")))
    isa, table = cpu_choices.read((no_shipped_rules / f"{machine['processor']}.json").read_bytes())
    assert isa == machine["isa"]
    regrets = []
    for s in made + fit.derived(made):
        if (rule := table.get(s.op, {}).get(s.kind)) is not None:
            regrets.append(fit.regret(rule, s))
    assert len(regrets) > 1000
    assert fit.mean(regrets) < 1.03
    # Beside the rules that were there when it was measured.
    before = [r for found in measured.regrets_before(made).values() for r in found]
    assert fit.mean(regrets) < fit.mean(before)


def test_something_is_stored():
    assert STORED


def test_attention_with_gradients_is_the_librarys(folder):
    """Backward sums the scores in the order in which forward did, whatever a file says of forward."""
    folder(
        "amd-26-2", {"attention": {f"float32 {what}": "few_queries" for what in ("inference", "training")}}
    )
    op, q = OPS["attention"], torch.randn(1, 2, 9, 8)
    args = (q, q, q, None, False, None)
    assert plan(op, args).algorithm == "few_queries"
    made = plan(op, (q.clone().requires_grad_(), *args[1:]))
    assert (made.algorithm, made.numbers) == ("blocks", ())


def test_what_the_library_said_is_not_kept_for_good():
    from fastnn.ops.core import algorithms as core

    assert core._asked.cache_info().maxsize is not None
