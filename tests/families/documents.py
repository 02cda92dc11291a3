"""Encoder-decoders that are shown an image alone, of a page or a line: the encoder's rows are all visual, and its layers thin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as tf
from torch import Tensor

import tokgraph as tg
from tests.families.family import Example, Family
from tests.families.kin import BATCH, HIDDEN, PATCHES, PIXELS, TOWER, VOCABULARY, build, listed, loss_of

ANSWER = {0: "batch", 1: "answer"}


def _seen(model: Any, layers: tuple[str, ...], rows: int, image: Callable[[int], Mapping[str, Tensor]]) -> Example:
    """The task: an answer, predicted token by token, of an image whose rows in the encoder are the visual tokens.

    Args:
        model: the model.
        layers: of its encoder.
        rows: of the encoder.
        image: inputs of the encoder, by seed.
    """

    def batch(task: str, seed: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (BATCH, 6), generator=torch.Generator().manual_seed(seed))
        return {**image(seed), "decoder_input_ids": ids, "labels": ids.clone()}

    def forward(model: Any, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        logits = model(**inputs, use_cache=False).logits
        return {"loss": loss_of(logits, labels), "logits": logits}

    inputs = batch("understanding", 0)
    dynamic = {name: ANSWER if name in ("decoder_input_ids", "labels") else {0: "batch"} for name in inputs}
    visual = tg.VisualTokens.positions(slice(0, rows))
    task = tg.Task(forward, inputs, dynamic=dynamic, visual=visual, reads="all")
    return Example(model, {"understanding": task}, batch, {"understanding": layers})


def _pixels(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*PIXELS, generator=torch.Generator().manual_seed(seed + 50))}


def trocr() -> Example:
    """TrOCR: a ViT, and a decoder that reads all of its rows."""
    decoder = tf.TrOCRConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        max_position_embeddings=64, dropout=0.0, cross_attention_hidden_size=HIDDEN,
    )  # fmt: skip
    encoder = tf.ViTConfig(
        **{**TOWER, "num_hidden_layers": 3}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.decoder_start_token_id = 1, 2
    model = build(tf.VisionEncoderDecoderModel, config, "eager")
    names = [name for name, _ in model.named_modules()]
    path = next(name.removesuffix(".0") for name in names if name.startswith("encoder") and name.endswith(".0"))
    return _seen(model, listed(path), PATCHES + 1, _pixels)


def pix2struct() -> Example:
    """Pix2Struct: patches of any arrangement, with their rows and columns, and T5's decoder."""
    config = tf.Pix2StructConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "dropout_rate": 0.0,
        },
        vision_config={
            "hidden_size": HIDDEN, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 3,
            "num_attention_heads": 4, "seq_len": 16, "initializer_range": 0.02,
        },
    )  # fmt: skip
    model = build(tf.Pix2StructForConditionalGeneration, config, "eager")

    def patches(seed: int) -> dict[str, Tensor]:
        places = torch.stack([torch.arange(PATCHES) // 4 + 1, torch.arange(PATCHES) % 4 + 1], -1).float()
        values = torch.randn(BATCH, PATCHES, 12, generator=torch.Generator().manual_seed(seed + 50))
        return {"flattened_patches": torch.cat([places.expand(BATCH, -1, -1), values], -1)}

    return _seen(model, listed("encoder.encoder.layer"), PATCHES, patches)


FAMILIES = [
    Family("TrOCR", "VisionEncoderDecoderModel", trocr, ("an image alone: visual tokens and layers of its encoder",)),
    Family(
        "Pix2Struct",
        "Pix2StructForConditionalGeneration",
        pix2struct,
        ("an image alone: visual tokens and layers of its encoder",),
    ),
]
