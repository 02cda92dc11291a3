"""Families whose towers work out their geometry from the data, which no capture can follow: features are an input.

The forward is what the model's own does behind its tower: features take the places of image tokens, the decoder runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor

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
from tests.families.qwen import OPEN, positions

IDS = {"image_token_id": IMAGE, "video_token_id": 111}
MARKS = {"image_start_token_id": 108, "image_end_token_id": 109}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
HALF = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4, "partial_rotary_factor": 0.5}
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 32, "image_size": 32,
}  # fmt: skip
LANGUAGE = "model.language_model.layers"


def example(
    name: str, text: dict[str, Any], vision: dict[str, Any], *, path: str = LANGUAGE, three: bool = False,
    attention: str = "sdpa", cls: str = "", logits: Callable[..., Tensor] = from_features,
    experts: str | None = None, **options: Any,
) -> Example:  # fmt: skip
    """A family by its configuration.

    Args:
        name: of the configuration's class, without `Config`.
        text: of the decoder.
        vision: of the tower, which is built and not run.
        path: of the decoder's layers.
        three: positions have three axes.
        attention: implementation.
        cls: the model's class; by default that of the name for conditional generation.
        logits: the forward.
        experts: implementation of experts.
        options: further fields of the configuration.
    """
    config = getattr(tf, f"{name}Config")(text_config=text, vision_config=vision, **options)
    model = build(getattr(tf, cls or f"{name}{CONDITIONAL}"), config, attention, experts=experts)
    inner = getattr(model.model, "visual", None) or getattr(model.model, "vision_tower", None)
    if inner is not None:
        inner.requires_grad_(False)  # the features come from elsewhere
    return understanding(
        model, listed(path), pixels=(BATCH, PATCHES, HIDDEN), name="features", logits=logits,
        more=positions if three else None, dynamic=OPEN if three else None,
    )  # fmt: skip


def by_kind(model: Any, input_ids: Tensor, features: Tensor, position_ids: Tensor) -> Tensor:
    """ERNIE's layers send text and image rows to experts of their own, where ``kinds.any()`` says that there are image rows.

    No graph can branch on that: the forward answers it once, and checks the answer on every batch.
    """
    kinds = (input_ids == IMAGE).int()
    torch._assert((kinds > 0).any(), "a batch without an image")
    kinds.any = lambda: True
    return from_features(model, input_ids, features, position_ids=position_ids, moe_mm_token_type_ids=kinds)


def molmo2() -> Example:
    """Molmo2: norms on queries and keys, an embedding in two parts."""
    config = tf.Molmo2Config(
        text_config={**{k: v for k, v in TEXT.items() if not k.endswith("_id")}, "head_dim": 8, "additional_vocab_size": 8},
        vision_config={**TOWER, "num_hidden_layers": 1, "image_size": [32, 32], "num_key_value_heads": 4, "head_dim": 8,
                       "num_position_embeddings": 16},
        adapter_config={"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
                        "intermediate_size": 48, "text_hidden_size": 32, "vision_feature_layer": [0]},
        image_patch_id=IMAGE,
    )  # fmt: skip
    model = build(tf.Molmo2ForConditionalGeneration, config)

    def logits(model: Any, input_ids: Tensor, features: Tensor) -> Tensor:
        rows = model.get_input_embeddings()(input_ids)
        rows = rows.masked_scatter((input_ids == IMAGE).unsqueeze(-1), features)
        decoder = getattr(model.model, "language_model", None) or model.model.transformer
        found: Tensor = model.lm_head(decoder(inputs_embeds=rows, use_cache=False).last_hidden_state)
        return found

    return understanding(model, listed(LANGUAGE), pixels=(BATCH, PATCHES, HIDDEN), name="features", logits=logits)


EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
LATENT = {
    "model_type": "deepseek_v3", **TEXT, **EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def phi4() -> Example:
    """Phi-4 multimodal's decoder: one projection for queries, keys and values."""
    config = tf.Phi4MultimodalConfig(
        **TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        vision_config={**TOWER, "num_hidden_layers": 1, "crop_size": 32, "feature_layer": -1, "image_token_id": IMAGE},
        audio_config={"hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 4,
                      "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
                      "audio_token_id": 111, "feature_layer": -1},
    )  # fmt: skip
    model = build(tf.Phi4MultimodalForCausalLM, config)
    model.model.embed_tokens_extend.requires_grad_(False)
    return understanding(
        model, listed("model.layers"), pixels=(BATCH, PATCHES, HIDDEN), name="features", logits=from_features
    )


