"""What schedules share whose products of f32 are three of TF32 each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lowering.schedule import Array, Magnitudes, Picks, require

if TYPE_CHECKING:
    from ..hardware.target import Target
    from ..problem.spec import ConvSpec


class ThreeProducts:
    """Goes before the schedule whose matrix units it feeds."""

    transforms = True

    def admits(self, spec: ConvSpec) -> None:
        require(spec.dtype == "f32", "needs f32")
        require(spec.accuracy in ("standard", "relaxed"), "its error is that of accuracy standard")

    def magnitudes(self, spec: ConvSpec, target: Target, picks: Picks, src: Array, weights: Array) -> Magnitudes:
        """Two operands cut off after 22 bits, and the product that is left out: 12 roundings of f32 at most."""
        return Magnitudes(spec, src, 4 * weights)

    def kind(self, spec: ConvSpec) -> str:
        return "tf32x3"
