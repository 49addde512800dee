"""What only a GPU can show, by one command: AMP, the emulator's fidelity, engines, and the tests that need a GPU.

    python run.py [--output DIR] [--minutes 20] [--only amp,fidelity,engines,tests] [--dry-run]

Writes on_your_gpu.json and on_your_gpu.md. What is missing on the machine is skipped and listed with its reason. `--dry-run` goes
through the same code on a CPU with tiny models; its numbers mean nothing and are marked so.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("MPDEPLOY_REPO", Path(__file__).resolve().parents[2]))
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import torch  # noqa: E402
from amp import amp  # noqa: E402
from engines import engines  # noqa: E402
from fidelity import fidelity  # noqa: E402
from machine import Session, description, say  # noqa: E402
from tables import markdown  # noqa: E402

from mpdeploy.files import finite_json, write_json, write_text  # noqa: E402

PARTS = ("amp", "fidelity", "engines", "tests")


def gpu_tests(session: Session) -> dict[str, Any]:
    """Everything marked `gpu` in the tests, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs", "tests"]
    if session.dry:
        command.append("--collect-only")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(30, session.seconds_left - 10), check=False
    )
    lines = done.stdout.strip().splitlines()
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "counts": counts, "failed": failed}


def main() -> int:
    """Measure, and write what was measured; 21 where there is no GPU and no `--dry-run`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only takes {', '.join(PARTS)}; found {', '.join(sorted(unknown))}")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.dry_run:
        say("torch sees no CUDA device here. mpdeploy doctor says why; --dry-run goes through the same code on a CPU.")
        return 21
    device = "cpu" if arguments.dry_run else "cuda"
    session = Session(device=device, dry=arguments.dry_run, minutes=arguments.minutes)
    report: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
        "dry_run": arguments.dry_run,
        "hardware": description(device),
    }
    parts = {
        "amp": lambda: amp(session, ROOT),
        "fidelity": lambda: fidelity(session),
        "engines": lambda: engines(session, ROOT),
        "tests": lambda: gpu_tests(session),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        if name in arguments.only.split(","):
            report[name] = session.measured(name, parts[name], needs_s=30)
            report["skipped"] = session.skipped
            write(report, arguments.output)  # what is measured is kept, whatever comes next
    say(f"wrote {arguments.output / 'on_your_gpu.json'} and .md")
    return 0


def write(report: dict[str, Any], folder: Path) -> None:
    """The report as data and as a page to read."""
    plain = finite_json(report)
    write_json(folder / "on_your_gpu.json", plain)
    write_text(folder / "on_your_gpu.md", markdown(json.loads(json.dumps(plain))))


if __name__ == "__main__":
    sys.exit(main())
