"""What profiles of ONNX Runtime and OpenVINO say about the convolutions inside a model."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MeasureError

#: What is in the names of operators that are convolutions, and not in ``Convert``.
_CONVOLUTION = re.compile(r"Conv(?!ert)|Deconv")
#: Activations that only follow convolutions: x·sigmoid(x) as ONNX Runtime fuses it, and OpenVINO's names.
_ACTIVATION = re.compile(r"QuickGelu|H?Swish|Mish")
#: Event of ONNX Runtime's profile that is a run of the whole model, and how it calls an operator's own time.
_RUN, _KERNEL = "model_run", "_kernel_time"
#: What it writes as a depthwise 1×1 convolution is a batch normalisation where its name has this in it.
_NORMALISATION, _AS_CONV = "BatchNormalization", "_bn_nchwc"


@dataclass(frozen=True)
class Profile:
    """Where one run of a model spent its time.

    What a library has fused into a convolution counts as the convolution, and so do activations on their own that only
    follow convolutions, as convgen fuses them. Others, and residuals that are added by themselves, are among the rest,
    which is in the library's favour.

    Attributes:
        convolutions, reorders, others: seconds of the operators: the convolutions with their activations, changes of
            layout that the library has inserted, and everything else.
        nodes: how many of them are convolutions: fewer than the model has where the library has made something else
            of one.
    """

    convolutions: float
    reorders: float
    others: float
    nodes: int


def onnxruntime_profiles(events: Sequence[Mapping[str, Any]]) -> list[Profile]:
    """One profile for each run that ONNX Runtime has written down, in the order in which they were.

    Raises:
        MeasureError: there are none.
    """
    runs = sorted((event for event in events if event.get("name") == _RUN), key=lambda event: event["ts"])
    if not runs:
        raise MeasureError(f"profile of ONNX Runtime: expected events {_RUN}, found none among {len(events)}")
    kernels = sorted(
        (event["ts"], _NORMALISATION if _AS_CONV in event["name"] else event["args"]["op_name"], event["dur"] * 1e-6)
        for event in events
        if event.get("cat") == "Node" and str(event.get("name")).endswith(_KERNEL)
    )
    profiles, at = [], 0
    for run in runs:
        end = run["ts"] + run["dur"]
        within = []
        while at < len(kernels) and kernels[at][0] <= end:
            within.append(kernels[at][1:])
            at += 1
        profiles.append(_profile(within))
    return profiles


def openvino_profile(nodes: Sequence[tuple[str, float]]) -> Profile:
    """The profile of one run, or of an average one.

    Args:
        nodes: type and seconds of every node that was executed.

    Raises:
        MeasureError: there are none.
    """
    if not nodes:
        raise MeasureError("profile of OpenVINO: expected executed nodes, found none")
    return _profile(nodes)


def median_profile(profiles: Sequence[Profile]) -> Profile:
    """The profile of the medians."""
    return Profile(
        statistics.median(profile.convolutions for profile in profiles),
        statistics.median(profile.reorders for profile in profiles),
        statistics.median(profile.others for profile in profiles),
        min(profile.nodes for profile in profiles),
    )


def _profile(nodes: Sequence[tuple[str, float]]) -> Profile:
    """Sums by kind of operator: ``Conv``, ``FusedConv``, ``NhwcFusedConv``, ``ConvTranspose``, ``QLinearConv`` …;
    of OpenVINO ``Convolution``, ``GroupConvolution``, ``ConvolutionBackpropData``, ``Deconvolution`` ….
    """
    convolutions = [seconds for kind, seconds in nodes if _CONVOLUTION.search(kind)]
    activations = sum(seconds for kind, seconds in nodes if _ACTIVATION.search(kind))
    reorders = sum(seconds for kind, seconds in nodes if "Reorder" in kind)
    total = sum(seconds for _, seconds in nodes)
    own = sum(convolutions) + activations
    return Profile(own, reorders, total - own - reorders, len(convolutions))
