"""The commands of examples/serving_benchmark that break things under load, in short: no answer lost, swapped or late, memory flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving_benchmark"


def figures_of(*arguments: object, timeout: float = 240) -> dict[str, object]:
    """What a command found; it must have ended well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "faults.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_ten_times_too_much_is_refused_and_nothing_is_late_lost_or_swapped():
    found = figures_of("overload", "--seconds", 8)
    assert found["swapped_or_wrong"] == found["lost"] == 0
    assert found["answers_by_status"]["503"] > found["answers_by_status"]["200"] > 0  # type: ignore[index]


@pytest.mark.slow
def test_a_killed_process_loses_what_it_held_and_nothing_else():
    found = figures_of("kill", "--seconds", 8)
    assert found["kills"] == found["started_again"] != 0


@pytest.mark.slow
def test_version_after_version_under_load_without_a_failed_request():
    assert int(str(figures_of("reload", "--seconds", 4)["versions"])) > 2


@pytest.mark.slow
def test_mutated_requests_never_crash_it_and_never_get_a_500():
    found = figures_of("fuzz", "--count", 3000)
    assert found["live_server"]["alive"]  # type: ignore[index]


@pytest.mark.slow
def test_the_soak_reports_memory():
    found = figures_of("soak", "--minutes", 0.2)
    assert len(found["rss_mib"]) > 5  # type: ignore[arg-type]
    assert found["swapped_or_wrong"] == 0
