"""Frozen models in files: what is read back, and what is refused."""

from __future__ import annotations

import copy
import json
import random
import subprocess

import pytest
import torch
from conftest import BUILD, missing
from safetensors import safe_open
from safetensors.torch import save_file
from test_graph import MODELS, Of, leaves, prepared, randn

import fastnn
from fastnn import _library
from fastnn.graph import saved

pytestmark = pytest.mark.usefixtures("quick_choice")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def small_cnn(tmp_path_factory):
    """A model, what it is called with, and its file's contents."""
    path = tmp_path_factory.mktemp("small_cnn") / "model.safetensors"
    model, x = prepared(MODELS["small CNN"][0]()), randn(1, 3, 32, 32)
    fastnn.freeze(model, x).save(path)
    return model, x, path.read_bytes()


def parts(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["fastnn"])


def rewrite(path, tensors, found):
    """The file with other contents, and a digest that fits them."""
    text = json.dumps(found)
    save_file(tensors, path, {"fastnn": text, "sha256": saved._digest(text, tensors)})


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_loaded(name, path):
    make, inputs = MODELS[name]
    dtype = torch.bfloat16 if name in ("ResNet", "causal layer") else torch.float32
    model = prepared(make()).to(dtype)
    # Of some, two kinds of calls.
    calls = [[t.to(dtype) if t.is_floating_point() else t for t in inputs(n)] for n in (2, 3)]
    calls = calls if name in ("ConvNeXt", "causal layer", "MLP") else calls[:1]
    frozen = fastnn.freeze(model, *calls[0])
    for given in calls[1:]:
        frozen(*given)
    frozen.save(path)
    loaded = fastnn.load(path)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    for given in calls:
        with torch.no_grad():
            expected = leaves(model(*given))
        for a, b in zip(leaves(loaded(*given)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            assert a.stride() == b.stride()
    assert any(row.where.startswith("fastnn") for row in fastnn.explain(loaded, *calls[0]))


def test_structures_and_options(path):
    model = Of(
        lambda m, x, *, scale=1.0, flag=False: {"y": m.a(x["t"]) * scale, "n": None}, a=torch.nn.Linear(6, 6)
    )
    x = {"t": randn(3, 6)}
    frozen = fastnn.freeze(model, x, scale=2.0, flag=True)
    frozen.save(path)
    loaded = fastnn.load(path)
    out = loaded(x, scale=2.0, flag=True)
    assert out["n"] is None
    torch.testing.assert_close(out["y"], frozen(x, scale=2.0, flag=True)["y"])
    for call in (
        lambda: loaded(x, scale=3.0, flag=True),
        lambda: loaded({"t": randn(4, 6)}, scale=2.0, flag=True),
    ):
        with pytest.raises(ValueError, match="kinds of calls"):
            call()
    again = path.with_name("again")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    torch.testing.assert_close(copy.deepcopy(loaded)(x, scale=2.0, flag=True)["y"], out["y"])


def test_weights_are_saved_once_and_packed_anew(path):
    model, x = prepared(MODELS["small CNN"][0]()), randn(2, 3, 32, 32)
    frozen = fastnn.freeze(model, x)
    frozen(randn(1, 3, 32, 32))
    frozen.save(path)
    tensors, found = parts(path)
    weights = sum(p.nbytes for p in model.parameters())
    assert sum(t.nbytes for t in tensors.values()) < 2.2 * weights  # in two layouts at the most
    assert len(found["kinds"]) == 2
    # On another processor, and at another level, the library chooses.
    expected = frozen(x)
    for key, value in (("processor", "abacus-1-1"), ("level", "portable")):
        other = path.with_name(key)
        rewrite(other, tensors, {**found, key: value})
        torch.testing.assert_close(fastnn.load(other)(x), expected, rtol=1e-4, atol=1e-5)


def test_at_every_level(path, level):
    model, x = prepared(MODELS["small CNN"][0]()), randn(2, 3, 32, 32)
    frozen = fastnn.freeze(model, x)
    frozen.save(path)
    loaded = fastnn.load(path)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    _library.set_isa("portable")
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ResNet", "post-norm layer", "small CNN"])
def test_without_python(name, path):
    """The example in C++ gives what the loaded model does, where it was built."""
    if not (BUILD / "run_saved").exists():
        missing(f"no run_saved in {BUILD}: run `ninja -C build run_saved`")
    make, inputs = MODELS[name]
    x = inputs(2)
    frozen = fastnn.freeze(prepared(make()), *x)
    frozen.save(path)
    expected = frozen(*x)
    names = [path.with_name(f"input_{i}") for i in range(len(x))]
    for file, t in zip(names, x, strict=True):
        file.write_bytes(t.contiguous().numpy().tobytes())
    out = path.with_name("output")
    subprocess.run([BUILD / "run_saved", path, out, *names], check=True, capture_output=True)
    made = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).view(expected.shape)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    path.write_bytes(path.read_bytes()[:-1])
    done = subprocess.run([BUILD / "run_saved", path, out, *names], capture_output=True, text=True)
    assert done.returncode == 1
    assert "past the end" in done.stderr


def test_what_is_not_saved(path):
    frozen = fastnn.freeze(Of(lambda m, x, s: m.a(x) * s, a=torch.nn.Linear(6, 6)), randn(3, 6), float("inf"))
    with pytest.raises(ValueError, match="not saved"):
        frozen.save(path)
    assert not path.exists()


def test_files_that_are_none(path, small_cnn):
    whole = small_cnn[2]
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            fastnn.load(path)
    choose = random.Random(0)
    for _ in range(60):
        altered = bytearray(whole)
        altered[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            fastnn.load(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no frozen model"):
        fastnn.load(path)
    with pytest.raises(OSError):
        fastnn.load(path.with_name("missing"))


def calls_of(found):
    return [entry for entry in found["kinds"][0]["graph"] if entry["op"] == "call"]


@pytest.mark.parametrize(
    "op",
    [
        "aten.from_file.default",
        "aten.add_.Tensor",
        "aten.no_such_op.default",
        "prims.add.default",
        "fastnn._program_run.default",
        "fastnn._set_isa.default",
        "os.system.default",
        "eval",
        "aten",
        7,
    ],
)
def test_ops_that_no_file_may_name(op, path, small_cnn):
    path.write_bytes(small_cnn[2])
    tensors, found = parts(path)
    call = calls_of(found)[0]
    call["target"] = op
    call.pop("algorithm", None)
    if op == "aten.from_file.default":
        call["args"], call["kwargs"] = ["/etc/hostname"], {"dict": {}}
    rewrite(path, tensors, found)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        fastnn.load(path)


def test_contents_that_do_not_fit(path, small_cnn):
    """Of a file whose digest fits: other versions, and places at random that hold something else."""
    model, x, whole = small_cnn
    path.write_bytes(whole)
    tensors, found = parts(path)
    rewrite(path, tensors, found)
    torch.testing.assert_close(fastnn.load(path)(x), model(x), rtol=1e-4, atol=1e-5)
    rewrite(path, tensors, {**found, "version": 2})
    with pytest.raises(ValueError, match="version is 2"):
        fastnn.load(path)
    rewrite(path, dict(list(tensors.items())[1:]), found)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        fastnn.load(path)

    def places(value, at=()):
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in items:
            yield (*at, key)
            yield from places(inner, (*at, key))

    choose = random.Random(0)
    for place in choose.sample(list(places(found)), 100):
        hostile = copy.deepcopy(found)
        inner = hostile
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = choose.choice((None, -1, 3, 1 << 40, "aten", [], {}, {"node": 0}, 2.5, True))
        rewrite(path, tensors, hostile)
        try:
            fastnn.load(path)
        except ValueError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017
