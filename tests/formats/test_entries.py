"""What is said of a model's layers beside what the model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from convgen.errors import SpecError
from convgen.formats.entries import AccuracyRule, SpecEntry, with_accuracy
from convgen.formats.sources import read_specs
from convgen.problem.spec import ConvSpec
from convgen.tuning.job import Job

LAYER = ConvSpec.parse("conv2d n1 ic8 oc8 i9x9 k3x3")
OTHER = ConvSpec.parse("conv2d n1 ic8 oc8 i9x9 k1x1")
INTEGERS = ConvSpec.parse("conv2d n1 ic8 oc8 i9x9 k3x3 i8")
ENTRIES = [
    SpecEntry(LAYER, 5, ("stem", "body.0", "body.1", "head")),
    SpecEntry(OTHER, 2, ("head.1",)),
    SpecEntry(INTEGERS, 1, ("quantised",)),
]


def chosen(*texts: str) -> list[tuple[str, str, int, tuple[str, ...]]]:
    (entries,) = with_accuracy([ENTRIES], [AccuracyRule.parse(text) for text in texts])
    return [("x".join(map(str, e.spec.kernel)), e.spec.accuracy, e.count, e.names) for e in entries]


def test_a_rule_for_all_leaves_layers_of_integers_as_they_are() -> None:
    assert chosen("strict") == [
        ("3x3", "strict", 5, ("stem", "body.0", "body.1", "head")),
        ("1x1", "strict", 2, ("head.1",)),
        ("3x3", "standard", 1, ("quantised",)),
    ]


def test_rules_part_a_layer_with_several_names_and_the_last_counts() -> None:
    assert chosen("relaxed", "head*=strict", "stem=standard") == [
        ("3x3", "standard", 2, ("stem",)),  # one of the five has no name
        ("3x3", "relaxed", 2, ("body.0", "body.1")),
        ("3x3", "strict", 1, ("head",)),
        ("1x1", "strict", 2, ("head.1",)),
        ("3x3", "standard", 1, ("quantised",)),
    ]


def test_without_rules_nothing_changes() -> None:
    assert with_accuracy([ENTRIES, []], []) == [ENTRIES, []]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "exact",
            "expected CLASS or NAME=CLASS with one of strict, standard, relaxed, tf32, bf16, f16, found 'exact'",
        ),
        ("=strict", "accuracy: expected CLASS or NAME=CLASS"),
        ("", "accuracy: expected CLASS or NAME=CLASS"),
        ("tail=strict", "accuracy: expected a layer with a name like 'tail', found none"),
        ("quant*=strict", "accuracy: expected standard for i8, which is exact, found strict"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        chosen(text)
    assert message in str(error.value)


def test_a_job_says_it_and_keeps_it(tmp_path: Path) -> None:
    model = tmp_path / "net.toml"
    model.write_text(
        "".join(
            f'[[layers]]\nname = "{name}"\nic = 8\noc = 8\nkernel = 3\nin_spatial = [9, 9]\n' for name in ("a", "b")
        )
    )
    text = 'models = ["net.toml"]\naccuracy = ["strict", "b=relaxed"]\n'
    (tmp_path / "job.toml").write_text(text)
    job = Job.from_file(tmp_path / "job.toml")
    assert [(p.spec.accuracy, p.names) for p in job.problems()] == [("strict", ("a",)), ("relaxed", ("b",))]
    (tmp_path / "again.toml").write_text(job.to_toml())
    assert Job.from_file(tmp_path / "again.toml").id == job.id
    (tmp_path / "plain.toml").write_text('models = ["net.toml"]\n')
    assert Job.from_file(tmp_path / "plain.toml").id != job.id
    (tmp_path / "wrong.toml").write_text('models = ["net.toml"]\naccuracy = "exact"\n')
    with pytest.raises(SpecError, match=r"wrong.toml: accuracy: expected CLASS or NAME=CLASS .*found 'exact'"):
        Job.from_file(tmp_path / "wrong.toml")
    assert [entry.spec.accuracy for entry in read_specs(model)] == ["standard"]
