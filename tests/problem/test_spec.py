"""ConvSpec: shapes as ONNX has them, identity, and what it refuses."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import channels_first, stored
from onnx import TensorProto, helper
from strategies import spec_fields, specs

from convgen.errors import ConvgenError, SpecError
from convgen.problem.layout import Blocks
from convgen.problem.spec import ConvSpec

BASE: dict[str, Any] = {"n": 1, "ic": 4, "oc": 6, "in_spatial": (8, 9), "kernel": (3, 3)}


# ---- shapes -----------------------------------------------------------------------------------


def inferred(fields: dict[str, Any], **attributes: Any) -> tuple[int, ...] | None:
    """The output shape that ONNX's shape inference gives a NCHW convolution; None if it refuses."""
    op = "ConvTranspose" if fields["transposed"] else "Conv"
    ic, oc, groups = fields["ic"], fields["oc"], fields["groups"]
    channels = (ic, oc // groups) if fields["transposed"] else (oc, ic // groups)
    shapes = {"x": (fields["n"], ic, *fields["in_spatial"]), "w": (*channels, *fields["kernel"])}
    if fields["transposed"]:
        attributes["output_padding"] = fields["output_padding"]
    node = helper.make_node(
        op, ["x", "w"], ["y"], strides=fields["stride"], dilations=fields["dilation"], group=groups, **attributes
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]), opset_imports=[helper.make_opsetid("", 20)]
    )
    try:
        found = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError:
        return None
    return tuple(dim.dim_value for dim in found.graph.output[0].type.tensor_type.shape.dim)


def nchw_shape(spec: ConvSpec) -> tuple[int, ...]:
    return (spec.n, spec.oc, *spec.out_spatial)


def fits(fields: dict[str, Any], padding: Sequence[tuple[int, int]]) -> bool:
    """Whether the dilated kernel fits; shape inference rounds (size - window) / stride up to 0 where it does not."""
    windows = ((k - 1) * d + 1 for k, d in zip(fields["kernel"], fields["dilation"], strict=True))
    return all(w <= size + sum(p) for w, size, p in zip(windows, fields["in_spatial"], padding, strict=True))


@settings(max_examples=300, deadline=None)
@given(spec_fields())
def test_output_shape_is_onnx_s(fields: dict[str, Any]) -> None:
    """What ConvSpec accepts has the inferred shape; it refuses only what has no output."""
    begins, ends = zip(*fields["padding"], strict=True)
    shape = inferred(fields, pads=[*begins, *ends])
    try:
        spec = ConvSpec(**fields)
    except SpecError:
        assert shape is None or min(shape[2:]) <= 0 or not fits(fields, fields["padding"])
        return
    assert nchw_shape(spec) == shape
    assert spec.dst_shape == stored(np.empty(shape), spec.dst_layout).shape


@settings(max_examples=200, deadline=None)
@given(spec_fields(), st.sampled_from([("same", "SAME_UPPER"), ("same_lower", "SAME_LOWER"), ("valid", "VALID")]))
def test_padding_words_are_onnx_s(fields: dict[str, Any], words: tuple[str, str]) -> None:
    fields |= {"padding": words[0]}
    if words[0] != "valid" and fields["transposed"]:
        # Here shape inference adds output_padding to the size that SAME names, and takes less than
        # input * stride where no window reaches; ONNX's text has neither.
        fields["output_padding"] = (0,) * len(fields["kernel"])
        windows = [(k - 1) * d + 1 for k, d in zip(fields["kernel"], fields["dilation"], strict=True)]
        assume(all(s <= w for s, w in zip(fields["stride"], windows, strict=True)))
    shape = inferred(fields, auto_pad=words[1])
    try:
        spec = ConvSpec(**fields)
    except SpecError:
        assert words[0] == "valid"
        assert shape is None or not fits(fields, [(0, 0)] * len(shape[2:]))
        return
    assert nchw_shape(spec) == shape
    if words[0] == "same" and not fields["transposed"]:
        assert all(end - begin in (0, 1) for begin, end in spec.padding)
    if words[0] == "same_lower" and not fields["transposed"]:
        assert all(begin - end in (0, 1) for begin, end in spec.padding)


