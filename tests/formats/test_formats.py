"""Notations of other tools: what their lines mean, and that what is written means the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile import HIDING, check
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import ACTIVATIONS, specs, specs_without_activation

from convgen.check.reference import run_onnxruntime
from convgen.errors import SpecError, UnsupportedError
from convgen.formats import benchdnn, miopen
from convgen.formats.entries import SpecEntry
from convgen.formats.notation import plain
from convgen.formats.sources import format_specs, read_specs
from convgen.problem.spec import ConvSpec


def problems(text: str) -> Iterator[ConvSpec]:
    """What benchdnn's command line or batch file means."""
    for outcome in benchdnn.Reader(lambda path: ()).read(text, "here"):
        if not isinstance(outcome, tuple):
            raise outcome
        yield outcome[0]


def problem(text: str) -> str:
    (spec,) = problems(text)
    return spec.descriptor


# ---- benchdnn: sizes --------------------------------------------------------------------------

#: Problems of oneDNN's own inputs and documentation, and what they mean.
PROBLEMS = {
    'g1mb50ic3ih224iw224oc64oh112ow112kh7kw7sh2sw2ph3pw3n"resnet_50:conv1"': (
        "conv2d n50 ic3 oc64 i224x224 k7x7 s2x2 p3x3"
    ),
    'mb50ic64ih56oc64oh56kh3ph1n"resnet_50:res2a_branch2b*3"': "conv2d n50 ic64 oc64 i56x56 k3x3 s1x1 p1x1",
    'g1mb50ic256ih56iw56oc512oh28ow28kh1kw1sh2sw2ph0pw0n"resnet_50:res3a_branch1"': (
        "conv2d n50 ic256 oc512 i56x56 k1x1 s2x2 p0x0"
    ),
    'ic3ih227iw227_oc96oh55ow55_kh11kw11_sh4sw4ph0pw0_n"alexnet:conv1"': (
        "conv2d n2 ic3 oc96 i227x227 k11x11 s4x4 p0x0"  # the default batch is 2
    ),
    'g2mb256ic96ih27oc256oh27kh5ph2n"alexnet:conv2"': "conv2d n256 ic96 oc256 g2 i27x27 k5x5 s1x1 p2x2",
    'g32mb1ic32ih112iw112oc32oh112ow112kh3kw3sh1sw1ph1pw1n"mobilenet:conv2_1/dw"': (
        "conv2d n1 ic32 oc32 g32 i112x112 k3x3 s1x1 p1x1"
    ),
    'mb1ic512ih38iw57oc512oh38ow57kh3kw3ph3pw3dh2dw2n"dilated_rfcn"': (
        "conv2d n1 ic512 oc512 i38x57 k3x3 s1x1 p3x3 d3x3"  # dilation 0 is dense
    ),
    'mb1_g1ic32oc32_iw84350ow84349kw2sw1dw0pw0n"wavenet:conv1d_1"': "conv1d n1 ic32 oc32 i84350 k2 s1 p0",
    # with 2 on both sides the output would be 31: the size given asks for 3 at the end
    "ic3oc64_id64od32kd7sd2dd0pd2_ih224oh112kh7sh2dh0ph2_iw224ow112kw7sw2dw0pw2": (
        "conv3d n2 ic3 oc64 i64x224x224 k7x7x7 s2x2x2 p2_3x2_3x2_3"
    ),
    # "large asymmetric padding"
    "mb2_g1ic32oc32_ih7oh11kh3ph2": "conv2d n2 ic32 oc32 i7x7 k3x3 s1x1 p2_4x2_4",
    "mb2_g1ic8oc8_ih1oh16kh2ph1": "conv2d n2 ic8 oc8 i1x1 k2x2 s1x1 p1_15x1_15",
    # stride_h != stride_w, and the axes in either order
    'mb2_ic32oc32_ih41oh16kh10sh2ph0_iw79ow75kw5sw1pw0n"ds2"': "conv2d n2 ic32 oc32 i41x79 k10x5 s2x1 p0x0",
    'mb2_ic32oc32_iw79ow75kw5sw1pw0_ih41oh16kh10sh2ph0n"ds2-swap"': "conv2d n2 ic32 oc32 i41x79 k10x5 s2x1 p0x0",
    # padding from the output's size: (149 * 2 - 300 + 3) / 2 = 0 at the beginning, 1 at the end
    "mb2ic3ih300oc32oh150kh3sh2": "conv2d n2 ic3 oc32 i300x300 k3x3 s2x2 p0_1x0_1",
    "ic4id8oc8kd3": "conv3d n2 ic4 oc8 i8x8x8 k3x3x3 s1x1x1 p0x0x0",
    "ic4iw8oc8kw3pw1sw2dw1": "conv1d n2 ic4 oc8 i8 k3 s2 p1 d2",
    # (2 - 3) / 2 is 0 in C: one window, half of it past the end
    "ic1iw2oc1kw3sw2": "conv1d n2 ic1 oc1 i2 k3 s2 p0_1",
    "mb0ic1iw2oc1kw1": "conv1d n0 ic1 oc1 i2 k1 s1 p0",
    "ic1iw2oc1kw1ic3": "conv1d n2 ic3 oc1 i2 k1 s1 p0",  # the last of several counts
    '--deconv ic8iw5oc8ow2kw3pw3dw2n"deconv1d:1"': "convtranspose1d n2 ic8 oc8 i5 k3 s1 p3_6 d3",
    '--deconv g1mb256oc3ow227ic96iw55kw11sw4pw0n"alexnet:deconv1"': "convtranspose1d n256 ic96 oc3 i55 k11 s4 p0",
    '--deconv g2mb256oc96oh27ic256ih27kh5ph2n"alexnet:deconv2"': (
        "convtranspose2d n256 ic256 oc96 g2 i27x27 k5x5 s1x1 p2x2"
    ),
    # twice the size: what PyTorch says with output_padding=1
    "--deconv mb1ic64ih8oc32oh16kh3sh2ph1": "convtranspose2d n1 ic64 oc32 i8x8 k3x3 s2x2 p1x1 op1x1",
    "--deconv ic1iw3oc1kw2sw3ow9": "convtranspose1d n2 ic1 oc1 i3 k2 s3 p0 op1",
}


