"""Write the API reference from docstrings: `python docs/api/write.py`; `--check` fails where a page is out of date."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "whimbrel",
    "whimbrel.mixers",
    "whimbrel.mixers.rdn",
    "whimbrel.mixers.rla",
    "whimbrel.optim",
    "whimbrel.merge",
    "whimbrel.sparse.flex_prefill",
    "whimbrel.sparse.row_local",
    "whimbrel.attend",
    "whimbrel.evals",
    "whimbrel.training",
)
"""Packages that need no extra, in the order of the reference."""


def page(package: str) -> str:
    """The page of one package: its docstring and that of everything it exports."""
    module = importlib.import_module(package)
    parts = [f"# {package}\n", _doc(module), "\n"]
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if inspect.ismodule(value) or not (inspect.isclass(value) or callable(value)):
            parts.append(f"\n## {name}\n\n`{value!r}`\n")
            continue
        if not value.__module__.startswith("whimbrel"):
            parts.append(f"\n## {name}\n\n`{value.__module__}.{value.__qualname__}`, unchanged.\n")
            continue
        parts.append(f"\n## {name}\n\n```text\n{_signature(name, value)}\n```\n\n{_doc(value)}\n")
        if inspect.isclass(value):
            parts += _methods(value)
    return "".join(parts)


def _doc(value: Any) -> str:
    """The docstring as it stands, in a block, since shapes and tables of it are set by hand."""
    text = inspect.cleandoc(vars(value).get("__doc__") or "") if inspect.isclass(value) else inspect.getdoc(value)
    return f"```text\n{text}\n```\n" if text else ""


def _signature(name: str, value: Any) -> str:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return name
    # Names and defaults alone: annotations print otherwise in each release of Python.
    plain = []
    star = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            plain.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            text += f"={default if ' at 0x' not in default and '<' not in default else '...'}"
        plain.append(text)
    line = f"{name}({', '.join(plain)})"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {text},\n" for text in plain) + ")"


def _methods(value: type) -> list[str]:
    """Methods and properties that the class itself defines and documents."""
    parts = []
    for name, member in sorted(vars(value).items()):
        plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        documented = inspect.isfunction(plain) and inspect.getdoc(plain)
        if not name.startswith("_") and documented:
            shown = name if isinstance(member, property) else _signature(name, plain)
            parts.append(f"\n### {value.__name__}.{name}\n\n```text\n{shown}\n```\n\n{_doc(plain)}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    args = parser.parse_args()
    index = "# API reference\n\nMade from the docstrings by `python docs/api/write.py`.\n\n"
    index += "".join(f"- [{package}]({package}.md)\n" for package in PACKAGES)
    pages = {"README.md": index} | {f"{package}.md": page(package) for package in PACKAGES}
    old = [name for name, text in pages.items() if not (HERE / name).exists() or (HERE / name).read_text() != text]
    old += [path.name for path in HERE.glob("*.md") if path.name not in pages]
    if args.check:
        sys.exit(f"docs/api: out of date: {', '.join(old)}; run python docs/api/write.py" if old else 0)
    for path in HERE.glob("*.md"):
        path.unlink()
    for name, text in pages.items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
