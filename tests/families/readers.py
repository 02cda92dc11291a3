"""Families whose image is read by queries, by cross-attention, or by an encoder; decoders with gates, memories, convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor

import tokgraph as tg
from tests.families.family import Example, Family
from tests.families.kin import (
    BATCH,
    HIDDEN,
    IMAGE,
    PATCHES,
    PIXELS,
    TEXT,
    TOKENS,
    TOWER,
    VOCABULARY,
    build,
    listed,
    loss_of,
    understanding,
)

LANGUAGE = listed("model.language_model.layers")
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
OPT = {
    "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": HIDDEN, "pad_token_id": 0, "dropout": 0.0,
}  # fmt: skip
QFORMER = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": HIDDEN, "vocab_size": VOCABULARY,
}  # fmt: skip


T5 = {
    "model_type": "t5", "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip


def blip2(name: str = "Blip2", text: dict[str, Any] = OPT) -> Example:
    """BLIP-2 and InstructBLIP: queries read the image, InstructBLIP's with the instruction beside them."""
    config = getattr(tf, f"{name}Config")(
        vision_config=TOWER, qformer_config=QFORMER, text_config=text, num_query_tokens=4, image_token_index=IMAGE
    )
    model = build(getattr(tf, f"{name}ForConditionalGeneration"), config)

    def instruction(ids: Tensor) -> dict[str, Tensor]:
        return {"qformer_input_ids": ids[:, -4:].clone()}

    instructed = name != "Blip2"
    path = "language_model.model.decoder.layers" if text is OPT else "language_model.model.layers"
    return understanding(
        model, listed(path), count=4, more=instruction if instructed else None,
        dynamic={"qformer_input_ids": {0: "batch"}} if instructed else None,
    )  # fmt: skip


def kosmos2(attention: str = "sdpa") -> Example:
    """Kosmos-2: learned queries, sinusoidal positions, norms inside of attention and feed-forward."""
    config = tf.Kosmos2Config(
        text_config={
            "vocab_size": VOCABULARY, "embed_dim": HIDDEN, "layers": 3, "ffn_dim": 48, "attention_heads": 4,
            "max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0,
        },
        vision_config=TOWER, latent_query_num=4,
    )  # fmt: skip
    model = build(tf.Kosmos2ForConditionalGeneration, config, attention)

    def places(ids: Tensor) -> dict[str, Tensor]:
        return {"image_embeds_position_mask": (ids == IMAGE).long()}

    return understanding(
        model, listed("text_model.model.layers"), count=4, more=places, dynamic={"image_embeds_position_mask": TOKENS}
    )


def idefics2() -> Example:
    """Idefics2: a resampler and a Mistral decoder."""
    config = tf.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8}, vision_config=TOWER,
        perceiver_config={
            "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
            "num_key_value_heads": 2, "hidden_size": HIDDEN,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    model = build(tf.Idefics2ForConditionalGeneration, config)
    return understanding(model, listed("model.text_model.layers"), count=4, pixels=(BATCH, 1, 3, 32, 32))


def lfm2_vl() -> Example:
    """LFM2-VL: short convolutions over the tokens between attentions."""
    config = tf.Lfm2VlConfig(
        text_config={
            "model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention", "full_attention", "full_attention"],
            "num_hidden_layers": 4, "block_ff_dim": 48, "conv_L_cache": 3,
        },
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_patches": 16, "patch_size": 8,
        },
        downsample_factor=2, image_token_id=IMAGE, projector_hidden_size=HIDDEN,
    )  # fmt: skip
    model = build(tf.Lfm2VlForConditionalGeneration, config)
    fixed = {
        "spatial_shapes": np.array([[4, 4]] * BATCH), "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
    }  # fmt: skip
    layers = listed("model.language_model.layers", 4)
    return understanding(model, layers, count=4, pixels=(BATCH, 16, 192), fixed=fixed)


