"""ONNX's own backend tests, with all convolutions on convgen's kernels.

The cases and their outputs come with the onnx package; its runner loads, runs and compares them.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import TestCase

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper, parser

from convgen.api import build
from convgen.check import onnx_backend
from convgen.check.onnx_backend import Representation
from convgen.errors import Inapplicable, SpecError, UnsupportedError
from convgen.hardware.target import resolve
from convgen.kernel.kernel import Kernel, compile_candidate
from convgen.lowering.candidates import parse_candidate
from convgen.lowering.discover import schedules
from convgen.problem.accuracy import CLASS_FACTOR, UNIT_ROUNDOFF
from convgen.problem.dtypes import UNIT_ROUNDOFF as NARROW_ROUNDOFF
from convgen.problem.dtypes import narrow, numpy_dtype, widen
from convgen.problem.spec import ConvSpec

THREADS = 2
pytestmark = pytest.mark.timeout(1200)  # on a busy machine the kernels of the real graphs take minutes

#: Every case of onnx 1.23.2 with a Conv or ConvTranspose.
FAMILIES = {
    "basic_conv": "with_padding without_padding",
    "conv_with": "autopad_same strides_and_asymmetric_padding strides_no_padding strides_padding",
    "convtranspose": "1d 3d autopad_same dilations group_2 group_2_image_3 kernel_shape output_shape pad pads",
    "causal_conv_with_state": "b1_c1_degenerate basic decode_step fp16 kernel_size_one short_input_no_past_state silu "
    "silu_fp16 silu_with_past_state swish_alias with_bias with_bias_and_past_state with_past_state",
    "Conv1d": "dilated groups pad1 pad1size1 pad2 pad2size1 stride",
    "Conv2d": "depthwise depthwise_padded depthwise_strided depthwise_with_multiplier dilated groups groups_thnn "
    "no_bias padding strided",
    "Conv3d": "dilated dilated_strided groups no_bias stride stride_padding",
    "ConvTranspose2d": "no_bias",
    "operator": "conv convtranspose",
}
CASES = ["test_convtranspose", "test_Conv1d", "test_Conv2d", "test_Conv3d", "test_ConvTranspose2d"] + [
    f"test_{prefix}_{name}{'_expanded' * prefix.startswith('causal')}"
    for prefix, names in FAMILIES.items()
    for name in names.split()
]
#: The real graphs and their numbers of convolutions.
GRAPHS = {
    "bvlc_alexnet": 5,
    "densenet121": 121,
    "inception_v1": 57,
    "inception_v2": 69,
    "resnet50": 53,
    "shufflenet": 49,
    "squeezenet": 26,
    "vgg19": 16,
    "zfnet512": 5,
}
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@cache
def kernel(spec: ConvSpec) -> Kernel:
    return build(spec, threads=THREADS, records=False)


@cache
def scheduled(schedule_id: str, spec: ConvSpec) -> Kernel:
    """The kernel of that schedule at its default, else the spec's own default."""
    target = resolve()
    try:
        return compile_candidate(spec, target, parse_candidate(spec, target, schedule_id), THREADS)
    except Inapplicable:
        return kernel(spec)


class Spy:
    """The backend as ONNX's runner calls it; keeps the last model and what was prepared of it."""

    supports_device = staticmethod(onnx_backend.supports_device)

    def __init__(self) -> None:
        self.kernel: Callable[[ConvSpec], Any] = kernel
        self.model = ModelProto()
        self.representation: Representation | None = None

    def prepare(self, model: ModelProto, device: str) -> Representation:
        self.model = model
        self.representation = representation = onnx_backend.prepare(model, device, kernel=self.kernel)
        return representation


class Suite:
    """ONNX's runner with its cases, and the models of those."""

    def __init__(self) -> None:
        from onnx.backend.test.loader import load_model_tests
        from onnx.backend.test.runner import Runner

        self.spy = Spy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as it makes other operators' cases, numbers overflow
            classes: list[type[TestCase]] = list(Runner(self.spy).test_cases.values())
        self.tests = {name: case for case in classes for name in vars(case) if name.startswith("test_")}
        kinds = ("node", "simple", "real", "pytorch-converted", "pytorch-operator")
        self.found = {
            case.name for kind in kinds for case in load_model_tests(kind=kind) if convolutions(model_of(case).graph)
        }

    def run(self, name: str, kernel: Callable[[ConvSpec], Any] = kernel) -> Representation:
        """Run a case on the CPU; raises what it raises."""
        self.spy.kernel = kernel
        name = f"{name}_cpu"
        self.tests[name](name).debug()
        assert self.spy.representation is not None
        return self.spy.representation