@pytest.mark.parametrize(("text", "meaning"), PROBLEMS.items(), ids=[text.split('n"')[0] for text in PROBLEMS])
def test_problem(text: str, meaning: str) -> None:
    assert problem(text) == meaning
    assert benchdnn.recognise(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ic3ih5oc4", "kh: expected a size of 1 or more, found 0 or none"),
        ("ih5oc4kh3", "ic: expected a size"),
        ("ic3oc4kh3", "ih: expected a size"),
        ("ic3oc4mb2", "axes: expected w, h and w, or d, h and w, found none"),
        ("ic3oc4ih5iw5kh3", "kw: expected a size"),
        ("ic3oc4ih5kh3sh0", "sh: expected a size"),
        ("ic3oc4ih5kh3dw1", "iw: expected a size"),
        ("ic3oc4id5kd3ih5kh3", "axes: expected .*, found d and h"),
        ("ic3oc4id5kd3iw5kw3", "axes: expected .*, found d and w"),
        ("g0ic3oc4ih5kh3", "g: expected a size"),
        ("g2ic3oc4ih5kh3", "groups: expected a divisor of ic=3, found 2"),
        ("ic3oc4ih5kh9", "oh: expected 1 or more with these sizes, found -3"),
        ("ic3oc4ih5kh3q5", "q5: expected a field such as ih56"),
        ("ic3oc4__ih5kh3", "_ih5kh3: expected a field"),
        ("ic3oc4ih-5kh3", "ih-5kh3: expected a field"),
        ("ic3oc4ih5kh3 --frob=1", "--frob=1: expected an option of benchdnn's conv and deconv drivers"),
        ("--dir ic3oc4ih5kh3", "--dir: expected an option"),
        ("--mb=x ic3oc4ih5kh3", "--mb: expected a number, found x"),
        ("--batch=nowhere", "--batch: expected an existing file, found nowhere"),
    ],
)
def test_wrong_problem(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"^here: {message}"):
        list(problems(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mb1_ic16oc16_ih2oh1kh1sh3ph0iw2ow1kw1sw2pw1", "ow: expected the size that this input gives"),
        ("ic1oc1ih8oh3kh1sh2ph0", "oh: expected the size that this input gives with padding, found 3"),
        ("ic1oc1ih8oh2kh1", "oh: expected an output that needs no negative padding, found 2"),
        ("--deconv ic1oc1ih3kh2sh2oh9ph0", "oh: expected the size that this input gives with padding, found 9"),
    ],
)
def test_output_that_padding_cannot_give(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^here: {message}"):
        list(problems(text))


# ---- benchdnn: options ------------------------------------------------------------------------

SMALL = "mb1ic4ih5oc4kh1"
MEANT = "conv2d n1 ic4 oc4 i5x5 k1x1 s1x1 p0x0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ""),
        ("--dir=FWD_B", ""),
        ("--dir=FWD_D", "nobias"),
        ("--dir=fwd_i", "nobias"),
        ("--dir=FWD_I --bia-dt=f32", ""),
        ("--dir=BWD_D", "data"),
        ("--dir=BWD_W --bia-dt=f32", "nobias weights"),
        ("--dir=bwd_wb", "weights"),
        ("--dt=bf16 --dir=FWD_D --bia-dt=bf16", "bf16"),
        ("--dt=bf16", "bf16"),  # FWD_B has an f32 bias then
        ("--dt=f16:f16:f16", "f16"),
        ("--cfg=f32_wino", ""),
        ("--cfg=bf16bf16bf16", "bf16"),
        ("--stag=axb --dtag=any", "nhwc"),
        ("--stag=nhwc --dtag=acdb --wtag=any", "nhwc"),
        ("--stag=abx --dtag=nchw", ""),
        ("--stag=abx --dtag=axb", "dst_nhwc"),
        ("--mode=P -v5 --repeats-per-prb=3 --alg=wino --skip-impl=ref,x64:gemm --attr-scratchpad=user", ""),
        ("--attr-scales= --attr-zero-points= --strides=", ""),
        ("--attr-post-ops=sum", "residual"),
        ("--attr-post-ops=sum:1.0:0:f32+eltwise_relu", "residual relu"),
        ("--attr-post-ops=binary_add:f32:15:abx+relu", "residual relu"),
        ("--attr-post-ops=add:f32:per_tensor", "residual"),
        ("--attr-post-ops=relu", "relu"),
        ("--attr-post-ops=relu_dst", "relu"),
        ("--attr-post-ops=relu:0.1", "leaky_relu(0.1)"),
        ("--attr-post-ops=elu:0.5:0:1", "elu(0.5)"),
        ("--attr-post-ops=clip:0:6", "clip(0,6)"),
        ("--attr-post-ops=clip_v2:-1:inf", "clip(-1,inf)"),
        ("--attr-post-ops=swish:1.0", "silu"),
        ("--attr-post-ops=eltwise_hardswish:0.166667:0.5", "hardswish"),
        ("--attr-post-ops=eltwise_hardswish", "hardswish"),
        ("--attr-post-ops=hardsigmoid:0.2:0.5", "hardsigmoid"),
        ("--attr-post-ops=logistic", "sigmoid"),
        ("--attr-post-ops=gelu_erf", "gelu"),
        ("--attr-post-ops=gelu_tanh", "gelu_tanh"),
        ("--attr-post-ops=mish", "mish"),
        ("--attr-post-ops=linear:1", ""),
        ("--attr-post-ops=prelu:per_oc", "prelu"),
        ("--attr-post-ops=relu --reset", ""),
        ("--dt=bf16 --conv", ""),  # another command line
        ("./benchdnn --mode=P --conv --dir=FWD_D", "nobias"),
        ("3:PASSED (12 ms) __REPRO: --conv --dir=FWD_D", "nobias"),
        ("--dt=s8", "i8"),
        ("--dt=u8:s8:u8 --dir=FWD_D", "nobias src_u8 dst_u8 i8"),
        ("--dt=u8:s8:s32 --bia-dt=s32", "src_u8 dst_i32 i8"),
        (
            "--dt=u8:u8:f32 --attr-scales=src:common:0.5+wei:per_oc --attr-post-ops=relu",
            "src_u8 weights_u8 dst_f32 relu i8",
        ),
        ("--dt=u8:s8:s8 --attr-zero-points=src0:common:1+dst:0:s32", "src_zero dst_zero src_u8 i8"),
        ("--dt=s8:u8:s8 --attr-zero-points=wei:per_oc+src:common:0", "weights_zero weights_u8 i8"),
    ],
)
def test_options(options: str, words: str) -> None:
    assert problem(f"{options} {SMALL}") == ConvSpec.parse(f"{MEANT} {words}").descriptor


