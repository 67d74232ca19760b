"""The data of the examples: real CIFAR-10, MNIST and text files if the user has them, else what is already installed.

Without a folder the images are scikit-learn's handwritten digits, resized, and the text is the source of Python's own
standard library, so that every example runs on a machine with no network.
"""

from __future__ import annotations

import gzip
import pickle
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

CIFAR_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_TEST = ("test_batch",)
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

TRAIN_CHARACTERS, TEST_CHARACTERS = 400_000, 40_000


class Images:
    """Labelled images, kept as bytes and handed out as floats in [-1, 1]."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels[indices].float() / 127.5 - 1, self.labels[indices]


class Text:
    """A text cut into windows of `length` characters; the targets are the characters that follow."""

    def __init__(self, characters: torch.Tensor, length: int):
        self.characters, self.length = characters, length

    def __len__(self) -> int:
        return (len(self.characters) - 1) // self.length

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = indices[:, None] * self.length + torch.arange(self.length + 1)
        windows = self.characters[positions].long()
        return windows[:, :-1], windows[:, 1:].contiguous()


class Data(NamedTuple):
    """What to train on, what to test on, and where it comes from."""

    train: Images | Text
    test: Images | Text
    source: str


def cifar10(directory: str | Path | None = None) -> Data:
    """CIFAR-10 (3x32x32) from its Python or its binary version; without a folder, the digits in that size."""
    if directory is None:
        return _digits(32, channels=3)
    candidates = _folders(directory, "cifar-10-batches-py", "cifar-10-batches-bin")
    for suffix, read in (("", _read_cifar_pickle), (".bin", _read_cifar_binary)):
        for folder in candidates:
            names = [n + suffix for n in CIFAR_TRAIN + CIFAR_TEST]
            if not any((folder / n).is_file() for n in names):
                continue
            if missing := [n for n in names if not (folder / n).is_file()]:
                raise FileNotFoundError(
                    f"{folder} holds only a part of CIFAR-10: {', '.join(missing)} missing"
                )
            train, test = ([read(folder / (n + suffix)) for n in part] for part in (CIFAR_TRAIN, CIFAR_TEST))
            return Data(_join(train), _join(test), f"CIFAR-10 in {folder}")
    raise FileNotFoundError(
        f"no CIFAR-10 in {directory}: expected {', '.join(CIFAR_TRAIN + CIFAR_TEST)} (the Python version) or the same "
        f"names ending in .bin (the binary version), there or in cifar-10-batches-py/ or cifar-10-batches-bin/"
    )


def mnist(directory: str | Path | None = None) -> Data:
    """MNIST (1x28x28) from its four idx files, gzipped or not; without a folder, the digits in that size."""
    if directory is None:
        return _digits(28, channels=1)
    best: list[str] = list(MNIST_FILES)
    for folder in _folders(directory, "MNIST/raw", "raw"):
        paths = [_find_idx(folder, name) for name in MNIST_FILES]
        missing = [name for name, path in zip(MNIST_FILES, paths, strict=True) if path is None]
        if not missing:
            train_x, train_y, test_x, test_y = (
                _read_idx(p, dims=d) for p, d in zip(paths, (3, 1, 3, 1), strict=True)
            )
            return Data(
                _labelled(train_x[:, None], train_y, paths[0]),
                _labelled(test_x[:, None], test_y, paths[2]),
                f"MNIST in {folder}",
            )
        best = min(best, missing, key=len)
    raise FileNotFoundError(
        f"no complete MNIST in {directory}: {', '.join(best)} missing (each may also end in .gz); expected there or in "
        f"MNIST/raw/: {', '.join(MNIST_FILES)}"
    )


def text(directory: str | Path | None = None, length: int = 64) -> Data:
    """Characters (ASCII codes) of the .py and .txt files of a folder, by default Python's standard library's.

    Every tenth file is for the test.
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if directory is None else directory)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".py", ".txt") and p.is_file())
    train = _read_text((p for i, p in enumerate(files) if i % 10 != 5), TRAIN_CHARACTERS)
    test = _read_text((p for i, p in enumerate(files) if i % 10 == 5), TEST_CHARACTERS)
    for part, needs in ((train, "one"), (test, "six")):
        if len(part) <= length:
            raise FileNotFoundError(
                f"not enough text in {folder}: expected at least {needs} .py or .txt files, with more than {length} "
                f"characters, found {len(files)} files"
            )
    source = "the source of Python's standard library" if directory is None else f"text in {folder}"
    return Data(Text(train, length), Text(test, length), source)


def _digits(size: int, channels: int) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    pixels = (pixels * 255).round().to(torch.uint8).repeat(1, channels, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return Data(
        Images(pixels[train], labels[train]),
        Images(pixels[test], labels[test]),
        f"scikit-learn's handwritten digits, resized to {size}x{size}",
    )


def _folders(directory, *below) -> list[Path]:
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    return [root, *(root / name for name in below if (root / name).is_dir())]


def _labelled(pixels: np.ndarray, labels: np.ndarray, path) -> Images:
    if len(pixels) != len(labels):
        raise ValueError(f"{path}: {len(pixels)} images but {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(f"{path}: expected labels from 0 to 9, got {labels.min()} to {labels.max()}")
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


def _join(parts: list[Images]) -> Images:
    return Images(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and nothing else: a pickle from elsewhere may name any function."""

    ALLOWED = frozenset(
        (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        )
    )

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a CIFAR-10 batch has no use for")
        # numpy 2 moved the module that old pickles name.
        return super().find_class(module.replace("numpy.core", "numpy._core") if _NUMPY_2 else module, name)


_NUMPY_2 = int(np.__version__.split(".")[0]) >= 2


def _read_cifar_pickle(path: Path) -> Images:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels = np.asarray(batch[b"data"] if b"data" in batch else batch["data"])
        labels = np.asarray(batch[b"labels"] if b"labels" in batch else batch["labels"])
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path} is not a batch of CIFAR-10's Python version: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise ValueError(
            f"{path}: expected uint8 data of shape (N, 3072), got {pixels.dtype} of shape {pixels.shape}"
        )
    return _labelled(pixels.reshape(-1, 3, 32, 32), labels, path)


def _read_cifar_binary(path: Path) -> Images:
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % 3073:
        raise ValueError(
            f"{path}: expected records of 3073 bytes (label and 3x32x32 pixels), got {len(raw)} bytes"
        )
    records = raw.reshape(-1, 3073)
    return _labelled(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], path)


def _find_idx(folder: Path, name: str) -> Path | None:
    # Some copies spell the first dash before "idx" as a dot.
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    return None


def _read_idx(path: Path, dims: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    if raw[:4] != bytes((0, 0, 8, dims)):
        raise ValueError(
            f"{path}: expected an idx file of bytes in {dims} dimensions, got first bytes {raw[:4].hex()}"
        )
    if len(raw) < 4 + 4 * dims:
        raise ValueError(f"{path}: expected a header of {4 + 4 * dims} bytes, got {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=dims, offset=4))
    expected = 4 + 4 * dims + int(np.prod(shape))
    if len(raw) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for shape {shape}, got {len(raw)}")
    if dims == 3 and shape[1:] != (28, 28):
        raise ValueError(f"{path}: expected images of 28x28, got {shape[1]}x{shape[2]}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def _read_text(files, limit: int) -> torch.Tensor:
    text = bytearray()
    for path in files:
        text += path.read_bytes()
        if len(text) >= limit:
            break
    codes = torch.tensor(text[:limit], dtype=torch.uint8)
    return torch.where(codes < 128, codes, ord("?"))
