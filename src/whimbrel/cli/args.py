"""Command-line arguments through tyro, with Whimbrel's own one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from whimbrel.config import Config, load_config, with_overrides
from whimbrel.errors import ConfigError
from whimbrel.recipes import RECIPES

T = TypeVar("T")
_BOX = re.compile(r"^[│╭╰]\s?|\s*[│╮╯]$")
_COMPLAINTS = (
    (
        r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.+)",
        r"\1 = \2 is not allowed; use a whole number",
    ),
    (r"Error parsing (--\S+): could not convert string to float: (.+)", r"\1 = \2 is not allowed; use a number"),
    (r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.+)\]", r"\1 = \2 is not allowed"),
    (
        r"invalid choice (.+) for argument '(--\S+)'\. Expected one of \((.+?),?\)\.",
        r"\2 = \1 is not allowed; use one of \3",
    ),
    (r"Missing value for argument '(--\S+)'\. Expected \d+ values?\.", r"\1 needs a value"),
    (r"Unrecognized options: (--[^,]+).*", r"unknown option \1"),
    (r"Unrecognized options: (.*)", r"unknown argument \1"),
    (r"Missing from (whimbrel [\w ]+): (.*)", r"\1 needs \2"),
    (r" \(required\)", ""),
)
"""What tyro writes -> what is said here: name, value, what is allowed, as every other message has it."""


def parse(
    cls: type[T], argv: Sequence[str], *, verb: str, default: T | None = None, first: str = "", about: str | None = None
) -> T:
    """A `cls` from the arguments of `whimbrel VERB`; raises ConfigError for wrong ones, exits with 0 after --help.

    first: name of an argument that was taken off `argv`, for the line of usage.
    about: what the help begins with in place of the docstring of `cls`.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            program = f"whimbrel {verb} {first}".rstrip()
            # Without settings every switch is off at first, so that --no-SWITCH would only be noise.
            style = (tyro.conf.FlagCreatePairsOff,) if default is None else ()
            parsed: Any = tyro.cli(cls, args=list(argv), prog=program, default=default, description=about, config=style)
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
        also = ", a checkpoint, or 'kinds'" if verb == "show" else ""
        raise ConfigError(f"whimbrel {verb} needs a recipe or a TOML file{also} as its first argument, e.g. 'demo'")
    chosen, rest = _kind_flags(args)
    config = load_config(source, chosen)
    start = make(source, config)
    about = (
        f"{inspect.getdoc(type(start))}\n\nSOURCE is a TOML file or a recipe:\n{', '.join(RECIPES)}.\n\n"
        f"The settings below are those of {source!r}; --optim.kind NAME and its like choose another method."
    )
    parsed: Any = parse(type(start), rest, verb=verb, default=start, first="SOURCE", about=about)
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
    for pattern, text in _COMPLAINTS:
        body = re.sub(pattern, text, body)
    return f"{body}{nearest} (whimbrel {verb} --help lists all options)"


def _method(hint: str, complaint: str) -> str:
    """The flag that is meant: who writes `--optim adamw` wants to choose a method, not to set an option of one."""
    family = hint.rpartition(".")[0]
    unknown = re.search(r"--([\w.-]+)", complaint)
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
    console.print()
