"""The notations of other tools and frameworks: oneDNN's benchdnn, MIOpenDriver, PyTorch and Keras."""

from __future__ import annotations

from dataclasses import fields

from ..errors import UnsupportedError
from ..problem.spec import ConvSpec


def plain(spec: ConvSpec) -> ConvSpec:
    """The same convolution, value for value, as notations without padding at the end say it.

    The end of an axis is padded like its beginning where that leaves the output's size as it is, and
    else as little as can be: padding that no window reaches, and output padding that is cropped again,
    are gone.
    """
    padding, extras = [], []
    axes = zip(spec.in_spatial, spec.out_spatial, spec.window, spec.stride, spec.dilation, strict=True)
    for (size, out, window, stride, dilation), (begin, _) in zip(axes, spec.padding, strict=True):
        if spec.transposed:
            end = (size - 1) * stride + window - begin - out  # below 0: output padding
            extra = begin - end
            symmetric = 0 <= extra < max(stride, dilation)
        else:
            end, extra = (out - 1) * stride + window - begin - size, 0  # below 0: last rows that are not read
            symmetric = (size + 2 * begin - window) // stride + 1 == out
        padding.append((begin, begin if symmetric else max(end, 0)))
        extras.append(extra if symmetric else max(-end, 0) * spec.transposed)
    return spec.with_(padding=tuple(padding), output_padding=tuple(extras))


def unsupported(where: str, field: str, expected: str, found: object) -> UnsupportedError:
    """The error for what is meant well and cannot be served; ``where`` leads its message."""
    return UnsupportedError(": ".join(filter(None, (where, field, f"expected {expected}, found {found}"))))


def check_said(spec: ConvSpec, said: ConvSpec, notation: str) -> None:
    """Refuse a spec whose line in a notation would be read as another spec; names the first field that differs."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if value != getattr(said, field.name):
            raise unsupported("", field.name, f"what {notation} can say", value)
