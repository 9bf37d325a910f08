"""What a device is checked with before anything is measured on it: one feature of a layer at a time.

Where a plain layer is right and one with a feature more is wrong, the feature is the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...errors import SpecError
from ...hardware.target import Target
from ...lowering.candidates import default_candidate
from ...lowering.discover import schedules_of
from ...lowering.schedule import Candidate
from ...problem.spec import ConvSpec

#: Layers by what tells each from the plain one.
FEATURES = {
    "plain": "conv2d n1 ic64 oc64 i8x8 k1x1 s1 p0 nobias",
    "several steps": "conv2d n1 ic512 oc64 i8x8 k1x1 s1 p0 nobias",
    "taps": "conv2d n1 ic64 oc64 i10x10 k3x3 s1 p0 nobias",
    "padding": "conv2d n1 ic64 oc64 i8x8 k3x3 s1 p1 nobias",
    "uneven padding": "conv2d n1 ic64 oc64 i8x8 k3x3 s1 p1x0_2 nobias",
    "images": "conv2d n3 ic64 oc64 i8x8 k1x1 s1 p0 nobias",
    "stride": "conv2d n1 ic64 oc64 i17x17 k3x3 s2 p1 nobias",
    "dilation": "conv2d n1 ic64 oc64 i12x12 k3x3 s1 p2 d2 nobias",
    "pixels beside tiles": "conv2d n1 ic64 oc64 i7x9 k1x1 s1 p0 nobias",
    "channels beside tiles": "conv2d n1 ic64 oc17 i8x8 k1x1 s1 p0 nobias",
    "few channels": "conv2d n1 ic19 oc64 i8x8 k3x3 s1 p1 nobias",
    "groups": "conv2d n1 ic128 oc128 g2 i8x8 k3x3 s1 p1 nobias",
    "small groups": "conv2d n1 ic32 oc32 g8 i8x8 k3x3 s1 p1 nobias",
    "depthwise": "conv2d n1 ic64 oc64 g64 i8x8 k3x3 s1 p1 nobias",
    "transposed": "convtranspose2d n1 ic64 oc64 i8x8 k4x4 s2 p1 nobias",
    "1-D": "conv1d n1 ic64 oc64 i64 k3 s1 p1 nobias",
    "3-D": "conv3d n1 ic64 oc64 i4x4x4 k3x3x3 s1 p1 nobias",
    "bias": "conv2d n1 ic64 oc64 i8x8 k1x1 s1 p0",
    "residual": "conv2d n1 ic64 oc64 i8x8 k1x1 s1 p0 nobias residual",
    "activation": "conv2d n1 ic64 oc64 i8x8 k1x1 s1 p0 nobias gelu",
    "slope": "conv2d n1 ic64 oc64 i8x8 k1x1 s1 p0 nobias prelu",
    "gradient of src": "conv2d n2 ic64 oc64 i8x8 k3x3 s1 p1 data",
    "gradient of src, strided": "conv2d n2 ic64 oc64 i8x8 k3x3 s2 p1 data",
    "gradient of weights": "conv2d n2 ic64 oc64 i8x8 k3x3 s1 p1 nobias weights",
    "gradient of weights and bias": "conv2d n2 ic64 oc64 i8x8 k3x3 s1 p1 weights",
    "many blocks": "conv2d n2 ic256 oc256 i28x28 k3x3 s1 p1 nobias",
}
#: How each is stored and multiplied.
MODES = ("", "nhwc", "f16", "nhwc f16", "nhwc bf16", "nhwc tf32", "nhwc i8")


def feature_layers() -> Iterator[tuple[str, ConvSpec]]:
    """Every feature in every mode that has it: its name, and a layer."""
    for feature, text in FEATURES.items():
        for mode in MODES:
            try:
                spec = ConvSpec.parse(f"{text} {mode}")
            except SpecError:  # i8 has neither residual nor other activations than ReLU
                continue
            yield f"{feature}, {mode or 'f32'}", spec


def every_default(spec: ConvSpec, target: Target) -> tuple[Sequence[Candidate], Candidate]:
    """The default of each schedule that applies, with its plain points, and which of the defaults is taken."""
    core = spec.core
    applicable = [s for s in schedules_of(target.kind).values() if s.reason_against(core, target) is None]
    points = [(s, picks) for s in applicable for picks in (s.default(core, target), *s.plain_points(core, target))]
    return list(dict.fromkeys(Candidate(*point) for point in points)), default_candidate(spec, target)
