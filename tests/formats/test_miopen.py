"""Commands of MIOpenDriver: what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from convgen.errors import SpecError, UnsupportedError
from convgen.formats import benchdnn, miopen
from convgen.formats.sources import read_specs

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
        ("convfp8 -n 1", "command: expected one of conv, convfp16, convbfp16, convint8, found convfp8"),
        ("convint8 -b 1", "bias: expected 0 with convint8, whose bias would be of i8, found 1"),
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


@pytest.mark.parametrize("line", ["./bin/MIOpenDriver -n 1", "conv2d n1 ic4", "MIOpenDriver", "conv", "convoy -n 1"])
def test_what_is_no_command(line: str) -> None:
    assert not miopen.recognise(line)
    assert not benchdnn.recognise(line)


def test_other_primitives_of_a_log_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "layers.txt"
    conv = "./bin/MIOpenDriver conv -n 1 -c 4 -k 4 -H 5 -W 5 -F 1"
    path.write_text(f"./bin/MIOpenDriver pool -n 1\n{conv}\nMIOpenDriver bnormfp16 -n 1 -c 4\n{conv}\n")
    skipped: list[str] = []
    (entry,) = read_specs(path, skipped=skipped)
    assert (entry.spec, entry.count, skipped) == (miopen.parse(conv), 2, [])
    with pytest.raises(SpecError, match=r"expected MIOpenDriver conv, found './bin/MIOpenDriver pool -n 1'"):
        miopen.parse("./bin/MIOpenDriver pool -n 1")
    with pytest.raises(SpecError, match="lines of which none is about a convolution"):
        read_specs("./bin/MIOpenDriver pool -n 1")
