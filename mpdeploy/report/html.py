"""report.html: one self-contained page. No script, no network (its own policy forbids both), inline SVG, light and dark."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Golden
from mpdeploy.errors import MissingExtraError, NotComparableError
from mpdeploy.files import sha256_of_file, write_text
from mpdeploy.gates.evidence import Evidence
from mpdeploy.report import precision_map, run_tables, samples, sections
from mpdeploy.report.graph import Node
from mpdeploy.report.reading import SYMBOLS, Json, counted, headline, worst_first
from mpdeploy.report.training import training_section
from mpdeploy.run_dir import RunDir, StageRecord

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
        waiting=sections.waiting_lines(gate),
        drift=sections.drift_rows(gate),
        accuracy=sections.accuracy_rows(gate),
        samples=samples.changed_samples(evidence, golden, texts=_texts(run_dir), classes=_classes(run_dir)),
        latency=sections.latency_cards(gate, evidence),
        training=training_section(run_dir),
        precision=precision_map.precision_maps(plans or {}, graph, run_dir),
        fp32_engines=precision_map.fp32_engines(run_dir),
        slices=sections.slice_rows(gate),
        corpus=sections.corpus_rows(gate),
        noise=sections.noise_rows(gate),
        noise_titles=sections.NOISE_TITLES,
        noise_lines=[line for line in (sections.seed_line(run_dir), sections.tf32_line(run_dir)) if line],
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


def _texts(run_dir: RunDir) -> dict[str, str]:
    """Sample id -> text, where the pipeline described samples and the file is still what was recorded."""
    record = run_dir.record("50-validate")
    item = record.artifacts.get("samples") if record else None
    if item is None or not item.path.is_file() or sha256_of_file(item.path) != item.sha256:
        return {}
    found = json.loads(item.path.read_text(encoding="utf-8")).get("texts", {})
    return {str(name): str(text) for name, text in found.items()}


def _classes(run_dir: RunDir) -> list[str]:
    """Names of the classes, where the data has them."""
    record = run_dir.record("20-export")
    data = record.report.get("data") if record else None
    return [str(name) for name in data.get("classes", ())] if isinstance(data, Mapping) else []


def _digests(gate: Json) -> list[tuple[str, str]]:
    found = list(gate["digests"].items())
    for at, place in gate["places"].items():
        found += [(f"{at} {name}", digest) for name, digest in place["digests"].items()]
    return found


def _commands(run_dir: RunDir) -> list[tuple[str, str]]:
    """What reproduces each part of this run."""
    run, records = shlex.quote(str(run_dir.path)), run_dir.records()
    validated = records.get("50-validate")
    given = run_dir.manifest.get("command") or (validated.report.get("command") if validated else None)
    text = given if isinstance(given, str) else shlex.join(map(str, given)) if given else ""
    commands = [("the whole run", text)] if text else []
    again = text or f"mpdeploy train-and-export PIPELINE.py --run {run}"
    commands += [
        (f"from {stage} on", f"{again} --from {stage}")
        for stage in dict.fromkeys(name.split("/")[0] for name in records)
    ]
    for name, record in records.items():
        model = _model_of(records, str(record.report.get("precision", "")))
        if name.startswith("40-build/") and record.status == "done" and model is not None:
            engine = name.split("/", 1)[1]
            commands.append(
                (
                    f"the engine {engine} alone",
                    f"mpdeploy build {shlex.quote(str(model))} --engine {engine} --output {shlex.quote(engine)}",
                )
            )
    return [
        *commands,
        ("the verdicts, from the evidence alone", f"mpdeploy gate {run}"),
        ("this page", f"mpdeploy report {run}"),
    ]


def _model_of(records: Mapping[str, StageRecord], precision: str) -> Path | None:
    """The ONNX file that an engine of this precision was built from."""
    stage, name = ("20-export", "model") if precision == "fp32" else ("30-convert", precision)
    record = records.get(stage)
    return record.artifacts[name].path if record is not None and name in record.artifacts else None
