"""The model file that the campaign trains, exports and compresses: small, with state in batch norms and in dropout."""

import os
import signal

import torch
from torch import nn

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(48) % 4
epochs = 4
steps = 0


def model():
    torch.manual_seed(0)
    parts = [nn.Linear(16, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 40), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(40, 4))


def example_inputs():
    return (X[:4],)


def train_data():
    return [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]


def loss(output, batch):
    global steps
    steps += 1
    if steps == int(os.environ.get("STOP_AT", 0)):
        os.kill(os.getpid(), signal.SIGINT)
    return nn.functional.cross_entropy(output, batch[-1])


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)
