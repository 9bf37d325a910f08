"""The networks that are written here as PyTorch modules, with weights, and exported as ONNX files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import classifiers, others

#: Name -> what makes the module, and the shape of its input.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (classifiers.resnet18, (1, 3, 224, 224)),
    "resnet50": (classifiers.resnet50, (1, 3, 224, 224)),
    "mobilenet_v1": (classifiers.mobilenet_v1, (1, 3, 224, 224)),
    "mobilenet_v2": (classifiers.mobilenet_v2, (1, 3, 224, 224)),
    "mobilenet_v3_large": (classifiers.mobilenet_v3_large, (1, 3, 224, 224)),
    "efficientnet_b0": (classifiers.efficientnet_b0, (1, 3, 224, 224)),
    "regnet_x_800mf": (classifiers.regnet_x_800mf, (1, 3, 224, 224)),
    "densenet121": (classifiers.densenet121, (1, 3, 224, 224)),
    "shufflenet_v2": (classifiers.shufflenet_v2, (1, 3, 224, 224)),
    "squeezenet1_1": (classifiers.squeezenet1_1, (1, 3, 224, 224)),
    "convnext_tiny": (classifiers.convnext_tiny, (1, 3, 224, 224)),
    "detector": (others.detector, (1, 3, 320, 320)),
    "detector_v8": (others.detector_v8, (1, 3, 320, 320)),
    "fcn_resnet18": (others.fcn_resnet18, (1, 3, 224, 224)),
    "unet": (others.unet, (1, 3, 256, 256)),
    "vocoder": (others.vocoder, (1, 80, 64)),
}


def input_shape(name: str, side: int | None = None) -> tuple[int, ...]:
    """The shape of a network's input; its images with sides of other lengths where one is given."""
    shape = MODULES[name][1]
    return shape if side is None else (*shape[:2], *(side for _ in shape[2:]))


def module(name: str, seed: int = 0, side: int | None = None) -> Any:
    """A network with weights, ready for inference on images of some size: the same in every process.

    Convolutions and linear layers keep the scale of what follows an activation, and batch normalisation has the means
    and variances of its inputs, so that it normalises them as in a trained network.
    """
    make, shape = MODULES[name][0], input_shape(name, side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make()
        for part in made.modules():
            if isinstance(part, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                if part.bias is not None:
                    nn.init.normal_(part.bias, std=0.1)
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0  # statistics are those of the last batch
        with torch.no_grad():
            made.train()(torch.randn(8 // shape[0], *shape[1:]))
    return made.eval()


def write_module(name: str, folder: Path, side: int | None = None) -> Path:
    """A network as an ONNX file in a folder, its batch normalisations folded; on images of another size where a length
    of their sides is given.
    """
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that this exporter is the older one; the newer needs onnxscript
        given = (torch.zeros(input_shape(name, side)),)
        torch.onnx.export(module(name, side=side), given, path, dynamo=False, input_names=["x"])
    return path
