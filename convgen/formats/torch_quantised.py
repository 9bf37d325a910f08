"""Quantised convolutions of ``torch.ao``: what ``convert`` makes of a calibrated or quantisation-aware trained model.

A module has its own weights, steps and zero point of what it stores; those of its src are of what stands before it: a
``Quantize``, or the module that has stored it. PyTorch is not imported here.

Source: ``torch/ao/nn/quantized/modules`` and ``torch/ao/nn/intrinsic/quantized/modules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import SpecError, UnsupportedError
from ..problem.dtypes import RANGES, numpy_dtype
from ..problem.spec import ConvSpec

#: Class in torch.ao.nn -> (rank, transposed, activation).
CONVOLUTIONS = {
    **{f"quantized.modules.conv.Conv{rank}d": (rank, False, "none") for rank in (1, 2, 3)},
    **{f"quantized.modules.conv.ConvTranspose{rank}d": (rank, True, "none") for rank in (1, 2, 3)},
    **{f"intrinsic.quantized.modules.conv_relu.ConvReLU{rank}d": (rank, False, "relu") for rank in (1, 2, 3)},
}
QUANTIZE, DEQUANTIZE = "quantized.modules.Quantize", "quantized.modules.DeQuantize"

_TYPES = {"torch.quint8": "u8", "torch.qint8": "i8"}
_I32 = np.iinfo(np.int32)


class Steps(NamedTuple):
    """How numbers are stored: ``number = scale * (stored - zero)``."""

    scale: float
    zero: int
    dtype: str


def stored_by(quantize: Any, where: str) -> Steps:
    """How a ``Quantize`` stores numbers.

    Raises:
        UnsupportedError: not as 8-bit integers.
    """
    dtype = str(quantize.dtype)
    if dtype not in _TYPES:
        raise UnsupportedError(f"{where}: dtype: expected one of {', '.join(_TYPES)}, found {dtype}")
    return Steps(float(quantize.scale), int(quantize.zero_point), _TYPES[dtype])


@dataclass
class QuantisedConvolution:
    """A quantised convolution and what it reads.

    Attributes:
        kind: of :data:`CONVOLUTIONS`.
        source: how its src is stored; None where nothing before it says that.
    """

    conv: Any
    kind: str
    place: str
    where: str
    source: Steps | None
    activation: str = "none"

    def __post_init__(self) -> None:
        self.activation = CONVOLUTIONS[self.kind][2]
        if self.conv.padding_mode != "zeros":
            raise UnsupportedError(f"{self.where}: padding_mode: expected 'zeros', found {self.conv.padding_mode!r}")

    @property
    def stored(self) -> Steps:
        """How its dst is stored: of the type of its src, which is u8 where nothing says another."""
        return Steps(float(self.conv.scale), int(self.conv.zero_point), self.source.dtype if self.source else "u8")

    def spec(self, input_shape: Sequence[int], accuracy: str, layout: str) -> ConvSpec:
        """The layer, of integers. Where nothing says how src is stored, it has a zero point.

        Args:
            input_shape: ``(n, channels, *sizes)``.
        """
        conv, (rank, transposed, _) = self.conv, CONVOLUTIONS[self.kind]
        n, channels, *in_spatial = input_shape
        if channels != conv.in_channels:
            raise SpecError("input_shape", f"in_channels = {conv.in_channels}", f"{channels} channels", self.where)
        _, _, zeros = self._weights()
        return ConvSpec(
            n=n,
            ic=channels,
            oc=conv.out_channels,
            in_spatial=tuple(in_spatial),
            kernel=tuple(conv.kernel_size),
            stride=tuple(conv.stride)[:rank],
            padding=tuple(conv.padding)[:rank],
            dilation=tuple(conv.dilation)[:rank],
            groups=conv.groups,
            transposed=transposed,
            output_padding=tuple(conv.output_padding)[:rank] if transposed else 0,  # type: ignore[arg-type]
            bias=conv.bias() is not None,
            activation=self.activation,
            accuracy=accuracy,
            dtype="i8",
            layout=layout,
            src_dtype=self.stored.dtype,
            dst_dtype=self.stored.dtype,
            src_zero=self.source is None or self.source.zero != 0,
            weights_zero=bool(zeros.any()),
            dst_zero=self.stored.zero != 0,
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What ``kernel.bind`` takes. The bias, which PyTorch keeps as f32, is rounded to steps of the sums.

        Raises:
            SpecError: nothing says how src is stored.
            UnsupportedError: the bias leaves the range of i32.
        """
        if self.source is None:
            raise SpecError("module", "a Quantize before it, which says how its input is stored", "none", self.where)
        weights, scales, zeros = self._weights()
        found: dict[str, npt.NDArray[Any]] = {"weights": weights}
        steps = np.float32(self.source.scale) * scales
        if (bias := self.conv.bias()) is not None:
            whole = np.rint(bias.detach().cpu().double().numpy() / steps.astype(np.float64))
            if not (np.isfinite(whole) & (whole >= _I32.min) & (whole <= _I32.max)).all():
                raise UnsupportedError(f"{self.where}: bias: expected i32 in steps of the sums, found more")
            found["bias"] = whole.astype(np.int32)
        found["scale"] = (steps / np.float32(self.stored.scale)).astype(np.float32)
        for name, stored in (("src_zero", self.source), ("dst_zero", self.stored)):
            if stored.zero:
                found[name] = np.array([_within(stored, self.where)], numpy_dtype(stored.dtype))
        if zeros.any():
            found["weights_zero"] = zeros.astype(np.int8)
        return found

    def _weights(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Weights as they are stored, and the scale and the zero point of each output channel."""
        weight, oc = self.conv.weight().detach().cpu(), self.conv.out_channels
        by_channel = "per_channel" in str(weight.qscheme())
        scales = weight.q_per_channel_scales().numpy() if by_channel else np.array([weight.q_scale()])
        zeros = weight.q_per_channel_zero_points().numpy() if by_channel else np.array([weight.q_zero_point()])
        if by_channel and scales.size != oc:  # transposed: of a group's channels
            scales, zeros = (np.resize(values, oc) for values in (scales, zeros))
        stored = np.ascontiguousarray(weight.int_repr().numpy())
        return (
            stored,
            np.broadcast_to(scales.astype(np.float32), (oc,)),
            np.broadcast_to(zeros.astype(np.int64), (oc,)),
        )


def _within(stored: Steps, where: str) -> int:
    low, high = RANGES[stored.dtype]
    if not low <= stored.zero <= high:
        raise SpecError("zero_point", f"{low} to {high} of {stored.dtype}", stored.zero, where)
    return stored.zero
