"""Small networks at every opset from 9 to 25, normalisation, recurrent and attention operators, image operators."""

from __future__ import annotations

import numpy as np

from .conformance_base import Case, case, normal, weight

X = normal(3, 8, seed="x")
W = weight(8, 8)
B = normal(8, seed="b", scale=0.1)
ONES = normal(8, seed="gain", scale=0.1, shift=1.0)
IMAGE = normal(2, 4, 8, 8, seed="image")
K3 = normal(4, 4, 3, 3, seed="kernel", scale=1 / 6)
BN = {
    "g": normal(4, seed="g", scale=0.1, shift=1.0),
    "o": normal(4, seed="o", scale=0.1),
    "m": normal(4, seed="m", scale=0.2),
    "v": np.abs(normal(4, seed="v", scale=0.2, shift=1.0)),
}


def _x_to_y(name: str, body: str, weights: dict[str, np.ndarray] | None = None, **more: object) -> Case:
    text = f"g (float[N, 8] x) => (float[N, 8] y) {{ {body} }}"
    return case(name, text, {"x": X}, weights=weights, **more)


def _image(name: str, body: str, weights: dict[str, np.ndarray] | None = None, **more: object) -> Case:
    """A case with one image [N, 4, 8, 8] and one output of rank 4."""
    text = f"g (float[N, 4, 8, 8] x) => (float[N, C, H, V] y) {{ {body} }}"
    return case(name, text, {"x": IMAGE}, weights=weights, **more)


def _conv_net(opset: int) -> Case:
    """Convolution, BatchNormalization, pooling, clamp, Gemm, Softmax as that opset writes them."""
    clamp = "Clip<min = 0.0, max = 6.0>(r)" if opset < 11 else "Clip(r, low, high)"
    flat = "f = Flatten<axis = 1>(p)"
    text = f"""g (float[N, 4, 8, 8] x) => (float[N, 5] y) {{
      c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, k, kb)
      n = BatchNormalization<epsilon = 1e-5>(c, g, o, m, v)
      r = Add(n, x)
      a = {clamp}
      q = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
      p = GlobalAveragePool(q)
      {flat}
      l = Gemm<transB = 1>(f, w, wb)
      y = Softmax<axis = 1>(l)
    }}"""
    weights = {**BN, "k": K3, "kb": normal(4, scale=0.1), "w": weight(5, 4), "wb": normal(5, scale=0.1)}
    if opset >= 11:
        weights |= {"low": np.array(0.0, np.float32), "high": np.array(6.0, np.float32)}
    return case(f"opset_sweep/conv_{opset:02d}", text, {"x": IMAGE}, opset=opset, weights=weights)


def _attention_net(opset: int) -> Case:
    """Attention and a decomposed LayerNormalization as that opset writes them."""
    squeeze = "Squeeze<axes = [0]>(s)" if opset < 13 else "Squeeze(s, zero)"
    mean = "ReduceMean<axes = [-1]>" if opset < 18 else "ReduceMean"
    axes = "" if opset < 18 else ", last"
    axis = 2 if opset < 13 else -1
    text = f"""g (float[1, T, 8] x) => (float[T, 8] y) {{
      q = MatMul(x, wq)
      k = MatMul(x, wk)
      t = Transpose<perm = [0, 2, 1]>(k)
      d = MatMul(q, t)
      e = Div(d, root)
      a = Softmax<axis = {axis}>(e)
      h = MatMul(a, x)
      r = Add(h, x)
      u = {mean}(r{axes})
      c = Sub(r, u)
      c2 = Pow(c, two)
      var = {mean}(c2{axes})
      ve = Add(var, eps)
      sd = Sqrt(ve)
      n = Div(c, sd)
      gn = Mul(n, gain)
      s = Add(gn, b)
      y = {squeeze}
    }}"""
    weights = {"wq": weight(8, 8, "q"), "wk": weight(8, 8, "k"), "gain": ONES, "b": B}
    weights |= {"root": np.float32(8**0.5), "two": np.float32(2), "eps": np.float32(1e-5)}
    if opset >= 13:
        weights["zero"] = np.array([0])
    if opset >= 18:
        weights["last"] = np.array([-1])
    return case(f"opset_sweep/attention_{opset:02d}", text, {"x": normal(1, 5, 8)}, opset=opset, weights=weights)


SWEEP = [make(opset) for opset in range(9, 26) for make in (_conv_net, _attention_net)]

_LN = {"w": W, "s": ONES, "b": B}