@pytest.mark.parametrize(
    "line",
    [
        'perf,cpu,brgconv_1x1:avx512_core,"a*3",--conv --mode=P --dir=FWD_I mb1ic4ih5oc4kh1n"a*3",0.10276,0,0.693115',
        "perf,cpu,jit:avx2,,--mode=CP --conv --dir=FWD_D --attr-scratchpad=user mb1ic4ih5oc4kh1,0.9,78.3,**45.6**,21",
        'perf,cpu,ref,"a,b",--conv --dir=FWD_I mb1ic4ih5oc4kh1n"a,b",1,nan,inf',
    ],
)
def test_what_benchdnn_measured(line: str) -> None:
    assert benchdnn.recognise(line)
    assert problem(line) == f"{MEANT} nobias"


def test_what_benchdnn_measured_of_other_drivers_is_none_of_its_convolutions() -> None:
    assert not benchdnn.recognise("perf,cpu,brg:avx512_core,,--mode=P --matmul 4x5:5x6,0.1,0,0.6")


@pytest.mark.parametrize(
    "options",
    [
        "--attr-scales=src:per_oc:0.5",
        "--attr-scales=dst:per_oc:0.5",
        "--attr-scales=attr_post_op_0:common:2",
        "--attr-zero-points=src:per_dim_1:1",
        "--attr-zero-points=bias:common:1",
        "--attr-post-ops=sum",
        "--attr-post-ops=clip:0:6",
        "--bia-dt=bf16",
    ],
)
def test_what_layers_of_integers_lack_is_refused(options: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^here: {options.partition('=')[0]}: expected"):
        list(problems(f"--dt=u8:s8:u8 --dir=FWD_I {options} {SMALL}"))


def test_sums_have_no_scales() -> None:
    with pytest.raises(UnsupportedError, match="expected none with a dst of s32"):
        list(problems(f"--dt=u8:s8:s32 --attr-scales=src:common:0.5 {SMALL}"))


@pytest.mark.parametrize(
    "option",
    [
        "--dir=BWD_DW",
        "--dt=u8:s8:bf16",
        "--dt=s8:f32:s8",
        "--dt=bf16:bf16:f32",
        "--dt=f32:f32",
        "--bia-dt=s8",
        "--stag=aBx4b",
        "--dtag=ABx16b16a",
        "--attr-scales=src:common:0.25",
        "--attr-zero-points=src:common:1",
        "--attr-rounding-mode=dst:stochastic",
        "--attr-dropout=0.5",
        "--strides=8x1x2x1::8x1x2x1",
        "--match=.*kh3.*",
        "--start=2",
        *(
            f"--attr-post-ops={ops}"
            for ops in ("sum:0.5", "sum:1:1", "sum:1:0:s8", "relu+sum", "relu+relu", "linear:2:1", "swish", "swish:2")
        ),
        *(f"--attr-post-ops={ops}" for ops in ("hardswish:1:0", "prelu", "add:s8:per_tensor", "add:f32:per_oc")),
        *(f"--attr-post-ops={ops}" for ops in ("dw:k3s1p1", "mul:f32", "abs", "relu:x", "relu:0:0:2", "sum:1:0:f32:1")),
    ],
)
def test_what_changes_the_layer_is_refused(option: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^here: {option.partition('=')[0]}: expected"):
        list(problems(f"--dir=FWD_I {option} {SMALL}"))


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ("--stag=any --dtag=aBcd16b", "nchw16c"),
        ("--stag=nChw8c --dtag=any", "nchw8c"),
        ("--stag=nChw8c --dtag=aBx16b", "nchw8c dst_nchw16c"),
        ("--stag=axb --dtag=nChw16c --attr-post-ops=add:f32:per_tensor:aBx16b", "residual nhwc dst_nchw16c"),
    ],
)
def test_tags_of_blocks(tags: str, words: str) -> None:
    assert problem(f"{tags} mb1ic16ih5oc32kh1") == f"{MEANT.replace('ic4 oc4', 'ic16 oc32')} {words}"


