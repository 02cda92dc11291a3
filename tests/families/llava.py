"""LLaVA and its kin: a tower, a projector, features in the places of image tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.families.family import Example, Family
from tests.families.kin import (
    BATCH,
    BATCHED,
    HIDDEN,
    IMAGE,
    PATCHES,
    TEXT,
    TOWER,
    build,
    from_features,
    listed,
    understanding,
)

LLAMA = {"model_type": "llama", **TEXT}
MISTRAL = {"model_type": "mistral", **TEXT, "head_dim": 8}
QWEN = {"model_type": "qwen2", **TEXT}
CLIP = {"model_type": "clip_vision_model", **TOWER, "num_hidden_layers": 2, "projection_dim": HIDDEN}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", **TOWER}
LANGUAGE = listed("model.language_model.layers")
SIZES = [(32, 32)] * BATCH


class LowRank(nn.Module):
    """A frozen linear layer and a trained product of two thin ones beside it (LoRA, 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


def with_low_rank(model: nn.Module, names: tuple[str, ...] = ("q_proj", "v_proj")) -> nn.Module:
    """The model frozen, with low-rank additions to projections of its decoder."""
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for path, module in list(model.named_modules()):
            name = path.rpartition(".")[2]
            if name in names and "language_model" in path:
                setattr(model.get_submodule(path.rpartition(".")[0]), name, LowRank(module))  # type: ignore[arg-type]
    return model


def llava(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, train: bool = False, lora: bool = False
) -> Example:
    """LLaVA: a CLIP tower and a Llama decoder."""
    config = tf.LlavaConfig(text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE)
    model = build(tf.LlavaForConditionalGeneration, config, attention, dtype)
    if lora:
        model = with_low_rank(model)
    return understanding(model.train(train), LANGUAGE)


def llava_next() -> Example:
    """LLaVA-NeXT: an image and its parts, a learned row at the end of each line."""
    config = tf.LlavaNextConfig(
        text_config=MISTRAL, vision_config=CLIP, image_token_index=IMAGE, image_grid_pinpoints=[[32, 32]]
    )
    model = build(tf.LlavaNextForConditionalGeneration, config)
    return understanding(
        model, LANGUAGE, count=PATCHES + 4 * 5, pixels=(BATCH, 2, 3, 32, 32), fixed={"image_sizes": SIZES}
    )


def llava_next_video() -> Example:
    """LLaVA-NeXT-Video: frames, pooled."""
    config = tf.LlavaNextVideoConfig(
        text_config=LLAMA, vision_config=CLIP, video_token_index=IMAGE, image_token_index=111,
        image_grid_pinpoints=[[32, 32]],
    )  # fmt: skip
    model = build(tf.LlavaNextVideoForConditionalGeneration, config)
    return understanding(model, LANGUAGE, count=2 * 4, pixels=(BATCH, 2, 3, 32, 32), name="pixel_values_videos")


def llava_onevision() -> Example:
    """LLaVA-OneVision: a SigLIP tower, parts of an image."""
    config = tf.LlavaOnevisionConfig(
        text_config=QWEN, vision_config=SIGLIP, image_token_index=IMAGE, image_grid_pinpoints=[[32, 32]]
    )
    model = build(tf.LlavaOnevisionForConditionalGeneration, config)
    return understanding(
        model, LANGUAGE, count=PATCHES + 4 * 5, pixels=(BATCH, 2, 3, 32, 32), fixed={"image_sizes": SIZES}
    )


def video_llava() -> Example:
    """Video-LLaVA: frames, each with its class token."""
    config = tf.VideoLlavaConfig(text_config=LLAMA, vision_config=CLIP, video_token_index=IMAGE, image_token_index=111)
    model = build(tf.VideoLlavaForConditionalGeneration, config)
    return understanding(
        model, LANGUAGE, count=2 * (PATCHES + 1), pixels=(BATCH, 2, 3, 32, 32), name="pixel_values_videos"
    )


def vipllava() -> Example:
    """ViP-LLaVA: features of several layers of the tower."""
    config = tf.VipLlavaConfig(
        text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layers=[-1, -2]
    )
    config.vision_feature_layer = [-1, -2]
    return understanding(build(tf.VipLlavaForConditionalGeneration, config), LANGUAGE)


def pixtral() -> Example:
    """Pixtral: a tower for images of any size, whose sizes are part of the forward here."""
    config = tf.LlavaConfig(
        text_config=MISTRAL, vision_config=PIXTRAL, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return understanding(build(tf.LlavaForConditionalGeneration, config), LANGUAGE, fixed={"image_sizes": SIZES})


def mistral3() -> Example:
    """Mistral 3: Pixtral's tower, patches merged by fours."""
    config = tf.Mistral3Config(
        text_config=MISTRAL,
        vision_config=PIXTRAL,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    model = build(tf.Mistral3ForConditionalGeneration, config)
    return understanding(model, LANGUAGE, count=PATCHES // 4, fixed={"image_sizes": SIZES})


def lighton_ocr() -> Example:
    """LightOnOCR: Pixtral's tower and a Qwen3 decoder."""
    config = tf.LightOnOcrConfig(
        text_config={"model_type": "qwen3", **TEXT, "head_dim": 8}, vision_config={**PIXTRAL, "head_dim": 8},
        image_token_id=IMAGE,
    )  # fmt: skip
    model = build(tf.LightOnOcrForConditionalGeneration, config)
    return understanding(model, LANGUAGE, count=PATCHES // 4, fixed={"image_sizes": SIZES})


def _siglip(cls: str, text: dict[str, Any], count: int, **options: Any) -> Example:
    config = getattr(tf, f"{cls}Config")(text_config=text, vision_config=SIGLIP, **options)
    return understanding(build(getattr(tf, f"{cls}ForConditionalGeneration"), config), LANGUAGE, count=count)


def deepseek_vl() -> Example:
    """DeepSeek-VL: a SigLIP tower and a Llama decoder."""
    return _siglip("DeepseekVL", LLAMA, PATCHES, image_token_id=IMAGE)


def deepseek_vl_hybrid() -> Example:
    """DeepSeek-VL hybrid: SigLIP beside SAM at a higher resolution."""
    sam = {
        "model_type": "sam_vision_model", "hidden_size": HIDDEN, "output_channels": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1],
        "mlp_dim": 48, "num_pos_feats": 16,
    }  # fmt: skip
    config = tf.DeepseekVLHybridConfig(
        text_config=LLAMA, vision_config=SIGLIP, high_res_vision_config=sam, image_token_id=IMAGE
    )
    model = build(tf.DeepseekVLHybridForConditionalGeneration, config)

    def more(ids: Tensor) -> dict[str, Tensor]:
        return {
            "high_res_pixel_values": torch.randn(
                BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(int(ids.sum()))
            )
        }

    return understanding(model, LANGUAGE, more=more, dynamic={"high_res_pixel_values": {0: "batch"}})


def aya_vision() -> Example:
    """Aya Vision: attention and feed-forward side by side, a sliding window."""
    text = {"model_type": "cohere2", **TEXT, "head_dim": 8, "sliding_window": 8}
    return _siglip(
        "AyaVision", text, PATCHES // 4, image_token_index=IMAGE, downsample_factor=2, vision_feature_layer=-1
    )


def cohere2_vision() -> Example:
    """Command A Vision."""
    text = {"model_type": "cohere2", **TEXT, "head_dim": 8, "sliding_window": 8}
    return _siglip(
        "Cohere2Vision", text, PATCHES // 4, image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=64
    )


def got_ocr2() -> Example:
    """GOT-OCR2: SAM's tower and a Qwen2 decoder."""
    tower = {
        "hidden_size": HIDDEN, "output_channels": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 128,
        "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48,
    }  # fmt: skip
    config = tf.GotOcr2Config(text_config=QWEN, vision_config=tower, image_token_index=IMAGE)
    model = build(tf.GotOcr2ForConditionalGeneration, config, "eager")
    return understanding(model, LANGUAGE, pixels=(BATCH, 3, 128, 128), count=16)


def qianfan_ocr() -> Example:
    """Qianfan-OCR: InternVL's tower and a Qwen3 decoder."""
    config = tf.QianfanOCRConfig(
        text_config={"model_type": "qwen3", **TEXT, "head_dim": 8},
        vision_config={**TOWER, "image_size": (32, 32), "patch_size": (8, 8), "drop_path_rate": 0.0},
        image_token_id=IMAGE, image_seq_length=PATCHES // 4,
    )  # fmt: skip
    return understanding(build(tf.QianfanOCRForConditionalGeneration, config), LANGUAGE, count=PATCHES // 4)


def aria() -> Example:
    """Aria: queries that read patches, a decoder with experts."""
    text = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = tf.AriaConfig(
        text_config=text, vision_config={"model_type": "idefics3_vision", **TOWER}, image_token_index=IMAGE,
        projector_patch_to_query_dict={PATCHES: 4}, vision_feature_layer=-1,
    )  # fmt: skip
    return understanding(build(tf.AriaForConditionalGeneration, config, experts="batched_mm"), LANGUAGE, count=4)


def ovis2() -> Example:
    """Ovis2: patches become soft codes of a table of visual words. The model's own forward branches on which marks occur."""
    tower = {**TOWER, "vocab_size": 24 + 5, "num_visual_indicator_tokens": 5, "hidden_stride": 2}
    config = tf.Ovis2Config(
        text_config=QWEN,
        vision_config=tower,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[103, 104, 105, 106, 107],
        vocab_size=TEXT["vocab_size"],
        hidden_size=HIDDEN,
    )

    def logits(model: Any, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return from_features(model, input_ids, model.model.get_image_features(pixel_values).pooler_output)

    model = build(tf.Ovis2ForConditionalGeneration, config)
    return understanding(model, LANGUAGE, count=PATCHES // 4, logits=logits)


CONDITIONAL = "ForConditionalGeneration"
FAMILIES = [
    Family("LLaVA", f"Llava{CONDITIONAL}", llava),
    Family(
        "LLaVA, eager attention",
        f"Llava{CONDITIONAL}",
        partial(llava, "eager"),
        ("attention as products and a softmax",),
    ),
    Family(
        "LLaVA, flex attention",
        f"Llava{CONDITIONAL}",
        partial(llava, "flex_attention"),
        ("the eager model runs in `sdpa`: on a CPU flex attention has no gradient",),
    ),
    Family("LLaVA, bfloat16", f"Llava{CONDITIONAL}", partial(llava, dtype=torch.bfloat16), ("parameters in bfloat16",)),
    Family("LLaVA, train mode", f"Llava{CONDITIONAL}", partial(llava, train=True), ("`model.train()`",)),
    Family(
        "LLaVA, LoRA",
        f"Llava{CONDITIONAL}",
        partial(llava, lora=True),
        ("rank 4 on query and value projections, all else frozen",),
    ),
    Family("LLaVA-NeXT", f"LlavaNext{CONDITIONAL}", llava_next),
    Family("LLaVA-NeXT-Video", f"LlavaNextVideo{CONDITIONAL}", llava_next_video),
    Family("LLaVA-OneVision", f"LlavaOnevision{CONDITIONAL}", llava_onevision),
    Family("Video-LLaVA", f"VideoLlava{CONDITIONAL}", video_llava),
    Family("ViP-LLaVA", f"VipLlava{CONDITIONAL}", vipllava),
    Family("Pixtral", f"Llava{CONDITIONAL}", pixtral),
    Family("Mistral 3", f"Mistral3{CONDITIONAL}", mistral3),
    Family("LightOnOCR", f"LightOnOcr{CONDITIONAL}", lighton_ocr),
    Family("DeepSeek-VL", f"DeepseekVL{CONDITIONAL}", deepseek_vl),
    Family("DeepSeek-VL hybrid", f"DeepseekVLHybrid{CONDITIONAL}", deepseek_vl_hybrid),
    Family("Aya Vision", f"AyaVision{CONDITIONAL}", aya_vision),
    Family("Command A Vision", f"Cohere2Vision{CONDITIONAL}", cohere2_vision),
    Family("GOT-OCR2", f"GotOcr2{CONDITIONAL}", got_ocr2),
    Family("Qianfan-OCR", f"QianfanOCR{CONDITIONAL}", qianfan_ocr),
    Family("Aria", f"Aria{CONDITIONAL}", aria, (BATCHED,)),
    Family(
        "Ovis2",
        f"Ovis2{CONDITIONAL}",
        ovis2,
        ("the forward leaves out marks around images, on which the model's own branches",),
    ),
]
