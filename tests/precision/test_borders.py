"""Where casts go: the cheapest set, by a minimum cut."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from mpdeploy.precision.borders import CAST_BYTES, half_units
from mpdeploy.precision.flow import Edge, Flow, Unit
from mpdeploy.precision.keep_list import match_keep_list, read_patterns
from mpdeploy.precision.plan import make_plan
from mpdeploy.precision.rewrite import prepare
from tests.precision.visible import FP16, W, X, converted, graph, named, plan_of

ISLAND = "g (float[N, 8] x) => (float[N, 8] y) { a = Exp(x)  b = Sigmoid(a)  y = Exp(b) }"


def test_an_island_that_costs_more_than_it_saves_goes_to_fp32_and_says_so() -> None:
    done = converted(named(graph(ISLAND)), keep=["a", "y"])
    assert "b" not in done.half
    assert done.why("b") == "border: half precision here would cost more in casts than it saves"
    assert not any("Cast" in line for line in done.lines)


def test_an_island_that_saves_as_much_as_its_casts_cost_stays_half() -> None:
    """Each node saves 2 bytes a value on its input and on its output; the two casts cost 6 each."""
    three = "g (float[N, 8] x) => (float[N, 8] y) { a = Exp(x)  b = Sigmoid(a)  c = Tanh(b)  d = Neg(c)  y = Exp(d) }"
    assert plan_of(named(graph(three)), keep=["a", "y"])[1].half_nodes == ["b", "c", "d"]
    assert plan_of(named(graph(three)), keep=["a", "d", "y"])[1].half_nodes == []


def test_at_equal_cost_half_wins() -> None:
    flow = _flow([0, 12, 0], [(0, 1, 1), (1, 2, 1)], fixed=[0, 2])
    assert half_units(flow) == {"u1"}
    assert half_units(_flow([0, 11, 0], [(0, 1, 1), (1, 2, 1)], fixed=[0, 2])) == set()


def test_what_is_fixed_in_addition_lets_nothing_else_become_half() -> None:
    """Also where capacities are scaled to integers, and many labellings cost the same."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = 12
        sizes = rng.integers(1, 4, 2 * count) * 3_333_333
        edges = [
            (int(a), int(b), int(s))
            for (a, b), s in zip(rng.integers(0, count, (2 * count, 2)), sizes, strict=True)
            if a < b
        ]
        gains = (rng.integers(0, 5, count) * 9_999_999).tolist()
        fixed = rng.choice(count, 2, replace=False).tolist()
        more = [*fixed, *rng.choice([u for u in range(count) if u not in fixed], 2, replace=False).tolist()]
        few, many = half_units(_flow(gains, edges, fixed=fixed)), half_units(_flow(gains, edges, fixed=more))
        assert many <= few
        # what is FP32 already changes nothing when it is said to be
        kept = [unit for unit in range(count) if f"u{unit}" not in few]
        assert half_units(_flow(gains, edges, fixed=kept)) == few


def test_a_matrix_product_is_never_flipped() -> None:
    done = converted(
        named(graph("g (float[N, 8] x) => (float[N, 8] y) { a = Exp(x)  m = MatMul(a, w)  y = Exp(m) }", w=W)),
        keep=["a", "y"],
    )
    assert done.half == ["m"]
    assert [line for line in done.lines if "Cast" in line] == [
        "a_to_float16 = Cast<FLOAT16>(a)",
        "m_to_float = Cast<FLOAT>(m)",
    ]


def test_a_tensor_with_three_consumers_pays_one_cast() -> None:
    """Three consumers of one FP32 tensor: each alone would not pay its cast, all together do."""
    edges = [(0, 1, 1), (0, 2, 1), (0, 3, 1)]
    shared = Flow()
    for number, gain in enumerate([0, 3, 3, 3]):
        shared.add(Unit(f"u{number}", gain=float(gain), fixed=number == 0))
    shared.edges = [Edge(None, 0, consumers=[1, 2, 3], size=1)]  # type: ignore[arg-type]
    assert half_units(shared) == {"u1", "u2", "u3"}
    assert half_units(_flow([0, 3, 3, 3], edges, fixed=[0])) == set(), "as three tensors, each pays its own cast"


def test_inputs_and_outputs_that_the_user_wants_in_fp32_cost_nothing() -> None:
    one = "g (float[N, 8] x) => (float[N, 8] y) { y = Exp(x) }"
    assert plan_of(named(graph(one)), float_io=["x", "y"])[1].half_nodes == ["y"]


def test_a_model_without_a_border_is_half_as_a_whole() -> None:
    assert plan_of(named(graph(ISLAND)))[1].half_nodes == ["a", "b", "y"]


