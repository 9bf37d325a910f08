"""Lines of oneDNN's verbose mode: those that PyTorch's own oneDNN prints, and the forms of older versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convgen.errors import SpecError, UnsupportedError
from convgen.formats.sources import FORMS, read_specs

PROBLEM = "mb1_ic16oc32_ih9oh9kh3sh1dh0ph1_iw8ow8kw3sw1dw0pw1"
MEANT = "conv2d n1 ic16 oc32 i9x8 k3x3 s1x1 p1x1"


def line(
    memory: str = "src:f32::blocked:acdb::f0 wei:f32:a:blocked:Acdb64a::f0 bia:f32::blocked:a::f0 "
    "dst:f32::blocked:acdb::f0",
    attributes: str = "",
    start: str = "onednn_verbose,v1,primitive,exec,cpu",
    kind: str = "convolution",
    direction: str = "forward_inference",
    end: str = f"alg:convolution_direct,{PROBLEM},0.42",
) -> str:
    return ",".join([start, kind, "brg_conv_fwd:avx512_core", direction, memory, attributes, end])


OLD = "src_{0}::blocked:{1}:f0 wei_{0}::blocked:Acdb16a:f0 bia_{2}:f0 dst_{0}::blocked:{3}:f0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line(), "nhwc"),
        (line(start="onednn_verbose,exec,cpu"), "nhwc"),
        (line(start="onednn_verbose,1693533460193.346924,exec,cpu"), "nhwc"),
        (line(start="onednn_verbose,v1,1693533460193.3,primitive,create:cache_miss,cpu"), "nhwc"),
        (line(start="[rank 0] dnnl_verbose,create:cache_hit,cpu"), "nhwc"),
        (line(direction="forward_training"), "nhwc"),
        (line(end=f"alg:convolution_auto,{PROBLEM}"), "nhwc"),
        (line(end=f"alg:convolution_direct,{PROBLEM},11,1197"), "nhwc"),  # where the decimal point is a comma
        (line(attributes="attr-post-ops:eltwise_relu"), "relu nhwc"),
        (line(attributes="attr-scratchpad:user attr-post-ops:sum+eltwise_clip:0:6"), "residual clip(0,6) nhwc"),
        (line(attributes="attr-post-ops:binary_add:f32:15:acdb"), "residual nhwc"),
        (line(attributes="attr-post-ops:prelu:2"), "prelu nhwc"),
        (line(attributes="attr-fpmath:bf16"), "nhwc"),
        (line(attributes="post_ops:'eltwise_relu;'"), "relu nhwc"),
        (line(attributes="post_ops:'sum;eltwise_relu;';"), "residual relu nhwc"),
        (line(OLD.format("f32", "abcd", "f32::blocked:a", "aBcd16b")), "dst_nchw16c"),
        (line(OLD.format("bf16", "aBcd8b", "undef::undef", "aBcd8b")), "nobias bf16 nchw8c"),
        (line(OLD.format("f32", "abcd", "undef::undef:", "abcd")), "nobias"),
        (
            line(
                "src:u8::blocked:acdb::f0 wei:s8:a:blocked:AcdB32a4b::f8:zpm1 bia:f32:a:blocked:a::f0 "
                "dst:u8::blocked:acdb::f0",
                "attr-scales:src0:0:f32+dst:0:f32 attr-zero-points:src0:0:s32+dst:0:s32",
            ),
            "src_zero dst_zero src_u8 dst_u8 i8 nhwc",
        ),
        (
            line(
                "src_u8::blocked:acdb:f0 wei_s8::blocked:AcdB16a4b:f8:zpm1 bia_s32::blocked:a:f0 "
                "dst_s8::blocked:acdb:f0",
                "attr-oscale:2:* attr-zero-points:src0:0:*",
            ),
            "src_zero src_u8 i8 nhwc",
        ),
    ],
)
def test_lines_of_all_versions(text: str, words: str) -> None:
    (entry,) = read_specs(text)
    assert entry.spec.descriptor == read_specs(f"{MEANT} {words}")[0].spec.descriptor
    assert entry.count == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(direction="backward_bias"), "prop_kind: expected one of forward_inference.*, found backward_bias"),
        (line(attributes="attr-post-ops:eltwise_relu+sum"), "--attr-post-ops: expected"),
        (line(attributes="attr-post-ops:sum:0.5"), "--attr-post-ops: expected"),
        (line(attributes="attr-scales:src0:0:f32"), "--attr-scales: expected none"),
        (line(attributes="attr-dropout:undef"), "--attr-dropout: expected none"),
        (
            line(attributes="attr-of-the-future:1"),
            "attr-of-the-future: expected an attribute that a layer has, found 1",
        ),
        (line(OLD.format("f32", "aBcd4b", "undef::undef", "abcd")), "--stag: expected one of"),
        (line(OLD.format("f64", "abcd", "undef::undef", "abcd")), "--dt: expected"),
        (line("fsrc:nChw8c fwei:OIhw8i8o fbia:undef fdst:nChw8c"), "memory: expected .* of oneDNN 1.0 or later"),
        (
            line("src:f32::blocked:abcd:9999x72x8x1:f0 wei:f32::blocked:abcd::f0 dst:f32::blocked:abcd::f0"),
            "memory of src: expected a dense tensor, found strides 9999x72x8x1",
        ),
        (
            line("src:f32::sparse:csr::f0 wei:f32::blocked:abcd::f0 dst:f32::blocked:abcd::f0"),
            "memory of src: expected blocked, found sparse",
        ),
    ],
)
def test_what_is_no_layer_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_specs(text)
    skipped: list[str] = []
    assert read_specs(text, skipped=skipped) == []
    assert len(skipped) == 1


@pytest.mark.parametrize(
    "text",
    [
        "onednn_verbose,v1,primitive,exec,cpu,convolution",
        line(end="alg:convolution_direct,0.42"),
        line(memory="src:f32::blocked:abcd::f0"),
    ],
)
def test_lines_that_are_cut_off(text: str) -> None:
    with pytest.raises(SpecError, match="expected"):
        read_specs(text)


PLAIN = "src:f32::blocked:abcd::f0 wei:f32:a:blocked:Acdb64a::f0 bia:{} dst:f32::blocked:abcd::f0"


@pytest.mark.parametrize(
    ("direction", "bias", "words"),
    [
        ("backward_data", "undef::undef:::", "data"),
        ("backward_weights", "undef::undef:::", "weights nobias"),
        ("backward_weights", "f32:a:blocked:a::f0", "weights"),
    ],
)
@pytest.mark.parametrize("kind", ["convolution", "deconvolution"])
def test_gradients_are_layers_of_their_direction(direction: str, bias: str, words: str, kind: str) -> None:
    (entry,) = read_specs(line(PLAIN.format(bias), direction=direction, kind=kind))
    meant = MEANT.replace("conv2d", "convtranspose2d" if kind == "deconvolution" else "conv2d")
    assert entry.spec.descriptor == read_specs(f"{meant} {words}")[0].spec.descriptor


def test_a_layer_occurs_as_often_as_it_ran(tmp_path: Path) -> None:
    log, made = tmp_path / "run.txt", line(start="onednn_verbose,v1,primitive,create:cache_miss,cpu")
    once = made.replace("ic16", "ic48")
    others = [
        "onednn_verbose,v1,info,oneDNN v3.10.2 (commit 0)",
        "onednn_verbose,v1,primitive,info,template:operation,engine,primitive,implementation,prop_kind",
        "onednn_verbose,v1,primitive,exec,cpu,reorder,jit,undef,src:f32::blocked:ab::f0 dst:f32::blocked:ba::f0,,,1x2",
        "onednn_verbose,v1,primitive,create:dispatch,convolution,cpu,convolution,jit:avx2,forward_inference,no,x.cpp:7",
        made.replace("create", "create_nested").replace("ic16", "ic99"),
        "onednn_verbose,v1,graph,exec,cpu,100001,convolution_post_ops,conv;relu,,in0_f32:0:strided:undef:1x64x56x56:1",
    ]
    log.write_text("\n".join([*others, made, line(), line(), line(), once]))
    assert [(entry.count, entry.spec.ic) for entry in read_specs(log)] == [(3, 16), (1, 48)]


def test_it_is_no_notation_to_write() -> None:
    assert "onednn" not in FORMS


SCRIPT = """
import torch
torch.set_num_threads(1)
def run(module, *shape, dtype=torch.float32, layout=torch.contiguous_format):
    with torch.no_grad():
        module.to(dtype)(torch.zeros(shape).to(dtype).to(memory_format=layout))
