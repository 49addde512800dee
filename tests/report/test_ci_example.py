"""examples/ci_gate: the commands of the GitHub action and of the GitLab job are run as those services run them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ci_gate"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ci")
    subprocess.run([sys.executable, str(EXAMPLE / "make_runs.py")], cwd=folder, check=True)
    return folder / "runs"


@pytest.fixture
def run_script(tmp_path, runs):
    """Run a script in a folder that holds copies of the runs."""
    shutil.copytree(runs, tmp_path / "runs")

    def run(script, shell=("bash", "--noprofile", "--norc", "-eo", "pipefail"), **variables):
        (tmp_path / "script.sh").write_text(script)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **variables}
        return subprocess.run(
            [*shell, "script.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


def _filled(text, inputs):
    found = re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda match: inputs[match.group(1)], str(text))
    assert "${{" not in found
    return found


def _action(run_script, tmp_path, **given):
    """Do what GitHub does with a composite action: (exit code of the job, outputs, log)."""
    action = yaml.safe_load((EXAMPLE / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    inputs = {name: given.get(name, item.get("default", "")) for name, item in action["inputs"].items()}
    output, summary = tmp_path / "output", tmp_path / "summary.md"
    output.touch()
    code, log = 0, ""
    for step in action["runs"]["steps"]:
        if "run" not in step or (code and step.get("if") != "always()"):
            continue
        variables = {name: _filled(value, inputs) for name, value in step.get("env", {}).items()}
        assert "${{" not in step["run"], "an input must reach a script as a variable"
        done = run_script(
            step["run"], GITHUB_ACTIONS="true", GITHUB_OUTPUT=str(output), GITHUB_STEP_SUMMARY=str(summary), **variables
        )
        code, log = code or done.returncode, log + done.stdout + done.stderr
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return code, outputs, log, summary


@pytest.mark.parametrize(
    ("run", "strict", "code", "verdict"),
    [
        ("good", "false", 0, "pass"),
        ("drifted", "false", 10, "fail"),
        ("too_few", "false", 0, "inconclusive"),
        ("too_few", "true", 11, "inconclusive"),
    ],
)
def test_the_github_action_passes_on_the_verdict(run_script, tmp_path, run, strict, code, verdict):
    found, outputs, log, summary = _action(run_script, tmp_path, run=f"runs/{run}", strict=strict)
    assert (found, outputs) == (code, {"verdict": verdict}), log
    assert ("::error " in log) is (verdict == "fail")
    assert ("::warning " in log) is (verdict == "inconclusive")
    assert verdict.upper() in summary.read_text()
    assert summary.read_text().count("## ") == 1  # once, though two commands ran
    for name in ("report.html", "junit.xml", "gate.json"):
        assert (tmp_path / "runs" / run / name).is_file()  # written whatever the verdict


def test_the_github_action_says_no_verdict_where_none_was_reached(run_script, tmp_path):
    shutil.copy(tmp_path / "runs/good/evidence/engine-tensorrt.npz", tmp_path / "runs/drifted/evidence")
    (tmp_path / "runs/drifted/gate.json").write_text('{"verdict": "pass"}')  # of an earlier decision
    code, outputs, log, _ = _action(run_script, tmp_path, run="runs/drifted")
    assert (code, outputs) == (12, {}), log


def test_a_run_whose_name_is_a_command_is_only_a_name(run_script, tmp_path):
    code, _, log, _ = _action(run_script, tmp_path, run='runs/"; touch owned; "')
    assert code == 2, log
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_the_action_compares_with_a_baseline(run_script, tmp_path):
    promote = "mpdeploy baseline promote runs/good --reason 'first release' --file base.json"
    run_script("mpdeploy gate runs/good")
    assert run_script(promote).returncode == 0
    assert _action(run_script, tmp_path, run="runs/good", baseline="base.json")[0] == 0
    assert _action(run_script, tmp_path, run="runs/too_few", baseline="base.json")[0] == 12


@pytest.mark.parametrize(("run", "code"), [("good", 0), ("drifted", 10), ("too_few", 11)])
def test_the_gitlab_job_passes_on_the_verdict(run_script, tmp_path, run, code):
    job = yaml.safe_load((EXAMPLE / "gitlab-ci.yml").read_text())["mpdeploy-gate"]
    done = run_script("\n".join(job["script"]), RUN=f"runs/{run}")
    assert done.returncode == code, done.stderr
    assert run_script("\n".join(job["after_script"]), RUN=f"runs/{run}").returncode == 0
    for path in (*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]):
        assert (tmp_path / path.replace("$RUN", f"runs/{run}")).is_file()
    assert job["allow_failure"]["exit_codes"] == [11]


def test_the_workflow_uses_the_action_with_inputs_that_it_has():
    workflow = yaml.safe_load((EXAMPLE / "workflow.yml").read_text())
    action = yaml.safe_load((EXAMPLE / "action.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    (use,) = [step for step in steps if step.get("uses", "").endswith("mpdeploy-gate")]
    assert set(use["with"]) <= set(action["inputs"])
    assert workflow["jobs"]["gate"]["needs"] == "measure"


def test_the_gates_of_the_readme_are_gates():
    (block,) = re.findall(r"```python\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    made = {}
    exec(block, made)
    assert {gate.id for gate in made["gates"]} >= {"accuracy", "mlperf-99", "f1", "each-class", "noise"}
    assert made["validation"].noise_floor_seeds == 3
