"""The search against known answers and against a greedy search, as tables.

python examples/search_benchmark/run.py synthetic [--seeds 20]
python examples/search_benchmark/run.py model MODEL.onnx --data x.npz (--max-drift X | --of-all-half 0.25) [--greedy]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mpdeploy.data_files import load_feeds
from mpdeploy.precision.formats import FORMATS
from mpdeploy.precision.model_io import input_specs, load_model
from mpdeploy.precision.rewrite import prepare
from mpdeploy.precision.search.driver import SearchAnswer, search
from mpdeploy.precision.search.synthetic import SyntheticProblem, synthetic_problem
from mpdeploy.searching import search_model
from mpdeploy.searching.open import OpenedSearch, open_search
from mpdeploy.searching.plan import fixed_reasons

BUDGETS = (0.9, 0.5, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    synthetic = verbs.add_parser("synthetic")
    synthetic.add_argument("--seeds", type=int, default=20)
    synthetic.set_defaults(run=run_synthetic)
    model = verbs.add_parser("model")
    model.add_argument("model", type=Path)
    model.add_argument("--data", required=True)
    model.add_argument("--max-drift", type=float)
    model.add_argument("--of-all-half", type=float, help="the gate, as a share of the drift of everything in half")
    model.add_argument("--cost", default="nodes", choices=("nodes", "traffic"))
    model.add_argument("--greedy", action="store_true", help="also a greedy search over all single nodes")
    model.set_defaults(run=run_model)
    arguments = parser.parse_args()
    arguments.run(arguments)


# ---- synthetic problems: 1000 nodes, 32 samples; mpdeploy.precision.search.synthetic publishes the generator


def run_synthetic(arguments: argparse.Namespace) -> None:
    print(f"N = 1000 units, seeds 0 to {arguments.seeds - 1}; evaluations and kept: median (worst)\n")
    peer = _peer()
    print(f"peer: {'onnxconverter_common.auto_mixed_precision' if peer else 'onnxconverter-common is not installed'}\n")
    header = (
        "problem",
        "optimum",
        "kept",
        "kept / optimum",
        "evaluations",
        "of them proof",
        "peer: kept",
        "evaluations",
    )
    rows = [header]
    for count in (1, 5, 20, 100):
        rows.append(_row(f"{count} traps, pass or fail", arguments.seeds, False, None, num_traps=count))
    for budget in BUDGETS:
        rows.append(_row(f"additive, budget {budget:.0%}", arguments.seeds, True, 60.0, budget=budget))
    rows.append(_row("5 traps + additive 50%", arguments.seeds, True, None, num_traps=5, budget=0.5))
    rows.append(_row("5 pairs, pass or fail", arguments.seeds, False, None, num_pairs=5))
    rows.append(
        _row("5 traps + 5 pairs + additive 50%", arguments.seeds, True, None, num_traps=5, num_pairs=5, budget=0.5)
    )
    if peer is not None:
        peers = [peer(synthetic_problem(seed=0, **options)) for options in _peer_problems()]
        for number, (kept, evaluations) in enumerate(peers, start=1):
            rows[number] = (*rows[number][:-2], str(kept), str(evaluations))
    _print_table(rows)


def _peer_problems() -> list[dict[str, Any]]:
    return [*({"num_traps": count} for count in (1, 5, 20, 100)), *({"budget": budget} for budget in BUDGETS)]


def _row(name: str, seeds: int, parts: bool, max_evaluations: float | None, **options: Any) -> tuple[str, ...]:
    found: list[tuple[int, SearchAnswer]] = []
    for seed in range(seeds):
        problem = synthetic_problem(seed=seed, **options)
        limit = math.inf if max_evaluations is None else max_evaluations
        answer = search(problem, problem if parts else None, max_evaluations=limit)
        assert answer.met, f"{name}, seed {seed}: the gate is not met"
        assert problem.evaluate(answer.kept).passes
        assert problem.traps <= answer.kept
        if not parts:
            assert len(answer.kept) == len(problem.true_answer()), f"{name}, seed {seed}: not exact"
        found.append((len(problem.true_answer()), answer))
    ratios = [len(answer.kept) / best for best, answer in found]
    return (
        name,
        f"{statistics.median(best for best, _ in found):g}",
        _spread([len(answer.kept) for _, answer in found]),
        f"{statistics.median(ratios):.3f} ({max(ratios):.3f})",
        _spread([answer.evaluations for _, answer in found]),
        _spread([answer.by_phase.get("proof", 0.0) for _, answer in found]),
        "-",
        "-",
    )


def _spread(values: list[float] | list[int]) -> str:
    return f"{statistics.median(values):.0f} ({max(values):.0f})"


def _peer() -> Callable[[SyntheticProblem], tuple[int, int]] | None:
    """The search of onnxconverter-common, on the same problems, where it is installed: nodes -> (kept, evaluations)."""
    try:
        from onnxconverter_common.auto_mixed_precision import SegmentList
    except ImportError:
        return None

    def run(problem: SyntheticProblem) -> tuple[int, int]:
        """The loop of `auto_convert_mixed_precision` around its own SegmentList; an attempt is one of our evaluations."""
        segments = SegmentList(list(problem.units))
        count = 0
        while (segment := segments.get_largest()) is not None:
            count += 1
            if problem.evaluate(frozenset(segments.get_nodes(segment))).passes:
                segment.good = True
            elif segment.size == 1:
                segment.bad = True
            else:
                segment.split()
        kept = segments.get_nodes()
        assert problem.evaluate(frozenset(kept)).passes
        return len(kept), count + 1

    return run


# ---- real models


def run_model(arguments: argparse.Namespace) -> None:
    begin, cpu = time.perf_counter(), time.process_time()
    limit = arguments.max_drift
    if limit is None:
        with _opened(arguments, 1.0) as opened:
            limit = arguments.of_all_half * opened.problem.evaluate(frozenset(), until="lost").drift
        begin, cpu = time.perf_counter(), time.process_time()
    found = search_model(arguments.model, data=arguments.data, max_drift=limit, cost=arguments.cost)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    answer = found.answer
    rows = [("", "kept of", "drift", "held out", "evaluations", "seconds", f"CPU seconds / {os.cpu_count()}")]
    rows.append(("all half", f"0 of {found.num_free}", f"{answer.all_half.drift:.3g}", "", "1", "", ""))
    rows.append(
        (
            "search",
            f"{len(answer.kept)} of {found.num_free}",
            f"{found.confirmed.rel_l2:.3g}",
            "" if found.held_out_drift is None else f"{found.held_out_drift:.3g}",
            f"{answer.evaluations:.0f} (proof {answer.by_phase.get('proof', 0):.0f})",
            f"{seconds:.1f}",
            f"{cpu / (os.cpu_count() or 1):.1f}",
        )
    )
    if arguments.greedy:
        begin = time.perf_counter()
        with _opened(arguments, limit) as opened:
            kept, confirmed, evaluations = greedy(opened)
            seconds = time.perf_counter() - begin
            answers = {"greedy over single nodes": kept, "greedy, the gate really met": confirmed}
            for name, answer_of in answers.items():
                drift = opened.problem.confirm(answer_of)
                rows.append(
                    (
                        name,
                        f"{len(answer_of)} of {found.num_free}",
                        f"{drift:.3g}",
                        "",
                        str(evaluations),
                        f"{seconds:.1f}",
                        "",
                    )
                )
    print(
        f"{arguments.model.name}: {found.gate}; met: {found.met}; every kept node shown to be needed: {answer.is_minimal}\n"
    )
    _print_table(rows)
    print()
    for entry in found.entries[:10]:
        print(f"  {entry['node']} ({entry['op']}): {entry['reason']}")
    if len(found.entries) > 10:
        print(f"  ... and {len(found.entries) - 10} more")


@contextmanager
def _opened(arguments: argparse.Namespace, limit: float) -> Iterator[OpenedSearch]:
    half = FORMATS["fp16"]
    loaded = load_model(arguments.model)
    feeds = load_feeds(arguments.data, input_specs(loaded), where=str(arguments.model))
    prepared = prepare(loaded, half)
    with open_search(
        arguments.model, prepared, feeds, half, gate="", limit=limit, cost=arguments.cost,
        fixed=fixed_reasons(prepared.index, half, {}),
    ) as opened:  # fmt: skip
        yield opened


def greedy(opened: OpenedSearch) -> tuple[frozenset[str], frozenset[str], int]:
    """From everything in FP32, put nodes into half, the least harmful single one first, for as long as the gate holds; skip and go on.

    Returns:
        What is kept so that the switchable emulation, which both searches use, meets the gate; what is kept so that the really
        rewritten model does too, which ours must (the last nodes that went half are taken back until it does); and the evaluations.
    """
    problem = opened.problem
    everything = frozenset(problem.units)
    harm = {unit: problem.evaluate(everything - {unit}, until="lost").drift for unit in problem.units}
    kept, evaluations, let_go = everything, len(harm), []
    for unit in sorted(problem.units, key=lambda unit: (np.nan_to_num(harm[unit], posinf=1e30), unit)):
        evaluations += 1
        if problem.evaluate(kept - {unit}).passes:
            kept = kept - {unit}
            let_go.append(unit)
    confirmed = kept
    while problem.confirm(confirmed) > problem.limit:
        evaluations += 1
        confirmed |= {let_go.pop()}
    return kept, confirmed, evaluations


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    main()
