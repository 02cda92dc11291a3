"""Tiny, randomly initialised vision-language models of `transformers`, one builder each.

Every builder takes seconds, downloads nothing and returns a `ZooModel`: the model, and for each of its tasks a forward
function with example inputs. All models have two decoder blocks, a hidden size of 32 and grouped key-value heads
where the architecture has them. The example batches hold two rows whose images start at different positions, so an
index of visual rows differs from row to row (Janus generation, which concatenates, is the exception).

The weights are moved away from their initial values: with those, attention is close to uniform and norms and biases
are trivial, and many mistakes would not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

Attention = Literal["sdpa", "eager"]
Visual = tuple[Literal["ids"], str, int, int] | tuple[Literal["inputs"], tuple[str, ...]]
"""Where visual tokens are: ids of one input within `low..high`, both included, or whole inputs that carry them."""

BATCH = 2
HIDDEN = 32
HEADS = 4
KV_HEADS = 2
FFN = 48
LAYERS = 2
VISION = 24  # hidden size of the vision towers
IMAGE = 16  # pixels on a side
TEXT_VOCAB = 60  # ordinary text ids are 3 .. 59
IMAGE_ID = 60  # the placeholder, where a model has one
START_ID, END_ID = 61, 62  # around an image, where a model wants them
VOCAB = 64
CODES = 24  # image codes, where a model has a codebook
IGNORE = -100


@dataclass(frozen=True)
class ZooTask:
    """One task of a model.

    Args:
        forward: `(model, **inputs) -> (loss, logits)`; logits are `[batch, tokens, vocabulary]`.
        inputs: example batch, keyword by keyword.
        dynamic: names of the dimensions that a capture can leave symbolic, by input and dimension; None: all static.
        visual: where the visual tokens are.
        reads: which tokens the loss predicts.
        visual_count: visual tokens in each row.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]] | None
    visual: Visual
    reads: Literal["text", "visual"]
    visual_count: int


@dataclass(frozen=True)
class ZooModel:
    """A model with its tasks, by name: "understanding" and, for a unified model, "generation"."""

    name: str
    model: nn.Module
    tasks: dict[str, ZooTask]


def _build(cls: Any, config: Any, attn: Attention) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(attn)
    return model


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text(*shape: int) -> Tensor:
    return torch.randint(3, TEXT_VOCAB, shape, generator=_random(0))


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_random(1))


def _rows(images: Tensor, start: int | None = None, end: int | None = None, offset: int = 0) -> Tensor:
    """Nine text ids with one image in each row: at position 2 in the first row, one later in each row after.

    Args:
        images: ids of the image tokens, `[batch, image tokens]`.
        start: id put before the image.
        end: id put after the image.
        offset: added to the text ids.

    Returns:
        ids, `[batch, tokens]`.
    """
    batch = images.shape[0]
    around = [torch.full((1,), i) if i is not None else torch.empty(0, dtype=torch.long) for i in (start, end)]
    rows = []
    for row, (ids, image) in enumerate(zip(_text(batch, 9) + offset, images, strict=True)):
        at = 2 + row
        rows.append(torch.cat([ids[:at], around[0], image, around[1], ids[at:]]))
    return torch.stack(rows)


def _placeholders(count: int, start: int | None = None, end: int | None = None) -> Tensor:
    return _rows(torch.full((BATCH, count), IMAGE_ID), start, end)


def _codes(count: int) -> Tensor:
    return torch.randint(0, CODES, (BATCH, count), generator=_random(2))


def _labels(ids: Tensor, low: int, high: int, reads: Literal["text", "visual"]) -> Tensor:
    visual = (ids >= low) & (ids <= high)
    prompt = visual.flip(1).cumsum(1).flip(1) > 0  # images, and the text before the last of them
    return ids.masked_fill(prompt if reads == "text" else ~visual, IGNORE)


def _llama(**options: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }


def _tower(patch: int, **options: Any) -> dict[str, Any]:
    return {
        "hidden_size": VISION,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": IMAGE,
        "patch_size": patch,
        **options,
    }


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOKENS = {0: "batch", 1: "tokens"}
ONLY_TOKENS = {1: "tokens"}
ONLY_BATCH = {0: "batch"}


