"""The zoo's models in torch's own half precision: a judge of the emulator that needs no engine."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Where torch's half modules store between modules what hardware stores. Others compute parts in FP32 of their own accord (RMSNorm,
# rotary angles), and are left to engines.
TORCH_JUDGES = (
    "resnet",
    "mobilenetv2",
    "convnext",
    "vit",
    "swin",
    "segformer",
    "bert",
    "gpt2",
    "whisper_encoder",
    "wav2vec2",
)


def answers_in_half(
    build: Callable[[], Any], dtype: str, feeds: Mapping[str, np.ndarray], device: str
) -> list[np.ndarray]:
    """What the module that `build` makes answers in `dtype` (a name in torch) on `device`, as float32 arrays."""
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = _with_batch_norm_folded(build()).to(getattr(torch, dtype)).to(device)
        given = [torch.from_numpy(array).to(device) for array in feeds.values()]
        outputs = module(*(x.to(getattr(torch, dtype)) if x.is_floating_point() else x for x in given))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output.float().cpu().numpy() for output in outputs]


def _with_batch_norm_folded(module: Any) -> Any:
    """BatchNorm folded into the convolution before it, as the exported graph has it: one rounding where torch would make two.

    Unfolded, torch drifts 1.3 times as much on resnet and mobilenetv2: its half convolution is rounded before it is normalised.
    """
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for parent in module.modules():
        children = list(parent.named_children())
        for (first, conv), (second, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return module
