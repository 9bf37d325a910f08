"""The networks that ``network.py`` measures: written as PyTorch modules, or shipped with onnx without their weights.
Some are there as ONNX Runtime quantises them, too.

:func:`network_model` gives each as an ONNX file with weights. Weights are random, but such that activations neither
vanish nor grow: numbers that are nearly zero take processors a hundred times longer.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from convgen.errors import UnsupportedError
from convgen.measure.network_model import NetworkModel
from convgen.measure.network_peers import NETWORK_PEERS

from .light import LIGHT, write_light
from .quantised import QUANTISED, write_quantised

__all__ = ["NAMES", "QUANTISED", "check_models", "check_peers", "network_model"]

#: The networks of :data:`bench.networks.modules.MODULES`, which takes PyTorch to import.
_MODULES = (
    "resnet18",
    "resnet50",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_x_800mf",
    "densenet121",
    "shufflenet_v2",
    "squeezenet1_1",
    "convnext_tiny",
    "detector",
    "detector_v8",
    "fcn_resnet18",
    "unet",
    "vocoder",
)
#: Every network by name, in the order of the tables.
NAMES = (*_MODULES, *LIGHT)
_KNOWN = (*NAMES, *QUANTISED)


def network_model(name: str, folder: Path, dims: Mapping[str, int] | None = None) -> NetworkModel:
    """A network by its name, written to a folder; or an ONNX file by its path, with sizes of its symbolic dimensions.

    Raises:
        UnsupportedError: there is neither, or it is a module and PyTorch is not installed.
    """
    if name in QUANTISED:
        return NetworkModel(write_quantised(name, network_model(QUANTISED[name], folder), folder))
    if name in LIGHT:
        return NetworkModel(write_light(name, folder))
    if name in _MODULES:
        try:
            from .modules import module, write_module
        except ImportError as error:
            hint = "pip install '.[peers]'"
            raise UnsupportedError(
                f"{name}: expected PyTorch, which it is written in, found {error}: {hint}"
            ) from error
        return NetworkModel(write_module(name, folder), module=partial(module, name))
    if Path(name).is_file():
        return NetworkModel(Path(name), dims or {})
    raise UnsupportedError(f"--models: expected ONNX files or some of {', '.join(_KNOWN)}, found {name!r}")


def check_models(parser: ArgumentParser, models: Sequence[str]) -> None:
    """End with a usage error where one of ``--models`` is neither a network here nor a file."""
    for name in models:
        if name not in _KNOWN and not Path(name).is_file():
            parser.error(f"--models: expected ONNX files or some of {', '.join(_KNOWN)}, found {name!r}")


def check_peers(parser: ArgumentParser, peers: Sequence[str]) -> None:
    """End with a usage error where one of ``--peers`` is no library that runs whole networks."""
    for name in peers:
        if name not in NETWORK_PEERS:
            parser.error(f"--peers: expected some of {', '.join(NETWORK_PEERS)}, found {name!r}")
