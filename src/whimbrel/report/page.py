"""The page: one HTML file that needs no network and no script, for light and dark screens of any width."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from whimbrel.files import atomic_write_text
from whimbrel.report import averaging, comparison, diagnostics, forecast, long_context, memory, recall, training
from whimbrel.report.block import Block, Table
from whimbrel.report.numbers import count, fixed, seconds
from whimbrel.report.schema import Configuration, Header, Report, check
from whimbrel.report.summary import summary
from whimbrel.report.svg import THEME

WIDE, NARROW = 760, 346


def write_report(data: Mapping[str, object], out: Path) -> Path:
    """Write the page made from `data` to the file `out` and return its path.

    data: a dictionary as `whimbrel.report.schema.Report` describes it.
    Raises DataError naming the key that is missing, unknown or of a wrong type; then nothing is written.
    """
    atomic_write_text(out, render(check(data)))
    return out


def render(report: Report) -> str:
    """The page as text."""
    header = report["header"]
    style = THEME + _asset("page.css")
    script = _asset("page.js")
    # Only these two inline parts may apply, so that no text of a run can, and nothing is fetched.
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:"
    sections = list(_sections(report))
    links = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(header['name'])} · Whimbrel</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{_header(report, links)}<main>\n"
        + "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>\n' for key, title, body in sections)
        + f"</main>\n{_footer(header)}<script>{script}</script>\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[tuple[str, str, str]]:
    """Anchor, title and body of each section that has something to show."""
    made: list[tuple[str, str, Sequence[Block]]] = []
    if "training" in report:
        made.append(("training", "Training", training.blocks(report["training"])))
    if "averaging" in report:
        made.append(("averaging", "Averaging", averaging.blocks(report["averaging"], report.get("training"))))
    if "forecast" in report:
        made.append(("forecast", "Forecast of annealing", forecast.blocks(report["forecast"])))
    if "memory" in report:
        made.append(("memory", "Memory", memory.blocks(report["memory"])))
    if "recall" in report:
        made.append(("recall", "Recall", recall.blocks(report["recall"])))
    if "diagnostics" in report:
        made.append(("inside", "Inside the model", diagnostics.blocks(report["diagnostics"])))
    if "long_context" in report:
        made.append(("long-context", "Long context", long_context.blocks(report["long_context"])))
    tables = [block for item in report.get("comparisons", []) for block in comparison.blocks(item)]
    made.append(("comparisons", "Side by side", tables))
    for key, title, blocks in made:
        if blocks:
            yield key, title, "".join(map(_block, blocks))
    if "configuration" in report:
        yield "repeat", "Repeat it", _configuration(report["configuration"])


def _header(report: Report, links: str) -> str:
    header = report["header"]
    large = {
        "Parameters": count(header["parameters"]),
        "Tokens trained on": count(header["tokens"]),
        "Time for everything": seconds(header["seconds"]),
    }
    if "averaging" in report:
        best = min(report["averaging"]["rows"], key=lambda row: row["loss"])
        large[f"Bits per byte, {best['name']}"] = fixed(best["bits_per_byte"], 3)
    small = {
        "Date": header["date"].replace("T", " "),
        "Code": header["commit"],
        "Hardware": header["hardware"],
        "Versions": ", ".join(f"{name}\u00a0{version}" for name, version in header["versions"].items()),
    }
    return (
        f'<header><p class="kicker">Whimbrel run report</p><h1>{escape(header["name"])}</h1>'
        f'<p class="summary">{escape(summary(report))}</p>'
        f'<dl class="facts large">{_facts(large)}</dl><dl class="facts">{_facts(small)}</dl>'
        f"<nav>{links}</nav></header>\n"
    )


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)


def _footer(header: Header) -> str:
    text = f"Every sentence, figure and table is computed from the numbers of this run, code {header['commit']}."
    return f"<footer>{escape(text)}</footer>\n"


def _block(block: Block) -> str:
    figure = ""
    if block.draw:
        figure += f'<div class="wide">{block.draw(WIDE).inline()}</div>'
        figure += f'<div class="narrow">{block.draw(NARROW).inline()}</div>'
    for index, (title, text) in enumerate(block.quotes):
        style = ' class="before"' if index < len(block.quotes) - 1 else ""
        figure += f'<p class="quote-title">{escape(title)}</p><blockquote{style}>{escape(text)}</blockquote>'
    if block.table:
        figure += f"<details><summary>The numbers</summary>{_table(block.table, block.title)}</details>"
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    words = f'<h3>{escape(block.title)}</h3><p class="finding">{escape(block.finding)}</p>{note}'
    return f'<div class="block"><div>{words}</div><figure>{figure}</figure></div>'


def _table(table: Table, title: str) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    label = escape(f"{title}: numbers", quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _configuration(configuration: Configuration) -> str:
    toml = configuration["toml"]
    parts = (
        (
            "Commands",
            "Run in this order, from the code named above.",
            f"<pre>{escape(chr(10).join(configuration['commands']))}</pre>",
        ),
        (
            "Resolved configuration",
            "Every setting, defaults included.",
            f"<details><summary>Show it</summary><pre>{escape(toml)}</pre></details>",
        ),
    )
    return "".join(
        f'<div class="block"><div><h3>{title}</h3><p class="note">{note}</p></div><div>{body}</div></div>'
        for title, note, body in parts
    )


def _asset(name: str) -> str:
    return (resources.files("whimbrel.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
