"""What `examples/serving/Dockerfile` says, done without Docker: its packages alone in an environment, its user, its commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_triton import free_port
from served import checksum_model, make_run

REPOSITORY = Path(__file__).parents[2]
USER = 10001


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with what follows it on one line."""
    text = (REPOSITORY / "examples/serving/Dockerfile").read_text()
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def command(name: str) -> list[str]:
    """An instruction's command, as JSON says it."""
    said = next(rest for what, rest in instructions() if what == name)
    return list(json.loads(said[said.index("[") :]))


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that the image's user may enter; pytest's own are for one user alone."""
    folder = Path(tempfile.mkdtemp(prefix="image-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_image_s_packages_and_commands_serve_a_run(root):
    for what, rest in instructions():
        if what == "COPY" and "${RUN}" not in rest:
            *sources, target = rest.split()
            (root / "src").mkdir(exist_ok=True)
            for source in sources:
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(
                        REPOSITORY / source, root / target.lstrip("/"), ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(REPOSITORY / source, root / "src")
    extras = re.search(r'pip install [^&]*"/src\[([a-z,]+)\]"', " ".join(rest for _, rest in instructions()))
    assert extras is not None
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    bin_dir = root / "venv" / "bin"
    subprocess.run([bin_dir / "pip", "install", "--quiet", f"{root / 'src'}[{extras[1]}]"], check=True, timeout=900)
    shutil.rmtree(root / "src")
    make_run(root / "model", checksum_model(), name="sums")

    port, grpc_port = free_port(), free_port()
    start = [part.replace("/run/model", str(root / "model")) for part in command("ENTRYPOINT") + command("CMD")]
    more = ["--port", str(port), "--grpc-port", str(grpc_port)]
    healthy = [bin_dir / "python", *(part.replace(":8000", f":{port}") for part in command("HEALTHCHECK")[1:])]
    # as the image's user, where this one may become it and that one may enter where Python lies
    open_to_all = all(folder.stat().st_mode & 0o001 for folder in Path(sys.executable).resolve().parents)
    user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 and open_to_all else {}
    with (root / "log").open("wb") as log, subprocess.Popen(
        [bin_dir / start[0], *start[1:], *more], stdout=log, stderr=log, cwd="/", env={"PATH": str(bin_dir)}, **user
    ) as server:  # fmt: skip
        try:
            end = time.monotonic() + 60
            while subprocess.run(healthy, capture_output=True, check=False).returncode:
                assert server.poll() is None, (root / "log").read_text()
                assert time.monotonic() < end, (root / "log").read_text()
                time.sleep(0.3)
            socket.create_connection(("127.0.0.1", grpc_port), timeout=10).close()
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0, (root / "log").read_text()
        finally:
            server.kill()
    assert subprocess.run(healthy, capture_output=True, check=False).returncode
    assert all(json.loads(line)["message"] for line in (root / "log").read_text().splitlines())
