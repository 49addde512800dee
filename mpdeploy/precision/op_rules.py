"""What is known about ops beyond their schemas: one table, one row an op, each with its reason.

Whether an op *has* a half form at all is read from its ONNX schema (`schema.py`). This table adds what schemas do not say, and every row
matters: without it some model drifts, or is refused (tests/precision/test_op_rows_matter.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from mpdeploy.precision.formats import HalfFormat


@dataclass(frozen=True, slots=True)
class OpRule:
    """One op.

    Attributes:
        op: its type; `domain` is the default one.
        keep: always FP32.
        keep_with_input: FP32 where one of these inputs is given.
        keep_in: FP32 where these formats are asked for.
        float_inputs: input positions whose tensors stay FP32 although the schema admits half there.
        reason: why.
    """

    op: str
    reason: str
    keep: bool = False
    keep_with_input: tuple[int, ...] = ()
    keep_in: tuple[str, ...] = ()
    float_inputs: tuple[int, ...] = ()


OP_RULES: tuple[OpRule, ...] = (
    OpRule("CumSum", keep=True, reason="each value is a running sum: rounding adds up along the axis"),
    OpRule(
        "LogSoftmax",
        keep_in=("fp16",),
        reason="TensorRT takes the logarithm of a Softmax stored in half: what is below 6e-8 becomes minus infinity",
    ),
    OpRule("Resize", float_inputs=(1, 2), reason="roi and scales are coordinates: TensorRT and ONNX Runtime want FP32"),
    OpRule("RandomNormal", keep=True, reason="no half kernel in ONNX Runtime"),
    OpRule("RandomUniform", keep=True, reason="no half kernel in ONNX Runtime"),
    OpRule("RandomNormalLike", keep_in=("bf16",), reason="TensorRT's parser makes no random numbers in BF16"),
    OpRule("RandomUniformLike", keep_in=("bf16",), reason="TensorRT's parser makes no random numbers in BF16"),
    # Quantisation: scales decide the integers, and TensorRT fuses Q/DQ pairs only when their scales stay as trained.
    OpRule("QuantizeLinear", keep=True, reason="a rounded scale moves the integers"),
    OpRule("DequantizeLinear", keep=True, reason="a rounded scale moves every value"),
    # Coordinates, and ops without a half kernel.
    OpRule("RoiAlign", keep=True, reason="regions are coordinates: integers above 2048 are not exact in FP16"),
    OpRule("GridSample", keep=True, reason="its grid holds coordinates: FP16 moves them by pixels"),
    OpRule("EyeLike", keep=True, reason="no half kernel in ONNX Runtime, and nothing to gain"),
    OpRule(
        "LSTM",
        keep_with_input=(4,),
        reason="with sequence_lens, TensorRT's parser masks in FP32 and refuses half states",
    ),
    OpRule(
        "GRU",
        keep_with_input=(4,),
        keep_in=("bf16",),
        reason="with sequence_lens, TensorRT's parser masks in FP32 and refuses half states; BF16 ones always",
    ),
    OpRule(
        "RNN",
        keep_with_input=(4,),
        reason="with sequence_lens, TensorRT's parser masks in FP32 and refuses half states",
    ),
    OpRule("BlackmanWindow", keep=True, reason="TensorRT's parser makes it in FP32 only"),
    OpRule("HammingWindow", keep=True, reason="TensorRT's parser makes it in FP32 only"),
    OpRule("HannWindow", keep=True, reason="TensorRT's parser makes it in FP32 only"),
    OpRule(
        "MeanVarianceNormalization", keep=True, reason="ONNX defines it with FP32 constants: its checker refuses half"
    ),
    OpRule("HardSwish", keep_in=("bf16",), reason="TensorRT's parser takes no BF16 here"),
    OpRule("LpNormalization", keep_in=("bf16",), reason="TensorRT's parser takes no BF16 here"),
    OpRule("LpPool", keep_in=("bf16",), reason="TensorRT's parser takes no BF16 here"),
    OpRule("Mish", keep_in=("bf16",), reason="TensorRT's parser takes no BF16 here"),
    OpRule("MelWeightMatrix", keep=True, reason="no half kernel in ONNX Runtime"),
)


def keeps(op_type: str, half: HalfFormat) -> bool:
    """Whether every node of an op stays FP32 in a format, by this table."""
    rule = RULE_OF_OP.get(op_type)
    return rule is not None and (rule.keep or half.name in rule.keep_in)


RULE_OF_OP = {rule.op: rule for rule in OP_RULES}

# Ops that compute nothing: the values that come out are values that went in (or exact functions of them, like Relu), so that a
# half input gives a half output without another rounding.
EXACT_OPS = frozenset(
    [
        "Abs",
        "ArgMax",
        "ArgMin",
        "Ceil",
        "Compress",
        "Concat",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Max",
        "MaxPool",
        "GlobalMaxPool",
        "Min",
        "Neg",
        "OneHot",
        "Pad",
        "ReduceMax",
        "ReduceMin",
        "Relu",
        "Reshape",
        "ReverseSequence",
        "Round",
        "ScatterElements",
        "ScatterND",
        "Scatter",
        "Sign",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unique",
        "Unsqueeze",
        "Where",
        "Clip",
        "Shape",
        "Size",
        "IsNaN",
        "IsInf",
        "NonZero",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
        "EyeLike",
    ]
)

# Ops whose work grows faster than their bytes: half precision is what makes them fast, so a border never costs more than it saves.
COMPUTE_OPS = frozenset(
    ["MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention", "LSTM", "GRU", "RNN", "DeformConv"]
)
