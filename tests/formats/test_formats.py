"""Notations of other tools: what their lines mean, and that what is written means the same."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from benchdnn_lines import problems
from hostile import HIDING, check
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import ACTIVATIONS, specs, specs_without_activation

from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats import benchdnn, miopen
from convgen.formats.entries import SpecEntry
from convgen.formats.notation import plain
from convgen.formats.sources import format_specs
from convgen.problem.spec import ConvSpec

PIECES = ["mb1", "ic4", "oc4", "ih5", "kh3", "id", "sw0", "ph1", "n", "_", "-", "--", "conv", "--conv", "--deconv"]
PIECES += [
    "--dir=",
    "FWD_D",
    ",",
    ":",
    "+",
    "--attr-post-ops=",
    "relu",
    "sum",
    "clip",
    "--dt=",
    "f32",
    "\\",
    '"',
    "9" * 30,
]
PIECES += [
    "./bin/MIOpenDriver ",
    "-n ",
    "-m trans ",
    "-_ 3 ",
    "-g ",
    "3 ",
    "inf",
    "nan",
    "--batch=",
    "*",
    "&",
    "\0",
    "é",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, " ", " "]), max_size=25).map("".join))
def test_whatever_is_written_there_gives_an_error_of_ours(line: str) -> None:
    with contextlib.suppress(SpecError, UnsupportedError):
        list(problems(line))
    with contextlib.suppress(SpecError, UnsupportedError):
        miopen.parse(line)


# ---- writing ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(specs())
def test_plain_says_the_same(spec: ConvSpec) -> None:
    said = plain(spec)
    assert said.dst_shape == spec.dst_shape
    assert plain(said) == said
    for (begin, end), (was, _), extra in zip(said.padding, spec.padding, said.output_padding, strict=True):
        assert begin == was
        assert begin == end or end == 0 or extra == 0
    changed = {"padding", "output_padding"}
    assert {k: v for k, v in said.to_dict().items() if k not in changed} == {
        k: v for k, v in spec.to_dict().items() if k not in changed
    }


@settings(max_examples=40, deadline=None)
@given(specs_without_activation(), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_plain_computes_the_same(spec: ConvSpec, more: int, seed: int) -> None:
    spec = spec.with_(n=max(spec.n, 1), dtype="f32", residual=False)
    with contextlib.suppress(SpecError):  # a transposed convolution that is cropped to nothing
        spec = spec.with_(padding=tuple((begin, end + more) for begin, end in spec.padding))
    assume(plain(spec) != spec)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(-3, 4, shape).astype(np.float32) for name, shape in spec.shapes.items()}
    arrays.pop("dst")
    said, meant = (run_onnxruntime(s, **arrays, threads=1) for s in (plain(spec), spec))
    np.testing.assert_array_equal(said, meant)


@settings(max_examples=300, deadline=None)
@given(specs())
def test_benchdnn_round_trip(spec: ConvSpec) -> None:
    spec = spec.with_(accuracy="standard")
    if spec.is_quantised and (spec.residual or spec.activation_op.name == "clip"):
        with pytest.raises(UnsupportedError, match=r"attr-post-ops: expected none or relu, for a layer of integers"):
            benchdnn.write(spec)
        return
    line = benchdnn.write(spec)
    assert list(problems(line)) == [plain(spec)]
    assert benchdnn.write(plain(spec)) == line
    assert benchdnn.recognise(line)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.lists(st.text(st.characters(exclude_characters="&*\"'\\"), max_size=4), max_size=4))
def test_benchdnn_counts_and_names(count: int, names: list[str]) -> None:
    line = benchdnn.write(ConvSpec.parse("conv1d ic1 oc1 i3 k1"), count, names)
    (outcome,) = benchdnn.Reader(lambda path: ()).read(line, "")
    assert not isinstance(outcome, Exception)
    _, found, labels = outcome
    assert found == count
    kept = [name for name in names[:count] if name]
    assert len(labels) == len(kept)
    assert all(name == label for name, label in zip(kept, labels, strict=True) if name.isalnum())


def _is_sums_of_i8(spec: ConvSpec) -> bool:
    """Whether a layer is what MIOpen's int8 is: i8 by i8 to i32."""
    types = (spec.src_dtype, spec.weights_dtype, spec.dst_dtype)
    return types == ("i8", "i8", "i32") and not (spec.bias or spec.src_zero or spec.weights_zero)


@settings(max_examples=300, deadline=None)
@given(specs_without_activation())
def test_miopen_round_trip(spec: ConvSpec) -> None:
    spec = spec.with_(accuracy="standard", residual=False)
    said = plain(spec)
    sayable = (
        spec.rank > 1
        and spec.layout == spec.dst_layout
        and spec.layout in ("nchw", "nhwc")
        and (not spec.is_quantised or _is_sums_of_i8(spec))
        and all(begin == end for begin, end in said.padding)
        and all(extra < stride for extra, stride in zip(said.output_padding, said.stride, strict=True))
    )
    if not sayable:
        with pytest.raises(
            UnsupportedError,
            match=r"^(in_spatial|padding|output_padding|bias|\w+_(d?type|dtype|zero)|(dst_)?layout): expected",
        ):
            miopen.write(spec)
        return
    command = miopen.write(spec)
    assert miopen.parse(command) == said
    assert miopen.recognise(command)


