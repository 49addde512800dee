"""summary.md for a pull request or `$GITHUB_STEP_SUMMARY`, and GitHub's `::error` lines."""

from __future__ import annotations

from pathlib import Path

from mpdeploy.files import write_text
from mpdeploy.gates.verdict import format_number
from mpdeploy.report.reading import SYMBOLS, Json, headline, measured_text, number, worst_first

MAX_BYTES = 1024 * 1024
"""GitHub refuses a step summary above 1024 KiB."""
_LONGEST_MESSAGE = 1000
_ANNOTATION = {"fail": "error", "inconclusive": "warning", "unvalidated": "notice"}


def render_markdown(gate: Json, *, max_bytes: int = MAX_BYTES) -> str:
    """The summary: verdict, a table of all gates with the failed ones first, and what they rest on.

    Rows that would not fit into `max_bytes` are left out, passed ones first, and counted.
    """
    head = [
        f"## {SYMBOLS[gate['verdict']]} {gate['verdict'].upper()}: {_text(gate['pipeline'])}",
        "",
        _text(headline(gate)),
        "",
        "| | gate | at | measured | limit | samples |",
        "|---|---|---|---|---|---|",
    ]
    tail = ["", *_tail(gate), ""]
    room = max_bytes - len("\n".join([*head, *tail]).encode()) - 200
    rows, left_out = [], 0
    for verdict in worst_first(gate["verdicts"]):
        row = _row(verdict)
        room -= len(row.encode()) + 1
        if room < 0:
            left_out += 1
        else:
            rows.append(row)
    if left_out:
        rows.append(f"\n{left_out:,} more verdicts are in gate.json.")
    return "\n".join([*head, *rows, *tail])


def write_markdown(path: Path, gate: Json) -> None:
    """Write it, atomically."""
    write_text(path, render_markdown(gate))


def github_annotations(gate: Json) -> list[str]:
    """`::error`, `::warning` and `::notice` lines for a GitHub job's log, worst first; advisory failures are warnings."""
    lines = []
    for verdict in worst_first(gate["verdicts"]):
        kind = _ANNOTATION.get(verdict["verdict"])
        if kind is None:
            continue
        if verdict["advisory"]:
            kind = "warning" if kind == "error" else "notice"
        title = _property(f"mpdeploy: {verdict['id']} at {verdict['at']}")
        lines.append(f"::{kind} title={title}::{_data(verdict['message'])}")
    return lines


def _row(verdict: Json) -> str:
    name = SYMBOLS[verdict["verdict"]] + " " + verdict["verdict"] + (" (advisory)" if verdict["advisory"] else "")
    cells = (name, verdict["id"], verdict["at"], measured_text(verdict), format_number(number(verdict["limit"])))
    row = "| " + " | ".join(_cell(cell) for cell in cells) + f" | {verdict['num_samples']:,} |"
    if verdict["verdict"] == "pass":
        return row
    return row + f"\n| | | | {_message(verdict['message'][:_LONGEST_MESSAGE])} | | |"


def _tail(gate: Json) -> list[str]:
    environment = gate["environment"]
    hardware = ", ".join(item["name"] for item in environment.get("gpus", []) if "name" in item) or environment.get(
        "cpu", "?"
    )
    lines = [_text(gate["failure_claim"]["statement"])]
    lines += [f"Gate `{_code(each['id'])}` did not apply: {_text(each['reason'])}." for each in gate["not_applied"]]
    digests = ", ".join(f"{_text(name)} `{_code(digest[:12])}`" for name, digest in gate["digests"].items())
    lines.append(f"Measured on {_text(hardware)}" + (f"; {digests}" if digests else "") + ".")
    lines.append("Each end of an interval is a one-sided 95 % bound (of a latency ratio: together 95 %).")
    return [item for line in lines for item in (line, "")][:-1]


def _text(text: object) -> str:
    """Text that markdown and HTML show as it is."""
    escaped = str(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "*_[]#|":
        escaped = escaped.replace(character, f"\\{character}")
    return " ".join(escaped.split())


def _cell(text: object) -> str:
    return _text(text).replace("`", "\\`") or " "


def _message(text: str) -> str:
    """A message whose `backticked` parts stay code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return _cell(text)
    return "".join(f"`{_code(part)}`" if index % 2 else _spaced(part) for index, part in enumerate(parts))


def _spaced(text: str) -> str:
    lead, trail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{' ' if lead else ''}{_text(text)}{' ' if trail and text.strip() else ''}"


def _code(text: object) -> str:
    return " ".join(str(text).replace("`", "'").replace("|", "\\|").split())


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
