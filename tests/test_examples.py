"""The examples: every network trains alike on torch.nn and fastnn.nn, and real data is read from its original files."""

import gzip
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import training

EXAMPLES = Path(__file__).parent.parent / "examples"
TASKS = {name: training.load_task(name) for name in training.NETS}

import data  # noqa: E402  (examples/ is on the path now)
import train  # noqa: E402


@pytest.fixture
def few_samples(monkeypatch):
    """Makes each test set small enough to be evaluated in no time."""
    monkeypatch.setattr(data.Images, "__len__", lambda self: min(len(self.labels), 200))
    monkeypatch.setattr(data.Text, "__len__", lambda self: 64)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_losses_agree(name, fused):
    task = TASKS[name]
    if fused and not task.has_fused:
        pytest.skip("has no fused form")
    split = task.load(None).train
    losses = {}
    for backend in ("torch", "fastnn"):
        net, optimizer = train.make(task, train.backend(backend), seed=3, fused=fused and backend == "fastnn")
        generator = torch.Generator().manual_seed(3)
        order = train.batches(len(split), 16, generator)[:4]
        losses[backend] = [train.step(net, optimizer, *split.batch(i)) for i in order]
    assert len(set(losses["torch"])) == 4
    np.testing.assert_allclose(losses["fastnn"], losses["torch"], rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in TASKS if TASKS[n].has_fused])
def test_fused_has_the_same_state(name):
    plain, _ = train.make(TASKS[name], train.backend("torch"), seed=5)
    fused, _ = train.make(TASKS[name], train.backend("fastnn"), seed=5, fused=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "fastnn"])
@pytest.mark.parametrize("name", TASKS)
def test_command_line(name, backend, few_samples, capsys):
    assert train.main(TASKS[name], ["--backend", backend, "--steps", "2", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{backend}.nn" in out
    assert "test accuracy" in out
    assert "2 steps" in out


def test_runs_as_a_script():
    command = [sys.executable, EXAMPLES / "mnist_mlp.py", "--backend", "torch", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 steps" in done.stdout


def test_command_line_refuses(tmp_path, capsys):
    assert train.main(TASKS["cifar_cnn"], ["--backend", "torch", "--data", str(tmp_path)]) == 1
    assert "data_batch_1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(TASKS["cifar_cnn"], ["--backend", "torch", "--fused"])
    with pytest.raises(SystemExit):
        train.main(TASKS["cifar_cnn"], ["--epochs", "0"])


def test_digits():
    images = data.cifar10()
    pixels, labels = images.train.batch(torch.arange(5))
    assert pixels.shape == (5, 3, 32, 32)
    assert labels.shape == (5,)
    assert -1 <= pixels.min() < 0 < pixels.max() <= 1
    assert len(images.train) + len(images.test) == 1797
    assert data.mnist().train.batch(torch.arange(2))[0].shape == (2, 1, 28, 28)


def _cifar_batches(seed=0, count=4):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist())
        for name in data.CIFAR_TRAIN + data.CIFAR_TEST
    }


def _check_cifar(found, batches):
    pixels = np.concatenate([batches[n][0] for n in data.CIFAR_TRAIN]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(found.train.pixels.numpy(), pixels)
    assert found.train.labels.tolist() == [label for n in data.CIFAR_TRAIN for label in batches[n][1]]
    assert found.test.labels.tolist() == batches["test_batch"][1]


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("keys", [bytes, str])
def test_cifar_python_version(tmp_path, below, keys):
    batches = _cifar_batches()
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    for name, (pixels, labels) in batches.items():
        batch = {"batch_label": name, "labels": labels, "data": pixels}
        if keys is bytes:
            batch = {k.encode(): v for k, v in batch.items()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    _check_cifar(data.cifar10(tmp_path), batches)


def test_cifar_as_python_2_wrote_it(tmp_path):
    # The original files: protocol 2 of Python 2, where str is bytes and numpy's module has its old name.
    for name, (pixels, labels) in (batches := _cifar_batches()).items():
        raw = pixels.tobytes()
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01bt"
            b"R(I1\n(I%d\nI3072\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\n"
            % len(pixels)
        )
        array += b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
        listed = b"(l" + b"".join(b"I%d\na" % label for label in labels)
        (tmp_path / name).write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u.")
    _check_cifar(data.cifar10(tmp_path), batches)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar_binary_version(tmp_path, below):
    batches = _cifar_batches()
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    for name, (pixels, labels) in batches.items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    _check_cifar(data.cifar10(tmp_path), batches)
    (folder / "test_batch.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected records of 3073 bytes.*100 bytes"):
        data.cifar10(tmp_path)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin missing"):
        data.cifar10(tmp_path)


class _Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Evil()), r"builtins\.print"),
        (pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}), r"\(N, 3072\)"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "2 images but 1 labels"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [11]}), "from 0 to 9"),
        (pickle.dumps([1, 2]), "not a batch"),
        (b"", "not a batch"),
    ],
)
def test_cifar_refuses_other_pickles(tmp_path, capsys, content, message):
    for name in data.CIFAR_TRAIN + data.CIFAR_TEST:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.cifar10(tmp_path)
    assert "must not run" not in capsys.readouterr().out


