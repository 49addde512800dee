"""The training section: what is known is drawn, what is not known is listed, and nothing breaks the page."""

import pytest

from mpdeploy.files import write_json
from mpdeploy.report.html import render_html
from mpdeploy.report.training import training_section
from mpdeploy.run_dir import StageRecord

HISTORY = [
    {"epoch": n, "loss": 2.0 / n, "loss_scale": 65536.0, "num_skipped": 0, "precision": "fp16", "grad_spread": 0.1 * n}
    for n in range(1, 5)
]
REPORT = {
    "choice": {"precision": "fp16", "device": "cuda", "reason": "auto on CUDA", "step_ms": {}},
    "history": HISTORY,
    "reference_history": HISTORY[:2],
    "num_steps": 40,
    "num_skipped": 2,
    "skipped_steps": [3, 17],
    "loss_scales": [[0, 65536.0], [3, 32768.0], [17, 16384.0]],
    "step_ms": 2.0,
    "reference_step_ms": 4.0,
    "gradient_norm": {"median": 1.5, "largest": 9.0},
    "memory": {"saved_activations": 1e6},
    "reference_memory": {"saved_activations": 2e6},
    "precision_events": [{"step": 9, "from": "fp16", "to": "fp32", "reason": "three skips in a row"}],
    "gradient_parity": [{"cosines": {"head.weight": 0.5, "body.weight": 0.999}, "excess_zeros": {"head.weight": 0.25}}],
    "excess_zero_gradients": 0.25,
    "health": {"shadow_backward": [{"step": 17, "loss_scale": 1.0, "flushed": 0.25, "proposed_scale": 1024.0}]},
    "parity": {
        "tier": 2,
        "num_seeds": 3,
        "verdict_at": {"3": "pass"},
        "nll": {
            "reference_by_seed": [0.5, 0.52, 0.51],
            "candidate_by_seed": [0.51, 0.52, 0.5],
            "reference_spread": 0.01,
            "difference": 0.001,
        },
        "churn": {"amp": [0.01, 0.02], "seeds": [0.05], "num_flips": 12},
    },
    "pruning": {
        "method": "magnitude",
        "sparsity": 0.5,
        "dense": {"score": 0.9, "gzip_bytes": 1000},
        "pruned": {"score": 0.89, "gzip_bytes": 600},
        "layers": {"head": 0.5},
        "measured_on": "180 samples",
    },
    "moon_phase": {"name": "waxing", "share": 0.75},
}


@pytest.fixture
def section(make_run):
    def make(report):
        run = make_run()
        run.directory.put(StageRecord("10-train", "done", {}, report=report))
        return training_section(run.directory), run

    return make


def test_every_known_fact_is_drawn_and_an_unknown_one_is_listed(section):
    found, run = section(REPORT)
    assert found is not None
    titles = [card["title"] for card in found["cards"]]
    assert titles == ["training loss", "grad spread", "loss scale by step"]
    facts = dict(found["facts"])
    assert facts["skipped steps"] == "2 of 40: 3, 17"
    assert facts["median step"] == "2 ms, 0.50 times FP32's 4 ms"
    assert facts["activations kept for backward"] == "1.0 MB, 0.50 times FP32's"
    assert facts["loss scale (powers of two)"] == "65,536 in every epoch", "a flat line needs no chart"
    assert found["events"] == ["step 9: fp16 → fp32, three skips in a row"]
    assert found["tables"][0]["rows"][0] == ["head.weight", "0.5", "25 %"], "the worst parameter first"
    assert found["tables"][1]["rows"] == [["17", "1", "25 %", "1,024"]]
    assert found["parity"]["num_seeds"] == 3
    assert "pass with 3 seeds" in found["parity"]["lines"][0]
    assert found["pruning"]["rows"][0] == ["score", "0.9", "0.89"]
    assert found["other"] == [("moon_phase.name", "waxing"), ("moon_phase.share", "0.75")]
    page = render_html(run.directory, run.gate)
    for text in ("loss scale by step", "AMP less FP32: 0.001", "Pruning: magnitude, 50 % asked for", "moon_phase.name"):
        assert text in page


@pytest.mark.parametrize(
    "change",
    [
        {"history": "none"}, {"history": [{"epoch": "x", "loss": None}]}, {"loss_scales": [["a"], 3, [1, "b"]]},
        {"gradient_parity": [{"cosines": 3}]}, {"health": []}, {"health": {"shadow_backward": [{}]}},
        {"parity": "pass"}, {"parity": {"nll": {"reference_by_seed": 1}}}, {"pruning": {"method": "x"}},
        {"pruning": {"method": "x", "dense": 3, "layers": {"a": None}}}, {"memory": None}, {"step_ms": "nan"},
        {"choice": None}, {"precision_events": [{"note": "odd"}]}, {"gradient_norm": 3}, {"fp32_modules": ["a"] * 99},
    ],
)  # fmt: skip
def test_facts_of_another_shape_leave_the_page_whole(section, change):
    _, run = section({**REPORT, **change})
    assert "</html>" in render_html(run.directory, run.gate)


def test_a_run_that_trained_nothing_says_so(make_run):
    run = make_run()
    run.directory.drop("10-train")
    assert training_section(run.directory) is None


def test_exponents_of_the_training_are_drawn_from_health_json(section, make_run):
    _, run = section(REPORT)
    exponents = {"zeros": 0, "not_finite": 0, "exponents": {"-30": 5, "-3": 100}}
    write_json(
        run.directory.folder("10-train") / "health.json", {"health": {"gradient_exponents": {"head.weight": exponents}}}
    )
    found = training_section(run.directory)
    assert found is not None
    (card,) = found["histograms"]
    assert card["caption"] == "gradient, from 2^-30 to 2^-3"
    assert "x-lost" in card["chart"], "2^-30 becomes zero in FP16"
