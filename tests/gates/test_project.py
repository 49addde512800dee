"""mpdeploy.toml: gates of a project that only converts."""

import numpy as np
import pytest

from mpdeploy.errors import ConfigError, GateFailedError
from mpdeploy.gates.project import decide_model, find_project_gates, load_project_gates, raise_if_failed
from mpdeploy.measure.drift import drift_of


@pytest.fixture
def project(tmp_path):
    def write(text):
        (tmp_path / "mpdeploy.toml").write_text(text)
        return tmp_path / "mpdeploy.toml"

    return write


@pytest.fixture
def drift():
    def make(noise, nan=False):
        golden = np.random.default_rng(0).normal(size=(50, 8))
        found = golden + noise * np.random.default_rng(1).normal(size=golden.shape)
        if nan:
            found[3, 3] = np.nan
        return drift_of([({"y": golden}, {"y": found})])

    return make


def test_short_and_long_gates_are_read(project):
    gates = load_project_gates(
        project(
            "[gates]\nmax_rel_l2 = 1e-2\nmin_cosine = 0.999\nmax_num_kept = 4\n"
            '[gates.outliers]\nmetric = "worst_sample_rel_l2"\nlimit = 0.05\nadvisory = true\n'
        )
    )
    assert [(gate.id, gate.metric, gate.limit, gate.advisory) for gate in gates] == [
        ("max_rel_l2", "rel_l2", 0.01, False),
        ("min_cosine", "cosine", 0.999, False),
        ("max_num_kept", "num_kept", 4.0, False),
        ("outliers", "worst_sample_rel_l2", 0.05, True),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gates]\nrel_l2 = 1e-2", "closest names: max_rel_l2"),
        ("[gates]\nmax_rel_12 = 1e-2", "closest names: max_rel_l2"),
        ("[gates]\nmin_rel_l2 = 1e-2", "the limit of rel_l2 is the largest value allowed, not a min"),
        ("[gates]\nmax_cosine = 0.9", "the smallest value allowed, not a max"),
        ('[gates]\nmax_rel_l2 = "small"', "must be a number, found 'small'"),
        ("[gates]\nmax_rel_l2 = true", "must be a number"),
        ("[gates]\nmax_score_drop = 0.01", "score_drop is not known of a converted model"),
        ('[gates.a]\nmetric = "rel_l2"', "limit: Field required"),
        ('[gates.a]\nmetric = "rel"\nlimit = 1', "there is no metric 'rel'"),
        ('[gates.a]\nmetric = "rel_l2"\nlimit = 1\nat = "x"', "no meaning for one model"),
        ("gates = 3", "'gates' is no table"),
        ("[gates", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write(project, text, says):
    with pytest.raises(ConfigError) as caught:
        load_project_gates(project(text))
    assert says in str(caught.value)


def test_all_faults_are_reported_at_once(project):
    with pytest.raises(ConfigError, match=r"(?s)gates\.a_rel_l2.*gates\.max_cosine"):
        load_project_gates(project("[gates]\na_rel_l2 = 1\nmax_cosine = 1"))


def test_the_nearest_file_counts_up_to_the_root_of_the_repository(project, tmp_path):
    project("[gates]\nmax_rel_l2 = 1e-2")
    inner = tmp_path / "repository" / "models"
    inner.mkdir(parents=True)
    assert find_project_gates(inner).path == tmp_path / "mpdeploy.toml"
    (tmp_path / "repository/.git").mkdir()
    assert find_project_gates(inner) is None
    (inner.parent / "mpdeploy.toml").write_text("[tool]\n")
    assert find_project_gates(inner) is None


@pytest.mark.parametrize(
    ("noise", "nan", "failing"),
    [(1e-3, False, []), (0.1, False, ["max_rel_l2"]), (1e-3, True, ["max_num_nonfinite", "max_rel_l2"])],
)
def test_a_model_is_decided(project, drift, noise, nan, failing):
    gates = load_project_gates(project("[gates]\nmax_num_nonfinite = 0\nmax_rel_l2 = 1e-2\nmax_num_kept = 4"))
    verdicts = decide_model(gates, drift(noise, nan), at="model.fp16.onnx", facts={"num_kept": 4})
    assert [each.id for each in verdicts if each.verdict == "fail"] == failing
    assert len(verdicts) == 3


def test_a_gate_on_drift_without_data_fails_and_says_so(project):
    gates = load_project_gates(project("[gates]\nmax_rel_l2 = 1e-2\nmax_num_kept = 4"))
    verdicts = decide_model(gates, None, facts={"num_kept": 2})
    assert [each.verdict for each in verdicts] == ["fail", "pass"]
    with pytest.raises(GateFailedError, match="a missing metric is never a pass"):
        raise_if_failed(verdicts, project(""))


def test_what_passed_raises_nothing_and_an_advisory_gate_neither(project, drift):
    path = project('[gates.a]\nmetric = "rel_l2"\nlimit = 1e-9\nadvisory = true\n')
    verdicts = decide_model(load_project_gates(path), drift(0.1))
    assert verdicts[0].verdict == "fail"
    assert raise_if_failed(verdicts, path) == "inconclusive"
    assert raise_if_failed([], path) == "pass"
