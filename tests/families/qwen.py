"""Qwen's vision-language models beyond those of `tests/zoo.py`: features that come in again, experts, gated delta nets."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from tests.families.family import Example, Family
from tests.families.kin import (
    BATCH,
    BATCHED,
    END,
    IMAGE,
    PATCHES,
    START,
    TEXT,
    TOWER,
    build,
    from_features,
    listed,
    understanding,
)

LANGUAGE = listed("model.language_model.layers")
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4}
SIDE = 8  # patches of an image on a side
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": 111, "vision_start_token_id": START, "vision_end_token_id": END}


def positions(ids: Tensor) -> dict[str, Tensor]:
    """Positions in time, height and width, `[3, batch, tokens]`: images as squares of `SIDE / 2`."""
    side = SIDE // 2
    rows = []
    for row in ids:
        at = int((row == IMAGE).nonzero()[0])
        grid = torch.stack(
            torch.meshgrid(torch.zeros(1, dtype=torch.long), torch.arange(side), torch.arange(side), indexing="ij")
        )
        image = at + grid.flatten(1)
        rest = at + side + torch.arange(len(row) - at - side * side)
        rows.append(torch.cat([torch.arange(at).expand(3, -1), image, rest.expand(3, -1)], 1))
    return {"position_ids": torch.stack(rows, 1)}


OPEN = {"position_ids": {1: "batch", 2: "tokens"}}


def qwen3_vl(experts: str | None = None) -> Example:
    """Qwen3-VL: features of inner layers of the tower are added behind the first layers of the decoder (DeepStack)."""
    text = {**TEXT, "head_dim": 8, "rope_parameters": ROPE}
    name = "Qwen3VL"
    if experts:
        name = "Qwen3VLMoe"
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    config = getattr(tf, f"{name}Config")(
        text_config=text, vision_config={**VISION, "deepstack_visual_indexes": [0]}, **IDS
    )
    model = build(getattr(tf, f"{name}ForConditionalGeneration"), config, experts=experts)
    return understanding(
        model, LANGUAGE, pixels=(BATCH * SIDE * SIDE, 96), before=(START,), after=(END,), more=positions, dynamic=OPEN,
        fixed=geometry(model),
    )  # fmt: skip


def geometry(model: Any) -> dict[str, Any]:
    """What the tower makes of the image grid, made once: its shapes depend on it."""
    grid, tower = np.array([(1, SIDE, SIDE)] * BATCH), model.model.visual
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.from_numpy(grid), num_grid_per_side=tower.num_grid_per_side, mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners, spatial_merge_size=tower.config.spatial_merge_size,
    )  # fmt: skip
    return {
        "image_grid_thw": grid, "image_cu_seqlens": np.arange(BATCH + 1) * SIDE * SIDE,
        "image_position_ids": get_vision_position_ids(torch.from_numpy(grid), 2), "image_interp_indices": indices,
        "image_interp_weights": weights,
    }  # fmt: skip


def qwen3_5() -> Example:
    """Qwen3.5: gated delta nets between full attentions; features are an input."""
    text = tf.Qwen3_5TextConfig(
        **{**TEXT, "num_hidden_layers": 4}, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention", "full_attention", "full_attention"],
        rope_parameters={**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = build(tf.Qwen3_5ForCausalLM, text)
    return understanding(
        model, listed("model.layers", 4), pixels=(BATCH, PATCHES, 32), name="features", logits=from_features
    )


def qwen_decoder(cls: str, **options: Any) -> Example:
    """A decoder alone; features are an input."""
    config = getattr(tf, f"{cls}Config")(**TEXT, **options)
    model = build(getattr(tf, f"{cls}ForCausalLM"), config)
    return understanding(
        model, listed("model.layers"), pixels=(BATCH, PATCHES, 32), name="features", logits=from_features
    )


def video_llama3() -> Example:
    """VideoLLaMA 3: a tower for images of any size and a Qwen2 decoder; features are an input."""
    config = tf.VideoLlama3Config(
        text_config={"model_type": "qwen2", **TEXT}, vision_config={**TOWER, "patch_size": 4}, image_token_id=IMAGE,
        video_token_id=111,
    )  # fmt: skip
    model = build(tf.VideoLlama3ForConditionalGeneration, config)
    return understanding(model, LANGUAGE, pixels=(BATCH, PATCHES, 32), name="features", logits=from_features)


MOE = "Qwen3VLMoeForConditionalGeneration"
FEATURES = "image features are an input"
FAMILIES = [
    Family("Qwen3-VL", "Qwen3VLForConditionalGeneration", qwen3_vl),
    Family("Qwen3-VL-MoE", MOE, partial(qwen3_vl, experts="batched_mm"), (BATCHED,)),
    Family("Qwen3-VL-MoE, grouped experts", MOE, partial(qwen3_vl, experts="grouped_mm")),
    Family("Qwen3.5", "Qwen3_5ForCausalLM", qwen3_5, (FEATURES,)),
    Family("VideoLLaMA 3", "VideoLlama3ForConditionalGeneration", video_llama3, (FEATURES,)),
]