def mllama() -> Example:
    """Llama 3.2 Vision: the image is read by gated cross-attention layers among the others."""
    config = tf.MllamaConfig(
        text_config={**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [2], "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4}},
        vision_config={
            "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
            "intermediate_size": 48, "vision_output_dim": 2 * HIDDEN, "image_size": 32, "patch_size": 8, "max_num_tiles": 1,
            "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )  # fmt: skip
    model = build(tf.MllamaForConditionalGeneration, config)
    fixed = {
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 1, dtype=torch.long),
    }
    layers = listed("model.language_model.layers", 4)

    def seen(ids: Tensor) -> dict[str, Tensor]:
        return {"cross_attention_mask": (ids == IMAGE).cumsum(1).clamp(max=1)[..., None, None]}

    return understanding(
        model, layers, count=4, pixels=(BATCH, 1, 1, 3, 32, 32), fixed=fixed, more=seen,
        dynamic={"cross_attention_mask": TOKENS},
    )  # fmt: skip


def llama4() -> Example:
    """Llama 4: rotary embeddings as complex numbers, experts in every second layer, chunked attention."""
    config = tf.Llama4Config(
        text_config={
            **TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16, "no_rope_layer_interval": 3,
        },
        vision_config={
            "hidden_size": HIDDEN, "intermediate_size": HIDDEN * 4, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8, "vision_output_dim": HIDDEN, "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN, "pixel_shuffle_ratio": 0.5,
        },
        image_token_index=IMAGE, boi_token_index=108, eoi_token_index=109,
    )  # fmt: skip
    model = build(tf.Llama4ForConditionalGeneration, config)
    return understanding(model, listed("language_model.model.layers"), count=4)


def fuyu() -> Example:
    """Fuyu: no tower; patches go into a Persimmon decoder by one linear layer."""
    config = tf.FuyuConfig(
        text_config={
            "model_type": "persimmon", **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        image_size=32, patch_size=8, image_token_id=IMAGE,
    )  # fmt: skip
    model = build(tf.FuyuForCausalLM, config)
    return understanding(model, LANGUAGE, count=PATCHES, pixels=(BATCH, PATCHES, 192), name="image_patches")


def git() -> Example:
    """GIT: image rows in front of the text, in one decoder."""
    config = tf.GitConfig(
        vision_config=TOWER, vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = build(tf.GitForCausalLM, config, "eager")
    rows = PATCHES + 1

    def batch(task: str, seed: int) -> dict[str, Tensor]:
        some = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 100, (BATCH, 9), generator=some)
        return {"input_ids": ids, "pixel_values": torch.randn(*PIXELS, generator=some), "labels": ids.clone()}

    def forward(model: Any, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        logits = model(**inputs, use_cache=False).logits
        return {"loss": loss_of(logits[:, rows:], labels), "logits": logits}

    task = tg.Task(
        forward, batch("understanding", 0), visual=tg.VisualTokens.positions(slice(0, rows)), reads="text",
        dynamic={"input_ids": TOKENS, "labels": TOKENS, "pixel_values": {0: "batch"}},
    )  # fmt: skip
    return Example(model, {"understanding": task}, batch, {"understanding": listed("git.encoder.layer")})


def florence2() -> Example:
    """Florence-2: image and prompt are read by BART's encoder; its layers are the ones that thin."""
    config = tf.Florence2Config(
        text_config={
            "model_type": "bart", "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 3, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_position_embeddings": 128, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        vision_config={
            "depths": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 32), "num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2),
            "patch_size": (7, 3, 3, 3), "patch_stride": (4, 2, 2, 1), "window_size": 4, "drop_path_rate": 0.0,
            "projection_dim": HIDDEN,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    model = build(tf.Florence2ForConditionalGeneration, config)

    return _encoding(model, listed("model.language_model.encoder.layers"), count=5)


def blip2_t5() -> Example:
    """BLIP-2 with T5: queries and prompt are read by T5's encoder, whose bias of positions grows with the prompt."""
    config = tf.Blip2Config(
        vision_config=TOWER, qformer_config=QFORMER, text_config=T5, num_query_tokens=4, image_token_index=IMAGE
    )
    model = build(tf.Blip2ForConditionalGeneration, config)
    answer = {name: {0: "batch", 1: "answer"} for name in ("decoder_input_ids", "labels")}
    dynamic = {"input_ids": TOKENS, "pixel_values": {0: "batch"}, **answer}
    return _encoding(model, listed("language_model.encoder.block"), count=4, dynamic=dynamic)


def _encoding(model: Any, layers: tuple[str, ...], count: int, dynamic: Any = None) -> Example:
    """The task of a model whose encoder reads image and prompt, and whose decoder the answer."""

    def answer(ids: Tensor) -> dict[str, Tensor]:
        return {"decoder_input_ids": ids[:, -5:].clone()}

    def logits(model: Any, **inputs: Tensor) -> Tensor:
        found: Tensor = model(**inputs, use_cache=False).logits
        return found

    made = understanding(model, layers, count=count, more=answer, logits=logits)

    def batch(task: str, seed: int) -> dict[str, Tensor]:
        inputs = made.batch(task, seed)
        return inputs | {"labels": inputs["decoder_input_ids"].clone()}

    task = made.tasks["understanding"]
    own = tg.Task(task.forward, batch("understanding", 0), visual=task.visual, reads="all", dynamic=dynamic)
    return Example(model, {"understanding": own}, batch, made.layers)


CONDITIONAL = "ForConditionalGeneration"
FAMILIES = [
    Family("BLIP-2", f"Blip2{CONDITIONAL}", blip2),
    Family("BLIP-2, T5", f"Blip2{CONDITIONAL}", blip2_t5, ("visual tokens and layers of its encoder",)),
    Family("InstructBLIP", f"InstructBlip{CONDITIONAL}", partial(blip2, "InstructBlip")),
    Family(
        "InstructBLIP, Vicuna",
        f"InstructBlip{CONDITIONAL}",
        partial(blip2, "InstructBlip", {"model_type": "llama", **TEXT}),
    ),
    Family("Kosmos-2", f"Kosmos2{CONDITIONAL}", kosmos2),
    Family("Idefics2", f"Idefics2{CONDITIONAL}", idefics2),
    Family("LFM2-VL", f"Lfm2Vl{CONDITIONAL}", lfm2_vl),
    Family(
        "Llama 3.2 Vision",
        f"Mllama{CONDITIONAL}",
        mllama,
        ("its visual tokens are placeholders; the image is read by cross-attention",),
    ),
    Family("Llama 4", f"Llama4{CONDITIONAL}", llama4),
    Family("Fuyu", "FuyuForCausalLM", fuyu),
    Family("GIT", "GitForCausalLM", git),
    Family("Florence-2", f"Florence2{CONDITIONAL}", florence2, ("visual tokens and layers of its encoder",)),
]
