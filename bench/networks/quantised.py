"""Networks as ONNX Runtime quantises them: u8 activations, i8 weights per channel, calibrated on random inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convgen.measure.network_model import NetworkModel

#: Name -> the network that is quantised.
QUANTISED = {f"{name}_int8": name for name in ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1", "densenet121")}
#: Inputs that ranges of activations are taken from.
CALIBRATED = 4


class _Inputs:
    """What ONNX Runtime's quantiser reads: arrays by name, until None."""

    def __init__(self, inputs: Iterable[Mapping[str, npt.NDArray[Any]]]) -> None:
        self._left = iter(inputs)

    def get_next(self) -> Mapping[str, npt.NDArray[Any]] | None:
        return next(self._left, None)


def _random(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Mapping[str, npt.NDArray[Any]]]:
    rng = np.random.default_rng(0)
    for _ in range(CALIBRATED):
        yield {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_quantised(
    name: str, model: NetworkModel, folder: Path, inputs: Iterable[Mapping[str, npt.NDArray[Any]]] | None = None
) -> Path:
    """A network's quantised model in a folder, with QuantizeLinear and DequantizeLinear round its operators.

    Args:
        inputs: that ranges of activations are taken from; a few random ones where None.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    path = folder / f"{name}.onnx"
    logging.disable(logging.WARNING)  # it advises to infer shapes before, which these models have
    try:
        quantize_static(
            str(model.path),
            str(path),
            _Inputs(inputs or _random({given: array.shape for given, array in model.inputs.items()})),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)
    return path
