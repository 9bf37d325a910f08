"""Winograd's minimal filtering algorithms: short convolutions with fewer products than taps.

All are exact fractions, rounded once where they are used. F(m, r) makes m outputs of r taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

from ..deferred import np
from ..problem.accuracy import SMALLEST_NORMAL
from ..problem.spec import ConvSpec
from .schedule import Array, Magnitudes

if TYPE_CHECKING:
    import numpy.typing as npt

Matrix = list[list[Fraction]]

#: What an accuracy class admits: outputs of a phase per tile, and interpolation points, infinity among them. A class
#: that is not here admits no transform: whatever adds pixels before it multiplies them, if only two, loses the smaller
#: one where they differ enough.
#: Largest errors in units of 2**-24 * conv(|src|, |weights|), 16 to 256 channels, normal data, two axes:
#:   F(2,2) F(3,2) F(2,3) 1–3; F(2,4) 4; F(2,5) 6; F(3,3) 8; F(2,6) F(2,7) F(3,5) F(3,6) F(4,5) 7–13;
#:   F(3,4) F(4,4) 14; F(4,3) F(4,2) 18; F(5,4) 22; F(5,3) 28; F(6,3) 36; F(5,2) 49; F(6,2) F(7,2) 59–76.
ADMITTED = {"standard": (4, 8), "relaxed": (7, 8), "tf32": (7, 8), "bf16": (7, 8)}

#: Interpolation points besides infinity: small, in pairs of opposite sign.
POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))


@cache
def toom_cook(m: int, r: int) -> tuple[Matrix, Matrix, Matrix]:
    """Rows of Aᵀ (back), G (weights) and Bᵀ (input) of F(m, r), as fractions: y = Aᵀ[(G g) · (Bᵀ d)].

    Toom-Cook interpolation, transposed (Winograd, *Arithmetic Complexity of Computations*, 1980;
    Blahut, *Fast Algorithms for Signal Processing*, §5).
    """
    if min(m, r) == 1:  # one output or one tap: no product can be saved
        ones, identity = [[Fraction(1)] * max(m, r)], _identity(max(m, r))
        return (identity, [[v] for v in ones[0]], identity) if r == 1 else (ones, identity, identity)
    points = [Fraction(p) for p in POINTS[: m + r - 2]]

    def expanded(roots: Sequence[Fraction]) -> list[Fraction]:
        """Coefficients of the product of (x - root), lowest power first."""
        poly = [Fraction(1)]
        for root in roots:
            poly = [a - root * b for a, b in zip([Fraction(0), *poly], [*poly, Fraction(0)], strict=True)]
        return poly

    others = [[q for q in points if q != p] for p in points]
    back = [[p**i for p in points] + [Fraction(i == m - 1)] for i in range(m)]
    weights = [
        [p**k / math.prod(p - q for q in rest) for k in range(r)] for p, rest in zip(points, others, strict=True)
    ]
    weights.append([Fraction(k == r - 1) for k in range(r)])
    inputs = [[*expanded(rest), Fraction(0)] for rest in others] + [expanded(points)]
    return back, weights, inputs


def _identity(size: int) -> Matrix:
    return [[Fraction(i == j) for j in range(size)] for i in range(size)]


def _spread(row: Sequence[Fraction], places: Sequence[int], size: int) -> list[Fraction]:
    """A row of zeros with the given values at their places."""
    spread = [Fraction(0)] * size
    for place, value in zip(places, row, strict=True):
        spread[place] = value
    return spread


@cache
def strided(m: int, kernel: int, stride: int) -> tuple[Matrix, Matrix, Matrix]:
    """Aᵀ, G and Bᵀ of ``m`` outputs of a strided correlation: the sum of its phases.

    Phase p reads inputs p, p + s, p + 2s … under the taps p, p + s, …
    """
    back: Matrix = [[] for _ in range(m)]
    weights: Matrix = []
    inputs: Matrix = []
    for phase, taps in enumerate(phases(kernel, stride)):
        a, g, b = toom_cook(m, taps)
        for row, more in zip(back, a, strict=True):
            row += more
        weights += [_spread(row, range(phase, kernel, stride), kernel) for row in g]
        extent = stride * (m - 1) + kernel
        inputs += [_spread(row, [phase + stride * i for i in range(m + taps - 1)], extent) for row in b]
    return back, weights, inputs


@cache
def transposed(m: int, kernel: int, stride: int, begin: int) -> tuple[Matrix, Matrix, Matrix, int]:
    """Aᵀ, G and Bᵀ of ``m`` outputs of each phase of a transposed convolution, interleaved; and the first
    input that they read, where the first output is 0 and ``begin`` the padding.

    Phase r, the outputs s·q + r, reads inputs q + (r + begin) div s - t under the taps (r + begin) mod s + s·t.
    """
    found = []
    for phase in range(stride):
        shift, tap = divmod(phase + begin, stride)
        taps = list(range(tap, kernel, stride))[::-1]
        found.append((shift - len(taps) + 1, taps))
    first = min(shift for shift, taps in found if taps)
    extent = max(shift + m + len(taps) - 1 for shift, taps in found if taps) - first
    positions = sum(m + len(taps) - 1 for _, taps in found if taps)
    back = [[Fraction(0)] * positions for _ in range(m * stride)]
    weights: Matrix = []
    inputs: Matrix = []
    for phase, (shift, taps) in enumerate(found):
        if not taps:  # these outputs are the bias
            continue
        a, g, b = toom_cook(m, len(taps))
        places = range(len(inputs), len(inputs) + len(b))
        for q, row in enumerate(a):
            back[q * stride + phase] = _spread(row, places, positions)
        weights += [_spread(row, taps, kernel) for row in g]
        inputs += [_spread(row, range(shift - first, shift - first + len(row)), extent) for row in b]
    return back, weights, inputs, first


@cache
def of_gradient(m: int, kernel: int, stride: int) -> tuple[Matrix, Matrix, Matrix]:
    """Aᵀ, G and Bᵀ of the gradients of ``kernel`` weights along an axis, from ``m`` gradients of dst. G transforms
    these; the taps are the outputs.

    Phase p has the taps p, p + s, … of every s-th input, from p on: F(⌈(kernel - p) / s⌉, m).
    """
    found = [toom_cook(taps, m) for taps in phases(kernel, stride)]
    positions, extent = sum(len(inputs) for *_, inputs in found), stride * (m - 1) + kernel
    back: Matrix = [[] for _ in range(kernel)]
    gradients: Matrix = []
    inputs: Matrix = []
    for phase, (a, g, b) in enumerate(found):
        places = range(len(inputs), len(inputs) + len(b))
        for tap, row in zip(range(phase, kernel, stride), a, strict=True):
            back[tap] = _spread(row, places, positions)
        gradients += g
        inputs += [_spread(row, [phase + stride * i for i in range(len(b))], extent) for row in b]
    return back, gradients, inputs


def phases(kernel: int, stride: int) -> list[int]:
    """The number of taps of each phase of a stride, for those phases that have taps."""
    return [-((phase - kernel) // stride) for phase in range(min(kernel, stride))]


def admitted(accuracy: str, taps: int) -> list[int]:
    """The tile sizes m that the accuracy class admits for F(m, taps)."""
    most, points = ADMITTED.get(accuracy, (0, 0))
    return list(range(2, min(most, points - taps + 1) + 1))


def admitted_of_gradient(accuracy: str, taps: int) -> list[int]:
    """The tile sizes m that the accuracy class admits for F(taps, m): pixels of the gradient of dst."""
    most, points = ADMITTED.get(accuracy, (0, 0))
    return list(range(2, points - taps + 2)) if taps <= most else []


# ---- rounding errors ---------------------------------------------------------------------------


def magnitudes(spec: ConvSpec, src: Array, weights: Array, tiles: Mapping[int, int]) -> Magnitudes:
    """What rounding errors are relative to where axes are transformed: those in ``tiles``, with so many outputs of a
    phase.

    ``|Aᵀ|[(|G| |g|) · (|Bᵀ| |d|)]``, element by element, is a convolution too: of ``|d|`` with a larger kernel, which
    reaches all of a tile. An output may have any place in its tile, so each of its elements is the largest of all
    places' (Barabasz, Anderson, Soodhalter and Gregg, *Error analysis and improving the accuracy of Winograd
    convolution for deep neural networks*, ACM Trans. Math. Softw. 46(4), 2020, §4).
    """
    kernel, padding, output_padding = list(spec.kernel), list(spec.padding), list(spec.output_padding)
    reaches = {axis: _reach(spec, axis, m) for axis, m in tiles.items()}
    # What becomes of smaller ones is subnormal, even where they are not.
    weights = np.maximum(weights, np.float32(SMALLEST_NORMAL / math.prod(least for *_, least in reaches.values())))
    for axis in tiles:
        first, rows, _ = reaches[axis]
        weights = np.moveaxis(np.tensordot(weights, rows, (2 + axis, 0)), -1, 2 + axis)
        step, out, size = spec.stride[axis], spec.out_spatial[axis], spec.in_spatial[axis]
        window = (rows.shape[1] - 1) * spec.dilation[axis] + 1
        begin = padding[axis][0] - first * spec.dilation[axis]
        if spec.transposed:
            end = (size - 1) * step + window - begin - out
            output_padding[axis] = max(0, -end)
        else:
            end = (out - 1) * step + window - begin - size
        kernel[axis], padding[axis] = rows.shape[1], (begin, max(0, end))
    larger = spec.with_(kernel=tuple(kernel), padding=tuple(padding), output_padding=tuple(output_padding))
    return Magnitudes(larger, src, weights)


def _reach(spec: ConvSpec, axis: int, m: int) -> tuple[int, npt.NDArray[np.float32], float]:
    """What each tap of an axis becomes in the kernel of :func:`magnitudes`, ``[tap][tap there]``; which tap the
    first one there is: one before the kernel's is negative; and the least that equal weights are multiplied by.
    """
    kernel, stride, begin = spec.kernel[axis], spec.stride[axis], spec.padding[axis][0]
    tap: Callable[[int, int], int]  # of the i-th output and the j-th input of a tile
    if spec.transposed:
        *matrices, first = transposed(m, kernel, stride, begin)

        def tap(i: int, j: int) -> int:
            return i + begin - stride * (first + j)
    else:
        matrices = [*strided(m, kernel, stride)]

        def tap(i: int, j: int) -> int:
            return j - i * stride

    back, weights, inputs = (np.abs(np.array(matrix, np.float64)) for matrix in matrices)
    taps = [tap(i, j) for i in (0, len(back) - 1) for j in (0, inputs.shape[1] - 1)]
    lowest = min(0, *taps)
    rows = np.zeros((kernel, max(kernel - 1, *taps) - lowest + 1), np.float64)
    for i, j in np.ndindex(len(back), inputs.shape[1]):
        column = rows[:, tap(i, j) - lowest]
        np.maximum(column, weights.T @ (back[i] * inputs[:, j]), out=column)
    return lowest, rows.astype(np.float32), float(weights.sum(1).min())


def magnitudes_of_gradient(spec: ConvSpec, src: Array, gradient: Array, tiles: Mapping[int, int]) -> Magnitudes:
    """As :func:`magnitudes`, of the gradient of weights from tiles of so many gradients of dst.

    Element by element it is the gradient from another src: ``|src|`` filtered, so that an element has what a tile adds
    to it, wherever in the tile it is and whichever tap is meant.
    """
    in_spatial, padding = list(spec.in_spatial), list(spec.padding)
    first = 2 if spec.layout == "nchw" else 1
    for axis, m in tiles.items():
        stride, dilation, (begin, end) = spec.stride[axis], spec.dilation[axis], spec.padding[axis]
        back, gradients, inputs = (
            np.abs(np.array(matrix, np.float64)) for matrix in of_gradient(m, spec.kernel[axis], stride)
        )
        gradient = np.maximum(gradient, np.float32(SMALLEST_NORMAL / gradients.sum(1).min()))
        reach = inputs.shape[1] - 1 + stride * (m - 1) + len(back) - 1
        row = np.zeros(2 * reach + 1)
        for k, i, j in np.ndindex(len(back), m, inputs.shape[1]):
            at = reach + j - stride * i - k
            row[at] = max(row[at], float((back[k] * gradients[:, i] * inputs[:, j]).sum()))
        size = in_spatial[axis] + begin + end
        around = [(0, 0)] * src.ndim
        around[first + axis] = (begin + reach * dilation, end + reach * dilation)
        wide = np.moveaxis(np.pad(src, around), first + axis, 0)
        made = sum(np.float32(c) * wide[u * dilation : u * dilation + size] for u, c in enumerate(row) if c)
        src = np.moveaxis(np.asarray(made, np.float32), 0, first + axis)
        in_spatial[axis], padding[axis] = size, (0, 0)
    return Magnitudes(spec.with_(in_spatial=tuple(in_spatial), padding=tuple(padding)), src, gradient)
