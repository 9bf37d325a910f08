"""``convgen help``: the pages of the documentation, in the terminal."""

from __future__ import annotations

import difflib
import sys

import click
from click.shell_completion import CompletionItem

from ..errors import UnsupportedError
from .common import say, table


def _complete_topic(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ..topics import topics

    return [CompletionItem(topic, help=title) for topic, title in topics().items() if topic.startswith(incomplete)]


@click.command("help")
@click.argument("topic", required=False, shell_complete=_complete_topic)
@click.pass_context
def show_help(context: click.Context, topic: str | None) -> None:
    """Print a page of the documentation, or list its topics.

    A command's name prints what its --help says, where no page is called so. What does not go to a terminal is the
    Markdown of the page.
    """
    from ..topics import topic_text, topics

    titles = topics()
    if topic is None:
        say(table(["topic", "what it is about"], list(titles.items())))
        say("\nconvgen help TOPIC prints a page, convgen COMMAND --help what a command takes.")
        return
    commands = context.parent.command if context.parent else context.command
    if topic in titles:
        _print(topic_text(topic))
    elif isinstance(commands, click.Group) and topic in commands.commands:
        say(commands.commands[topic].get_help(click.Context(commands.commands[topic], context.parent, topic)))
    else:
        close = difflib.get_close_matches(topic, titles, n=1)
        hint = f": did you mean {close[0]}?" if close else "; convgen help lists them"
        raise UnsupportedError(f"topic: expected one there is, found {topic!r}{hint}")


def _print(text: str) -> None:
    if not sys.stdout.isatty():
        say(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text, hyperlinks=False), width=min(console.width, 110))
