"""The words of a descriptor: one token and the field that it says."""

from __future__ import annotations

import re
from typing import Any

from ..errors import SpecError, meant
from .activation import ALIASES, DEFAULTS, Activation
from .dtypes import DTYPES, QUANTISED
from .layout import LAYOUTS

ACCURACIES = ("strict", "standard", "relaxed", "tf32", "bf16")
#: What a whole network takes besides: tensors between its steps stored as f16.
NETWORK_ACCURACIES = (*ACCURACIES, "f16")
DIRECTIONS = ("forward", "data", "weights")
PADDING_WORDS = ("valid", "same", "same_lower")
#: Flags and their tokens: what is True where they are given.
ZEROS = ("src_zero", "weights_zero", "dst_zero")
FLAGS = ("residual", *ZEROS, "mirrored")


def joined(letter: str, values: tuple[int, ...]) -> str:
    """A token of sizes: ``i56x56``."""
    return letter + "x".join(map(str, values))


# ASCII digits only, and no more of them than int() accepts.
_NUMBER = re.compile(r"(n|ic|oc|g|op|i|k|s|d)([0-9]{1,18}(?:x[0-9]{1,18})*)\Z")
#: What gives the sizes of src; in 1-D, ``i8`` may.
SIZES = re.compile(r"i[0-9x]+\Z")
_PADS = re.compile(r"p([0-9]{1,18}(?:_[0-9]{1,18})?(?:x[0-9]{1,18}(?:_[0-9]{1,18})?)*)\Z")
#: What a layout token of dst begins with, and the type of one tensor.
DST = "dst_"
#: Begins the token of an accuracy class that has the name of a dtype.
ACCURACY = "accuracy_"
_TENSOR_TYPES = {f"{name}_{dtype}": (f"{name}_dtype", dtype) for name, known in QUANTISED.items() for dtype in known}
#: The tokens that have no numbers.
_WORDS = (
    *(*PADDING_WORDS, "nobias", *FLAGS, *DTYPES, *_TENSOR_TYPES),
    *(*LAYOUTS, *(DST + layout for layout in LAYOUTS), *ACCURACIES, *DEFAULTS, *ALIASES),
)
_SCALARS = {"n": "n", "ic": "ic", "oc": "oc", "g": "groups"}
_SPATIALS = {"i": "in_spatial", "k": "kernel", "s": "stride", "d": "dilation", "op": "output_padding"}


def _axes(token: str, parts: list[str], rank: int) -> list[str]:
    if len(parts) not in (1, rank):
        raise SpecError(token, f"1 or {rank} values", f"{len(parts)}")
    return parts * rank if len(parts) == 1 else parts


def read_token(token: str, rank: int) -> tuple[str, Any]:
    """One descriptor token -> (field, value)."""
    if match := _NUMBER.match(token):
        letter, parts = match[1], match[2].split("x")
        if letter in _SCALARS:
            if len(parts) != 1:
                raise SpecError(token, "one number", f"{len(parts)}")
            return _SCALARS[letter], int(parts[0])
        if letter == "i" and len(parts) != rank:
            raise SpecError(token, f"{rank} sizes joined by x", len(parts))
        return _SPATIALS[letter], tuple(map(int, _axes(token, parts, rank)))
    if match := _PADS.match(token):
        axes = [[int(v) for v in part.split("_")] for part in _axes(token, match[1].split("x"), rank)]
        return "padding", tuple((axis[0], axis[-1]) for axis in axes)
    if token.removeprefix("p") in PADDING_WORDS:
        return "padding", token.removeprefix("p")
    if token == "nobias":
        return "bias", False
    if token in FLAGS:
        return token, True
    if token in DIRECTIONS:
        return "direction", token
    if token in DTYPES:
        return "dtype", token
    if token in _TENSOR_TYPES:
        return _TENSOR_TYPES[token]
    if token.removeprefix(DST) in LAYOUTS:
        return "dst_layout" if token.startswith(DST) else "layout", token.removeprefix(DST)
    if token.removeprefix(ACCURACY) in ACCURACIES:
        return "accuracy", token.removeprefix(ACCURACY)
    try:
        return "activation", str(Activation.parse(token))
    except SpecError as error:
        if "(" in token:
            raise
        raise SpecError(
            token,
            "a descriptor token (see `convgen show --help`)",
            f"an unknown or malformed one{meant(token, _WORDS)}",
        ) from error
