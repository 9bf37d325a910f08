"""What ``example.c`` and the header say of layers of 8-bit integers."""

from __future__ import annotations

from ..problem.dtypes import RANGES
from ..problem.spec import ConvSpec

_C = {"i8": "int8_t", "u8": "uint8_t", "i32": "int32_t", "f32": "float"}
#: Small whole numbers, src's and those of weights, by type.
_VALUES = {"i8": ("-4, 4", "-2, 2"), "u8": ("0, 8", "0, 4")}


def meaning(spec: ConvSpec, operation: str) -> str:
    """The layer as a formula."""
    operands = [f"{name} - {name}_zero" if getattr(spec, f"{name}_zero") else name for name in ("src", "weights")]
    total = " + ".join([f"{operation}({', '.join(operands)})"] + ["bias"] * spec.bias)
    if spec.dst_dtype == "i32":
        return f"dst = {total}"
    total = f"({total}) * scale" if spec.bias else f"{total} * scale"
    if spec.residual:
        product = f"(saturate(round({total}) + product_zero) - product_zero) * product_scale"
        total = f"{product} + (residual - residual_zero) * residual_scale"
    value = total if spec.activation == "none" else f"{spec.activation}({total})"
    if spec.dst_dtype == "f32":
        return f"dst = {value}"
    return f"dst = saturate(round({value}){' + dst_zero' * spec.dst_zero})"


def elements(spec: ConvSpec) -> str:
    """The types of tensors, and the parameters, in C."""
    vectors = {name: dtype for name, dtype in spec.dtypes.items() if name in (*spec.parameters[1:], "residual")}
    return "\n".join(
        [
            f"typedef {_C[spec.src_dtype]} element;",
            f"typedef {_C[spec.dst_dtype]} dst_element;",
            "",
            f"static {_C[spec.weights_dtype]} *weights;",
            *(f"static {_C[dtype]} *{name};" for name, dtype in vectors.items()),
            *(["static double added; /* to the output at hand: its residual */"] if spec.residual else []),
            "",
            "static double value(double x) { return x; }",
            "static element stored(float x) { return (element)x; }",
        ]
    )


def values(spec: ConvSpec) -> tuple[str, str]:
    """The numbers that src and weights get, from and to."""
    return _VALUES[spec.src_dtype][0], _VALUES[spec.weights_dtype][1]


def parameters() -> dict[str, str]:
    """What gives each parameter its elements, and the residual, in C."""
    numbers = {
        "bias": "(int32_t)(oc * 7 % 9 - 4)",
        "scale": "0.25f * (float)(1 + oc % 3)",
        "weights_zero": "(oc % 3)",
    }
    loop = "    for (long oc = 0; oc < OC; ++oc)\n"
    made = {
        name: f"    {name} = buffer(sizes.{name});\n{loop}        {name}[oc] = {number};\n"
        for name, number in numbers.items()
    }
    addends = "memcpy(sum, (float[4]){1, 2, 0.5f, 3}, sizes.sum);"
    made["sum"] = f"    sum = buffer(sizes.sum);\n    {addends}\n"
    loop = "for (size_t i = 0; i < sizes.residual; ++i)\n        residual[i] = i * 7 % 13;"
    made["residual"] = f"    residual = buffer(sizes.residual);\n    {loop}\n"
    zeros = {"src_zero": 3, "dst_zero": 5}
    return made | {name: f"    {name} = buffer(sizes.{name});\n    *{name} = {zero};\n" for name, zero in zeros.items()}


def result(spec: ConvSpec) -> str:
    """The sum ``x`` as it is stored, as a C expression."""
    if spec.dst_dtype == "i32":
        return "x"
    value, op = "(float)x * scale[oc]", spec.activation_op
    if spec.residual:
        least, most = RANGES[spec.dst_dtype]
        product = f"fmin(fmax(nearbyint({value}) + sum[1], {least}), {most})"
        value = f"(({product} - sum[1]) * sum[0] + (added - sum[3]) * sum[2])"
    if op.name == "relu":
        value = f"fmax({value}, 0)"
    elif op.name == "clip":
        low, high = (str(bound).replace("inf", "INFINITY") for bound in op.params)
        value = f"fmin(fmax({value}, {low}), {high})"
    if spec.dst_dtype == "f32":
        return value
    least, most = RANGES[spec.dst_dtype]
    return f"fmin(fmax(nearbyint({value}){' + *dst_zero' * spec.dst_zero}, {least}), {most})"
