"""Write docs/cli.md, the reference of the command line, from its parser.

python tools/cli_docs.py > docs/cli.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from expertwire.deploy import cli
from expertwire.deploy.options import engine_groups

_HEADER = """# Command line

Written by `python tools/cli_docs.py > docs/cli.md`. The options of the engine are also arguments of `expertwire.LLM`, with
underscores: `--ep-size 2` is `ep_size=2`. Commands print errors on one line and exit with 2 for a wrong option, model or input,
with 1 if the engine failed ([errors.md](errors.md) lists messages).
"""


def main() -> int:
    """Print the page."""
    sys.stdout.write(page())
    return 0


def page() -> str:
    """Return the page docs/cli.md."""
    return "\n".join([_HEADER, *(line for command in _commands(cli.make_parser()) for line in _section(command))])


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of all commands, a command with subcommands before these."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from _commands(command)


def _section(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines on one command; the engine's options are listed under `serve` only."""
    is_serve = parser.prog.endswith(" serve")
    groups = {group.title: list(_rows(parser, group)) for group in parser._action_groups}
    engine = {title: groups.pop(title) for title in engine_groups() if title in groups}
    yield from (f"## {parser.prog}\n", f"{parser.description}\n")
    if engine and not is_serve:
        yield "The options of the engine, which [serve](#expertwire-serve) lists, and:\n"
    yield from ("| argument | meaning |", "|---|---|")
    yield from (row for rows in groups.values() for row in rows)
    for title, rows in engine.items() if is_serve else ():
        yield from (f"| **{title}** | |", *rows)
    yield ""


def _rows(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> Iterator[str]:
    expand = parser._get_formatter()._expand_help
    for action in group._group_actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield f"| `{choice.dest}` | {choice.help} |"
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        yield f"| {names} | {(expand(action) if action.help else '').replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    raise SystemExit(main())
