"""What the accuracy classes cost a network: a stack of residual blocks, beside ONNX Runtime and PyTorch in double.

    python bench/accuracy.py [--images 120] [--layers 20] [--channels 64] [--pixels 28]

Prints, for each class and for ONNX Runtime, the largest and the root mean square error of the logits relative to those
of double precision, and how many images' first choice it changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import convgen
from convgen.check.reference import OrtReference
from convgen.problem.spec import ConvSpec
from convgen.problem.tokens import ACCURACIES

Array = npt.NDArray[Any]
Layer = Callable[[Array, Array | None], Array]
CLASSES = 1000


def stack(layers: Sequence[Layer], image: Array) -> Array:
    """Blocks of two layers; the second adds what the first one got."""
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        image = second(first(image, None), image)
    return image


def specs(options: argparse.Namespace, accuracy: str) -> list[ConvSpec]:
    """A block's layers."""
    c, i = options.channels, options.pixels
    text = f"conv2d n1 ic{c} oc{c} i{i}x{i} k3x3 p1 relu"
    return [ConvSpec.parse(f"{text} {accuracy}"), ConvSpec.parse(f"{text} residual {accuracy}")]


def kernels(weights: Sequence[Array], bias: Array, options: argparse.Namespace, accuracy: str) -> list[Layer]:
    built = [convgen.build(spec, threads=1, records=False) for spec in specs(options, accuracy)]
    bound = [built[index % 2].bind(w, bias) for index, w in enumerate(weights)]

    def layer(call: Any) -> Layer:
        return lambda src, residual: np.array(call(src, residual=residual))

    return list(map(layer, bound))


def onnxruntime(weights: Sequence[Array], bias: Array, options: argparse.Namespace) -> list[Layer]:
    def layer(spec: ConvSpec, w: Array) -> Layer:
        src = np.zeros(spec.src_shape, np.float32)
        residual = np.zeros(spec.dst_shape, np.float32) if spec.residual else None
        session = OrtReference(spec, src, w, bias, residual=residual)

        def run(given: Array, more: Array | None) -> Array:
            src[:] = given
            if residual is not None and more is not None:
                residual[:] = more
            return session.run()

        return run

    block = specs(options, "standard")
    return [layer(block[index % 2], w) for index, w in enumerate(weights)]


def in_double(weights: Sequence[Array], bias: Array) -> list[Layer]:
    def layer(w: Array) -> Layer:
        tensor, offset = (torch.from_numpy(a.astype(np.float64)) for a in (w, bias))

        def run(src: Array, residual: Array | None) -> Array:
            sums = torch.nn.functional.conv2d(torch.from_numpy(src), tensor, offset, padding=1)
            return np.asarray(torch.relu(sums if residual is None else sums + torch.from_numpy(residual)))

        return run

    return [layer(w) for w in weights]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("images", 120), ("layers", 20), ("channels", 64), ("pixels", 28)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    c, shape = options.channels, (options.channels, options.channels, 3, 3)
    # The scale of He's initialisation, less in a block's second layer so that the sums do not grow.
    scales = [np.sqrt(2 / (9 * c)) * (1 if index % 2 == 0 else 0.3) for index in range(options.layers // 2 * 2)]
    weights = [(rng.standard_normal(shape) * scale).astype(np.float32) for scale in scales]
    bias = (rng.standard_normal(c) * 0.1).astype(np.float32)
    head = rng.standard_normal((c, CLASSES)) / np.sqrt(c)
    images = [
        rng.standard_normal((1, c, options.pixels, options.pixels)).astype(np.float32) for _ in range(options.images)
    ]

    def logits(layers: Sequence[Layer], dtype: type) -> Array:
        return np.stack(
            [stack(layers, image.astype(dtype)).mean((0, 2, 3), dtype=np.float64) @ head for image in images]
        )

    exact = logits(in_double(weights, bias), np.float64)
    size = np.sqrt((exact**2).mean())
    rows = {"ONNX Runtime": onnxruntime(weights, bias, options)}
    rows |= {name: kernels(weights, bias, options, name) for name in ACCURACIES if name not in ("tf32", "bf16")}
    print(f"{'':14}{'largest error':>15}{'rms error':>12}{'of ORT':>8}{'first choices changed':>23}")
    ort = 0.0
    for name, layers in rows.items():
        found = logits(layers, np.float32)
        error = np.abs(found - exact) / size
        rms = float(np.sqrt((error**2).mean()))
        ort = ort or rms
        changed = int((found.argmax(1) != exact.argmax(1)).sum())
        print(f"{name:14}{error.max():15.2e}{rms:12.2e}{rms / ort:8.1f}{changed:15} of {len(images)}")


if __name__ == "__main__":
    main()