def test_written_lines_of_integers() -> None:
    spec = ConvSpec.parse("conv2d n1 ic64 oc32 i56x56 k1 src_zero dst_zero src_u8 dst_u8 relu i8")
    assert benchdnn.write(spec) == (
        "--conv --dir=FWD_I --bia-dt=s32 --dt=u8:s8:u8 --stag=abx --dtag=abx --attr-scales=wei:per_oc "
        "--attr-zero-points=src:common:1+dst:common:2 --attr-post-ops=relu "
        "mb1_g1ic64oc32_ih56oh56kh1sh1dh0ph0_iw56ow56kw1sw1dw0pw0"
    )
    spec = ConvSpec.parse("conv2d n1 ic4 oc8 i9x9 k3 nobias dst_i32 i8")
    assert "--dt=s8:s8:s32 --stag=abx --dtag=abx mb1" in benchdnn.write(spec)
    assert miopen.write(spec).startswith("./bin/MIOpenDriver convint8 -n 1 -c 4 -k 8 ")
    assert miopen.parse("convint8 -n 1 -c 4 -H 9 -W 9 -k 8") == spec


def test_written_lines() -> None:
    spec = ConvSpec.parse("conv2d n1 ic64 oc32 g2 i56x28 k3 s2 p1 d2x1 residual relu")
    assert benchdnn.write(spec, 3, ["a b"]) == (
        "--conv --dir=FWD_I --bia-dt=f32 --dt=f32 --stag=abx --dtag=abx --attr-post-ops=sum+relu "
        'mb1_g2ic64oc32_ih56oh27kh3sh2dh1ph1_iw28ow14kw3sw2dw0pw1_n"a_b*3"'
    )
    spec = ConvSpec.parse("convtranspose3d n2 ic8 oc4 i4x5x6 k3 s2 p1 op1 nobias bf16 nhwc")
    assert miopen.write(spec) == (
        "./bin/MIOpenDriver convbfp16 -n 2 -c 8 -k 4 --in_d 4 -H 5 -W 6 --fil_d 3 -y 3 -x 3 --pad_d 1 -p 1 -q 1 "
        "--conv_stride_d 2 -u 2 -v 2 --dilation_d 1 -l 1 -j 1 --trans_output_pad_d 1 -Y 1 -X 1 --in_layout NDHWC "
        "--fil_layout NDHWC --out_layout NDHWC --spatial_dim 3 -m trans -g 1 -b 0 -F 1"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_a_post_op(activation: str) -> None:
    spec = ConvSpec(1, 4, 4, (5,), (1,), activation=activation)
    assert list(problems(benchdnn.write(spec))) == [spec]


@pytest.mark.parametrize(
    ("words", "write", "message"),
    [
        ("strict", benchdnn.write, "accuracy: expected what benchdnn can say, found strict"),
        ("leaky_relu(0)", benchdnn.write, r"activation: expected what benchdnn can say, found leaky_relu\(0\)"),
        ("relaxed", miopen.write, "accuracy: expected what MIOpenDriver can say, found relaxed"),
        ("relu", miopen.write, "activation: expected what MIOpenDriver can say, found relu"),
        ("nchw8c", miopen.write, "layout: expected NCHW or NHWC, the same of input and output"),
        ("dst_nhwc", miopen.write, "dst_layout: expected NCHW or NHWC, the same of input and output"),
        ("residual", miopen.write, "residual: expected what MIOpenDriver can say, found True"),
        ("p0_3", miopen.write, "padding: expected the same at the beginning and end"),
    ],
)
def test_what_a_notation_cannot_say(words: str, write, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError, match=f"^{message}"):
        write(ConvSpec.parse(f"conv2d ic8 oc8 i5x5 k1 {words}"))


def test_names_within_lines_of_benchdnn() -> None:
    line = format_specs([SpecEntry(ConvSpec.parse("conv2d ic3 oc4 i8x8 k3x3"), 1, (HIDING,))], "benchdnn")
    assert 'n"ok_no_2K_[bold]x[/]"' in check(line)


@pytest.mark.parametrize(
    ("number", "directions"),
    [
        (0, ["forward"]),
        (1, ["forward"]),
        (2, ["data"]),
        (3, ["forward", "data"]),
        (4, ["weights"]),
        (5, ["forward", "weights"]),
        (6, ["data", "weights"]),
        (7, ["forward", "data", "weights"]),
    ],
)
def test_a_command_for_several_directions_is_several_layers(number: int, directions: list[str]) -> None:
    layers = miopen.parse_all(f"conv -n 1 -c 4 -k 8 -H 5 -W 5 -b 1 -F {number}")
    assert [layer.direction for layer in layers] == directions
    assert miopen.parse(miopen.write(layers[-1])) == layers[-1]


@pytest.mark.parametrize("words", ["data", "weights", "nobias weights"])
def test_directions_are_written_as_they_are_read(words: str) -> None:
    spec = ConvSpec.parse(f"conv2d n2 ic4 oc6 g2 i7x6 k3x3 s2x2 p1x1 {words}")
    assert miopen.parse(miopen.write(spec)) == spec
    assert list(problems(benchdnn.write(spec))) == [plain(spec)]