run(torch.nn.Conv2d(16, 32, 3, padding=1, stride=2), 2, 16, 20, 20, layout=torch.channels_last)
run(torch.nn.Conv2d(16, 32, 3, dilation=2, groups=16, bias=False), 2, 16, 20, 21, layout=torch.channels_last)
run(torch.nn.ConvTranspose2d(16, 24, (4, 3), padding=1, stride=2, output_padding=(0, 1)), 2, 16, 20, 20,
    layout=torch.channels_last)
run(torch.nn.Conv2d(16, 32, 3), 1, 16, 20, 20, dtype=torch.bfloat16, layout=torch.channels_last)
run(torch.nn.Conv3d(16, 32, 3), 1, 16, 20, 20, 9, layout=torch.channels_last_3d)
torch.nn.Conv2d(16, 48, 3)(torch.zeros(2, 16, 20, 20, requires_grad=True)).sum().backward()
"""


def test_what_pytorch_prints() -> None:
    torch = pytest.importorskip("torch")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    environment = os.environ | {"ONEDNN_VERBOSE": "all", "PYTHONPATH": ""}  # where PyTorch is not hidden
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    runs = [text for text in ran.stdout.splitlines() if ",exec," in text and "convolution," in text]
    if not runs:
        pytest.skip("oneDNN did not run here")
    found = {entry.spec.descriptor for text in runs for entry in read_specs(text)}
    expected = {
        "conv2d n2 ic16 oc32 i20x20 k3x3 s2x2 p1x1 nhwc",
        "conv2d n2 ic16 oc32 g16 i20x21 k3x3 s1x1 p0x0 d2x2 nobias nhwc",
        "convtranspose2d n2 ic16 oc24 i20x20 k4x3 s2x2 p1x1 op0x1 nhwc",
        "conv2d n1 ic16 oc32 i20x20 k3x3 s1x1 p0x0 bf16 nhwc",
        "conv3d n1 ic16 oc32 i20x20x9 k3x3x3 s1x1x1 p0x0x0 nhwc",
        "conv2d n2 ic16 oc48 i20x20 k3x3 s1x1 p0x0",
        "conv2d n2 ic16 oc48 i20x20 k3x3 s1x1 p0x0 data",
        "conv2d n2 ic16 oc48 i20x20 k3x3 s1x1 p0x0 weights",
    }
    # Which of them PyTorch gives to oneDNN, and in which layout, is its own choice: what it gives must be one of these.
    assert {text.replace(" nhwc", "").replace(" nchw16c", "") for text in found} <= {
        text.replace(" nhwc", "") for text in expected
    }
    assert len(found) >= 3
