"""`mpdeploy doctor`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mpdeploy.cli.common import Json, console, emit, plain, table


def doctor(
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="NAME", help="List this engine's build options instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hardware, versions, engines that really work here, and what would add the others."""
    from mpdeploy.doctor import examine, options_of

    found = examine() if engine is None else options_of(engine)
    if as_json:
        emit(found)
    elif engine is None:
        _print_machine(found)
    else:
        _print_options(engine, found)


def _print_machine(found: dict[str, Any]) -> None:
    out = console(stderr=False)
    machine = found["environment"]
    out.print(f"{machine['os']}, Python {machine['python']}", markup=False)
    half = ", ".join(machine["cpu_half"]) or "no half-precision units"
    out.print(f"CPU: {machine['cpu']}, {machine['cores']} cores ({half})", markup=False)
    for gpu in machine["gpus"] or [{"name": "none"}]:
        out.print(f"GPU: {', '.join(gpu.values())}", markup=False)
    rows = table("engine", "builds", "runs", "takes", "what is missing, and what to do")
    for name, state in found["engines"].items():
        missing = f"{state['reason']} {state['hint']}" if state["reason"] else ""
        rows.add_row(name, _tick(state["builds"]), _tick(state["runs"]), state.get("takes", ""), plain(missing))
    out.print(rows)
    out.print("build options of an engine: mpdeploy doctor --engine NAME", markup=False)
    for provider, state in found["providers"].items():
        out.print(f"ONNX Runtime {provider}: {state}", markup=False)
    rows = table("extra", "missing packages", "install")
    for extra, missing in found["extras"].items():
        rows.add_row(extra, ", ".join(missing) or "-", f"pip install 'mpdeploy\\[{extra}]'" if missing else "")
    out.print(rows)
    for warning in found["warnings"]:
        out.print(f"[yellow]warning:[/] {plain(warning)}")


def _print_options(engine: str, found: dict[str, Any]) -> None:
    out = console(stderr=False)
    out.print(
        f"{engine}: mpdeploy build --option NAME=VALUE, or BuildConfig(options={{'{engine}': {{NAME: VALUE}}}})",
        markup=False,
    )
    rows = table("option", "takes", "default", "what it does")
    for row in found["options"]:
        default = {None: "-", True: "true", False: "false"}.get(row["default"] if row["default"] != [] else None)
        text = plain(row["text"]) + (f" [yellow]Not here: {plain(row['lacking'])}.[/]" if "lacking" in row else "")
        rows.add_row(row["name"], plain(row["takes"]), default or plain(row["default"]), text)
    out.print(rows)


def _tick(value: bool) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor")(doctor)
