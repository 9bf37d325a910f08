"""``convgen convert``: from whatever describes layers to any textual form."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..errors import SpecError
from ..formats.entries import AccuracyRule, with_accuracy
from ..formats.sources import FORMS, SUFFIXES, format_specs, read_specs, write_text
from ..report.words import plural
from .common import Choice, emit, json_option, layers_argument, note_left_out, say, tidy


@click.command(short_help="Write layers in another notation.")
@layers_argument
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(allow_dash=True),
    help="File to write; - is standard output.",
)
@click.option("--to", "form", type=Choice(FORMS), help="The notation.  [default: by FILE's suffix; for -, descriptors]")
@click.option("--skip", is_flag=True, help="Leave out layers that cannot be read or written, and say which.")
@json_option
def convert(
    spec: tuple[str, ...],
    dims: dict[str, int],
    accuracy: tuple[AccuracyRule, ...],
    output: str,
    form: str | None,
    skip: bool,
    as_json: bool,
) -> None:
    """Write layers in another notation.

    \b
    descriptors  conv2d n1 ic64 oc64 i56x56 k3x3 s1x1 p1x1  .txt
    benchdnn     --conv ... mb1_g1ic64oc64_ih56oh56kh3...   oneDNN's
    miopen       ./bin/MIOpenDriver conv -n 1 -c 64 ...     AMD's
    toml yaml json                                          .toml .yaml .yml .json

    benchdnn, toml, yaml and json keep names and counts; descriptors and miopen have a line for each time
    a layer occurs. Where benchdnn and miopen have no field for padding or output padding at the end,
    the layer is written in another way that means the same. A layer that a notation cannot express is an
    error, and nothing is written; with --skip the other layers are written, and the exit status is 0.

    \b
    To read a line that begins with --, put another -- before it:
      convgen convert -o - -- --deconv ic3ih8oc4kh3
    """  # noqa: D301 - click's mark for a paragraph that is not to be wrapped
    source, path = " ".join(spec), Path(output)
    to_stdout = output == "-"
    form = form or ("descriptors" if to_stdout else SUFFIXES.get(path.suffix.lower()))
    if form is None:
        raise click.UsageError(f"the suffix of {output} does not tell the notation: give --to")
    if to_stdout and as_json:
        raise click.UsageError("--json needs -o FILE: the layers and the JSON would both go to standard output")
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise click.UsageError(f"{output} is the file that is read: give another -o")
    skipped: list[str] | None = [] if skip else None
    entries = with_accuracy([read_specs(source, dims or None, skipped)], accuracy)[0]
    unread = len(skipped or ())
    text = format_specs(entries, form, skipped)
    written = len(entries) - len(skipped or ()) + unread
    note_left_out(skipped or [])
    if not written:
        raise SpecError("layers", f"one that can be written as {form}", "none", source)
    if to_stdout:
        say(text.removesuffix("\n"))
        return
    write_text(text, path)
    if as_json:
        emit({"output": output, "form": form, "layers": written, "skipped": skipped or []})
    else:
        say(f"{plural(written, 'different layer')} in {tidy(path)} as {form}")
