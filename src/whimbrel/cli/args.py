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
            parsed: Any = tyro.cli(cls, args=list(argv), prog=f"whimbrel {verb}", default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(complaint.getvalue(), verb)) from None
    for field in dataclasses.fields(parsed):
        flag = f"--{field.name.replace('_', '-')}"
        if flag in argv and getattr(parsed, field.name) == ():
            raise ConfigError(f"{flag} is empty; name at least one (whimbrel {verb} --help lists all options)")
    return parsed


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
    rules = [i for i, line in enumerate(lines) if len(line) > 2 and not line.strip("─-")]
    # The first line is the title of the box, which has a rule below it where the terminal knows ASCII only; the text
    # runs to the next rule or the end of the box.
    first = 2 if 1 in rules else 1
    last = next((i for i in rules if i > first), len(lines))
    body = " ".join(line for line in lines[first:last] if line)
    hint = re.search(r"Perhaps you meant:\s+(--[\w.-]+)", " ".join(lines))
    nearest = f"; did you mean {_method(hint.group(1), body)}?" if hint else ""
    return f"{body}{nearest} (whimbrel {verb} --help lists all options)"


def _method(hint: str, complaint: str) -> str:
    """The flag that is meant: who writes `--optim adamw` wants to choose a method, not to set an option of one."""
    family = hint.rpartition(".")[0]
    unknown = re.search(r"--([\w-]+)", complaint)
    wanted = unknown is not None and family.removeprefix("--").rpartition(".")[2] == unknown.group(1)
    return f"{family}.kind" if wanted else hint


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; the first column and columns of words stand on the left, figures on the right."""
    from rich.console import Console
    from rich.table import Table

    # Without a terminal the width is unbounded, so that no figure is cut in a file or a pipe.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    # A table would wrap its title at its own width.
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        words = any(str(row[i])[:1].isalpha() for row in rows)
        table.add_column(column, justify="left" if i == 0 or words else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)
