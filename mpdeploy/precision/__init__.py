"""The rewriter: an FP32 ONNX graph becomes a strictly typed half-precision one, and says what that costs.

    op_rules.py    one table: one row an op, with its reason
    graph_index.py every node, value and body of a model, indexed once; names for nodes that have none
    schema.py      what the ONNX schemas admit, per op and opset
    ranges.py      streamed statistics per tensor
    constants.py   what rounding does to a constant
    keep_list.py   the user's names, globs and op types
    plan.py        keep-list + rules + ranges -> PrecisionPlan; every kept node has a reason
    borders.py     the cheapest set of casts: a minimum cut
    passes/        one small onnx_ir pass a file
    rewrite.py     the passes in their order
    verify.py      strict types and the checker, before a file is written
    emulate.py     a mixed model as an FP32 model that rounds as the hardware does
    positions.py   arithmetic on positions, which must not be rounded
    blame.py       which nodes made the drift
    search*.py     the smallest keep-list that meets a gate: search.py drives, _hard finds traps, _soft spends the budget,
                   _graph is one emulation in which every rounding is a switch, _cost prices, _state logs and resumes

It is given statistics and a way to run a model; it imports no runtime.
"""