@settings(max_examples=200, deadline=None)
@given(specs(), st.data())
def test_output_spatial(spec: ConvSpec, data: st.DataObject) -> None:
    """A wanted output size is the output size, and is split as ONNX's text says."""
    assume(spec.transposed)
    fields = {name: value for name, value in spec.to_dict().items() if name != "padding"}
    whole = [
        (size - 1) * s + extra + w
        for size, s, extra, w in zip(spec.in_spatial, spec.stride, spec.output_padding, spec.window, strict=True)
    ]
    wanted = [data.draw(st.integers(1, size)) for size in whole]
    for word in ("same", "same_lower", 0):
        made = ConvSpec.from_dict({**fields, "padding": word, "output_spatial": wanted})
        assert made.out_spatial == tuple(wanted)
        assert made.output_padding == spec.output_padding
        for (begin, end), size, full in zip(made.padding, wanted, whole, strict=True):
            assert begin + end == full - size
            assert (end if word == "same" else begin) - (begin if word == "same" else end) in (0, 1)


def test_output_spatial_beyond_the_windows_is_output_padding() -> None:
    spec = ConvSpec(**BASE | {"in_spatial": (3, 3)}, stride=(3, 2), transposed=True, output_spatial=(10, 8))
    assert (spec.padding, spec.output_padding) == (((0, 0), (0, 0)), (1, 1))
    with pytest.raises(SpecError, match=r"output_spatial\[0\]: expected a size the windows reach, found 12"):
        ConvSpec(**BASE | {"in_spatial": (3, 3)}, stride=(3, 2), transposed=True, output_spatial=(12, 8))


@settings(max_examples=100, deadline=None)
@given(specs())
def test_cost_and_bytes(spec: ConvSpec) -> None:
    """MACs counted one output (or transposed: input) element at a time."""
    per_element = spec.reduction_length if not spec.transposed else spec.reduction_length // (spec.ic // spec.groups)
    elements = np.prod(spec.dst_shape) if not spec.transposed else np.prod(spec.src_shape) * (spec.oc // spec.groups)
    assert spec.macs == elements * per_element
    assert spec.flops == 2 * spec.macs
    assert spec.bytes["src"] == {"f32": 4, "f16": 2, "bf16": 2, "i8": 1}[spec.dtype] * np.prod(spec.src_shape)
    extra = {"bias": spec.bias, "slope": spec.has_slope, "residual": spec.residual}
    extra["sum"] = spec.dtype == "i8" and spec.residual
    extra["scale"] = spec.dtype == "i8" and spec.dst_dtype != "i32"
    extra |= {name: getattr(spec, name) for name in ("src_zero", "weights_zero", "dst_zero")}
    assert set(spec.bytes) - {"src", "weights", "dst"} == {name for name, there in extra.items() if there}


# ---- identity ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(specs(), st.randoms(use_true_random=False))
def test_round_trips(spec: ConvSpec, random: Any) -> None:
    operator, *tokens = spec.descriptor.split()
    random.shuffle(tokens)
    for same in (
        ConvSpec.parse(spec.descriptor),
        ConvSpec.parse(" ".join([operator, *tokens])),
        ConvSpec.from_dict(spec.to_dict()),
        ConvSpec.from_dict({k: v for k, v in spec.canonical.items() if k != "version"}),
        spec.with_(),
        pickle.loads(pickle.dumps(spec)),
    ):
        assert same == spec
        assert (same.descriptor, same.key, hash(same)) == (spec.descriptor, spec.key, hash(spec))
    assert re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", spec.name)


@settings(max_examples=200, deadline=None)
@given(specs(), specs())
def test_identity_tells_specs_apart(one: ConvSpec, other: ConvSpec) -> None:
    same = one == other
    assert (one.key == other.key) == same
    assert (one.descriptor == other.descriptor) == same
    assert (one.name == other.name) == same


def test_the_layout_of_dst_is_src_s_unless_said() -> None:
    spec = ConvSpec.parse("conv1d ic16 oc32 i9 k3 nwc")
    assert (spec.layout, spec.dst_layout) == ("nhwc", "nhwc")
    assert spec == spec.with_(dst_layout="") == spec.with_(dst_layout=None) == spec.with_(dst_layout="nwc")
    assert "dst_layout" not in spec.canonical | spec.to_dict()
    assert spec.with_(layout="ncw16c").dst_layout == "nchw16c"
    own = spec.with_(dst_layout="ncw")
    assert own.descriptor == "conv1d n1 ic16 oc32 i9 k3 s1 p0 nhwc dst_nchw"
    assert own.canonical == spec.canonical | {"dst_layout": "nchw"}
    assert own.with_(layout="nchw8c").dst_layout == "nchw"
    assert own.with_(layout="nchw") == spec.with_(layout="nchw")
    assert (own.src_shape, own.dst_shape) == ((1, 9, 16), (1, 32, 7))
    assert len({s.key for s in (spec, own, spec.with_(layout="nchw", dst_layout="nhwc"))}) == 3


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "nchw8c", "nchw16c"])
@pytest.mark.parametrize("spatial", [(3,), (3, 2), (3, 2, 4)])
def test_blocks_are_where_the_channels_are(layout: str, spatial: tuple[int, ...]) -> None:
    blocks = Blocks(layout, 32)
    logical = np.arange(2 * 32 * np.prod(spatial)).reshape(2, 32, *spatial)
    array = stored(logical, layout)
    assert blocks.shape(2, spatial) == array.shape
    np.testing.assert_array_equal(blocks.stored(logical), array)
    np.testing.assert_array_equal(blocks.channels_first(array), channels_first(array, layout))
    for n, channel, *pixel in np.ndindex(*logical.shape):
        index = blocks.order(n, channel, pixel)
        assert array[index] == logical[(n, channel, *pixel)]
        assert blocks.logical(index) == (n, channel, tuple(pixel))
    vector = np.arange(32).reshape(blocks.shape(1, (1,) * len(spatial)))
    np.testing.assert_array_equal(channels_first(array * 0 + vector, layout)[0, :, 0].reshape(32, -1)[:, 0], range(32))
    assert len(blocks.axes("ic", ["d", "h", "w"][: len(spatial)])) == array.ndim


