"""A 784-128-10 multilayer perceptron on MNIST or the handwritten digits."""

import torch
from data import mnist
from train import Task, main


class Net(torch.nn.Module):
    def __init__(self, nn):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(784, 128)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(self.flatten(x))))


class FusedNet(torch.nn.Module):
    """The same network, the first layer and its ReLU in one; parameters and their names are the same."""

    def __init__(self, nn):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.LinearReLU(784, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        return self.fc2(self.fc1(self.flatten(x)))


def build(nn, fused=False):
    return FusedNet(nn) if fused else Net(nn)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


TASK = Task("mnist_mlp", build, mnist, optimizer, batch_size=64, epochs=12)

if __name__ == "__main__":
    raise SystemExit(main(TASK))
