"""The classic small CNN for CIFAR-10: two 5x5 convolutions, each pooled, and three linear layers."""

import torch
from data import cifar10
from train import Task, main


class Net(torch.nn.Module):
    def __init__(self, nn):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.flatten(x)
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.fc3(x)


class FusedNet(torch.nn.Module):
    """The same network from fused layers; parameters and their names are the same."""

    def __init__(self, nn):
        super().__init__()
        self.conv1 = nn.ConvReLUMaxPool2d(3, 6, 5, pool_kernel_size=2)
        self.conv2 = nn.ConvReLUMaxPool2d(6, 16, 5, pool_kernel_size=2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.LinearReLU(16 * 5 * 5, 120)
        self.fc2 = nn.LinearReLU(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.flatten(self.conv2(self.conv1(x)))
        return self.fc3(self.fc2(self.fc1(x)))


def build(nn, fused=False):
    return FusedNet(nn) if fused else Net(nn)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


TASK = Task("cifar_cnn", build, cifar10, optimizer, batch_size=64, epochs=12)

if __name__ == "__main__":
    raise SystemExit(main(TASK))
