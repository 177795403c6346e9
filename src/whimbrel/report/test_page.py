"""The page: every number from the data, nothing from a run taken as markup, no holes, losses said plainly."""

from __future__ import annotations

import copy
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from whimbrel.errors import DataError
from whimbrel.report import comparison, write_report
from whimbrel.report.averaging import finding as averaging_finding
from whimbrel.report.fixtures.sample import HOSTILE, averaging_rows, sample_report
from whimbrel.report.long_context import blocks as long_blocks
from whimbrel.report.memory import length_finding, training_finding
from whimbrel.report.page import render
from whimbrel.report.recall import finding as recall_finding
from whimbrel.report.schema import check
from whimbrel.report.summary import summary
from whimbrel.report.training import blocks as training_blocks

VOID = {"meta", "link", "br", "img"}
SECTIONS = ("training", "averaging", "memory", "recall", "diagnostics", "long_context", "comparisons", "configuration")


class Balanced(HTMLParser):
    """Collects tags, links and text, and fails on a tag that closes what was not open."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parsed(report) -> Balanced:
    page = Balanced()
    page.feed(render(check(report)))
    assert page.open == []
    return page


def words(report) -> str:
    return " ".join(" ".join(parsed(report).text).replace("\u00a0", " ").replace("\u2212", "-").split())


def test_page_is_written_whole_and_well_formed(tmp_path):
    out = write_report(sample_report(), tmp_path / "run" / "report.html")
    assert out == tmp_path / "run" / "report.html"
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    page = Balanced()
    page.feed(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("h1") == 1
    assert page.tags.count("section") == 8
    assert page.tags.count("svg") >= 20


def test_page_fetches_nothing():
    text = render(sample_report())
    page = parsed(sample_report())
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert page.tags.count("script") == 1
    for outside in ("http://", "https://", "@import", "url(", "@font-face"):
        assert outside not in text
    assert "default-src 'none'" in text


def test_text_of_a_run_is_never_markup():
    report = sample_report()
    hostile = copy.deepcopy(report)
    header = hostile["header"]
    header.update(name=HOSTILE, hardware=HOSTILE, commit=HOSTILE, summary=HOSTILE, versions={HOSTILE: HOSTILE})
    hostile["training"]["runs"][0]["name"] = HOSTILE
    hostile["averaging"]["rows"][1]["name"] = HOSTILE
    hostile["configuration"]["toml"] = hostile["configuration"]["commands"][0] = HOSTILE
    for item in hostile.get("comparisons", []):
        item["title"] = item["setting"] = item["rows"][0]["name"] = HOSTILE
    text = render(hostile)
    assert "<b>" not in text
    assert text.count("<script") == 1
    assert HOSTILE in unescape(text)
    found, wanted = parsed(hostile).tags, parsed(report).tags
    assert set(found) == set(wanted)
    for tag in ("p", "script", "section", "blockquote", "td"):
        assert found.count(tag) == wanted.count(tag)


@pytest.mark.parametrize("left_out", SECTIONS)
def test_a_section_left_out_leaves_no_hole(left_out):
    report = sample_report()
    title = {
        "training": "Training",
        "averaging": "Averaging",
        "memory": "Memory",
        "recall": "Recall",
        "diagnostics": "Inside the model",
        "long_context": "Long context",
        "comparisons": "Side by side",
        "configuration": "Repeat it",
    }[left_out]
    assert f"<h2>{title}</h2>" in render(report)
    report.pop(left_out)
    page = render(report)
    assert f"<h2>{title}</h2>" not in page
    assert page.count("<section") == page.count("<nav>") * 7 == page.count('<a href="#')


def test_inside_the_model_says_what_stands_out():
    page = render(sample_report())
    assert "Without block 3, head 1 (softmax) the loss at the answers rises by 1.42 from 2.31 nats" in page
    assert "50% of the softmax heads spend over 30% of their attention on the first token" in page
    assert "States fall to a half within 1.4 to 210 tokens" in page
    assert "of the residual in block 1, the most" in page


def test_header_alone_is_a_page():
    page = parsed({"header": sample_report()["header"]})
    assert page.tags.count("section") == 0
    assert "svg" not in page.tags


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("recall", "mqar"),
        ("recall", "needle"),
        ("recall", "trained_length"),
        ("long_context", "prefill"),
        ("long_context", "plans"),
        ("long_context", "sample"),
        ("memory", "methods"),
        ("memory", "by_length"),
        ("memory", "used"),
        ("training", "merged_tokens"),
    ],
)
def test_an_optional_part_left_out_leaves_no_hole(section, key):
    report: Any = sample_report()
    report[section].pop(key)
    assert "None" not in words(report)


def test_empty_lists_make_no_section():
    report = sample_report()
    report["training"] = {"runs": [{"name": "constant", "points": []}]}
    report["memory"] = {"methods": []}
    report["recall"] = {"confidence": 0.95, "mqar": {"chance": 0.1, "series": []}}
    report["diagnostics"] = {"answer_loss": 6.1, "heads": [], "sinks": [], "layers": []}
    report["long_context"] = {"prefill": [], "plans": []}
    report["comparisons"] = []
    titles = re.findall(r"<h2>(.*?)</h2>", render(check(report)))
    assert titles == ["Averaging", "Repeat it"]


def test_heads_are_drawn_with_what_their_bars_measure():
    report: Any = sample_report()
    report["comparisons"] = []
    with_sinks = parsed(report)
    assert "rise of the loss at the answers, nats" in " ".join(with_sinks.text)
    report["diagnostics"]["sinks"] = []
    without = parsed(report)
    assert with_sinks.tags.count("svg") - without.tags.count("svg") == 2  # wide and narrow


def test_numbers_in_the_page_are_those_of_the_data():
    report = sample_report()
    text = words(report)
    expected = ["3.21 million", "1.64 million", "5 min 23 s", "2026-08-23 14:05", "aab9d90+", "torch 2.13.0"]
    for row in report["averaging"]["rows"]:
        expected += [f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}"]
        expected += [f"{w:.3f}" for w in row.get("weights", [])]
        if "difference" in row:
            expected += [f"{row['difference'][key]:.4f}" for key in ("value", "low", "high")]
    for run in report["training"]["runs"]:
        expected += [f"{point['tokens']:,} {point['loss']:.4f}" for point in run["validation"]]
    for task in (report["recall"]["mqar"], report["recall"]["needle"]):
        for series in task["series"]:
            expected += [f"{100 * p['accuracy']:.1f}%" for p in series["points"] if 0 < p["accuracy"] < 1]
        for grid in task.get("grids", []):
            expected += [f"{100 * value:.0f}" for row in grid["accuracy"] for value in row]
    for prefill in report["long_context"]["prefill"]:
        expected += [
            f"{100 * layer[key]:.1f}%" for layer in prefill["layers"] for key in ("density", "coverage_achieved")
        ]
        expected += [f"{prefill['max_logit_difference']:.3g}", f"{100 * prefill['top1_agreement']:.1f}%"]
    for item in report["comparisons"]:
        for row in item["rows"]:
            for metric in item["metrics"]:
                share = metric["unit"] == "share"
                for value in row["values"][metric["name"]]:
                    expected.append("diverged" if value is None else f"{100 * value:.1f}%" if share else f"{value:.4f}")
    for method in report["memory"]["methods"]:
        expected.append(f"{method['optimizer_state'] / 2**20:.3g} MiB")
    missing = [number for number in expected if number not in text]
    assert missing == []


def change(shift: float, **annealed):
    rows: Any = averaging_rows(shift)
    if annealed:
        rows[-1]["difference"] = annealed
        rows[-1]["loss"] = rows[0]["loss"] + annealed["value"]
    else:
        rows = rows[:-1]
    return averaging_finding({"rows": rows, "blocks": 10, "confidence": 0.95}).replace("\u2212", "-")


def test_averaging_says_win_tie_and_loss():
    assert change(0.0) == (
        "The best merge, WMA, is 0.0339 nats per token below the last checkpoint (95% interval -0.0387 to -0.0291)."
    )
    assert change(0.0339) == (
        "The best merge, WMA, cannot be told apart from the last checkpoint (95% interval -0.0048 to +0.0048)."
    )
    assert change(0.1) == (
        "No merge helps: the best, WMA, is 0.0661 nats per token above the last checkpoint "
        "(95% interval +0.0613 to +0.0709)."
    )


def test_averaging_is_measured_against_annealing():
    assert change(0.0, value=-0.0678, low=-0.07, high=-0.06).endswith(
        "; it reaches 50% of the 0.0678 that annealing gains."
    )
    assert change(0.0, value=-0.01, low=-0.02, high=-0.001).endswith(
        ", and further below than the annealed branch (-0.0100)."
    )
    assert change(0.1, value=-0.05, low=-0.06, high=-0.04).endswith("; annealing gains 0.0500.")
    assert change(0.0, value=0.02, low=0.01, high=0.03).endswith("; annealing ends 0.0200 above the last checkpoint.")


def test_summary_follows_the_sections():
    report = sample_report()
    assert "lowers the last one’s loss by 0.034 nats per token" in summary(report)
    assert "Fira keeps 26% of the optimizer state of AdamW" in summary(report)
    report["averaging"]["rows"] = averaging_rows(0.1)
    assert "raises the last one’s loss by 0.066 nats per token" in summary(report)
    report["averaging"]["rows"] = averaging_rows(0.034)
    assert "leaves the last one’s loss where it was" in summary(report)
    report["header"]["summary"] = "As given."
    assert summary(report) == "As given."
    assert summary({"header": sample_report()["header"]}).endswith("for everything on this page.")


def point(x, accuracy, low, high):
    return {"x": x, "accuracy": accuracy, "low": low, "high": high, "n": 64}


def test_recall_is_above_chance_only_with_its_whole_interval():
    good, tied = point(4, 0.5, 0.4, 0.6), point(8, 0.15, 0.08, 0.2)
    series: Any = [
        {"name": "a", "points": [good, point(8, 0.3, 0.2, 0.4)]},
        {"name": "b", "points": [good, tied]},
        {"name": "c", "points": [tied]},
    ]
    assert recall_finding({"chance": 0.1, "series": series}, "pairs") == (
        "Above chance: a throughout, 50.0% at 4 pairs and 30.0% at 8; b only at 4 pairs (50.0%); c nowhere."
    )


def test_memory_findings_compare_with_the_first():
    methods: Any = [
        {"method": "AdamW", "weights": 400, "gradients": 400, "optimizer_state": 800},
        {"method": "Fira", "weights": 400, "gradients": 400, "optimizer_state": 200},
    ]
    text = training_finding({"methods": methods, "used": "Fira"}).replace("\u00a0", " ")
    assert text == "Fira’s optimizer state takes 200 B, 25% of AdamW’s 800 B; all parts together take 38% less."
    worse = training_finding({"methods": methods[::-1], "used": "AdamW"}).replace("\u00a0", " ")
    assert worse == "AdamW’s optimizer state takes 800 B, 400% of Fira’s 200 B; all parts together take 60% more."
    lengths: Any = {
        "lengths": [256, 1024],
        "series": [
            {"name": "hybrid", "bytes": [500, 600]},
            {"name": "softmax", "bytes": [400, 1600]},
            {"name": "state", "bytes": [60, 60]},
        ],
    }
    assert length_finding(lengths).replace("\u00a0", " ") == (
        "At 1,024 tokens one sequence keeps 600 B for hybrid; 2.7 times as much, 1.56 KiB, for softmax, "
        "though less up to 256 tokens; 60 B, 10.0% of that, for state."
    )


def test_prefill_says_where_it_falls_short_or_is_slower():
    long = sample_report()["long_context"]
    long["prefill"][0]["layers"][1]["coverage_achieved"] = 0.9
    by_title = {block.title: block.finding for block in long_blocks(long)}
    assert (
        "cover at least 90.0% (less than asked in layer 7) of the attention"
        in by_title["Sparse prefill of the softmax layers"]
    )
    assert "Prefill with row_local is slower: 1.35 times as long as dense" in by_title["Prefill time"]
    assert "is 1.11 times as fast as dense" in by_title["Prefill time"]
    long["prefill"][0]["sparse"].update(q25=1.0, q75=1.3)
    again = {block.title: block.finding for block in long_blocks(long)}
    assert "is not told apart from dense" in again["Prefill time"]


def test_plan_density_counts_causal_blocks_only():
    plan = {"selector": "s", "layer": 0, "head": 0, "block_size": 64, "mask": [[1, 0, 0], [1, 1, 0], [0, 0, 1]]}
    (block,) = long_blocks({"plans": [plan]})
    assert block.finding == "The head shown read 67% of the causal blocks; 0 of 1 always read the first key block."


def compared(*rows, lower=True, unit="bits per byte"):
    metric = {"name": "loss", "unit": unit, "lower_is_better": lower}
    named = [{"name": name, "values": {"loss": values}} for name, values in rows]
    return comparison.metric_finding(named, metric)


def test_comparison_names_the_winner_whoever_it_is():
    assert compared(("ours", [2.0, 2.2]), ("theirs", [1.8, 1.9])) == (
        "Lowest mean loss: theirs, 1.8500 bits per byte, 0.2500 below ours (no seed overlaps)."
    )
    assert compared(("ours", [2.0, 2.2]), ("theirs", [2.1, 2.3])) == (
        "Lowest mean loss: ours, 2.1000 bits per byte, 0.1000 below theirs (their seeds overlap)."
    )
    assert compared(("ours", [0.5]), ("theirs", [0.25]), lower=False, unit="share") == (
        "Highest mean loss: ours, 50.0%, 25.0 points above theirs (one seed each)."
    )
    assert compared(("ours", [2.0, 2.1]), ("theirs", [1.5, None])) == (
        "Lowest mean loss: theirs, 1.5000 bits per byte, 0.5500 below ours (no seed overlaps). "
        "theirs diverged on some seed, which no mean counts."
    )
    assert compared(("ours", [2.0, 2.1]), ("theirs", [2.0, 2.1])) == (
        "Lowest mean loss: ours, 2.0500 bits per byte, level with theirs (their seeds overlap)."
    )
    assert compared(("ours", [None]), ("theirs", [None])) == (
        "No row has a loss. ours and theirs diverged on some seed, which no mean counts."
    )


def test_training_says_when_the_loss_rose():
    points: Any = [{"step": i, "tokens": 100 * i, "loss": 3.0 + i, "lr": 0.1} for i in range(3)]
    (block,) = training_blocks({"runs": [{"name": "constant", "points": points}]})
    assert block.finding == "Training loss rose from 3.00 to 5.00 nats per token over 200 tokens."
    (block,) = training_blocks({"runs": [{"name": "constant", "points": points[:1]}]})
    assert block.finding == "Training loss stayed at 3.00 nats per token over 0 tokens."


def broken(edit):
    report = sample_report()
    edit(report)
    return report


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("header"), "report.header is missing"),
        (lambda r: r["header"].pop("tokens"), "report.header.tokens is missing"),
        (lambda r: r["header"].update(tokens=1.5), "report.header.tokens = 1.5 must be a whole number"),
        (lambda r: r["header"].update(seconds=float("nan")), "report.header.seconds = nan must be a finite number"),
        (lambda r: r["header"].update(seconds=True), "report.header.seconds = True must be a finite number"),
        (lambda r: r["header"].update(name=None), "report.header.name = None must be text"),
        (lambda r: r["header"].update(versions=[]), "report.header.versions = [] must be a dictionary"),
        (lambda r: r.update(training=3), "report.training = 3 must be a dictionary"),
        (lambda r: r["training"].update(runs={}), "report.training.runs = {} must be a list"),
        (
            lambda r: r["averaging"]["rows"][1].update(kind="sma"),
            "report.averaging.rows[1].kind = 'sma' must be one of 'last', 'merge', 'annealed'",
        ),
        (
            lambda r: r["comparisons"][0]["rows"][0]["values"]["validation loss"].append("2"),
            "report.comparisons[0].rows[0].values['validation loss'][3] = '2' must be float or NoneType",
        ),
        (
            lambda r: r["averaging"].update(rows=r["averaging"]["rows"][1:]),
            "report.averaging.rows must hold exactly one row of kind 'last', not 0",
        ),
        (
            lambda r: r["memory"]["by_length"]["series"][0]["bytes"].pop(),
            "report.memory.by_length.series[0].bytes has 9 entries, want 10",
        ),
        (
            lambda r: r["recall"]["needle"]["grids"][0]["accuracy"][2].pop(),
            "report.recall.needle.grids[0].accuracy[2] has 4 entries, want 5",
        ),
        (
            lambda r: r["long_context"]["plans"][1]["mask"][3].pop(),
            "report.long_context.plans[1].mask[3] has 61 entries, want 62",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(edit, message, tmp_path):
    with pytest.raises(DataError) as caught:
        write_report(broken(edit), tmp_path / "r.html")
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_unknown_keys_name_the_nearest():
    with pytest.raises(
        DataError, match=r"^report.trainning is unknown: allowed are header, .*; did you mean 'training'\?$"
    ):
        check(broken(lambda r: r.update(trainning={})))
