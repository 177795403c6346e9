"""Command-line arguments through tyro, with Whimbrel's own one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from whimbrel.config import Config, load_config, with_overrides
from whimbrel.errors import ConfigError

T = TypeVar("T")
_BOX = re.compile(r"^[│╭╰]\s?|\s*[│╮╯]$")


def parse(cls: type[T], argv: Sequence[str], *, verb: str, default: T | None = None) -> T:
    """A `cls` from the arguments of `whimbrel VERB`; raises ConfigError for wrong ones, exits with 0 after --help."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=list(argv), prog=f"whimbrel {verb}", default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(complaint.getvalue(), verb)) from None


def parse_with_config(
    make: Callable[[str, Config], T], argv: Sequence[str], *, verb: str, default_source: str | None = None
) -> T:
    """Arguments of a verb that takes a recipe or TOML file first and any setting of it as a flag.

    `make(source, config)` gives the verb's arguments before the flags are read. Flags that choose a method
    (`--optim.kind galore`) are applied first, so that the method's own flags exist.
    """
    args = list(argv)
    if args and not args[0].startswith("-"):
        source = args.pop(0)
    elif default_source is not None or any(arg in ("-h", "--help") for arg in args):
        source = default_source or "demo"
    else:
        raise ConfigError(f"whimbrel {verb} needs a recipe or a TOML file as its first argument, e.g. 'demo'")
    chosen, rest = _kind_flags(args)
    config = load_config(source, chosen)
    start = make(source, config)
    parsed: Any = parse(type(start), rest, verb=verb, default=start)
    # Rules between two settings are checked again over the final tree.
    return dataclasses.replace(parsed, config=with_overrides(parsed.config, {}))


def _kind_flags(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split off the flags that choose a method: --a.b.kind NAME or --a.b.kind=NAME."""
    chosen: dict[str, Any] = {}
    rest: list[str] = []
    queue = iter(args)
    for arg in queue:
        name, equals, value = arg.partition("=")
        if not (name.startswith("--") and name.endswith(".kind")):
            rest.append(arg)
            continue
        value = value if equals else next(queue, "")
        if not value:
            raise ConfigError(f"{name} needs the name of a method")
        chosen[name[2:]] = value
    return chosen, rest


def _one_line(text: str, verb: str) -> str:
    lines = [_BOX.sub("", line).strip() for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if line.startswith("───")]
    # The first line is the title of the box; the text runs to the first rule or the end of the box.
    body = " ".join(line for line in lines[1 : rules[0] if rules else len(lines)] if line and "───" not in line)
    hint = re.search(r"Perhaps you meant:\s+(--[\w.-]+)", " ".join(lines))
    nearest = f"; did you mean {hint.group(1)}?" if hint else ""
    return f"{body}{nearest} (whimbrel {verb} --help lists all options)"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; the first column is text, the others are figures."""
    from rich.console import Console
    from rich.table import Table

    # Without a terminal the width is unbounded, so that no figure is cut in a file or a pipe.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    # A table would wrap its title at its own width.
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)
