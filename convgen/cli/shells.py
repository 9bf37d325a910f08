"""Shells that ask for completions; click's, where these do not take words as they are: targets have colons in them, and
lists have commas.
"""

from __future__ import annotations

import os
from typing import Any

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
        esac
    done < <(
        COMP_TEXT="${COMP_LINE:0:COMP_POINT}" COMP_BREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1"
    )
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """Bash breaks words at colons and equals signs, completes what is behind the last one, and tells words without the
    spaces between them: so it is asked for the line itself.
    """

    source_template = _BASH
    _incomplete = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        if "COMP_TEXT" not in os.environ:  # a shell that has click's script from before
            return super().get_completion_args()
        # With a letter more the last word is the one that is being typed, be it empty or in quotes.
        *words, last = split_arg_string(os.environ["COMP_TEXT"] + "x")
        self._incomplete = last[:-1]
        return words[1:], self._incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        word, incomplete = str(item.value), self._incomplete
        option, equals, _ = incomplete.partition("=")
        if equals and option.startswith("-"):
            word = f"{option}={word}"
        breaks = set(":=") & set(os.environ.get("COMP_BREAKS", ""))
        return f"{item.type},{word[1 + max((incomplete.rfind(sign) for sign in breaks), default=-1) :]}"


class Fish(FishComplete):
    """Of a line of the answer fish takes what is between the first comma and the second: here all behind the first."""

    source_template = FishComplete.source_template.replace('string split ","', 'string split --max 1 ","')


def shell(name: str) -> type[ShellComplete] | None:
    """What serves the completions of a shell; None where nothing does."""
    for made in (Bash, Fish):
        add_completion_class(made)
    return get_completion_class(name)
