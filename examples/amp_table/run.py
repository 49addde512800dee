"""FP32 against mixed precision for three trainings: one command, one table, medians and ratios of one run.

    python run.py [--quick] [--only digits,mnist,minilm] [--epochs N] [--seeds N] [--steps N] [--output DIR]

Writes amp_table.json and amp_table.md. Run it from a checkout: the trainings are those of `pipelines/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(os.environ.get("MPDEPLOY_REPO", Path(__file__).resolve().parents[2]))

from measure import (  # noqa: E402
    BareLoop,
    chosen_by_auto,
    excess_zeros,
    in_turns,
    loop_overhead,
    paired_seeds,
    peak_bytes,
    print_peak,
)

from mpdeploy.artifact import Dataset  # noqa: E402
from mpdeploy.config import DEFAULT_GATES, load_pipeline  # noqa: E402
from mpdeploy.environment import cpu_flags, hardware_key, package_versions  # noqa: E402
from mpdeploy.errors import MpdeployError  # noqa: E402
from mpdeploy.train.precision import PrecisionChoice, pick_device  # noqa: E402
from mpdeploy.train.splits import Splits  # noqa: E402

PIPELINES = {"digits": "digits_cnn.py", "mnist": "mnist_cnn.py", "minilm": "text_classifier.py"}
LOST_GRADIENTS = next(gate.limit for gate in DEFAULT_GATES if gate.metric == "excess_zero_gradients")
COLUMNS = (
    "training", "batch", "step FP32 ms", "step AMP ms", "AMP / FP32", "auto takes", "saved activations MB", "peak memory MB",
    "lost gradients AMP", "lost gradients, control", "accuracy FP32 %", "accuracy AMP %", "held-out loss", "loop / bare loop",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One row: a pipeline's training with its data."""

    config: Any
    splits: Splits
    metric: Any
    data: str


def digits_at_28() -> Splits:
    """scikit-learn's digits, enlarged to 28x28: MNIST's shape where its files are not at hand."""
    digits = load_pipeline(ROOT / "pipelines" / PIPELINES["digits"]).data
    splits = digits.load(digits)

    def enlarged(part: Dataset) -> Dataset:
        images = torch.nn.functional.interpolate(torch.from_numpy(part.inputs["image"]), (28, 28), mode="bilinear")
        return Dataset({"image": images.numpy()}, part.ids, part.labels)

    return Splits(*(enlarged(getattr(splits, name)) for name in ("train", "early_stopping", "calibration", "gate")))


