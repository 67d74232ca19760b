"""A small causal transformer encoder that predicts the next character of Python source."""

import math

import torch
from data import text
from train import Task, main

CHARACTERS = 128  # ASCII


class Net(torch.nn.Module):
    def __init__(self, nn, width=128, heads=2, layers=2, length=64):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(CHARACTERS, width)
        # Dropout would draw different random numbers in each implementation; without it their losses can be compared.
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, CHARACTERS)
        self.register_buffer("positions", positional_encoding(length, width), persistent=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        x = self.embedding(tokens) * math.sqrt(self.width) + self.positions[:length]
        x = self.encoder(x, mask=self.mask[:length, :length], is_causal=True)
        return self.head(x)


def positional_encoding(length, width):
    """Sines and cosines of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al., 2017)."""
    position = torch.arange(length)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    encoding = torch.empty(length, width)
    encoding[:, 0::2] = torch.sin(position * frequency)
    encoding[:, 1::2] = torch.cos(position * frequency)
    return encoding


def build(nn, fused=False):
    return Net(nn)


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


TASK = Task("transformer_text", build, text, optimizer, batch_size=32, epochs=1, has_fused=False)

if __name__ == "__main__":
    raise SystemExit(main(TASK))
