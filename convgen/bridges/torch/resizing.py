"""What PyTorch's operators that resize images mean, as nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...network.node import Refusal
from .onnx_graph import Reading, array


def resize(mode: str) -> Callable[[Reading], None]:
    """Reads images that are resized, ``linear`` or ``nearest``, to given sizes or by factors."""

    def read(r: Reading) -> None:
        way = "half_pixel" if mode == "linear" else "asymmetric"
        if mode == "linear" and r["align_corners"]:
            way = "align_corners"
        source = "input" if "input" in r.arguments else "self"
        before, after = r.sizes(source)[2:], r.shape[2:]
        # A factor says where pixels come from, but where corners are aligned; without one the sizes do.
        factors = _factors(r, len(before)) if way != "align_corners" else None
        given: list[float | None] = [None] * len(after) if factors is None else [*factors]
        if mode == "nearest" and not all(map(_same_pixels, before, after, given)):
            raise Refusal("pixels between two, of which PyTorch and ONNX take different ones")
        options = {"coordinate_transformation_mode": way, "nearest_mode": "floor", "mode": mode}
        if factors is None:
            r.end("Resize", [r.input(source), "", "", r.integers(r.shape)], **options)
        elif list(after) == [int(size * factor) for size, factor in zip(before, factors, strict=True)]:
            r.end("Resize", [r.input(source), "", r.constant(np.array([1, 1, *factors], np.float32))], **options)
        else:
            raise Refusal("sizes that are not the factor's")

    return read


def _factors(r: Reading, rank: int) -> list[float] | None:
    """The factors that an image is resized by, where they are given for every axis."""
    given = [r[name] for name in r.arguments if name.startswith("scale")]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    if all(factor is None for factor in given):
        return None
    if len(given) != rank or None in given:
        raise Refusal("factors of some axes alone")
    return [float(factor) for factor in given]


def _same_pixels(size: int, length: int, factor: float | None) -> bool:
    """Whether PyTorch, which multiplies by a step, and ONNX, which divides by a scale, take the same ones in f32."""
    at = np.arange(length, dtype=np.float32)
    step = np.float32(size) / np.float32(length) if factor is None else np.float32(1 / factor)
    scale = np.float32(length) / np.float32(size) if factor is None else np.float32(factor)
    taken, divided = (np.minimum(np.floor(places), size - 1) for places in (at * step, at / scale))
    return np.array_equal(taken, divided)


def gathered(r: Reading) -> None:
    """Pixels by index: what the nearest ones of a resized image become, where the indices are known."""
    source, (*outer, rows, columns) = r.input(), r["indices"]
    sizes, out = r.sizes(), r.shape
    if len(sizes) != 4 or any(index is not None for index in outer) or len(outer) != 2:
        raise Refusal("indices of other axes than an image's")
    for index, axis in ((rows, 2), (columns, 3)):
        if index not in r.graph.known:
            raise Refusal("indices that are not known beforehand")
        nearest = np.arange(out[axis]) * sizes[axis] // out[axis]
        if r.graph.known[index].numel() != out[axis] or not np.array_equal(
            array(r.graph.known[index]).reshape(-1), nearest
        ):
            raise Refusal(
                "indices that are not those of the nearest pixels; F.interpolate of mode bilinear, which torch.compile "
                "takes apart into such, stays whole in exported programs"
            )
    options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
    r.end("Resize", [source, "", "", r.integers(out)], **options)
