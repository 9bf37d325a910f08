"""convgen from Python: build, call, validate, export, load again.

python examples/python_api.py
"""

from __future__ import annotations

import tempfile

import numpy as np

import convgen


def main() -> None:
    spec = convgen.ConvSpec(
        n=1, ic=32, oc=64, in_spatial=(28, 28), kernel=(3, 3), padding=1, activation="relu", residual=True
    )
    print(spec)  # its descriptor, one line that convgen.build takes as well

    # At once: the best matching record, else the schedule's default. `trials` or `seconds` tune first.
    kernel = convgen.build(spec, threads=2)
    print(f"{kernel.schedule}: {kernel.picks}")

    rng = np.random.default_rng(0)
    weights = rng.standard_normal(spec.weights_shape, np.float32)
    bias = rng.standard_normal(spec.oc, np.float32)
    x = rng.standard_normal(spec.src_shape, np.float32)
    z = rng.standard_normal(spec.dst_shape, np.float32)

    layer = kernel.bind(weights, bias)  # packs the weights, once
    y = layer(x, residual=z)
    layer(x, residual=z, out=y)  # into memory of one's own: NumPy, or anything with DLPack

    report = convgen.validate(kernel)  # against ONNX Runtime
    for check in report.checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.found}")

    with tempfile.TemporaryDirectory() as folder:
        kernel.export(folder)
        loaded = convgen.load(folder)  # needs NumPy, nothing else
        assert np.array_equal(loaded.bind(weights, bias)(x, residual=z), y)
        print("the exported library computes the same bits")


if __name__ == "__main__":
    main()