def test_a_residual_has_the_layout_of_the_output() -> None:
    with pytest.raises(UnsupportedError, match="--attr-post-ops: expected sum or add:f32:per_tensor"):
        list(problems(f"--stag=axb --dtag=abx --attr-post-ops=add:f32:per_tensor:axb {SMALL}"))


def test_lists_give_a_problem_for_each() -> None:
    found = list(problems(f"--dt=f32,bf16 --dir=FWD_B,FWD_D --mb=0,7 --attr-post-ops=,relu {SMALL}"))
    assert len(set(found)) == len(found) == 16
    assert {spec.n for spec in found} == {1, 7}
    assert found[0].descriptor == MEANT


def test_backslash_joins_words() -> None:
    assert problem(f"--attr-post-ops=sum+\\ relu {SMALL}") == f"{MEANT} residual relu"


def test_numbers_that_are_none() -> None:
    with pytest.raises(SpecError, match="here: activation: expected numbers as parameters of leaky_relu"):
        list(problems(f"--attr-post-ops=relu:nan {SMALL}"))


# ---- benchdnn: batch files --------------------------------------------------------------------


def test_batch_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "test_conv").write_text(
        "# a suite\n--reset --dt=bf16\n--batch=sub/set_all  # nested\nmb2ic1iw3oc1kw1\n"
    )
    (tmp_path / "sub" / "set_all").write_text("--dir=FWD_D\n--batch=shapes_a --batch=shapes_b\n")
    (tmp_path / "sub" / "shapes_a").write_text('mb1ic1iw3oc1kw1n"a:x*4" mb1ic2iw3oc1kw1n"b*2&c"\n')
    (tmp_path / "shapes_b").write_text("mb1ic1iw3oc1kw1\n")  # beside the first file
    found = [(entry.spec.descriptor, entry.count, entry.names) for entry in read_specs(tmp_path / "test_conv")]
    assert found == [
        ("conv1d n1 ic1 oc1 i3 k1 s1 p0 nobias bf16", 5, ("a:x",)),
        ("conv1d n1 ic2 oc1 i3 k1 s1 p0 nobias bf16", 3, ("b", "c")),
        ("conv1d n2 ic1 oc1 i3 k1 s1 p0 nobias bf16", 1, ()),
    ]