def model_of(case: Any) -> ModelProto:
    if case.model is not None:
        return case.model
    folder = Path(onnx.__file__).parents[1]
    return onnx.load(folder / case.url if case.url else Path(case.model_dir) / "model.onnx")


def convolutions(graph: GraphProto) -> int:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
    return sum(n.op_type in ("Conv", "ConvTranspose") for n in graph.node) + sum(map(convolutions, inner))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONNX_MODELS", str(tmp_path_factory.mktemp("models")))  # the runner writes there
        yield Suite()


# ---- the cases that onnx ships ----------------------------------------------------------------


def test_the_cases_are_all_that_onnx_ships(suite: Suite) -> None:
    assert suite.found == {*CASES, *(f"test_{name}" for name in GRAPHS)}
    assert len(CASES) == 60
    assert len(GRAPHS) == 9


@pytest.mark.parametrize("name", CASES)
def test_case(suite: Suite, name: str) -> None:
    representation = suite.run(name)
    assert convolutions(suite.spy.model.graph) == 1
    assert representation.ran.total() == 1
    assert representation.left == 0


@pytest.mark.parametrize("name", ["test_Conv2d", "test_convtranspose_1d", "test_operator_conv"])
def test_a_wrong_kernel_fails_its_case(suite: Suite, name: str) -> None:
    with pytest.raises(AssertionError):
        suite.run(name, lambda spec: damaged(kernel(spec)))


def damaged(right: Kernel) -> Callable[..., Any]:
    """A kernel whose output's last column is another, as if its padding were wrong."""

    def run(*operands: Any) -> Any:
        y = right(*operands)
        y[..., -1] += np.std(y)
        return y

    return run


# ---- the real graphs --------------------------------------------------------------------------


@cache
def graph_specs(name: str) -> tuple[ConvSpec, ...]:
    """The layers of a real graph, from a run that computes zeros."""
    specs: dict[ConvSpec, None] = {}

    def zeros(spec: ConvSpec) -> Callable[..., Any]:
        specs[spec] = None
        return lambda *_: np.zeros(spec.dst_shape, np.float32)

    model = onnx.load(DATA / f"light_{name}.onnx")
    onnx_backend.run_model(model, [np.zeros(shape(x), np.float32) for x in free_inputs(model)], kernel=zeros)
    return tuple(specs)


#: More than half of all distinct layers are theirs, and inception_v2 has the same kinds.
MANY_LAYERS = ("densenet121", "inception_v1")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in MANY_LAYERS)) for name in GRAPHS],
)
def graph(request: pytest.FixtureRequest) -> str:
    """Each real graph; all its tests follow one another, since its kernels take long to compile and are kept."""
    return str(request.param)


def free_inputs(model: ModelProto) -> list[Any]:
    given = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in given]


def shape(value: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def test_real_graph(suite: Suite, graph: str) -> None:
    """Against the output that onnx ships, with the tolerance of its runner."""
    representation = suite.run(f"test_{graph}")
    assert convolutions(suite.spy.model.graph) == GRAPHS[graph]
    assert representation.ran.total() == GRAPHS[graph]
    assert representation.left == 0


def randomised(name: str, seed: int = 0) -> tuple[ModelProto, dict[str, np.ndarray[Any, Any]]]:
    """A real graph with random inputs and weights, and its logits as the output.

    The shipped graphs have constant weights, of which any mistake may make the same constant. Here
    matrices and kernels are normal, as large as keeps values as large as they were; vectors (bias,
    scale, variance) uniform in [0.5, 1.5).
    """
    model = onnx.load(DATA / f"light_{name}.onnx")
    model.ir_version = 9  # the shipped graphs' wants every initializer among the inputs
    graph, rng = model.graph, np.random.default_rng(seed)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    filled = {n.output[0]: tuple(tensors[n.input[0]].tolist()) for n in graph.node if n.op_type == "ConstantOfShape"}
    shapes = {tensor: array.shape for tensor, array in tensors.items() if array.dtype == np.float32} | filled

    def draw(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if len(shape) == 1:
            return rng.random(shape, np.float32) + np.float32(0.5)
        return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[1:])))

    feeds = {tensor: draw(shape) for tensor, shape in shapes.items()}
    feeds |= {x.name: rng.standard_normal(shape(x), np.float32) for x in free_inputs(model)}

    for value in [value for value in graph.input if value.name in tensors]:
        graph.input.remove(value)
    for tensor in [tensor for tensor in graph.initializer if tensor.name in shapes]:
        graph.initializer.remove(tensor)
    graph.input.extend(helper.make_tensor_value_info(t, TensorProto.FLOAT, shape) for t, shape in shapes.items())
    for node in [node for node in graph.node if node.op_type in ("ConstantOfShape", "Softmax")]:
        if node.op_type == "Softmax":
            assert graph.output[0].name == node.output[0]
            graph.output[0].name = node.input[0]
        graph.node.remove(node)
    return model, feeds