def test_a_loop_carries_fp32_and_an_if_may_carry_half() -> None:
    loop = """g (float[N, 8] x, int64 n, bool c) => (float[N, 8] y) {
      h = MatMul(x, w)
      l = Loop(n, c, h) < body = b (int64 i, bool d, float[N, 8] p) => (bool e, float[N, 8] q) {
        e = Identity(d)  m = MatMul(p, w)  q = Tanh(m) } >
      y = MatMul(l, w) }"""
    done = converted(graph(loop, w=W))
    assert any("Cast<FLOAT16>(p)" in line for line in done.lines)
    branch = """g (float[N, 8] x, bool c) => (float[N, 8] y) {
      h = MatMul(x, w)
      l = If(c) < then_branch = a () => (float[N, 8] p) { p = MatMul(h, w) }, else_branch = b () => (float[N, 8] q) { q = Neg(h) } >
      y = MatMul(l, w) }"""
    assert not any("Cast" in line for line in converted(graph(branch, w=W)).lines)


def _flow(gains: list[float], edges: list[tuple[int, int, float]], fixed: list[int]) -> Flow:
    flow = Flow()
    for number, gain in enumerate(gains):
        flow.add(Unit(f"u{number}", gain=float(gain), fixed=number in fixed))
    flow.edges = [Edge(None, a, consumers=[b], size=size) for a, b, size in edges]  # type: ignore[arg-type]
    return flow


def _cost(flow: Flow, half: set[int]) -> float:
    """What a labelling costs by definition: lost gains, and one cast a tensor and direction."""
    cost = sum(unit.gain for number, unit in enumerate(flow.units) if number not in half and not unit.fixed)
    for edge in flow.edges:
        made_half = edge.producer in half and not edge.always_float
        takers = [unit in half for unit in set(edge.consumers)] + [False] * edge.float_consumers
        cost += CAST_BYTES * edge.size * any(taker != made_half for taker in takers)
    return cost


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_is_as_cheap_as_the_best_of_all_labellings_and_half_where_it_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(4, 10))
    flow = Flow()
    for number in range(count):
        flow.add(Unit(f"u{number}", gain=float(rng.integers(0, 9) * 4), fixed=bool(rng.random() < 0.3)))
    for producer in range(count - 1):
        later = rng.permutation(np.arange(producer + 1, count))[: rng.integers(1, 4)]
        flow.edges.append(
            Edge(
                None,  # type: ignore[arg-type]
                producer,
                always_float=bool(rng.random() < 0.1),
                consumers=[int(unit) for unit in later],
                float_consumers=bool(rng.random() < 0.15),
                size=float(rng.integers(1, 4)),
            )
        )
    free = [number for number, unit in enumerate(flow.units) if not unit.fixed]
    every = [set(chosen) for size in range(len(free) + 1) for chosen in itertools.combinations(free, size)]
    costs = [_cost(flow, chosen) for chosen in every]
    found = {flow.of_key[key] for key in half_units(flow)}
    assert _cost(flow, found) == pytest.approx(min(costs))
    most = max(len(chosen) for chosen, cost in zip(every, costs, strict=True) if cost == min(costs))
    assert len(found) == most


def test_the_mixed_model_pays_exactly_the_casts_of_the_cut() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  a = Exp(h)  b = Tanh(h)  s = Add(a, b)  y = MatMul(s, w) }"
    done = converted(named(graph(text, w=W)), keep=["a", "b", "s"], keep_io=True)
    assert sum("Cast" in line for line in done.lines) == 4
    assert np.isfinite(done.emulated({"x": X})[0]).all()
    assert done.plan.half is FP16


# ---- shapes are inferred only where they weigh something

LONG = "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w)  b = Exp(a)  c = Softmax(b)  d = Neg(c)  y = MatMul(d, w) }"


@pytest.mark.parametrize("kept", [(), ("b",), ("b", "d")])
def test_a_plan_is_the_same_whether_shapes_are_inferred_before_or_when_they_matter(kept: tuple[str, ...]) -> None:
    before = prepare(named(graph(LONG, w=W)), FP16)
    later = prepare(named(graph(LONG, w=W)), FP16, shapes=False)
    assert before.has_shapes
    assert not later.has_shapes
    plans = [
        make_plan(
            p.index,
            FP16,
            keep=match_keep_list(p.index, read_patterns(kept), model_name="g"),
            infer_shapes=p.infer_shapes,
        )
        for p in (before, later)
    ]
    assert plans[0] == plans[1]
    assert later.has_shapes == bool(kept), "sizes weigh casts, and without FP32 there is none"


def test_shapes_that_a_file_declares_are_never_taken_on_trust() -> None:
    model = named(graph(LONG, w=W))
    next(iter(model.graph)).outputs[0].shape = ir.Shape([3, 99])
    prepared = prepare(model, FP16, shapes=False)
    assert prepared.has_shapes
    assert next(iter(prepared.model.graph)).outputs[0].shape != ir.Shape([3, 99])