def test_errors_name_the_batch_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "outer").write_text("--batch=inner\n")
    (tmp_path / "inner").write_text("\nmb1ic1iw3oc1kw1\nic1iw3oc1\n")
    with pytest.raises(SpecError, match=f"^{tmp_path}/inner: line 3: kw: expected a size"):
        read_specs(tmp_path / "outer")


@pytest.mark.parametrize("inner", ["outer", "./outer", "link"])
def test_batch_files_that_include_themselves(inner: str, tmp_path: Path) -> None:
    (tmp_path / "outer").write_text("--batch=middle\n")
    (tmp_path / "middle").write_text(f"--batch={inner}\n")
    (tmp_path / "link").symlink_to(tmp_path / "outer")
    with pytest.raises(SpecError, match="middle: line 1: --batch: expected a file that does not include itself"):
        read_specs(tmp_path / "outer")


def test_hostile_batch_files_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchdnn, "LIMIT", 1000)
    for level in range(30):
        (tmp_path / f"level{level}").write_text(f"--batch=level{level + 1}\n" * 10)
    (tmp_path / "level30").write_text("# nothing\n")
    for name, text in {"deep": "--batch=level0", "wide": f"--mb={','.join('1' * 2000)} {SMALL}"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(SpecError, match="problems: expected at most 1000"):
            read_specs(tmp_path / name)
    for name in ("/dev/zero", "x" * 5000, "a\0b"):
        path = tmp_path / "names"
        path.write_text(f"--batch={name}")
        with pytest.raises(SpecError, match="names: line 1: --batch: expected an existing file, found "):
            read_specs(path)


# ---- MIOpenDriver -----------------------------------------------------------------------------

#: Commands of MIOpen's documentation, tests and logs, and what they mean.
COMMANDS = {
    "./bin/MIOpenDriver conv -W 32 -H 32 -c 3 -k 32 -x 5 -y 5 -p 2 -q 2": (
        "conv2d n100 ic3 oc32 i32x32 k5x5 s1x1 p2x2 nobias"
    ),
    "./bin/MIOpenDriver convfp16 -W 32 -H 32 -c 3 -k 32 -x 5 -y 5 -p 2 -q 2 -s 0 -F 1": (
        "conv2d n100 ic3 oc32 i32x32 k5x5 s1x1 p2x2 nobias f16"
    ),
    "./bin/MIOpenDriver convbfp16 -W 32 -H 32 -c 3 -k 32 -x 5 -y 5 -p 2 -q 2 -s 0 -F 1": (
        "conv2d n100 ic3 oc32 i32x32 k5x5 s1x1 p2x2 nobias bf16"
    ),
    "MIOpen(HIP): Command [LogCmdConvolution] ./bin/MIOpenDriver conv -n 128 -c 3 -H 32 -W 32 -k "
    "64 -y 3 -x 3 -p 1 -q 1 -u 1 -v 1 -l 1 -j 1 -m conv -g 1 -F 1 -t 1": (
        "conv2d n128 ic3 oc64 i32x32 k3x3 s1x1 p1x1 nobias"
    ),
    "./bin/MIOpenDriver convfp16 --batchsize 128 --spatial_dim 2 --pad_h 0 --pad_w 0 --pad_d 0 --conv_stride_h 4 "
    "--conv_stride_w 4 --conv_stride_d 0 --dilation_h 1 --dilation_w 1 --dilation_d 0 --group_count 1 --mode conv "
    "--pad_mode default --trans_output_pad_h 0 --trans_output_pad_w 0 --trans_output_pad_d 0 --out_layout NCHW "
    "--in_d 1 --in_h 227 --in_w 227 --fil_d 1 --fil_h 11 --fil_w 11 --in_channels 3 --out_channels 64 --forw 1": (
        "conv2d n128 ic3 oc64 i227x227 k11x11 s4x4 p0x0 nobias f16"
    ),
    "conv -n 2 -c 64 --in_d 128 -H 128 -W 128 -k 32 --fil_d 3 -y 3 -x 3 --pad_d 1 -p 1 -q 1 --conv_stride_d 1 -u 1 "
    "-v 1 --dilation_d 1 -l 1 -j 1 --spatial_dim 3 -m conv -g 1 -F 1 -t 1": (
        "conv3d n2 ic64 oc32 i128x128x128 k3x3x3 s1x1x1 p1x1x1 nobias"
    ),
    # of a transposed convolution -c still goes in and -k comes out
    "MIOpenDriver.exe conv -m trans -x 10 -y 5 -W 341 -H 79 -c 32 -n 4 -k 8 -p 0 -q 0 -u 2 -v 2 -l 1 -j 1 -g 4 -F 0": (
        "convtranspose2d n4 ic32 oc8 g4 i79x341 k5x10 s2x2 p0x0 nobias"
    ),
    "conv -m trans -x 3 -y 3 -W 108 -H 54 -c 3 -n 8 -k 64 -p 1 -q 1 -u 2 -v 2 -Y 1 --trans_output_pad_w 1 -b 1": (
        "convtranspose2d n8 ic3 oc64 i54x108 k3x3 s2x2 p1x1 op1x1"
    ),
    "conv -_ 3 -! 4 -H 5 -W 6 -@ 1 -y 2 -x 3 -# 2 -$ 1 -^ 2 -n 1 -k 4 -g 0": (
        "conv3d n1 ic3 oc4 i4x5x6 k1x2x3 s2x1x1 p1x0x0 d2x1x1 nobias"
    ),
    "conv -n 1 -c 4 -k 4 '-H' '5' -W 5 -p 7 -q 7 -z same -u 2 -v 3": "conv2d n1 ic4 oc4 i5x5 k3x3 s2x3 p1x0 nobias",
    "conv -n 1 -c 4 -k 4 -H 5 -W 5 -p 7 -q 7 -z valid": "conv2d n1 ic4 oc4 i5x5 k3x3 s1x1 p0x0 nobias",
    "conv -n 1 -c 4 -k 4 -H 9 -W 9 -p 1 -q 1 -z same -l 2 -j 2": "conv2d n1 ic4 oc4 i9x9 k3x3 s1x1 p1x1 d2x2 nobias",
    "conv -n 1 -c 4 -k 4 -H 5 -W 5 --in_layout NHWC --fil_layout NHWC --out_layout nhwc": (
        "conv2d n1 ic4 oc4 i5x5 k3x3 s1x1 p0x0 nobias nhwc"
    ),
    "conv -n 5 -n 1 -H 5 -W 5 -F 3 -Y 9": "conv2d n1 ic3 oc32 i5x5 k3x3 s1x1 p0x0 nobias",
}


@pytest.mark.parametrize(("command", "meaning"), COMMANDS.items(), ids=range(len(COMMANDS)))
def test_command(command: str, meaning: str) -> None:
    assert miopen.recognise(command)
    assert miopen.parse(command).descriptor == meaning


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("conv -n", "-n: expected a value, found none"),
        ("conv -n x", "batchsize: expected an integer, found 'x'"),
        ("conv -n 1 frob", "frob: expected a flag of MIOpenDriver conv, found an unknown one"),
        ("conv --frob 1", "--frob: expected a flag"),
        ("conv -F1 1", "-F1: expected a flag"),
        ("conv -m deconv", "mode: expected one of conv, trans, found 'deconv'"),
        ("conv -z full", "pad_mode: expected one of default, same, valid, found 'full'"),
        ("conv -g 2", "groups: expected a divisor of ic=3, found 2"),
        ("conv -y 99", r"kernel\[0\]: expected a dilated kernel within the padded input"),
        ("conv -m trans -Y 1", "trans_output_pad_h: expected less than the stride, 1, found 1"),
        ("conv -z same -u 0", r"stride\[0\]: expected an integer >= 1, found 0"),
    ],
)
def test_wrong_command(command: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"^here: {message}"):
        miopen.parse(command, "here")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("conv -F 8", "forw: expected 0 to 7, found 8"),
        ("convint8 -n 1", "command: expected one of conv, convfp16, convbfp16, found convint8"),
        ("MIOpenDriver CBAInfer -n 1", "command: .* found CBAInfer"),
        ("conv -_ 1", "spatial_dim: expected 2 or 3, found 1"),
        ("conv -I NHWC", "out_layout: expected the layout of the input, nhwc, found nchw"),
        ("conv -I CHWN -O CHWN", "in_layout: expected one of NCHW, NHWC, found CHWN"),
        ("conv -r 1", "pad_val: expected 0, found 1"),
        ("conv -U fp8", "in_cast_type: expected -1, found fp8"),
        ("conv -Z 1 -L 4", "tensor_vect: expected 0, found 1"),
        (
            "[LogCmdConvolution] ./bin/MIOpenDriver conv -c 4 -k 2 -m trans -g 2",
            "out_channels: expected no transposed, grouped convolution in a log, found 2",
        ),
    ],
)
def test_command_for_something_else(command: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^here: {message}"):
        miopen.parse(command, "here")


@pytest.mark.parametrize(
    "line", ["./bin/MIOpenDriver bnorm -n 1", "conv2d n1 ic4", "MIOpenDriver", "conv", "convoy -n 1"]
)
def test_what_is_no_command(line: str) -> None:
    assert not miopen.recognise(line)
    assert not benchdnn.recognise(line)


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
    if spec.dtype == "i8":
        with pytest.raises(UnsupportedError, match=r"^dtype: expected one of f32, f16, bf16 for benchdnn, found i8"):
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


@settings(max_examples=300, deadline=None)
@given(specs_without_activation())
def test_miopen_round_trip(spec: ConvSpec) -> None:
    spec = spec.with_(accuracy="standard", residual=False)
    said = plain(spec)
    sayable = (
        spec.rank > 1
        and spec.layout == spec.dst_layout
        and spec.layout in ("nchw", "nhwc")
        and spec.dtype != "i8"
        and all(begin == end for begin, end in said.padding)
        and all(extra < stride for extra, stride in zip(said.output_padding, said.stride, strict=True))
    )
    if not sayable:
        with pytest.raises(
            UnsupportedError, match=r"^(in_spatial|padding|output_padding|dtype|(dst_)?layout): expected"
        ):
            miopen.write(spec)
        return
    command = miopen.write(spec)
    assert miopen.parse(command) == said
    assert miopen.recognise(command)


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
    [(0, ["forward"]), (1, ["forward"]), (2, ["data"]), (4, ["weights"]), (6, ["data", "weights"])],
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
