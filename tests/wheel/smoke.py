"""What an installed wheel must do, on any Python: run with the wheel's folder on the path, outside of the source tree."""

import sys
from pathlib import Path

import torch

import fastnn
import fastnn.nn.functional as F
from fastnn import nn


def main() -> None:
    source = Path(__file__).resolve().parents[2]
    assert source not in Path(fastnn.__file__).resolve().parents, f"{fastnn.__file__} is the source tree's"
    torch.manual_seed(0)
    ours = nn.Sequential(
        nn.ConvReLUMaxPool2d(3, 6, 5),
        nn.Conv2d(6, 16, 5),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LinearReLU(400, 24),
        nn.Linear(24, 10),
    )
    torch.manual_seed(0)
    stock = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        torch.nn.Conv2d(6, 16, 5),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Sequential(torch.nn.Linear(400, 24), torch.nn.ReLU()),
        torch.nn.Linear(24, 10),
    )
    x = torch.randn(2, 3, 32, 32)
    losses = [model(x).square().sum() for model in (ours, stock)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    q = torch.randn(1, 2, 30, 16)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, q, q, is_causal=True),
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
    )
    assert "fastnn" in str(fastnn.explain(ours, x))
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: the wheel works")


if __name__ == "__main__":
    main()
