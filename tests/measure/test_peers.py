"""The libraries kernels are compared with: same layer, same output."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from convgen.check.bounds import even_tolerance, reference, worst
from convgen.check.data import exact_data, float_data
from convgen.errors import UnsupportedError
from convgen.measure.peers import PEERS, find_peer
from convgen.problem.dtypes import distance, widen
from convgen.problem.spec import ConvSpec

SPECS = [
    "conv2d n1 ic8 oc12 i9x11 k3x3 p1x1 relu",
    "conv2d n2 ic8 oc12 g4 i9x11 k3x2 s2x1 p1_2x0_1 residual silu",
    "conv2d n1 ic8 oc8 g8 i9x9 k3x3 p1x1 nobias clip(0,6) nhwc",
    "conv1d n1 ic6 oc4 i40 k5 d2 p0_2 leaky_relu(0.1)",
    "conv3d n1 ic4 oc8 i5x6x7 k2x3x3 hardsigmoid",
    "conv2d n1 ic8 oc8 i9x9 k1x1 residual gelu nhwc",
    "convtranspose1d n1 ic8 oc12 i30 k5 s3 p0_2 elu(0.5)",
    "convtranspose2d n1 ic8 oc12 g2 i9x11 k3x4 s2x3 p1_0x0_2 op1x1 prelu",
    "convtranspose3d n1 ic4 oc4 i4x5x6 k3x3x3 s2x2x2 gelu_tanh",
]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("descriptor", SPECS)
def test_every_way_computes_the_layer(name: str, descriptor: str) -> None:
    if PEERS[name].version() is None:
        pytest.skip(f"{name} is not installed")
    spec = ConvSpec.parse(descriptor)
    data = float_data(spec)
    expected, bound = reference(spec, data), even_tolerance(spec.with_(accuracy="relaxed"), data)
    if name == "ncnn" and spec.layout == "nhwc":
        with pytest.raises(UnsupportedError, match="takes NCHW only"):
            PEERS[name]().entrants(spec, data, threads=1)
        return
    entrants = PEERS[name]().entrants(spec, data, threads=1)
    assert entrants
    for entrant in entrants:
        with entrant.context():
            entrant.run()
            output = entrant.output()
        assert output.shape == spec.dst_shape
        assert worst(np.abs(output - expected), bound) <= 1, entrant.way


INTEGERS = [
    "conv2d n1 ic8 oc12 i9x11 k3x3 p1x1 i8 src_u8 dst_u8 src_zero dst_zero relu",
    "conv2d n2 ic8 oc8 g8 i9x9 k3x3 s2 p1 i8 src_u8 dst_u8 dst_zero nobias",
    "conv1d n1 ic6 oc4 i40 k5 d2 i8 src_u8 dst_u8",
    "conv2d n1 ic8 oc8 i9x9 k1x1 i8 src_zero clip(-3,40)",
    "conv2d n1 ic8 oc12 i9x11 k3x3 p1x1 i8 src_u8 dst_u8 src_zero dst_zero relu nhwc",
    "conv2d n2 ic8 oc8 g8 i9x9 k3x3 s2 p1 i8 src_u8 dst_u8 dst_zero nobias nhwc",
    "conv1d n1 ic6 oc4 i40 k5 d2 i8 src_u8 dst_u8 nhwc",
    "conv3d n1 ic4 oc8 i5x6x7 k2x3x3 i8 src_u8 dst_u8 nhwc",
    "conv2d n1 ic8 oc8 i9x9 k3x3 i8 src_zero clip(-3,40) nhwc dst_nchw",
    "convtranspose2d n1 ic8 oc12 i9x7 k4x4 s2 p1 op1 i8 src_u8 dst_u8 src_zero dst_zero relu",
]


@pytest.mark.parametrize("name", ["onnxruntime", "torch", "openvino"])
@pytest.mark.parametrize("descriptor", INTEGERS)
def test_layers_of_integers_are_computed_to_a_step(name: str, descriptor: str) -> None:
    if PEERS[name].version() is None:
        pytest.skip(f"{name} is not installed")
    spec = ConvSpec.parse(descriptor)
    data = float_data(spec)
    if name == "torch" and spec.src_dtype == "i8":
        with pytest.raises(UnsupportedError, match=r"multiplies u8 by i8 to u8 only|gives what it takes"):
            PEERS[name]().entrants(spec, data, threads=1)
        return
    if name != "onnxruntime" and spec.transposed:
        with pytest.raises(UnsupportedError, match=r"no such operator|does not fuse"):
            PEERS[name]().entrants(spec, data, threads=1)
        return
    expected = reference(spec, data)
    entrants = PEERS[name]().entrants(spec, data, threads=1)
    assert entrants
    assert name != "onnxruntime" or [entrant.way for entrant in entrants] == ["", "QDQ"]
    for entrant in entrants:
        with entrant.context():
            entrant.run()
            output = entrant.output()
        assert output.dtype == expected.dtype
        assert output.shape == expected.shape
        if "fbgemm" in entrant.way and spec.groups > 1:
            continue  # it adds two products in 16 bits there, and is refused where they saturate
        assert distance(output, expected).max() <= 1, entrant.way
        assert (output == expected).mean() > 0.9


@pytest.mark.parametrize(
    "descriptor", [f"conv2d n1 ic16 oc12 i9x11 k3x3 p1 relu {end}" for end in ("bf16", "accuracy_bf16")]
)
@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_products_of_bf16(name: str, descriptor: str) -> None:
    if PEERS[name].version() is None:
        pytest.skip(f"{name} is not installed")
    spec = ConvSpec.parse(descriptor)
    data = float_data(spec)
    if name == "openvino" and spec.dtype == "bf16":
        with pytest.raises(UnsupportedError, match="not bf16"):
            PEERS[name]().entrants(spec, data, threads=1)
        return
    bound = even_tolerance(spec.with_(accuracy="bf16") if spec.dtype == "f32" else spec, data)
    for entrant in PEERS[name]().entrants(spec, data, threads=1):
        with entrant.context():
            entrant.run()
            output = entrant.output()
        assert worst(distance(output, reference(spec, data)), bound) <= 1, entrant.way


@pytest.mark.parametrize("numbers", ["", "bf16", "accuracy_bf16"])
@pytest.mark.parametrize("direction", ["data", "weights", "nobias weights"])
@pytest.mark.parametrize("layer", ["conv2d n2 ic8 oc12 i9x8 k3 s2x1 p1 nhwc", "convtranspose1d n2 ic6 oc4 i9 k3 s2"])
def test_gradients_of_pytorch(layer: str, direction: str, numbers: str) -> None:
    """On integers of few bits, so that each is one number, however it is summed, which bf16 holds or is rounded to."""
    if PEERS["torch"].version() is None:
        pytest.skip("torch is not installed")
    spec = ConvSpec.parse(f"{layer} {direction} {numbers}")
    data = exact_data(spec)
    expected = widen(reference(spec, data))
    assert np.unique(expected).size > 10
    entrants = PEERS["torch"]().entrants(spec, data, threads=1)
    assert len(entrants) == 1
    for entrant in entrants:
        with entrant.context():
            entrant.run()
            np.testing.assert_array_equal(entrant.output(), expected, err_msg=entrant.way)


@pytest.mark.parametrize("direction", ["forward", "data", "weights"])
def test_pytorch_is_not_asked_for_f16(direction: str) -> None:
    """Which its convolutions on a CPU have no fast kernels of: it is left out of a comparison, with the reason."""
    if PEERS["torch"].version() is None:
        pytest.skip("torch is not installed")
    spec = ConvSpec.parse(f"conv2d n2 ic8 oc12 i9x8 k3x3 p1x1 f16 {direction}".removesuffix("forward"))
    with pytest.raises(UnsupportedError, match="is asked for f32, bf16 and integers only, not float16"):
        PEERS["torch"]().entrants(spec, float_data(spec), threads=1)


@pytest.mark.parametrize("layouts", ["nchw8c", "nchw dst_nchw16c", "nhwc dst_nchw"])
@pytest.mark.parametrize("name", PEERS)
def test_layouts_that_a_library_does_not_take(name: str, layouts: str) -> None:
    """The others convert between plain ones in their model."""
    if PEERS[name].version() is None:
        pytest.skip(f"{name} is not installed")
    spec = ConvSpec.parse(f"conv2d n1 ic8 oc16 i9x9 k3x3 p1 {layouts}")
    data = float_data(spec)
    if name == "onnxruntime" or (name == "openvino" and "8c" not in layouts and "16c" not in layouts):
        (entrant,) = PEERS[name]().entrants(spec, data, threads=1)
        entrant.run()
        bound = even_tolerance(spec.with_(accuracy="relaxed"), data)
        assert worst(np.abs(entrant.output() - reference(spec, data)), bound) <= 1
        return
    with pytest.raises(UnsupportedError, match="takes NCHW"):
        PEERS[name]().entrants(spec, data, threads=1)


def test_there_are_no_others() -> None:
    with pytest.raises(UnsupportedError, match="nobody"):
        find_peer("nobody")


RESTRICTED = """
import sys
sys.path[:] = [path for path in sys.path if not path.endswith("without_torch")]
import tvm
from convgen.errors import UnsupportedError
from convgen.measure.peers import PEERS
{before}
try:
    PEERS["{name}"].restrict(128)
except UnsupportedError as error:
    print(error)
else:
    print("kept")
"""


@pytest.mark.parametrize(
    ("name", "before", "said"),
    [
        ("torch", "", "kept"),
        ("torch", "import torch; torch.ones(9).exp()", "was in use before"),
        ("openvino", "", "kept"),
        ("openvino", "import openvino", "was in use before"),
    ],
)
def test_a_library_is_restricted_before_its_first_use_only(name: str, before: str, said: str) -> None:
    """Whatever TVM loads."""
    if PEERS[name].version() is None:
        pytest.skip(f"{name} is not installed")
    environment = {key: value for key, value in os.environ.items() if key not in PEERS[name].restrictions[128]}
    script = RESTRICTED.format(name=name, before=before)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith(said)
