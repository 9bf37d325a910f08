"""Lines and batch files of benchdnn: what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchdnn_lines import problem, problems

from convgen.errors import SpecError, UnsupportedError
from convgen.formats import benchdnn
from convgen.formats.sources import read_specs
from convgen.problem.spec import ConvSpec

# ---- sizes ------------------------------------------------------------------------------------

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


# ---- options ----------------------------------------------------------------------------------

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


# ---- batch files ------------------------------------------------------------------------------


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