def training_of(name: str, arguments: argparse.Namespace) -> Training:
    """The pipeline's training; `--quick` takes a few samples and one epoch."""
    pipeline = load_pipeline(ROOT / "pipelines" / PIPELINES[name])
    data = "scikit-learn's digits" if name == "digits" else "docstrings of Python's library"
    if name == "mnist" and arguments.mnist is None:
        splits, data = digits_at_28(), "scikit-learn's digits, enlarged to 28x28"
    else:
        folder = {"folder": arguments.mnist} if name == "mnist" else {}
        splits = pipeline.data.load(pipeline.data.model_copy(update=folder))
        data = f"MNIST from {Path(arguments.mnist).name}" if name == "mnist" else data
    if arguments.samples:
        splits = Splits(
            splits.train.take(slice(0, arguments.samples)), splits.early_stopping, splits.calibration, splits.gate
        )
    epochs = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    return Training(pipeline.train.model_copy(update=epochs), splits, pipeline.validation.metric, data)


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one row."""
    row = training_of(name, arguments)
    device = pick_device(row.config)
    fp32, amp = (PrecisionChoice(precision, device, "the table", {}) for precision in ("fp32", half_of(device)))
    say(f"{name}: steps in turns")
    loops = [BareLoop(row.config, choice, row.splits) for choice in (fp32, amp)]
    value: dict[str, Any] = {
        "data": row.data, "train_samples": len(row.splits.train), "batch_size": row.config.batch_size,
        "epochs": row.config.epochs, "device": device, "amp": amp.precision,
        "step": in_turns(loops[0].step, loops[1].step, arguments.steps),
        "auto": chosen_by_auto(row.config, {loop.choice.precision: loop for loop in loops}),
        "excess_zeros": excess_zeros(row.config, amp, row.splits),
        "saved_bytes": [loop.saved_bytes() for loop in loops],
    }  # fmt: skip
    say(f"{name}: peak memory")
    common = [
        str(Path(__file__).resolve()),
        "--peak-of",
        name,
        *(["--mnist", arguments.mnist] if arguments.mnist else []),
    ]
    common += ["--samples", str(arguments.samples)]
    value["peak_bytes"] = [peak_bytes([*common, "--precision", choice.precision]) for choice in (fp32, amp)]
    say(f"{name}: the loop against a bare one")
    value["loop"] = loop_overhead(row.config, fp32, row.splits, arguments.steps)
    if arguments.seeds:
        say(f"{name}: {arguments.seeds} paired seeds of {row.config.epochs} epochs")
        value["seeds"] = paired_seeds(row.config, amp, row.splits, row.metric, arguments.seeds)
    return value


def half_of(device: str) -> str:
    """What AMP means there: FP16 with a loss scaler on CUDA, BF16 on a CPU."""
    return "fp16" if device == "cuda" else "bf16"


def markdown(report: dict[str, Any]) -> str:
    """The table with what it rests on."""
    lines = [
        f"{report['hardware']}, {report['date']}; `{report['command']}`",
        f"Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}; "
        f"{report['threads']} threads; {report['bf16_units']}",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for name, row in report["rows"].items():
        if "missing" in row:
            lines.append(f"| {name} | {row['missing']} |" + " |" * (len(COLUMNS) - 2))
            continue
        step, loop, seeds = row["step"], row["loop"], row.get("seeds")
        mega = [value / 1e6 for value in (*row["saved_bytes"], *row["peak_bytes"])]
        cells = [
            f"{name} ({row['amp']})", str(row["batch_size"]), f"{step['a_ms']:.1f}", f"{step['b_ms']:.1f}",
            ratio(step), row["auto"]["precision"], change(mega[0], mega[1]), change(mega[2], mega[3]),
            *(judged(row["excess_zeros"][side]) for side in ("amp", "control")),
            *(mean_and_spread(seeds[side]) if seeds else "-" for side in ("fp32", "amp")),
            seeds["verdict"] if seeds else "-", ratio(loop),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, row in report["rows"].items():
        if "data" in row:
            lines.append(
                f"- {name}: {row['data']}, {row['train_samples']:,} training samples, {row['epochs']} epoch{'s' * (row['epochs'] != 1)}."
            )
            lines += [
                f"  - {message}" for message in (row["auto"]["reason"], *row.get("seeds", {}).get("messages", []))
            ]
    return "\n".join(lines) + "\n"


def ratio(found: dict[str, Any]) -> str:
    """`0.52 [0.50, 0.55]`."""
    return f"{found['ratio']:.3g} [{found['interval'][0]:.3g}, {found['interval'][1]:.3g}]"


def judged(share: float) -> str:
    """`46 % (fail)`: tier 0's verdict on a share of lost gradients."""
    return f"{100 * share:.3g} % ({'fail' if share > LOST_GRADIENTS else 'pass'})"


def change(before: float, after: float) -> str:
    """`120 -> 70 (-42 %)`."""
    share = f" ({100 * (after / before - 1):+.0f} %)" if before > 0 else ""
    return f"{before:.3g} -> {after:.3g}{share}"


def mean_and_spread(scores: list[float]) -> str:
    """In percent, with the standard deviation over seeds."""
    return f"{100 * np.mean(scores):.2f} ± {100 * np.std(scores, ddof=1):.2f}"


def say(text: str) -> None:
    """To the error stream: the table alone goes to the output."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="digits alone, a few steps: shows that it runs, measures nothing"
    )
    parser.add_argument("--only", help="comma-separated: digits, mnist, minilm")
    parser.add_argument("--epochs", type=int, help="of the paired seeds; the pipelines' own where not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="timed steps for each side")
    parser.add_argument("--samples", type=int, default=0, help="training samples at most; 0: all")
    parser.add_argument("--mnist", help="a folder with MNIST's IDX files")
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        row = training_of(arguments.peak_of, arguments)
        print_peak(row.config, PrecisionChoice(arguments.precision, pick_device(row.config), "", {}), row.splits)
        return
    if arguments.quick:
        arguments.only, arguments.epochs, arguments.steps, arguments.samples = "digits", 1, 10, 192
    flags = sorted(cpu_flags() & {"amx_bf16", "avx512_bf16", "avx512_fp16"})
    rows: dict[str, Any] = {}
    report = {
        "hardware": hardware_key(), "date": time.strftime("%Y-%m-%d"), "versions": package_versions(),
        "command": f"python run.py {shlex.join(sys.argv[1:])}".strip(), "threads": torch.get_num_threads(),
        "bf16_units": f"the CPU computes in {', '.join(flags)}" if flags else "the CPU has no BF16 or FP16 units", "rows": rows,
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(",") if arguments.only else PIPELINES:
        try:
            rows[name] = measured(name, arguments)
        except MpdeployError as error:
            rows[name] = {"missing": error.message.splitlines()[0]}
        # after each row: a run of hours that is stopped has measured something
        (arguments.output / "amp_table.json").write_text(json.dumps(report, indent=2) + "\n")
        (arguments.output / "amp_table.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
