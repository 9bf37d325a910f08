"""A small network with trained weights, for what cannot be said of random ones: drawn pictures of ten classes.

A class is the direction of a wave; its length, phase, colour, contrast and a noise over it are another ones in each
picture. The network has what quantisation is hard on: depthwise convolutions, residuals, a Relu6.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from convgen.measure.network_model import NetworkModel

Array = npt.NDArray[Any]

NAME = "pictures"
CLASSES, SIDE, NOISE = 10, 32, 1.5
STEPS, BATCH = 300, 32
#: Of pictures that it is calibrated with and asked for, of its first weights, and from which on pictures it is trained
#: with, a batch each.
CALIBRATED, ASKED, FIRST, TRAINED = 0, 1, 2, 3


def drawn(count: int, seed: int) -> tuple[Array, Array]:
    """Pictures ``[count, 3, 32, 32]`` and their classes."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    angle = (classes + rng.uniform(-0.3, 0.3, count)) * np.pi / CLASSES
    waves, phase = rng.uniform(3, 7, count), rng.uniform(0, 2 * np.pi, count)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    wave = np.cos(2 * np.pi * waves[:, None, None] * along + phase[:, None, None]) * rng.uniform(0.3, 1, (count, 1, 1))
    pictures = wave[:, None] * rng.standard_normal((count, 3, 1, 1))
    return (pictures + NOISE * rng.standard_normal(pictures.shape)).astype(np.float32), classes


class _Block(nn.Module):
    """A depthwise convolution and a 1×1 one, added to what they are of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.layers = nn.Sequential(
            depthwise, nn.BatchNorm2d(channels), nn.ReLU6(), pointwise, nn.BatchNorm2d(channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.layers(x))


def _network() -> nn.Module:
    parts: list[nn.Module] = []
    for before, channels in ((3, 32), (32, 48), (48, 64)):
        parts += [nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        parts += [_Block(channels)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def write_trained(folder: Path) -> NetworkModel:
    """The network, trained, as an ONNX file in a folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FIRST)
        network = _network().train()
        optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
        for step in range(STEPS):
            pictures, classes = map(torch.from_numpy, drawn(BATCH, TRAINED + step))
            loss = nn.functional.cross_entropy(network(pictures), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    path = folder / f"{NAME}.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that this exporter is the older one; the newer needs onnxscript
        given = (torch.zeros(1, 3, SIDE, SIDE),)
        torch.onnx.export(network.eval(), given, path, dynamo=False, input_names=["x"])
    return NetworkModel(path)
