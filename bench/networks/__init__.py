"""The networks that ``network.py`` measures: written as PyTorch modules, or shipped with onnx without their weights.

:func:`network_model` gives each as an ONNX file with weights. Weights are random, but such that activations neither
vanish nor grow: numbers that are nearly zero take processors a hundred times longer.
"""

from __future__ import annotations

from pathlib import Path

from convgen.errors import UnsupportedError
from convgen.measure.networks import NetworkModel

from .light import LIGHT, write_light

__all__ = ["NAMES", "network_model"]

#: Every network by name, in the order of the tables.
NAMES = (*LIGHT,)


def network_model(name: str, folder: Path) -> NetworkModel:
    """A network by its name, written to a folder; or an ONNX file by its path.

    Raises:
        UnsupportedError: there is neither.
    """
    if name in LIGHT:
        return NetworkModel(write_light(name, folder))
    if Path(name).is_file():
        return NetworkModel(Path(name))
    raise UnsupportedError(f"--models: expected ONNX files or some of {', '.join(NAMES)}, found {name!r}")