def _loss_and_logits(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    out = model(**inputs, use_cache=False)
    return out.loss, out.logits


def _understanding(ids: Tensor, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]] | None) -> ZooTask:
    """The usual task: placeholders in `input_ids`, features from `pixel_values`, the model's own loss over text."""
    return ZooTask(
        forward=_loss_and_logits,
        inputs={"input_ids": ids, **inputs, "labels": _labels(ids, IMAGE_ID, IMAGE_ID, "text")},
        dynamic=dynamic,
        visual=("ids", "input_ids", IMAGE_ID, IMAGE_ID),
        reads="text",
        visual_count=int((ids[0] == IMAGE_ID).sum()),
    )


def _generation(ids: Tensor, low: int, forward: Callable[..., tuple[Tensor, Tensor]]) -> ZooTask:
    """Teacher-forced generation by a model whose image codes are plain ids `low .. low + CODES - 1`."""
    high = low + CODES - 1
    return ZooTask(
        forward=forward,
        inputs={"input_ids": ids, "labels": _labels(ids, low, high, "visual")},
        dynamic={"input_ids": TOKENS, "labels": TOKENS},
        visual=("ids", "input_ids", low, high),
        reads="visual",
        visual_count=int(((ids[0] >= low) & (ids[0] <= high)).sum()),
    )


# Unified models: understanding and generation.