NORMS = [
    _x_to_y("layer_norm/scale_and_bias", "h = MatMul(x, w) y = LayerNormalization<epsilon = 1e-5>(h, s, b)", _LN),
    _x_to_y("layer_norm/no_bias", "h = MatMul(x, w) n = LayerNormalization(h, s) y = MatMul(n, w)", _LN),
    case(
        "layer_norm/three_outputs",
        """g (float[N, 8] x) => (float[N, 8] y, float[N, 1] mean, float[N, 1] inv) {
          h = MatMul(x, w)  n, mean, inv = LayerNormalization<axis = 1>(h, s, b)  y = Relu(n) }""",
        {"x": X},
        weights=_LN,
        notes="Mean and InvStdDev have the stash type (float32), not the input's",
    ),
    _x_to_y(
        "layer_norm/computed_scale",
        "h = MatMul(x, w) k = Sigmoid(s) y = LayerNormalization(h, k, b)",
        _LN,
    ),
    *[
        _image(
            f"batch_norm/opset_{opset:02d}",
            "c = Conv(x, k) n = BatchNormalization(c, g, o, m, v) y = Relu(n)",
            {**BN, "k": K3},
            opset=opset,
        )
        for opset in (9, 14, 15)
    ],
    _image(
        "batch_norm/on_the_input",
        "n = BatchNormalization(x, g, o, m, v) y = Conv(n, k)",
        {**BN, "k": K3},
        notes="statistics have types of their own (T1, T2) from opset 15 on",
    ),
    _image(
        "batch_norm/variance_below_half_range",
        "s = Mul(x, tiny) n = BatchNormalization<epsilon = 1e-12>(s, g, o, z, v) y = Relu(n)",
        {**BN, "tiny": np.float32(1e-4), "v": BN["v"] * 1e-8, "z": BN["m"] * 1e-4},
        hostile=True,
    ),
    _image("instance_norm/opset_17", "n = InstanceNormalization(x, g, o) y = Conv(n, k)", {**BN, "k": K3}),
    _image(
        "group_norm/opset_21",
        "n = GroupNormalization<num_groups = 2, stash_type = 1>(x, g, o) y = Conv(n, k)",
        {**BN, "k": K3},
        opset=21,
    ),
    _x_to_y(
        "rms_norm/opset_23", "h = MatMul(x, w) y = RMSNormalization<axis = -1, epsilon = 1e-6>(h, s)", _LN, opset=23
    ),
    _image("lp_norm/opset_9", "n = LpNormalization<axis = 1>(x) l = LRN<size = 3>(n) y = Relu(l)", opset=9),
]

_QKV = "float[B, 2, T, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v"
_QKV_FEEDS = {n: normal(2, 2, 5, 8, seed=n) for n in "qkv"}
_LSTM = {"W": normal(1, 16, 8, scale=0.3), "R": normal(1, 16, 4, scale=0.3), "B": normal(1, 32, scale=0.1)}
_GRU = {"W": normal(1, 12, 8, scale=0.3), "R": normal(1, 12, 4, scale=0.3), "B": normal(1, 24, scale=0.1)}

SEQUENCES = [
    case(
        "attention/opset_23",
        f"g ({_QKV}) => (float[B, 2, T, 8] y) {{ s = Sigmoid(q)  a = Attention(s, k, v)  y = Relu(a) }}",
        _QKV_FEEDS,
        opset=23,
    ),
    case(
        "attention/float_mask_opset_24",
        f"""g ({_QKV}, float[T, S] m) => (float[B, 2, T, 8] y) {{
          s = Sigmoid(q)  y = Attention<scale = 0.25>(s, k, v, m) }}""",
        {**_QKV_FEEDS, "m": np.triu(np.full((5, 5), -1e4, np.float32), 1)},
        opset=24,
    ),
    case(
        "attention/rotary_opset_23",
        """g (float[B, 2, T, 8] x) => (float[B, 2, T, 8] y) { h = MatMul(x, w) y = RotaryEmbedding(h, cos, sin, i) }""",
        {"x": normal(2, 2, 5, 8)},
        opset=23,
        weights={
            "w": W,
            "cos": np.cos(normal(5, 4)),
            "sin": np.sin(normal(5, 4)),
            "i": np.tile(np.arange(5), (2, 1)),
        },
    ),
    case(
        "rnn/lstm_all_inputs",
        """g (float[T, N, 8] x, int32[N] lengths) => (float[T, 1, N, 4] y, float[1, N, 4] h, float[1, N, 4] c) {
          y, h, c = LSTM<hidden_size = 4>(x, W, R, B, lengths, h0, c0, P) }""",
        {"x": normal(5, 3, 8), "lengths": np.array([5, 3, 4], np.int32)},
        opset=14,
        weights={**_LSTM, "h0": normal(1, 3, 4), "c0": normal(1, 3, 4, seed="c"), "P": normal(1, 12, scale=0.1)},
    ),
    case(
        "rnn/lstm_bidirectional_opset_9",
        """g (float[T, N, 8] x) => (float[T, 2, N, 4] y) {
          s = Relu(x)  y, h = LSTM<hidden_size = 4, direction = "bidirectional">(s, W, R, B) }""",
        {"x": normal(5, 3, 8)},
        opset=9,
        weights={k: np.concatenate([v, v[:, ::-1]]) for k, v in _LSTM.items()},
    ),
    case(
        "rnn/lstm_opset_22",
        """g (float[T, N, 8] x) => (float[1, N, 4] y) {
          s = Relu(x)  a, h = LSTM<hidden_size = 4>(s, W, R, B)  y = Tanh(h) }""",
        {"x": normal(5, 3, 8)},
        opset=22,
        weights=_LSTM,
    ),
    case(
        "rnn/gru",
        """g (float[T, N, 8] x) => (float[T, 1, N, 4] y) {
          y, h = GRU<hidden_size = 4, linear_before_reset = 1>(x, W, R, B) }""",
        {"x": normal(5, 3, 8)},
        weights=_GRU,
    ),
]

