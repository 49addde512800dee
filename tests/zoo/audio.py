"""Speech models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .recipe import Recipe
from .weights import give_signal

if TYPE_CHECKING:
    import torch

NUM_SAMPLES_AUDIO = 6400
NUM_FRAMES = 200


def _wav2vec2() -> torch.nn.Module:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        conv_dim=[64] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=32,
        attn_implementation="eager",
    )
    model = give_signal(Wav2Vec2ForCTC(config), seed=21)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_values: torch.Tensor) -> Any:
            return (self.model(input_values=input_values).logits,)

    return Logits().eval()


def _waves(num_samples: int, seed: int) -> dict[str, np.ndarray]:
    """Three sounding tones a sample under an envelope, and noise; unit variance, 16 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(NUM_SAMPLES_AUDIO) / 16_000
    pitch = rng.uniform(80, 3000, (num_samples, 3, 1))
    tones = np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6, pitch.shape)).sum(1)
    envelope = 1 + np.sin(2 * np.pi * rng.uniform(2, 12, (num_samples, 1)) * time)
    wave = tones * envelope + 0.2 * rng.standard_normal(tones.shape)
    return {"input_values": (wave / wave.std(1, keepdims=True)).astype(np.float32)}


def _whisper_encoder() -> torch.nn.Module:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=128,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=512,
        num_mel_bins=80,
        max_source_positions=NUM_FRAMES // 2,
        attn_implementation="eager",
    )
    model = give_signal(WhisperEncoder(config), seed=22)

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_features: torch.Tensor) -> Any:
            return (self.model(input_features).last_hidden_state,)

    return Hidden().eval()


def _spectrograms(num_samples: int, seed: int) -> dict[str, np.ndarray]:
    """Log-mel-like features between -1 and 1.5: moving bands of energy over a floor."""
    rng = np.random.default_rng(seed)
    mel, frame = np.arange(80)[:, None], np.arange(NUM_FRAMES)
    total = np.zeros((num_samples, 80, NUM_FRAMES))
    for _ in range(3):
        centre, drift, width = (rng.uniform(*r, (num_samples, 1, 1)) for r in ((5, 75), (-0.2, 0.2), (2, 8)))
        loudness = 1 + np.sin(frame * rng.uniform(0.02, 0.3, (num_samples, 1, 1)))
        total += loudness * np.exp(-(((mel - centre - drift * frame) / width) ** 2))
    return {"input_features": (total - 0.8 + 0.1 * rng.standard_normal(total.shape)).astype(np.float32)}


RECIPES = (
    Recipe("wav2vec2", _wav2vec2, _waves, ["logits"]),
    Recipe("whisper_encoder", _whisper_encoder, _spectrograms, ["last_hidden_state"]),
)
