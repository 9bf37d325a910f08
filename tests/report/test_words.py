"""Names of layers where there is little room."""

from __future__ import annotations

import pytest

from convgen.report.words import shortened

#: As PyTorch's exporters name them: they differ in their middle, and some near both ends.
RESNET = [
    f"/model/backbone/layer{stage}/layer{stage}.{block}/{part}/Conv"
    for stage in (1, 2, 3, 4)
    for block in (0, 1)
    for part in ("conv1", "conv2", "downsample/downsample.0")
]
MOBILENET = [f"/features/features.{i}/conv/conv.{j}/conv.{j}.0/Conv ×2" for i in range(12) for j in range(3)]


@pytest.mark.parametrize("names", [RESNET, MOBILENET, ["a" * 50 + c + "b" * 50 for c in "xyz"]])
@pytest.mark.parametrize("width", [24, 32])
def test_what_differs_still_does(names: list[str], width: int) -> None:
    cut = shortened(names, width)
    assert len(set(cut)) == len(set(names))
    assert max(map(len, cut)) <= width
    assert shortened([*names, *names], width) == [*cut, *cut]


def test_both_ends_stay_where_that_is_enough() -> None:
    assert shortened(["layer", "a_long_name_of_one", "a_long_name_of_two"], 11) == [
        "layer",
        "a_lon…f_one",
        "a_lon…f_two",
    ]
    assert shortened(["Gradient of weights", "Product of matrices"], 12) == ["Gradient of…", "Product of …"]
    assert shortened(["short", "names"], 5) == ["short", "names"]
    assert shortened([], 5) == []


def test_too_little_room_is_no_error() -> None:
    names = [f"{number:030}" for number in range(300)]
    assert {len(name) for name in shortened(names, 2)} == {2}
