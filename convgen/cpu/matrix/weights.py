"""What a convolution by matrix tiles takes of its parameters: weights as tiles, and a bias that a zero point is in."""

from __future__ import annotations

from ...deferred import te, tirx
from ...lowering.compute import STORAGE, Expr, Operands, ceildiv, copied, narrow
from .geometry import CHANNELS, Geometry
from .panel import LANES


def packed(ops: Operands, g: Geometry) -> list[te.Tensor]:
    """Everything that a kernel takes of the parameters."""
    vectors = {p.name: copied(p) for p in ops.parameters[1:]}
    if ops.spec.src_zero:
        vectors["bias"] = _bias(ops)
    return [_weights(ops, g), *vectors.values()]


def _weights(ops: Operands, g: Geometry) -> te.Tensor:
    """``[oc/32][taps and blocks of channels][16 oc][channels/2][16][2]`` (i8: /4, 4), tiles as they are used."""
    spec = ops.spec

    def weight(b: Expr, step: Expr, v: Expr, row: Expr, column: Expr) -> Expr:
        o, k = b * CHANNELS + v * LANES + column // g.depth, row * g.depth + column % g.depth
        tap, channel = g.element(step, k)
        exists = tirx.all(o < spec.oc, channel < spec.ic, tap[2] < g.kernel[2])
        value = tirx.if_then_else(exists, ops.weights[(o, channel, *tap[3 - spec.rank :])], tirx.const(0, g.sums))
        return value.astype(STORAGE[g.operands[1]]) if spec.is_quantised else narrow(value, "bf16")

    shape = (ceildiv(spec.oc, CHANNELS), g.steps, min(2, ceildiv(spec.oc, LANES)), g.run // g.depth, LANES * g.depth)
    return te.compute(shape, weight, name="weights_packed")


def _bias(ops: Operands) -> te.Tensor:
    """The bias, less what the zero point of src adds: it is multiplied by all weights of a channel, padding is it."""
    spec, given = ops.spec, {p.name: p for p in ops.parameters}
    axes = [te.reduce_axis((0, size), f"r{i}") for i, size in enumerate(spec.weights_shape[1:])]
    totals = te.compute((spec.oc,), lambda o: te.sum(ops.weights[(o, *axes)], axes), name="totals")

    def value(o: Expr) -> Expr:
        added = totals[o] * given["src_zero"][0]
        return given["bias"][o] - added if spec.bias else 0 - added

    return te.compute((spec.oc,), value, name="bias_packed")