def janus(attn: Attention = "sdpa") -> ZooModel:
    """Janus: encoder features by masked scatter; image codes have an embedding, an aligner and a head of their own."""
    config = tf.JanusConfig(
        text_config={"model_type": "llama", **_llama()},
        vision_config=_tower(4, mlp_ratio=2.0, projection_dim=HIDDEN, num_image_tokens=16),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
        },
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
    )

    def generation(model: Any, text_ids: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        text = model.get_input_embeddings()(text_ids)
        image = model.prepare_embeddings_for_image_generation(image_ids)
        stream = torch.cat([text, image], dim=1)
        hidden = model.model.language_model(inputs_embeds=stream, use_cache=False).last_hidden_state
        logits = model.model.generation_head(hidden)
        labels = torch.cat([torch.full_like(text_ids, IGNORE), image_ids], dim=1)
        return model.loss_function(logits=logits, labels=labels, vocab_size=CODES), logits

    ids = _placeholders(16)
    return ZooModel(
        "janus",
        _build(tf.JanusForConditionalGeneration, config, attn),
        {
            "understanding": _understanding(
                ids,
                {"pixel_values": _pixels(BATCH, 3, IMAGE, IMAGE)},
                {"input_ids": TOKENS, "pixel_values": ONLY_BATCH, "labels": TOKENS},
            ),
            "generation": ZooTask(
                forward=generation,
                inputs={"text_ids": _text(BATCH, 7), "image_ids": _codes(16)},
                dynamic={"text_ids": TOKENS, "image_ids": ONLY_BATCH},
                visual=("inputs", ("image_ids",)),
                reads="visual",
                visual_count=16,
            ),
        },
    )


def chameleon(attn: Attention = "sdpa") -> ZooModel:
    """Chameleon: images are codes of the text vocabulary in both tasks; query and key norms per head."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    vocabulary = {f"IMGIMG{str(code).translate(letters)}Z": VOCAB + code for code in range(CODES)}
    config = tf.ChameleonConfig(
        **_llama(vocab_size=VOCAB + CODES),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "latent_channels": 32,
            "resolution": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={"<image>": IMAGE_ID, **vocabulary},
        tie_word_embeddings=False,
    )

    def generation(model: Any, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # The model's own forward masks the logits of image codes: it only writes text.
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        return model.loss_function(logits=logits, labels=labels, vocab_size=VOCAB + CODES), logits

    return ZooModel(
        "chameleon",
        _build(tf.ChameleonForConditionalGeneration, config, attn),
        {
            "understanding": _understanding(
                _placeholders(16, start=START_ID, end=END_ID),
                {"pixel_values": _pixels(BATCH, 3, 8, 8)},
                {"input_ids": TOKENS, "pixel_values": ONLY_BATCH, "labels": TOKENS},
            ),
            "generation": _generation(
                _rows(VOCAB + _codes(16), start=START_ID, end=END_ID), low=VOCAB, forward=generation
            ),
        },
    )


def emu3(attn: Attention = "sdpa") -> ZooModel:
    """Emu3: images are codes of the text vocabulary in both tasks; each line of codes ends in a token of its own."""
    end_of_line = 63
    codes = {f"<|visual token {code:06d}|>": VOCAB + code for code in range(CODES)}
    config = tf.Emu3Config(
        text_config=_llama(vocab_size=VOCAB + CODES, attention_dropout=0.0),
        vq_config={
            "codebook_size": CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "temporal_downsample_factor": 2,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
        },
        vocabulary_map={"<image>": IMAGE_ID, "<|extra_200|>": end_of_line, **codes},
        tie_word_embeddings=False,
    )
    sizes = [[8, 8]] * BATCH

    def understanding(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        # A list: sizes in a tensor would make the shapes of the codes depend on data.
        return _loss_and_logits(model, image_sizes=sizes, **inputs)

    task = _understanding(
        _placeholders(4 * 5, start=START_ID, end=END_ID),
        {"pixel_values": _pixels(BATCH, 3, 8, 8)},
        {"input_ids": ONLY_TOKENS, "labels": ONLY_TOKENS},
    )
    return ZooModel(
        "emu3",
        _build(tf.Emu3ForConditionalGeneration, config, attn),
        {
            "understanding": replace(task, forward=understanding),
            "generation": _generation(
                _rows(VOCAB + _codes(16), start=START_ID, end=END_ID), low=VOCAB, forward=_loss_and_logits
            ),
        },
    )


def _grid_positions(ids: Tensor, low: int, high: int, side: int) -> Tensor:
    """Positions in time, height and width of rows that hold one square image each, `[3, batch, tokens]`."""
    rows = []
    for row in (ids >= low) & (ids <= high):
        at, positions, now = 0, [], 0
        while at < len(row):
            if row[at]:
                line = torch.arange(side)
                grid = [torch.zeros(side * side, dtype=torch.long), line.repeat_interleave(side), line.repeat(side)]
                positions.append(now + torch.stack(grid))
                at, now = at + side * side, now + side
            else:
                positions.append(torch.full((3, 1), now))
                at, now = at + 1, now + 1
        rows.append(torch.cat(positions, dim=1))
    return torch.stack(rows, dim=1)


def glm_image(attn: Attention = "sdpa") -> ZooModel:
    """GLM-Image: codes below the text ids; codes of an image given as pixels are scattered into the ids; M-RoPE.

    The published head predicts image codes and special tokens only. Here it covers the text ids too, so that a loss
    over text is possible.
    """
    image_id, start, end = CODES + IMAGE_ID, CODES + START_ID, CODES + END_ID
    config = tf.GlmImageConfig(
        text_config=_llama(
            vocab_size=CODES + VOCAB,
            vision_vocab_size=CODES + VOCAB,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={**_MROPE, "partial_rotary_factor": 0.5},
            eos_token_id=end,
        ),
        vision_config={
            "depth": 1,
            "hidden_size": VISION,
            "intermediate_size": 40,
            "num_heads": 2,
            "image_size": IMAGE,
            "patch_size": 4,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": VISION},
        image_token_id=image_id,
        image_start_token_id=start,
        image_end_token_id=end,
    )
    side = IMAGE // 4
    segments = np.arange(BATCH + 1) * side * side
    patches = torch.arange(side * side).repeat(BATCH)

    def loss_and_logits(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        return model.loss_function(logits=logits, labels=labels, vocab_size=CODES + VOCAB), logits

    def understanding(model: Any, input_ids: Tensor, pixel_values: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        # What the model's own forward does, whose branches and splits on the image grid a capture cannot follow.
        tower = model.model.visual
        lengths, shapes = torch.full((BATCH,), side * side), torch.tensor([[1, side, side]] * BATCH)
        hidden = tower.patch_embed(pixel_values)
        hidden = tower.embeddings(hidden, lengths, shapes, patches // side, patches % side)
        for block in tower.blocks:
            hidden = block(hidden, cu_seqlens=segments)
        features = hidden.view(BATCH, side, side, VISION).permute(0, 3, 1, 2)
        codes = model.model.vqmodel.encode(features).image_tokens
        input_ids = input_ids.masked_scatter(input_ids == image_id, codes)
        return loss_and_logits(model, input_ids=input_ids, **inputs)

    seen = _rows(torch.full((BATCH, side * side), image_id), start=start, end=end, offset=CODES)
    drawn = _rows(_codes(side * side), start=start, end=end, offset=CODES)
    return ZooModel(
        "glm_image",
        _build(tf.GlmImageForConditionalGeneration, config, attn),
        {
            "understanding": ZooTask(
                forward=understanding,
                inputs={
                    "input_ids": seen,
                    "pixel_values": _pixels(BATCH * side * side, 3 * 4 * 4),
                    "position_ids": _grid_positions(seen, image_id, image_id, side),
                    "labels": _labels(seen, image_id, image_id, "text"),
                },
                dynamic={"input_ids": ONLY_TOKENS, "position_ids": {2: "tokens"}, "labels": ONLY_TOKENS},
                visual=("ids", "input_ids", image_id, image_id),
                reads="text",
                visual_count=side * side,
            ),
            "generation": ZooTask(
                forward=loss_and_logits,
                inputs={
                    "input_ids": drawn,
                    "position_ids": _grid_positions(drawn, 0, CODES - 1, side),
                    "labels": _labels(drawn, 0, CODES - 1, "visual"),
                },
                dynamic={"input_ids": TOKENS, "position_ids": {1: "batch", 2: "tokens"}, "labels": TOKENS},
                visual=("ids", "input_ids", 0, CODES - 1),
                reads="visual",
                visual_count=side * side,
            ),
        },
    )


# Models that only understand.


def llava(attn: Attention = "sdpa") -> ZooModel:
    """LLaVA: a CLIP tower and a Llama decoder."""
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", **_llama()},
        vision_config={"model_type": "clip_vision_model", **_tower(4, num_hidden_layers=2, projection_dim=VISION)},
        image_token_index=IMAGE_ID,
        image_seq_length=16,
    )
    task = _understanding(
        _placeholders(16),
        {"pixel_values": _pixels(BATCH, 3, IMAGE, IMAGE)},
        {"input_ids": ONLY_TOKENS, "labels": ONLY_TOKENS},
    )
    return ZooModel("llava", _build(tf.LlavaForConditionalGeneration, config, attn), {"understanding": task})


def internvl(attn: Attention = "sdpa") -> ZooModel:
    """InternVL: pixel-shuffled features and a Qwen2 decoder, whose query, key and value projections have biases."""
    config = tf.InternVLConfig(
        text_config={"model_type": "qwen2", **_llama()},
        vision_config=_tower(2),
        image_token_id=IMAGE_ID,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    task = _understanding(
        _placeholders(16),
        {"pixel_values": _pixels(BATCH, 3, IMAGE, IMAGE)},
        {"input_ids": TOKENS, "pixel_values": ONLY_BATCH, "labels": TOKENS},
    )
    return ZooModel("internvl", _build(tf.InternVLForConditionalGeneration, config, attn), {"understanding": task})


def paligemma(attn: Attention = "sdpa") -> ZooModel:
    """PaliGemma: a Gemma decoder whose image and prompt see each other both ways; tied embeddings."""
    config = tf.PaliGemmaConfig(
        text_config={"model_type": "gemma", **_llama(num_key_value_heads=1, head_dim=HIDDEN // HEADS)},
        vision_config={
            "model_type": "siglip_vision_model",
            **_tower(4, vision_use_head=False, projection_dim=HIDDEN),
        },
        image_token_index=IMAGE_ID,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )
    ids = _placeholders(16)
    suffix = torch.zeros_like(ids)
    suffix[:, -4:] = 1
    task = _understanding(
        ids,
        {"pixel_values": _pixels(BATCH, 3, IMAGE, IMAGE), "token_type_ids": suffix},
        {"input_ids": TOKENS, "pixel_values": ONLY_BATCH, "token_type_ids": TOKENS, "labels": TOKENS},
    )
    return ZooModel("paligemma", _build(tf.PaliGemmaForConditionalGeneration, config, attn), {"understanding": task})


def _idefics(name: str, cls: Any, config: Any, attn: Attention) -> ZooModel:
    task = _understanding(
        _placeholders(16),
        {"pixel_values": _pixels(BATCH, 1, 3, IMAGE, IMAGE)},
        {"input_ids": ONLY_TOKENS, "labels": ONLY_TOKENS},
    )
    return ZooModel(name, _build(cls, config, attn), {"understanding": task})


def idefics3(attn: Attention = "sdpa") -> ZooModel:
    """Idefics3: a batch of image lists, empty images left out by a mask, and a Llama decoder."""
    config = tf.Idefics3Config(
        text_config={"model_type": "llama", **_llama()},
        vision_config=_tower(2),
        image_token_id=IMAGE_ID,
        scale_factor=2,
    )
    return _idefics("idefics3", tf.Idefics3ForConditionalGeneration, config, attn)


def smolvlm(attn: Attention = "sdpa") -> ZooModel:
    """SmolVLM: like Idefics3, except that a batch without any image keeps one empty image."""
    config = tf.SmolVLMConfig(
        text_config={"model_type": "llama", **_llama()},
        vision_config=_tower(2),
        image_token_id=IMAGE_ID,
        scale_factor=2,
    )
    return _idefics("smolvlm", tf.SmolVLMForConditionalGeneration, config, attn)


def _qwen(name: str, cls: Any, config: Any, attn: Attention) -> ZooModel:
    """Qwen2-VL and Qwen2.5-VL. The image grid is part of the forward function: its shapes depend on it."""
    vision = config.vision_config
    patches = IMAGE // vision.patch_size
    side = patches // vision.spatial_merge_size
    grid = np.array([[1, patches, patches]] * BATCH)
    fixed: dict[str, Any] = {
        "image_grid_thw": grid,
        "image_cu_seqlens": np.arange(BATCH + 1) * patches * patches,
        "image_position_ids": get_vision_position_ids(torch.from_numpy(grid), vision.spatial_merge_size),
    }
    if hasattr(vision, "window_size"):
        index, segments = get_vision_window_index(
            torch.from_numpy(grid), vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        fixed |= {"image_window_index": index, "image_cu_window_seqlens": segments.numpy()}

    def understanding(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return _loss_and_logits(model, **fixed, **inputs)

    ids = _placeholders(side * side, start=START_ID, end=END_ID)
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2
    return ZooModel(
        name,
        _build(cls, config, attn),
        {
            "understanding": ZooTask(
                forward=understanding,
                inputs={
                    "input_ids": ids,
                    "pixel_values": _pixels(BATCH * patches * patches, pixels),
                    "position_ids": _grid_positions(ids, IMAGE_ID, IMAGE_ID, side),
                    "labels": _labels(ids, IMAGE_ID, IMAGE_ID, "text"),
                },
                dynamic={"input_ids": ONLY_TOKENS, "position_ids": {2: "tokens"}, "labels": ONLY_TOKENS},
                visual=("ids", "input_ids", IMAGE_ID, IMAGE_ID),
                reads="text",
                visual_count=side * side,
            )
        },
    )


_QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": 63,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
}


def qwen2_vl(attn: Attention = "sdpa") -> ZooModel:
    """Qwen2-VL: packed image patches and M-RoPE."""
    config = tf.Qwen2VLConfig(
        text_config=_llama(rope_parameters={**_MROPE}),
        vision_config={
            "depth": 1,
            "embed_dim": VISION,
            "hidden_size": HIDDEN,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 2,
            "spatial_merge_size": 2,
        },
        **_QWEN_IDS,
    )
    return _qwen("qwen2_vl", tf.Qwen2VLForConditionalGeneration, config, attn)


def qwen2_5_vl(attn: Attention = "sdpa") -> ZooModel:
    """Qwen2.5-VL: as Qwen2-VL, with windowed attention in the tower."""
    config = tf.Qwen2_5_VLConfig(
        text_config=_llama(rope_parameters={**_MROPE}),
        vision_config={
            "depth": 2,
            "hidden_size": VISION,
            "out_hidden_size": HIDDEN,
            "intermediate_size": 40,
            "num_heads": 2,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        **_QWEN_IDS,
    )
    return _qwen("qwen2_5_vl", tf.Qwen2_5_VLForConditionalGeneration, config, attn)


ZOO: dict[str, Callable[..., ZooModel]] = {
    build.__name__: build
    for build in (
        janus,
        chameleon,
        emu3,
        glm_image,
        llava,
        internvl,
        paligemma,
        idefics3,
        smolvlm,
        qwen2_vl,
        qwen2_5_vl,
    )
}