def _idx(array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def _write_mnist(folder, suffix="", dot=False):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    arrays = [
        rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        rng.integers(0, 10, 6, dtype=np.uint8),
        rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        rng.integers(0, 10, 3, dtype=np.uint8),
    ]
    for name, array in zip(data.MNIST_FILES, arrays, strict=True):
        name = name.replace("-idx", ".idx") if dot else name
        raw = _idx(array)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return arrays


@pytest.mark.parametrize(
    ("below", "suffix", "dot"), [("", "", False), ("", ".gz", True), ("MNIST/raw", ".gz", False)]
)
def test_mnist(tmp_path, below, suffix, dot):
    arrays = _write_mnist(tmp_path / below, suffix, dot)
    found = data.mnist(tmp_path)
    np.testing.assert_array_equal(found.train.pixels.numpy()[:, 0], arrays[0])
    assert found.train.labels.tolist() == arrays[1].tolist()
    np.testing.assert_array_equal(found.test.pixels.numpy()[:, 0], arrays[2])
    assert found.test.labels.tolist() == arrays[3].tolist()


def test_mnist_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        data.mnist(tmp_path / "nowhere")
    _write_mnist(tmp_path)
    images, labels = (tmp_path / n for n in data.MNIST_FILES[:2])
    whole = images.read_bytes()
    images.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"expected {len(whole)} bytes.*got {len(whole) - 1}"):
        data.mnist(tmp_path)
    images.write_bytes(whole[:9])
    with pytest.raises(ValueError, match="header of 16 bytes, got 9"):
        data.mnist(tmp_path)
    images.write_bytes(labels.read_bytes())
    with pytest.raises(ValueError, match="3 dimensions"):
        data.mnist(tmp_path)
    images.unlink()
    (tmp_path / f"{images.name}.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        data.mnist(tmp_path)
    (tmp_path / f"{images.name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"{images.name} missing"):
        data.mnist(tmp_path)


def test_text(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_bytes(bytes(range(97, 107)) * 3 + "é".encode())
    found = data.text(tmp_path, length=8)
    inputs, targets = found.train.batch(torch.tensor([0, 1]))
    assert bytes(inputs[0].tolist()) == b"abcdefgh"
    assert bytes(targets[0].tolist()) == b"bcdefghi"
    assert bytes(inputs[1].tolist()) == b"ijabcdef"
    assert found.train.characters.max() < 128
    assert len(found.train) == (5 * 32 - 1) // 8
    assert len(found.test) == (32 - 1) // 8
    with pytest.raises(FileNotFoundError, match="not enough text"):
        data.text(tmp_path, length=64)


def test_text_is_causal():
    net, _ = train.make(TASKS["transformer_text"], train.backend("fastnn"), seed=0)
    inputs, _ = TASKS["transformer_text"].load(None).train.batch(torch.tensor([0]))
    changed = inputs.clone()
    changed[0, 40:] = 65
    with torch.no_grad():
        a, b = net(inputs), net(changed)
    torch.testing.assert_close(a[:, :40], b[:, :40])
    assert not torch.allclose(a[:, 40:], b[:, 40:])
