"""The sentence at the top of the page."""

from __future__ import annotations

from whimbrel.report.numbers import count, fixed, percent, seconds, signed
from whimbrel.report.schema import Averaging, Memory, Report


def summary(report: Report) -> str:
    """The header's own sentence, or one computed from the sections that are there."""
    header = report["header"]
    if "summary" in header:
        return header["summary"]
    text = (
        f"A model of {count(header['parameters'])} parameters, {count(header['tokens'])} tokens of training and "
        f"{seconds(header['seconds'])} for everything on this page"
    )
    parts = []
    if "averaging" in report:
        parts += _averaging(report["averaging"])
    if "memory" in report:
        parts += _memory(report["memory"])
    return text + (f": {'; '.join(parts)}." if parts else ".")


def _averaging(averaging: Averaging) -> list[str]:
    best = min(averaging["rows"], key=lambda row: row["loss"])
    parts = [f"its best version, {best['name']}, needs {fixed(best['bits_per_byte'], 3)} bits per byte of unseen text"]
    merges = [row for row in averaging["rows"] if row["kind"] == "merge"]
    change = min(merges, key=lambda row: row["loss"]).get("difference") if merges else None
    if change:
        level = percent(averaging["confidence"], 0)
        interval = f"({level} interval {signed(change['low'], 3)} to {signed(change['high'], 3)})"
        if change["low"] <= 0 <= change["high"]:
            parts.append(f"merging checkpoints leaves the last one’s loss where it was {interval}")
        else:
            verb = "lowers" if change["value"] < 0 else "raises"
            amount = f"{fixed(abs(change['value']), 3)} nats per token"
            parts.append(f"merging checkpoints {verb} the last one’s loss by {amount} {interval}")
    return parts


def _memory(memory: Memory) -> list[str]:
    methods = memory.get("methods", [])
    used = next((m for m in methods if m["method"] == memory.get("used")), None)
    if used is None or used is methods[0]:
        return []
    share = percent(used["optimizer_state"] / max(methods[0]["optimizer_state"], 1), 0)
    return [f"{used['method']} keeps {share} of the optimizer state of {methods[0]['method']}"]
