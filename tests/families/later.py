"""Families of 2026: experts, gates on residuals, features that come in again, attention to keys that an indexer chooses.

Features are an input, as in `towers_apart`.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import transformers as tf
from transformers.integrations.moe import use_experts_implementation
from transformers.models.step3p7 import modeling_step3p7

from tests.families.family import Example, Family
from tests.families.kin import BATCH, BATCHED, HIDDEN, IMAGE, PATCHES, TEXT, build, from_features, listed, understanding
from tests.families.qwen import OPEN, positions
from tests.families.towers_apart import ALONE, LANGUAGE, NOTE, example

ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
MLPS = ["dense", "sparse", "sparse"]
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
TOWER: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4,
}  # fmt: skip


def minimax() -> Example:
    """MiniMax-M3-VL: a gate that is capped, experts beside a shared one."""
    text = {
        **TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 48,
        "shared_intermediate_size": 16, "rotary_dim": 4, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        "mlp_layer_types": MLPS,
    }  # fmt: skip
    vision = {**TOWER, "temporal_patch_size": 2, "spatial_merge_size": 2, "image_size": 32}
    return example(
        "MiniMaxM3VL", text, vision, cls="MiniMaxM3SparseForConditionalGeneration", experts="batched_mm",
        image_token_index=IMAGE, video_token_index=111, projector_hidden_size=HIDDEN,
    )  # fmt: skip


def mistral_large4() -> Example:
    """Mistral Large 4: latent attention to keys that an indexer chooses, experts.

    With fewer heads of the indexer than these, keys tie at zero behind its ReLU, and runtimes choose different ones of them.
    """
    text = {
        **TEXT, **EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "index_topk": 6, "index_head_dim": 16, "index_n_heads": 8, "rope_parameters": ROPE,
    }  # fmt: skip
    vision = {"model_type": "pixtral", **TOWER, "image_size": 32}
    return example("MistralLarge4", text, vision, experts="batched_mm", image_token_index=IMAGE)


def muse_spark() -> Example:
    """Muse Spark: gates on residuals, norms behind, logits that are capped."""
    text = {
        **TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_hidden_size": 16, "mlp_layer_types": MLPS, "sliding_window": 8, "layer_types": SLIDING,
    }  # fmt: skip
    vision = {**TOWER, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16, "merge_size": 1}
    audio = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_hidden_size": HIDDEN}
    return example(
        "MuseSpark", text, vision, experts="batched_mm", audio_config=audio, image_token_id=IMAGE, video_token_id=111,
        audio_token_id=112, out_hidden_size=HIDDEN, projector_hidden_size=HIDDEN,
    )  # fmt: skip


def step() -> Example:
    """Step 3.7: gates on heads, sliding windows, experts in a loop, which get a choice of implementations."""
    text = {
        **TEXT, "head_dim": 8, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "share_expert_dim": 16, "mlp_layer_types": MLPS, "sliding_window": 8,
        "layer_types": SLIDING, "num_sliding_attention_heads": 4,
    }  # fmt: skip
    vision = {**TOWER, "image_size": 32, "mlp_ratio": 1.5, "max_position_embeddings": 64}
    experts = type("Experts", (modeling_step3p7.Step3p7Experts,), {})
    with mock.patch.object(modeling_step3p7, "Step3p7Experts", use_experts_implementation(experts)):
        made = example("Step3p7", text, vision, image_token_id=IMAGE)
    made.model.get_submodule("model.language_model").config._experts_implementation = "batched_mm"
    return made


def inkling() -> Example:
    """Inkling: short convolutions, relative positions."""
    text = {
        **TEXT, "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": 8, "d_rel": 4, "rel_extent": 16, "local_layer_ids": [0], "mlp_layer_types": MLPS,
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    }  # fmt: skip
    config = tf.InklingTextConfig(**text)
    model = build(tf.InklingForCausalLM, config, experts="batched_mm")
    return understanding(
        model, listed("model.layers"), pixels=(BATCH, PATCHES, HIDDEN), name="features", logits=from_features
    )


def cosmos() -> Example:
    """Cosmos 3 Edge: squared ReLU, three axes of positions."""
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    vision = {**TOWER, "num_patches": 16, "spatial_merge_size": 2}
    return example(
        "Cosmos3Edge", text, vision, three=True, image_token_id=IMAGE, video_token_id=111, projector_hidden_size=HIDDEN,
        vision_start_token_id=108, vision_end_token_id=109,
    )  # fmt: skip


def omni() -> Example:
    """Qwen2.5-Omni: the thinker, without its towers."""
    text = {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    model = build(tf.Qwen2_5OmniThinkerForConditionalGeneration, tf.Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={"depth": 1, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": HIDDEN},
        audio_config={"d_model": HIDDEN, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": HIDDEN, "num_mel_bins": 8},
        image_token_id=IMAGE, video_token_id=111, audio_token_id=112,
    ))  # fmt: skip
    return understanding(
        model, listed(LANGUAGE), pixels=(BATCH, PATCHES, HIDDEN), name="features", logits=from_features, more=positions,
        dynamic=OPEN,
    )  # fmt: skip


CHOICE = "its experts get a choice of implementations (`use_experts_implementation`), and are batched products"
CONDITIONAL = "ForConditionalGeneration"
FAMILIES = [
    Family("MiniMax-M3-VL", f"MiniMaxM3Sparse{CONDITIONAL}", minimax, (NOTE, BATCHED)),
    Family("Mistral Large 4", f"MistralLarge4{CONDITIONAL}", mistral_large4, (NOTE, BATCHED)),
    Family("Muse Spark", f"MuseSpark{CONDITIONAL}", muse_spark, (NOTE, BATCHED)),
    Family("Step 3.7", f"Step3p7{CONDITIONAL}", step, (NOTE, CHOICE)),
    Family("Inkling", "InklingForCausalLM", inkling, (ALONE, BATCHED)),
    Family("Cosmos 3 Edge", f"Cosmos3Edge{CONDITIONAL}", cosmos, (NOTE,)),
    Family("Qwen2.5-Omni", f"Qwen2_5OmniThinker{CONDITIONAL}", omni, (ALONE,)),
]
