"""A network that begins as VGG does: twice two 3x3 convolutions and a pooling, then two linear layers."""

import torch
from data import cifar10
from train import Task, main


class Net(torch.nn.Module):
    def __init__(self, nn):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(128 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.conv3(x))
        x = self.pool(self.relu(self.conv4(x)))
        return self.fc2(self.relu(self.fc1(self.flatten(x))))


class FusedNet(torch.nn.Module):
    """The same network from fused layers; parameters and their names are the same."""

    def __init__(self, nn):
        super().__init__()
        self.conv1 = nn.ConvReLU2d(3, 64, 3, padding=1)
        self.conv2 = nn.ConvReLUMaxPool2d(64, 64, 3, padding=1, pool_kernel_size=2)
        self.conv3 = nn.ConvReLU2d(64, 128, 3, padding=1)
        self.conv4 = nn.ConvReLUMaxPool2d(128, 128, 3, padding=1, pool_kernel_size=2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.LinearReLU(128 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        return self.fc2(self.fc1(self.flatten(x)))


def build(nn, fused=False):
    net = FusedNet(nn) if fused else Net(nn)
    # As torchvision's VGG: with the layers' own initial values the loss stays on a plateau at first.
    for parameter in net.parameters():
        if parameter.dim() == 4:
            torch.nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
    return net


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.005, momentum=0.9)


TASK = Task("vgg_start", build, cifar10, optimizer, batch_size=16, epochs=3)

if __name__ == "__main__":
    raise SystemExit(main(TASK))
