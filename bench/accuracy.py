"""What the accuracy classes cost a network: a stack of residual blocks, beside ONNX Runtime and PyTorch in double.

    python bench/accuracy.py [--images 120] [--layers 20] [--channels 64] [--pixels 28]
    python bench/accuracy.py --models pictures,resnet18,mobilenet_v2 [--images 200]

Prints, for each class and for ONNX Runtime, the largest and the root mean square error of the logits relative to those
of double precision, and how many images' first choice it changed.

With ``--models``: how far whole networks quantised to 8 bits, and multiplied in bf16, are from themselves in f32, here
and in another library: ONNX Runtime runs the same quantised model, OpenVINO chooses its precision itself. ``pictures``
is a network that is trained first, and asked for the classes of pictures that it has not seen. Prints a table in
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

import convgen
from bench.command import listed
from bench.networks import QUANTISED, check_models, network_model, pictures
from bench.networks.quantised import write_quantised
from convgen.check.reference import OrtReference, open_session
from convgen.folders import TemporaryFolder
from convgen.measure.network_model import NetworkModel
from convgen.problem.spec import ConvSpec
from convgen.problem.tokens import ACCURACIES
from convgen.report.markdown import markdown_table

Array = npt.NDArray[Any]
Layer = Callable[[Array, Array | None], Array]
CLASSES = 1000
#: A network: from its input to its first output.
Run = Callable[[Array], Array]
#: Of inputs: others than those that the networks are calibrated with.
SEED = 1
#: Pictures that a trained network's ranges of activations are taken from.
CALIBRATED = 64


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


# ---- whole networks ------------------------------------------------------------------------------


def by_convgen(model: NetworkModel, accuracy: str = "standard") -> Run:
    network = convgen.compile(model.path, threads=1, accuracy=accuracy, records=False)

    def run(x: Array) -> Array:
        found = network(x)
        return np.asarray(next(iter(found.values())) if isinstance(found, dict) else found)

    return run


def by_onnxruntime(model: NetworkModel) -> Run:
    session = open_session(model.data, 1, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    (given,) = session.get_inputs()
    return lambda x: np.asarray(session.run(None, {given.name: x})[0])


def by_openvino(model: NetworkModel) -> tuple[Run, str]:
    """In the precision that it chooses, and which that is."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model.data), "CPU", options)
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    return lambda x: np.array(compiled([x])[0]), precision


def decibels(exact: Array, found: Array) -> float:
    """Outputs over their error."""
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


class Question:
    """A network in f32 and quantised, and what it is asked.

    Attributes:
        inputs: arrays.
        classes: what is right; empty where that is not known.
        quantised: None where it is not known how.
    """

    def __init__(self, name: str, images: int, folder: Path) -> None:
        self.name, self.classes, self.quantised = name, np.zeros(0, int), None
        if name == pictures.NAME:
            self.model = pictures.write_trained(folder)
            shown, self.classes = pictures.drawn(images, pictures.ASKED)
            self.inputs = [shown[i : i + 1] for i in range(images)]
            known, _ = pictures.drawn(CALIBRATED, pictures.CALIBRATED)
            given = [{"x": known[i : i + 1]} for i in range(CALIBRATED)]
            self.quantised = NetworkModel(write_quantised(f"{name}_int8", self.model, folder, given))
            return
        self.model = network_model(name, folder)
        (shape,) = (array.shape for array in self.model.inputs.values())
        rng = np.random.default_rng(SEED)
        self.inputs = [rng.standard_normal(shape, np.float32) for _ in range(images)]
        for key, value in QUANTISED.items():
            if value == name:
                self.quantised = network_model(key, folder)

    def answers(self, run: Run) -> Array:
        return np.stack([run(x).reshape(-1) for x in self.inputs]).astype(np.float64)

    def rows(self) -> Iterator[list[str]]:
        """Its precision, then of convgen and of another library how far it is from f32."""
        exact = self.answers(by_onnxruntime(self.model))
        choices = exact.argmax(1)

        def right(found: Array) -> str:
            return f"{int((found.argmax(1) == self.classes).sum())}" if self.classes.size else ""

        def told(run: Run) -> list[str]:
            found = self.answers(run)
            same = int((found.argmax(1) == choices).sum())
            return [f"{decibels(exact, found):.1f}", f"{same} of {len(self.inputs)}", right(found)]

        known = [self.name, str(len(set(choices.tolist()))), right(exact)]
        if self.quantised is not None:
            own, other = by_convgen(self.quantised), by_onnxruntime(self.quantised)
            yield [*known, "i8", *told(own), "ONNX Runtime, i8", *told(other)]
        other, precision = by_openvino(self.model)
        yield [*known, "bf16", *told(by_convgen(self.model, "bf16")), f"OpenVINO, {precision}", *told(other)]


def compare_networks(models: Sequence[str], images: int) -> None:
    found = ("SNR, dB>", "same first choice>", "right>")
    header = ["model", "different choices>", "right in f32>", "precision", *found, "beside", *found]
    rows = []
    with TemporaryFolder() as folder:
        for name in models:
            for row in Question(name, images, folder).rows():
                rows.append(row)
                print(" ".join(row), file=sys.stderr, flush=True)
    print("\n".join(markdown_table((header, rows))))


def compare_classes(options: argparse.Namespace) -> None:
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("images", 120), ("layers", 20), ("channels", 64), ("pixels", 28)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--models", type=listed, help="names of bench/networks, or ONNX files with one input")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.models:
        check_models(parser, [name for name in options.models if name != pictures.NAME])
        compare_networks(options.models, options.images)
    else:
        compare_classes(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