def relative(found: Any, expected: Any) -> float:
    """The root mean square of the difference over that of what was expected."""
    return float(np.linalg.norm((found - expected).ravel()) / np.linalg.norm(expected.ravel()))


def accumulated(ran: Counter[ConvSpec]) -> float:
    """What rounding may add up to over the convolutions of a graph, relative to its output.

    In the root mean square a convolution of K products adds at most ``f * sqrt(K) * 2**-24`` (the
    probabilistic bound of a sum, Higham & Mary 2019, with the factor of the accuracy class). What is
    between the layers scales values and errors alike, and errors of different layers are independent,
    so their squares add up.
    """
    terms = (count * CLASS_FACTOR[s.accuracy] ** 2 * s.reduction_length for s, count in ran.items())
    return UNIT_ROUNDOFF * math.sqrt(sum(terms))


def check_graph(name: str, kernel: Callable[[ConvSpec], Any] = kernel) -> None:
    """A randomised graph against ONNX Runtime, which runs all of it."""
    model, feeds = randomised(name)
    (expected,) = session(model).run(None, feeds)
    representation = onnx_backend.prepare(model, kernel=kernel)
    (found,) = representation.run(feeds)
    assert representation.ran.total() == GRAPHS[name]
    assert np.std(expected) > 0.01 * np.abs(expected).max(), "an output that tells nothing"
    assert relative(found, expected) <= accumulated(representation.ran)


def test_real_graph_with_random_weights(graph: str) -> None:
    check_graph(graph)


def test_a_wrong_kernel_shows_in_a_graph() -> None:
    """One column of the first of 26 convolutions."""
    first: list[ConvSpec] = []

    def choose(spec: ConvSpec) -> Callable[..., Any]:
        first.append(spec)
        return damaged(kernel(spec)) if spec == first[0] else kernel(spec)

    with pytest.raises(AssertionError):
        check_graph("squeezenet", choose)


def session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# ---- on every schedule ------------------------------------------------------------------------


class Chooser:
    """Kernels of one schedule at its default where it applies; elsewhere a spec's own default."""

    def __init__(self, schedule_id: str) -> None:
        self.schedule_id, self.used = schedule_id, 0

    def __call__(self, spec: ConvSpec) -> Kernel:
        chosen = scheduled(self.schedule_id, spec)
        self.used += chosen.schedule == self.schedule_id
        return chosen


def applicable(specs: Iterable[ConvSpec]) -> list[str]:
    """The schedules that apply to one of these at least."""
    target = resolve()
    return [
        name
        for name, schedule in schedules().items()
        if any(schedule.reason_against(spec.core, target) is None for spec in specs)
    ]