@pytest.mark.parametrize("layouts", ["", "nhwc", "nchw16c", "nhwc dst_nchw", "nchw16c dst_nhwc", "nhwc dst_nchw8c"])
def test_core_is_of_the_same_buffers(layouts: str) -> None:
    """Of flat pixels; images follow each other without a break in NHWC alone."""
    spec = ConvSpec.parse(f"conv2d n2 ic16 oc32 i4x5 k1 residual {layouts}")
    core = spec.core
    assert (core.layout, core.dst_layout) == (spec.layout, spec.dst_layout)
    assert (core.n, core.in_spatial) == ((1, (40,)) if layouts == "nhwc" else (2, (20,)))
    src = np.arange(np.prod(spec.src_shape)).reshape(spec.src_shape)
    flat = channels_first(src.reshape(core.src_shape), core.layout)
    pixels = channels_first(src, spec.layout).reshape(2, 16, 20)
    np.testing.assert_array_equal(np.moveaxis(flat, 1, -1).reshape(40, 16), np.moveaxis(pixels, 1, -1).reshape(40, 16))


def test_canonical_form_is_stable() -> None:
    """Records and exported libraries hold these: a change needs a new canonical version."""
    spec = ConvSpec.parse("conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1 relu")
    assert spec.canonical == {
        "version": 1,
        "n": 1,
        "ic": 64,
        "oc": 64,
        "in_spatial": [56, 56],
        "kernel": [3, 3],
        "padding": [[1, 1], [1, 1]],
        "activation": "relu",
    }
    assert spec.key == "0f1f4c3c0d19870bc817d2910ab65ee07aa94deb63d07c2d2e61cf936202d6b9"
    assert spec.name == "conv2d_n1_ic64_oc64_i56x56_k3x3_s1x1_p1x1_relu"


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("conv2d ic4 oc4 i8x8 k3", "conv2d n1 ic4 oc4 i8x8 k3x3 s1x1 p0x0"),
        ("conv3d k1 i8x9x7 oc4 ic4 s2 d3 p1_2", "conv3d n1 ic4 oc4 i8x9x7 k1x1x1 s2x2x2 p1_2x1_2x1_2 d3x3x3"),
        ("conv2d ic4 oc4 i8x8 k3 same relu6", "conv2d n1 ic4 oc4 i8x8 k3x3 s1x1 p1x1 clip(0,6)"),
        ("conv2d ic4 oc4 i8x8 k4 same", "conv2d n1 ic4 oc4 i8x8 k4x4 s1x1 p1_2x1_2"),
        ("conv2d ic4 oc4 i8x8 k4 same_lower", "conv2d n1 ic4 oc4 i8x8 k4x4 s1x1 p2_1x2_1"),
        ("conv1d ic4 oc4 i8 k3 valid nwc swish g1", "conv1d n1 ic4 oc4 i8 k3 s1 p0 silu nhwc"),
        ("conv1d ic4 oc4 i8 k3 leaky_relu(0.01) op0", "conv1d n1 ic4 oc4 i8 k3 s1 p0 leaky_relu"),
        ("convtranspose1d n0 ic256 oc128 i800 k16 s8 p4", "convtranspose1d n0 ic256 oc128 i800 k16 s8 p4"),
    ],
)
def test_descriptor(short: str, full: str) -> None:
    assert ConvSpec.parse(short).descriptor == full


