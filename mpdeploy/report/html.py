"""report.html: one self-contained page. No script, no network (its own policy forbids both), inline SVG, light and dark."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Golden
from mpdeploy.errors import MissingExtraError, NotComparableError
from mpdeploy.files import write_text
from mpdeploy.gates.evidence import Evidence
from mpdeploy.report import precision_map, run_tables, samples, sections
from mpdeploy.report.graph import Node
from mpdeploy.report.reading import SYMBOLS, Json, counted, headline, worst_first
from mpdeploy.run_dir import RunDir

TEMPLATE = "report.html.j2"


def render_html(
    run_dir: RunDir,
    gate: dict[str, Any],
    *,
    plans: Mapping[str, Json] | None = None,
    golden: Golden | None = None,
    graph: Sequence[Node] | None = None,
) -> str:
    """The page as text.

    Args:
        run_dir: the run; its `evidence/` gives raw points and samples where it is there and whole.
        gate: gate.json.
        plans: a name for each (`fp16`) -> plan.json.
        golden: the golden samples, for pictures and labels of what changed most.
        graph: the outline of the FP32 model, for the order and the blocks of its nodes.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    evidence, fault = _evidence(run_dir)
    text: str = page_template(TEMPLATE).render(
        gate=gate,
        symbol=SYMBOLS[gate["verdict"]],
        headline=headline(gate),
        failing=[verdict["message"] for verdict in worst_first(counted(gate, "fail"))],
        evidence_fault=fault,
        verdicts=sections.verdict_rows(gate),
        drift=sections.drift_rows(gate),
        accuracy=sections.accuracy_rows(gate),
        samples=samples.changed_samples(evidence, golden),
        latency=sections.latency_cards(gate, evidence),
        training=sections.training_cards(run_dir),
        precision=precision_map.precision_maps(plans or {}, graph, run_dir),
        fp32_engines=precision_map.fp32_engines(run_dir),
        slices=sections.slice_rows(gate),
        corpus=sections.corpus_lines(gate),
        noise=sections.noise_lines(gate, run_dir),
        engines=run_tables.engine_rows(run_dir, gate),
        stages=run_tables.stage_rows(run_dir),
        environment=run_tables.flat_items(gate["environment"]),
        digests=_digests(gate),
        commands=_commands(run_dir),
        run=run_dir.path.name,
    )
    return text


def page_template(name: str) -> Any:
    """A template of this folder.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError.for_extra("jinja2", "report") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["code"] = _code
    return environment.get_template(name)


def write_html(
    path: Path,
    run_dir: RunDir,
    gate: dict[str, Any],
    *,
    plans: Mapping[str, Json] | None = None,
    golden: Golden | None = None,
    graph: Sequence[Node] | None = None,
) -> None:
    """Write the page, atomically."""
    write_text(path, render_html(run_dir, gate, plans=plans, golden=golden, graph=graph))


def _code(text: str) -> Any:
    """Text with its `backticked` parts as code, safely."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _evidence(run_dir: RunDir) -> tuple[Evidence | None, str]:
    try:
        return Evidence.load(run_dir.path / "evidence"), ""
    except NotComparableError as error:
        return None, error.message


def _digests(gate: Json) -> list[tuple[str, str]]:
    found = list(gate["digests"].items())
    for at, place in gate["places"].items():
        found += [(f"{at} {name}", digest) for name, digest in place["digests"].items()]
    return found


def _commands(run_dir: RunDir) -> list[tuple[str, str]]:
    """What reproduces each part of this run."""
    run = shlex.quote(str(run_dir.path))
    given = run_dir.manifest.get("command")
    commands = [
        ("decide again from the evidence alone", f"mpdeploy gate {run}"),
        ("this page", f"mpdeploy report {run}"),
    ]
    if given:
        text = given if isinstance(given, str) else shlex.join(map(str, given))
        commands.insert(0, ("the whole run", text))
        stages = dict.fromkeys(name.split("/")[0] for name in run_dir.records())
        commands += [(f"from {stage} on", f"{text} --from {stage}") for stage in stages]
    return commands