def decoder(config: str, cls: str, path: str = "model.layers", attention: str = "sdpa", **options: Any) -> Example:
    """A family's decoder alone."""
    made = getattr(tf, config)(**{**TEXT, **options})
    model = build(getattr(tf, cls), made, attention)
    return understanding(model, listed(path), pixels=(BATCH, PATCHES, HIDDEN), name="features", logits=from_features)


NOTE = "image features are an input: the tower's shapes depend on data"
ANSWERED = (
    "image features are an input; the forward answers that there is an image, on which the layers branch, and checks it"
)
ALONE = "the decoder alone; image features are an input"
CONDITIONAL = "ForConditionalGeneration"


def _family(
    title: str, name: str, text: dict[str, Any], vision: dict[str, Any], note: str = NOTE, **options: Any
) -> Family:
    notes = (note, BATCHED) if "experts" in options else (note,)
    return Family(title, f"{name}{CONDITIONAL}", partial(example, name, text, vision, **options), notes)


GLM_MOE = {**TEXT, **EXPERTS, "first_k_dense_replace": 1, "rope_parameters": HALF, "n_group": 1, "topk_group": 1}
FAMILIES = [
    _family("GLM-4V", "Glm4v", {**TEXT, "rope_parameters": ROPE}, VISION, three=True, **IDS, **MARKS),
    _family("GLM-4V-MoE", "Glm4vMoe", GLM_MOE, VISION, three=True, experts="batched_mm", **IDS, **MARKS),
    _family("GLM-4.6V", "Glm46V", {"model_type": "glm4v_text", **TEXT, "rope_parameters": ROPE},
            {"model_type": "glm4v_vision", **VISION}, three=True, **IDS, **MARKS),
    _family("GLM-OCR", "GlmOcr", {**TEXT, "head_dim": 8, "rope_parameters": ROPE}, VISION, three=True, **IDS, **MARKS),
    _family("Kimi K2.5", "Kimi_K25", LATENT,
            {"patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1},
            image_token_id=IMAGE, video_token_id=111, experts="batched_mm"),
    Family("Phi-4 multimodal", "Phi4MultimodalForCausalLM", phi4, (ALONE,)),
    _family("EXAONE 4.5", "Exaone4_5_",
            {"model_type": "exaone4", **TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            {**VISION}, **IDS),
    _family("PaddleOCR-VL", "PaddleOCRVL", {**TEXT, "head_dim": 8, "rope_parameters": ROPE},
            {**TOWER, "num_hidden_layers": 1}, three=True, **IDS),
    _family("ERNIE 4.5 VL", "Ernie4_5_VLMoe",
            {**TEXT, "moe_intermediate_size": [16, 16], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1,
             "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
            {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2},
            three=True, logits=by_kind, image_token_id=IMAGE, video_token_id=111, **MARKS),
    Family("HunYuan-VL", "HunYuanVLForConditionalGeneration", partial(
        example, "HunYuanVL", {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}}, {**TOWER, "num_hidden_layers": 1, "text_hidden_size": 32,
        "out_hidden_size": 32, "max_image_size": 32, "min_image_size": 32}, image_token_id=IMAGE), (NOTE,)),
    Family("Molmo2", "Molmo2ForConditionalGeneration", molmo2, (NOTE,)),
]  # fmt: skip