IMAGES = [
    _image(
        "image_operators/depthwise_and_pointwise",
        "d = Conv<group = 4>(x, kd) r = Relu(d) y = Conv(r, kp)",
        {"kd": normal(4, 1, 3, 3, scale=1 / 3), "kp": normal(6, 4, 1, 1, scale=0.5)},
    ),
    _image("image_operators/transposed", "y = ConvTranspose<strides = [2, 2]>(x, k, o)", {"k": K3, **BN}),
    _image(
        "image_operators/pools",
        """a = AveragePool<kernel_shape = [3, 3], strides = [1, 1]>(x)
           l = LpPool<kernel_shape = [2, 2], strides = [1, 1]>(a) y = MaxPool<kernel_shape = [2, 2]>(l)""",
    ),
    _image(
        "image_operators/prelu_and_shuffle",
        "a = PRelu(x, p) d = DepthToSpace<blocksize = 2>(a) y = SpaceToDepth<blocksize = 4>(d)",
        {"p": np.abs(normal(4, 1, 1, scale=0.3))},
    ),
    case(
        "image_operators/max_pool_indices",
        """g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y, int64[N, 4, 4, 4] i) {
          p, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
          y = MaxUnpool<kernel_shape = [2, 2], strides = [2, 2]>(p, i) }""",
        {"x": np.random.default_rng(3).permutation(512).reshape(2, 4, 8, 8).astype(np.float32) / 256},
    ),
    case(
        "image_operators/grid_sample",
        """g (float[N, 4, 8, 8] x, float[N, 5, 5, 2] at) => (float[N, 4, 5, 5] y) {
          h = Conv(x, k) s = GridSample(h, at) y = Relu(s) }""",
        {"x": IMAGE, "at": np.tanh(normal(2, 5, 5, 2))},
        opset=20,
        weights={"k": K3},
        notes="the grid has the type T2 of its own",
    ),
    case(
        "image_operators/roi_align",
        """g (float[N, 4, 8, 8] x, float[M, 4] boxes, int64[M] which) => (float[M, 4, 2, 2] y) {
          h = Conv(x, k) y = RoiAlign<output_height = 2, output_width = 2>(h, boxes, which) }""",
        {"x": IMAGE, "boxes": np.array([[0, 0, 4, 4], [1, 2, 5, 5.5]], np.float32), "which": np.array([0, 1])},
        opset=16,
        weights={"k": K3},
    ),
    case(
        "signal/window_and_stft",
        """g (float[1, 32, 1] x) => (float[1, F, K, 2] y) <int64 n = {16}, int64 hop = {8}> {
          win = HannWindow(n)  s = Mul(x, two)  y = STFT(s, hop, win) }""",
        {"x": normal(1, 32, 1)},
        weights={"two": np.float32(2)},
        notes="windows come out in `output_datatype`, STFT's frame and window must agree",
    ),
    _x_to_y(
        "activations/opset_20",
        'h = MatMul(x, w) a = Gelu<approximate = "tanh">(h) b2 = Mish(a) c = HardSwish(b2) y = Celu(c)',
        {"w": W},
        opset=20,
    ),
    _x_to_y("activations/opset_24_swish", "h = MatMul(x, w) y = Swish<alpha = 1.5>(h)", {"w": W}, opset=24),
    _x_to_y(
        "activations/thresholds",
        "h = MatMul(x, w) a = Elu<alpha = 0.5>(h) c = ThresholdedRelu<alpha = 0.1>(a) y = HardSigmoid(c)",
        {"w": W},
    ),
]

CASES = [*SWEEP, *NORMS, *SEQUENCES, *IMAGES]
