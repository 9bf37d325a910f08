"""``convgen help``: the pages of the documentation, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from ..errors import meant
from .common import emit, json_option, say
from .tables import say_table, table
from .view import page


def _complete_topic(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ..topics import topics

    return [CompletionItem(topic, help=title) for topic, title in topics().items() if topic.startswith(incomplete)]


@click.command("help")
@click.argument("topic", nargs=-1, shell_complete=_complete_topic)
@json_option
@click.pass_context
def show_help(context: click.Context, topic: tuple[str, ...], as_json: bool) -> None:
    """Print a page of the documentation, or list its topics.

    A command's name, such as `records best`, prints what its --help says, where no page is called so. What does not
    go to a terminal is the Markdown of the page.
    """
    from ..topics import topic_text, topics

    titles = topics()
    if not topic:
        if as_json:
            emit([{"topic": name, "title": title} for name, title in titles.items()])
        else:
            say_table(table(["topic", "what it is about"], list(titles.items())))
            say("\nconvgen help TOPIC prints a page, convgen COMMAND --help what a command takes.")
    elif len(topic) == 1 and (as_json or topic[0] in titles):
        text = topic_text(topic[0])
        if as_json:
            emit({"topic": topic[0], "title": titles[topic[0]], "text": text})
        else:
            page(text)
    else:
        say(_help(context.find_root(), topic, [*titles]))


def _help(root: click.Context, words: Sequence[str], titles: Sequence[str]) -> str:
    """What ``--help`` of the command says that some words name."""
    inside = root
    for word in words:
        group = inside.command
        commands = group.commands if isinstance(group, click.Group) else {}
        if word not in commands:
            known = [*commands, *(titles if inside is root else ())]
            raise click.UsageError(f"expected a topic or a command, found {word!r}{meant(word, known)}")
        inside = click.Context(commands[word], inside, word)
    return inside.command.get_help(inside)
