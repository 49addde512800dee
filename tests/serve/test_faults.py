"""The commands of examples/serving_benchmark that break things under load, in short: no answer lost, swapped or late, memory flat."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
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
    assert min(found["answers_by_status"][status] for status in ("200", "503")) > 0  # type: ignore[index]
    assert found["answered_200_after_deadline"]["by_the_server"] == 0  # type: ignore[index]


@pytest.mark.slow
def test_a_killed_process_loses_what_it_held_and_nothing_else():
    found = figures_of("kill", "--seconds", 8)
    assert found["kills"] == found["started_again"] != 0


@pytest.mark.slow
def test_version_after_version_under_load_without_a_failed_request():
    found = figures_of("reload", "--seconds", 4)
    assert found["versions"] == found["loads"] + 1 > 3  # type: ignore[operator]


@pytest.mark.slow
def test_mutated_requests_never_crash_it_and_never_get_a_500():
    found = figures_of("fuzz", "--count", 3000)
    assert found["live_server"]["alive"]  # type: ignore[index]


@pytest.mark.slow
def test_the_soak_reports_memory():
    found = figures_of("soak", "--minutes", 0.2)
    assert len(found["rss_mib"]) > 5  # type: ignore[arg-type]
    assert found["swapped_or_wrong"] == 0


WATCHED = """
import sys, time
from standstill import Standstills
with Standstills(None) as stood:
    time.sleep(0.3)  # its threads have begun, too
    begin = time.monotonic()
    print("begun", flush=True)
    sys.stdin.readline()
print(stood.seconds_within(begin, time.monotonic()))
"""


def test_a_process_that_was_stopped_knows_for_how_long():
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED], cwd=EXAMPLE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.8)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate("\n", timeout=30)
    assert float(said) > 0.7


def test_standstills_that_overlap_are_counted_once(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from standstill import Standstills

    stood = Standstills(None)
    stood.found = [(5.0, 6.0), (1.0, 2.0), (1.5, 2.5), (8.0, 9.5)]
    assert stood.seconds_within(0.0, 10.0) == 1.5 + 1.0 + 1.5
    assert stood.seconds_within(1.75, 5.25) == 0.75 + 0.25
    assert stood.seconds_within(2.5, 5.0) == 0.0
