"""Gemma's vision-language models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.families.family import Example, Family
from tests.families.kin import (
    BATCH,
    BATCHED,
    END,
    IMAGE,
    PATCHES,
    START,
    TEXT,
    TOKENS,
    TOWER,
    VOCABULARY,
    build,
    listed,
    understanding,
)

LANGUAGE = listed("model.language_model.layers")
HEAD = {"head_dim": 8}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}


def _kinds(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def gemma3() -> Example:
    """Gemma 3: sliding windows between full attentions, images that see themselves both ways."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Gemma3Config(
        text_config={**TEXT, **HEAD, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": layers},
        vision_config=SIGLIP, mm_tokens_per_image=PATCHES // 4, image_token_index=IMAGE, boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip
    model = build(tf.Gemma3ForConditionalGeneration, config)
    return understanding(
        model,
        LANGUAGE,
        count=PATCHES // 4,
        before=(START,),
        after=(END,),
        more=_kinds,
        dynamic={"token_type_ids": TOKENS},
    )


def gemma3n() -> Example:
    """Gemma 3n's decoder: four streams, embeddings for each layer, low-rank additions; features are an input."""
    config = tf.Gemma3nTextConfig(
        **TEXT, **HEAD, sliding_window=8, layer_types=["sliding_attention", "full_attention", "full_attention"],
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, altup_num_inputs=4, num_kv_shared_layers=0,
        laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0, 0.0],
    )  # fmt: skip
    model = build(tf.Gemma3nForCausalLM, config)

    def logits(model: Any, input_ids: Tensor, features: Tensor) -> Tensor:
        text = input_ids.masked_fill(input_ids == IMAGE, 0)
        each = model.model.get_per_layer_inputs(text)
        rows = model.model.embed_tokens(text)
        rows = rows.masked_scatter((input_ids == IMAGE).unsqueeze(-1), features)
        hidden = model.model(inputs_embeds=rows, per_layer_inputs=each, use_cache=False).last_hidden_state
        return model.lm_head(hidden)

    return understanding(
        model, listed("model.layers"), count=4, pixels=(BATCH, 4, TEXT["hidden_size"]), name="features", logits=logits
    )


def gemma4(experts: bool = False, shared: int = 0, each: int = 0) -> Example:
    """Gemma 4: scaled layers, one key and value head where attention is full, perhaps experts beside the feed-forward."""
    more = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16} if experts else {}
    layers = ["sliding_attention", "full_attention", "full_attention"]
    text = tf.Gemma4TextConfig(
        **TEXT, **HEAD, global_head_dim=8, hidden_size_per_layer_input=each, sliding_window=8, num_kv_shared_layers=shared,
        vocab_size_per_layer_input=VOCABULARY, enable_moe_block=experts, layer_types=layers, **more,
    )  # fmt: skip
    model = build(tf.Gemma4ForCausalLM, text, experts="batched_mm" if experts else None)

    def logits(model: Any, input_ids: Tensor, features: Tensor) -> Tensor:
        text = input_ids.masked_fill(input_ids == IMAGE, 0)
        options = {"per_layer_inputs": model.model.get_per_layer_inputs(text, None)} if each else {}
        rows = model.model.embed_tokens(text)
        rows = rows.masked_scatter((input_ids == IMAGE).unsqueeze(-1), features)
        hidden = model.model(inputs_embeds=rows, use_cache=False, **options).last_hidden_state
        return model.lm_head(hidden)

    return understanding(
        model, listed("model.layers"), count=4, pixels=(BATCH, 4, TEXT["hidden_size"]), name="features", logits=logits
    )


def paligemma2() -> Example:
    """PaliGemma 2: a Gemma 2 decoder, whose scores and logits are capped, norms before and after."""
    config = tf.PaliGemmaConfig(
        text_config={"model_type": "gemma2", **TEXT, **HEAD, "sliding_window": 8, "query_pre_attn_scalar": 8},
        vision_config={**SIGLIP, "projection_dim": TEXT["hidden_size"]}, image_token_index=IMAGE,
        projection_dim=TEXT["hidden_size"],
    )  # fmt: skip
    model = build(tf.PaliGemmaForConditionalGeneration, config, "eager")

    def suffix(ids: Tensor) -> dict[str, Tensor]:
        kinds = torch.zeros_like(ids)
        kinds[:, -4:] = 1
        return {"token_type_ids": kinds}

    return understanding(model, LANGUAGE, more=suffix, dynamic={"token_type_ids": TOKENS})


FEATURES = "image features are an input"
FAMILIES = [
    Family("Gemma 3", "Gemma3ForConditionalGeneration", gemma3),
    Family("Gemma 3n", "Gemma3nForCausalLM", gemma3n, (FEATURES,)),
    Family("Gemma 4", "Gemma4ForCausalLM", gemma4, (FEATURES,)),
    Family("Gemma 4, embeddings for each layer", "Gemma4ForCausalLM", partial(gemma4, each=8), (FEATURES,)),
    Family("Gemma 4, experts", "Gemma4ForCausalLM", partial(gemma4, experts=True), (FEATURES, BATCHED)),
    Family("PaliGemma 2", "PaliGemmaForConditionalGeneration", paligemma2, ("eager attention: its scores are capped",)),
]
