"""Image models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recipe import Recipe, images
from .weights import calibrate, give_signal

if TYPE_CHECKING:
    import torch

CLASSES = 100


def _picked(model: torch.nn.Module, *fields: str) -> torch.nn.Module:
    """The model returning these fields of its output as a tuple."""
    import torch

    class Picked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> Any:
            result = self.model(pixel_values=pixel_values)
            return tuple(getattr(result, field) for field in fields)

    return Picked().eval()


def _calibrated(module: torch.nn.Module, size: int) -> torch.nn.Module:
    import torch

    feeds = images(size)
    return calibrate(module, [torch.from_numpy(feeds(16, seed)["pixel_values"]) for seed in (1001, 1002, 1003)])


def _resnet() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=CLASSES)
    return _calibrated(_picked(give_signal(ResNetForImageClassification(config), seed=1), "logits"), 64)


def _mobilenetv2(*, calibrated: bool = True) -> torch.nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.5, image_size=96, num_labels=CLASSES)
    if not calibrated:
        # transformers' own initialisation, as everybody gets who exports an untrained model.
        return _picked(MobileNetV2ForImageClassification(config).eval(), "logits")
    return _calibrated(_picked(give_signal(MobileNetV2ForImageClassification(config), seed=2), "logits"), 96)


def _convnext() -> torch.nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 3, 1], image_size=64, num_labels=CLASSES)
    return _picked(give_signal(ConvNextForImageClassification(config), seed=3), "logits")


def _vit() -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=64,
        patch_size=8,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return _picked(give_signal(ViTForImageClassification(config), seed=4), "logits")


def _swin() -> torch.nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=4,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return _picked(give_signal(SwinForImageClassification(config), seed=5), "logits")


def _segformer() -> torch.nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[16, 32, 80, 128],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=64,
        num_labels=20,
        attn_implementation="eager",
    )
    return _calibrated(_picked(give_signal(SegformerForSemanticSegmentation(config), seed=6), "logits"), 64)


def _detr() -> torch.nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_queries=20,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_labels=20,
        attn_implementation="eager",
    )
    return _calibrated(_picked(give_signal(DetrForObjectDetection(config), seed=7), "logits", "pred_boxes"), 96)


RECIPES = (
    Recipe("resnet", _resnet, images(64), ["logits"]),
    Recipe("mobilenetv2", _mobilenetv2, images(96), ["logits"]),
    Recipe(
        "mobilenetv2_uncalibrated",
        lambda: _mobilenetv2(calibrated=False),
        images(96),
        ["logits"],
        signal_lost_in_half=True,
    ),
    Recipe("convnext", _convnext, images(64), ["logits"]),
    Recipe("vit", _vit, images(64), ["logits"]),
    Recipe("swin", _swin, images(64), ["logits"]),
    Recipe("segformer", _segformer, images(64), ["logits"]),
    Recipe("detr", _detr, images(96), ["logits", "pred_boxes"]),
    Recipe("resnet_torchscript_opset11", _resnet, images(64), ["logits"], torchscript_opset=11),
    Recipe("segformer_torchscript_opset11", _segformer, images(64), ["logits"], torchscript_opset=11),
)