def test_values_may_be_lists_and_numpy_integers() -> None:
    """As TOML, YAML and JSON give them, and as code that computes them does."""
    untyped: Any = ConvSpec
    listed = untyped(np.int64(1), 4, 6, [8, 9], [3], [np.int32(1), 1], [[1, 1], 1], layout="NCHW")
    assert listed == ConvSpec(**BASE, padding=((1, 1), (1, 1)))


def test_empty_batch() -> None:
    spec = ConvSpec(**BASE | {"n": 0})
    assert spec.dst_shape == (0, 6, 6, 7)
    assert spec.macs == 0


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "expected", "found"),
    [
        ({"n": -1}, "n", "an integer >= 0", "-1"),
        ({"ic": 0}, "ic", "an integer >= 1", "0"),
        ({"oc": -3}, "oc", "an integer >= 1", "-3"),
        ({"ic": 4.0}, "ic", "an integer >= 1", "4.0"),
        ({"ic": True}, "ic", "an integer >= 1", "True"),
        ({"ic": "4"}, "ic", "an integer >= 1", "'4'"),
        ({"ic": None}, "ic", "an integer >= 1", "None"),
        ({"ic": int}, "ic", "an integer >= 1", "<class 'int'>"),
        ({"ic": np.array([4, 4])}, "ic", "an integer >= 1", "array([4, 4])"),
        ({"n": 2**31}, "n", "at most 2147483647 (int32 indexing)", str(2**31)),
        ({"in_spatial": (8, 0)}, "in_spatial[1]", "an integer >= 1", "0"),
        ({"in_spatial": ()}, "in_spatial", "1, 2 or 3 sizes", "()"),
        ({"in_spatial": (8,) * 4}, "in_spatial", "1, 2 or 3 sizes", "(8, 8, 8, 8)"),
        ({"in_spatial": "88"}, "in_spatial", "1, 2 or 3 sizes", "'88'"),
        ({"kernel": (0, 3)}, "kernel[0]", "an integer >= 1", "0"),
        ({"kernel": (3, 3, 3)}, "kernel", "2 values, one per spatial axis", "3: (3, 3, 3)"),
        ({"kernel": "3x3"}, "kernel", "an integer, or 2 of them", "'3x3'"),
        ({"stride": 0}, "stride", "an integer >= 1", "0"),
        ({"stride": (1, -1)}, "stride[1]", "an integer >= 1", "-1"),
        ({"dilation": 0}, "dilation", "an integer >= 1", "0"),
        ({"padding": -1}, "padding", "an integer >= 0", "-1"),
        ({"padding": ((0, -1), 0)}, "padding[0]", "an integer >= 0", "-1"),
        ({"padding": (1, 1, 1)}, "padding", "2 values, one per spatial axis", "3: (1, 1, 1)"),
        ({"padding": ((1, 1, 1), 0)}, "padding[0]", "an integer or a (begin, end) pair", "(1, 1, 1)"),
        ({"padding": "full"}, "padding", "a number, pairs or one of valid, same, same_lower", "'full'"),
        ({"kernel": (9, 3)}, "kernel[0]", "a dilated kernel within the padded input (8)", "9"),
        ({"dilation": 4}, "kernel[0]", "a dilated kernel within the padded input (8)", "9"),
        ({"groups": 3}, "groups", "a divisor of ic=4", "3"),
        ({"groups": 4}, "groups", "a divisor of oc=6", "4"),
        ({"groups": 0}, "groups", "an integer >= 1", "0"),
        ({"output_padding": 1}, "output_padding", "0 unless transposed", "(1, 1)"),
        (
            {"output_padding": 2, "stride": 2, "transposed": True},
            "output_padding[0]",
            "below max(stride, dilation) = 2",
            "2",
        ),
        ({"output_padding": -1, "transposed": True}, "output_padding", "an integer >= 0", "-1"),
        ({"padding": ((5, 5), (0, 0)), "transposed": True}, "padding[0]", "less than the transposed output", "(5, 5)"),
        ({"output_spatial": (6, 7)}, "output_spatial", "None unless transposed", "(6, 7)"),
        ({"output_spatial": (0, 7), "transposed": True}, "output_spatial[0]", "an integer >= 1", "0"),
        ({"transposed": 1}, "transposed", "true or false", "1"),
        ({"bias": "yes"}, "bias", "true or false", "'yes'"),
        ({"residual": None}, "residual", "true or false", "None"),
        ({"activation": "relo"}, "activation", "one of none, relu", "'relo'"),
        ({"activation": None}, "activation", "a name such as 'relu' or 'clip(0,6)'", "None"),
        ({"activation": "relu(1)"}, "activation", "at most 0 parameters for relu", "'relu(1)'"),
        ({"activation": "clip(6,0)"}, "activation", "clip(lo,hi) with lo <= hi", "'clip(6,0)'"),
        ({"activation": "clip(a,6)"}, "activation", "numbers as parameters of clip", "'clip(a,6)'"),
        ({"activation": "clip(nan,6)"}, "activation", "numbers as parameters of clip", "'clip(nan,6)'"),
        ({"activation": "elu(1_0)"}, "activation", "numbers as parameters of elu", "'elu(1_0)'"),
        ({"activation": "leaky_relu(inf)"}, "activation", "float32 numbers as parameters", "'leaky_relu(inf)'"),
        ({"activation": "leaky_relu(1e39)"}, "activation", "float32 numbers as parameters", "'leaky_relu(1e39)'"),
        ({"accuracy": "exact"}, "accuracy", "one of strict, standard, relaxed, tf32, bf16", "'exact'"),
        ({"accuracy": np.array([1, 2])}, "accuracy", "one of strict", "array([1, 2])"),
        ({"dtype": "f64"}, "dtype", "one of f32", "'f64'"),
        ({"layout": "nwc"}, "layout", "a 2-D layout among", "'nwc'"),
        ({"layout": "chwn"}, "layout", "a 2-D layout among", "'chwn'"),
        ({"layout": "ncw16c"}, "layout", "a 2-D layout among nchw, nhwc, nchw8c, nchw16c", "'ncw16c'"),
        ({"dst_layout": "nchw4c"}, "dst_layout", "a 2-D layout among nchw, nhwc", "'nchw4c'"),
        ({"dst_layout": 0}, "dst_layout", "a 2-D layout among nchw, nhwc", "0"),
        ({"layout": "nchw8c"}, "ic", "a multiple of 8, the blocks of nchw8c", "4"),
        ({"dst_layout": "nchw16c", "oc": 24}, "oc", "a multiple of 16, the blocks of nchw16c", "24"),
        ({"in_spatial": (2**16, 2**15)}, "src", "at most 2147483647 elements (int32 indexing)", "shape"),
        ({"ic": 2**16, "oc": 2**15}, "weights", "at most 2147483647 elements (int32 indexing)", "shape"),
        ({"padding": 2**31 - 1, "stride": 2**31 - 1}, "src", "at most 2147483647 elements", "shape"),
        ({"oc": 2**20, "padding": 100}, "dst", "at most 2147483647 elements (int32 indexing)", "shape"),
        ({"stride": 2**30, "transposed": True}, "dst", "at most 2147483647 elements (int32 indexing)", "shape"),
        ({"strides": 1}, "strides", "one of accuracy, activation, bias", "an unknown key"),
        ({1: 1}, "1", "one of accuracy, activation, bias", "an unknown key"),
    ],
)
def test_refused(change: dict[Any, Any], field: str, expected: str, found: str) -> None:
    with pytest.raises(SpecError) as caught:
        ConvSpec.from_dict(BASE | change, "here")
    error = caught.value
    assert error.field == field
    assert expected in error.expected
    assert found in str(error.found)
    assert str(error) == f"here: {error.field}: expected {error.expected}, found {error.found}"
    assert isinstance(error, ConvgenError)
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", ["ic", "oc", "in_spatial", "kernel"])
def test_missing_field(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name}: expected a value, found none"):
        ConvSpec.from_dict({key: value for key, value in BASE.items() if key != name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "operator: expected one of conv1d, .*, found ''"),
        ("conv4d ic4", "operator: expected one of conv1d, .*, found 'conv4d'"),
        ("n1 conv2d", "operator: expected one of conv1d, .*, found 'n1'"),
        ("conv2d oc4 i8x8 k3", "ic: expected a token ic…, found none"),
        ("conv2d ic4 oc4 i8x8", "kernel: expected a token k…, found none"),
        ("conv2d ic4 oc4 i8x8 k3 k3x3", "k3x3: expected kernel at most once, found a second one"),
        ("conv2d ic4 oc4 i8x8 k3 relu tanh", "tanh: expected activation at most once, found a second one"),
        ("conv2d ic4 oc4 i8x8 k3 p1 same", "same: expected padding at most once, found a second one"),
        ("conv2d ic4 oc4 i8x8 k3x3x3", "k3x3x3: expected 1 or 2 values, found 3"),
        ("conv2d ic4x4 oc4 i8x8 k3", "ic4x4: expected one number, found 2"),
        ("conv2d ic4 oc4 i8x8 k3 p1_", "p1_: expected a descriptor token .*, found an unknown or malformed one"),
        ("conv2d ic4 oc4 i8x8 k3 s-1", "s-1: expected a descriptor token"),
        ("conv2d ic4 oc4 i8x8 k3 i9x9", "i9x9: expected in_spatial at most once"),
        ("conv2d ic4 oc4 i8x8 k3 dilated", "dilated: expected a descriptor token"),
        ("conv2d ic4 oc4 i8x8 k3 n１", "n１: expected a descriptor token"),
        ("conv2d ic4 oc4 i8x8 k" + "9" * 5000, "k9+: expected a descriptor token"),
        ("conv2d ic4 oc4 i8x8 k99999999999", r"kernel\[0\]: expected at most 2147483647"),
        ("conv2d ic4 oc4 i8x8 k3 clip(0", r"activation|clip"),
        ("conv2d ic4 oc4 i8x8 k3 f64", "f64: expected a descriptor token"),
        ("conv2d ic4 oc4 i8x8 k3 ncdhw", "layout: expected a 2-D layout"),
        ("conv2d ic4 oc4 i8x8 k3 nhwc nchw", "nchw: expected layout at most once"),
        ("conv2d ic4 oc4 i8x8 k3 dst_nhwc dst_nchw", "dst_nchw: expected dst_layout at most once"),
        ("conv2d ic4 oc4 i8x8 k3 dst_", "dst_: expected a descriptor token"),
    ],
)
def test_refused_descriptor(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ConvSpec.parse(text)


@settings(max_examples=300, deadline=None)
@given(
    st.text() | st.lists(st.sampled_from(["conv2d", "ic4", "oc4", "i8x8", "k3", "relu", "p1", "n", "x"])).map(" ".join)
)
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    try:
        spec = ConvSpec.parse(text)
    except SpecError:
        return
    assert ConvSpec.parse(spec.descriptor) == spec


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([1, 2, "same"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*ConvSpec(**BASE).to_dict(), "output_spatial"]), _JSON, max_size=3))
def test_any_values_are_a_spec_or_a_spec_error(values: dict[str, Any]) -> None:
    try:
        spec = ConvSpec.from_dict(BASE | values)
    except SpecError:
        return
    assert ConvSpec.from_dict(spec.to_dict()) == spec