@contextmanager
def naming(schedule_id: str) -> Iterator[None]:
    """An error says with which schedule it was raised."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with the schedule {schedule_id}")
        raise


@pytest.mark.parametrize("name", CASES)
def test_a_case_passes_on_every_schedule(suite: Suite, name: str) -> None:
    """On each that applies to its convolution."""
    (spec,) = suite.run(name).ran
    tried = applicable([spec])
    assert "reference" in tried
    for schedule_id in tried:
        choose = Chooser(schedule_id)
        with naming(schedule_id):
            assert suite.run(name, choose).ran.total() == 1
            assert choose.used == 1


#: Squeezenet has layers for every schedule that takes NCHW, one group and no transposed convolution.
OTHERS = [name for name in GRAPHS if name != "squeezenet"]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["squeezenet", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_a_real_graph_passes_on_every_schedule(name: str) -> None:
    """On each that applies to one of its convolutions."""
    tried = applicable(graph_specs(name))
    assert len(tried) > 4
    for schedule_id in tried:
        choose = Chooser(schedule_id)
        with naming(schedule_id):
            check_graph(name, choose)
            assert choose.used


# ---- what the shipped cases lack --------------------------------------------------------------

ATTRIBUTES = [
    # operator, attributes, shapes of src and weights, bias
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2]}, (2, 3, 8), (4, 3, 4), True),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 1]}, (1, 4, 7, 6), (6, 4, 4, 3), True),
    ("Conv", {"auto_pad": "VALID", "kernel_shape": [2, 2, 2]}, (1, 2, 3, 4, 5), (3, 2, 2, 2, 2), False),
    ("Conv", {"auto_pad": "NOTSET", "pads": [0, 1, 2, 3], "dilations": [2, 1]}, (1, 4, 6, 5), (4, 4, 3, 2), True),
    ("Conv", {"group": 4, "pads": [2, 2]}, (3, 4, 9), (8, 1, 3), True),
    ("ConvTranspose", {"strides": [3], "output_padding": [2]}, (2, 3, 5), (3, 4, 3), True),
    ("ConvTranspose", {"strides": [2, 2], "output_shape": [9, 8]}, (1, 3, 4, 4), (3, 2, 3, 3), True),
    ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (1, 3, 4, 4), (3, 2, 3, 3), False),
    ("ConvTranspose", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (1, 3, 4, 4), (3, 2, 3, 3), True),
    ("ConvTranspose", {"group": 2, "pads": [1, 0, 1, 0, 1, 0]}, (1, 4, 3, 4, 3), (4, 3, 3, 2, 2), True),
]


def single(op: str, attributes: dict[str, Any], *operands: Any) -> tuple[ModelProto, dict[str, Any]]:
    """A model of one node with symbolic sizes, and its feeds; of an operand that is None the name is empty."""
    feeds = dict(zip(("x", "w", "b"), operands, strict=False))
    node = helper.make_node(op, [name if x is not None else "" for name, x in feeds.items()], ["y"], **attributes)
    feeds = {name: x for name, x in feeds.items() if x is not None}
    element = helper.np_dtype_to_tensor_dtype(operands[0].dtype)
    ranks = {**{name: x.ndim for name, x in feeds.items()}, "y": operands[0].ndim}
    *inputs, output = (
        helper.make_tensor_value_info(name, element, [f"{name}{axis}" for axis in range(rank)])
        for name, rank in ranks.items()
    )
    graph = helper.make_graph([node], "single", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), feeds


def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("op", "attributes", "src", "weights", "bias"), ATTRIBUTES)
def test_node(op: str, attributes: dict[str, Any], src: Any, weights: Any, bias: bool) -> None:
    channels = weights[1] * attributes.get("group", 1) if op == "ConvTranspose" else weights[0]
    model, feeds = single(op, attributes, normal(*src), normal(*weights), normal(channels) if bias else None)
    representation = onnx_backend.prepare(model, kernel=kernel)
    (found,), (expected,) = representation.run(feeds), session(model).run(None, feeds)
    assert representation.ran.total() == 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    (spec,) = representation.ran
    assert spec.bias is bias


FUNCTION_AND_BODY = """
<ir_version: 9, opset_import: ["" : 20, "local" : 1]>
graph (float[n, 3, h, w] x, float[3, 3, 3, 3] k, bool deep) => (float[n, 3, h, w] y) {
    z = local.block <pads = [1, 1, 1, 1]> (x, k)
    y = If (deep) <
        then_branch = g1 () => (float[n, 3, h, w] a) { a = Conv <auto_pad = "SAME_UPPER"> (z, k) },
        else_branch = g2 () => (float[n, 3, h, w] b) { b = Identity (z) }
    >
}
<domain: "local", opset_import: ["" : 20]>
block <pads> (x, k) => (y) {
    c = Conv <pads: ints = @pads> (x, k)
    y = Relu (c)
}
"""


@pytest.mark.parametrize(("deep", "ran"), [(True, 2), (False, 1)])
def test_convolutions_in_functions_and_bodies_run_on_kernels(deep: bool, ran: int) -> None:
    model = parser.parse_model(FUNCTION_AND_BODY)
    feeds = {"x": normal(2, 3, 5, 4), "k": normal(3, 3, 3, 3), "deep": np.array(deep)}
    representation = onnx_backend.prepare(model, kernel=kernel)
    np.testing.assert_allclose(
        representation.run(feeds)[0], session(model).run(None, feeds)[0], rtol=0, atol=1e-4 if deep else 1e-5
    )
    assert representation.ran.total() == ran


def test_symbolic_sizes_get_a_kernel_each_and_operands_any_memory() -> None:
    model, _ = single("Conv", {}, normal(1, 2, 5), normal(3, 2, 2))
    representation = onnx_backend.prepare(model, kernel=kernel)
    for x in (normal(1, 2, 5), normal(2, 2, 7), normal(2, 14, 2).transpose(0, 2, 1)[:, :, ::2]):
        weights = np.asfortranarray(normal(3, 2, 2))
        (expected,) = session(model).run(None, {"x": x, "w": weights})
        np.testing.assert_allclose(representation.run([x, weights])[0], expected, rtol=0, atol=1e-5)
    assert sorted(representation.ran.values()) == [1, 2]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_dtypes_run_on_kernels(dtype: str) -> None:
    operands = [narrow(a, dtype) for a in (normal(1, 2, 5), normal(3, 2, 2))]
    representation = onnx_backend.prepare(single("Conv", {}, *operands)[0], kernel=kernel)
    (found,) = representation.run(operands)
    exact, feeds = single("Conv", {}, *map(widen, operands))
    (expected,) = session(exact).run(None, feeds)
    assert [spec.dtype for spec in representation.ran] == [dtype]
    assert found.dtype == numpy_dtype(dtype)
    np.testing.assert_allclose(widen(found), expected, rtol=2 * NARROW_ROUNDOFF[dtype])


def test_what_convgen_has_no_dtype_for_is_left_to_the_evaluator_and_counted() -> None:
    x, weights = normal(1, 2, 5).astype(np.float64), normal(3, 2, 2).astype(np.float64)
    model, feeds = single("Conv", {}, x, weights)
    representation = onnx_backend.prepare(model, kernel=kernel)
    (found,) = representation.run(feeds)
    assert (representation.left, representation.ran.total()) == (1, 0)
    assert found.dtype == np.float64
    windows = np.lib.stride_tricks.sliding_window_view(x, 2, axis=2)
    np.testing.assert_allclose(found, np.einsum("ncpk,ock->nop", windows, weights))


@pytest.mark.parametrize(
    ("src", "weights", "error", "message"),
    [
        ((1, 2, 3, 3, 3, 3), (4, 2, 1, 1, 1, 1), UnsupportedError, r"Conv 'y': .* 4 spatial axes; 1 to 3"),
        ((1, 2), (4, 2), UnsupportedError, r"Conv 'y': .* 0 spatial axes; 1 to 3"),
        ((1, 3, 5), (4, 2, 3), SpecError, r"Conv 'y': weights: expected 3 input channels"),
        ((1, 2, 2), (4, 2, 3), SpecError, r"Conv 'y': kernel\[0\]: expected a dilated kernel within the padded input"),
    ],
)
def test_what_convgen_cannot_run_is_a_typed_error(src: Any, weights: Any, error: type, message: str) -> None:
    model, feeds = single("Conv", {}, normal(*src), normal(*weights))
    with pytest.raises(error, match=message):
        onnx_backend.run_model(model, feeds, kernel=kernel)


def test_inputs_and_devices_are_checked() -> None:
    model, feeds = single("Conv", {}, normal(1, 2, 5), normal(3, 2, 2))
    with pytest.raises(SpecError, match="inputs: expected 2: x, w, found 1"):
        onnx_backend.run_model(model, feeds["x"])
    assert onnx_backend.supports_device("CPU")
    assert not onnx_backend.supports_device("CUDA")
    with pytest.raises(UnsupportedError, match="device: expected CPU, found 'CUDA'"):
        onnx_backend.prepare(model, "CUDA")
    with pytest.raises(onnx.checker.ValidationError):
        onnx_backend.prepare(ModelProto())
