"""Library models whose towers no graph can hold: captured with the tower, or the method around it, before the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg

pytestmark = pytest.mark.slow
IMAGE, BATCH, IGNORED = 110, 2, -100
TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
MARKS = {"image_token_id": IMAGE, "video_token_id": 111, "image_start_token_id": 108, "image_end_token_id": 109}


def batch(pixels: tuple[int, ...], count: int, name: str, more: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 100, (BATCH, 9), generator=generator)
    image = torch.tensor([108, *[IMAGE] * count, 109]).expand(BATCH, -1)
    ids = torch.cat([text[:, : 3 + seed], image, text[:, 3 + seed :]], 1)
    labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, IGNORED, ids)
    given = {key: x(ids) if callable(x) else x.clone() for key, x in more.items()}
    return {"input_ids": ids, name: torch.randn(*pixels, generator=generator), "labels": labels, **given}


def forward(model: nn.Module, labels: Tensor, **inputs: Tensor) -> Tensor:
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(3, BATCH, -1).clone()


GRID = {"image_grid_thw": torch.tensor([[1, 8, 8]] * BATCH)}


def glm4v() -> tuple[Any, Any, Callable[[int], dict[str, Tensor]]]:
    config = tf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": ROTARY},
        vision_config={
            **TOWER,
            "intermediate_size": 48,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "image_size": 32,
        },
        **MARKS,
    )
    more = {**GRID, "position_ids": positions}
    return (
        tf.Glm4vForConditionalGeneration,
        config,
        lambda seed: batch((BATCH * 64, 96), 16, "pixel_values", more, seed),
    )


def ernie() -> tuple[Any, Any, Callable[[int], dict[str, Tensor]]]:
    experts = {"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    config = tf.Ernie4_5_VLMoeConfig(
        text_config={**TEXT, **experts, "mlp_layer_types": ["dense"] * 2, "rope_parameters": ROTARY},
        vision_config={**TOWER, "intermediate_size": 48, "temporal_merge_size": 2},
        **MARKS,
    )
    more = {**GRID, "position_ids": positions, "mm_token_type_ids": lambda ids: (ids == IMAGE).int()}
    return (
        tf.Ernie4_5_VLMoeForConditionalGeneration,
        config,
        lambda seed: batch((BATCH * 64, 48), 16, "pixel_values", more, seed),
    )


def kimi() -> tuple[Any, Any, Callable[[int], dict[str, Tensor]]]:
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 2,
    }  # fmt: skip
    config = tf.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **TEXT, "num_key_value_heads": 4, **latent, **experts},
        vision_config={
            "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "num_attention_heads": 4, "num_hidden_layers": 2,
            "hidden_size": 32, "intermediate_size": 48,
        },
        projection_hidden_size=32, image_token_id=IMAGE, video_token_id=111, vision_start_token_id=108,
        vision_end_token_id=109,
    )  # fmt: skip
    return (
        tf.Kimi_K25ForConditionalGeneration,
        config,
        lambda seed: batch((BATCH * 64, 3, 4, 4), 16, "pixel_values", GRID, seed),
    )


def phi4() -> tuple[Any, Any, Callable[[int], dict[str, Tensor]]]:
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8, "crop_size": 32, "image_token_id": IMAGE, "feature_layer": -2,
    }  # fmt: skip
    audio = {
        "hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 4, "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32, "audio_token_id": 111, "input_size": 16,
        "time_reduction": 4,
    }  # fmt: skip
    config = tf.Phi4MultimodalConfig(**TEXT, vision_config=vision, audio_config=audio)
    more = {"image_sizes": torch.tensor([[32, 32]] * BATCH), "image_attention_mask": torch.ones(BATCH, 2, 4, 4)}
    return (
        tf.Phi4MultimodalForCausalLM,
        config,
        lambda seed: batch((BATCH, 2, 3, 32, 32), 13, "image_pixel_values", more, seed),
    )


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "GLM-4V": (glm4v, "model.get_image_features"),
    "GLM-4V, the tower alone": (glm4v, "model.visual"),
    "ERNIE 4.5 VL": (ernie, "model.get_image_features"),
    "Kimi K2.5": (kimi, "model.get_image_features"),
    "Phi-4 multimodal": (phi4, "model.embed_tokens_extend"),
}
FROZEN = ("GLM-4V", "Phi-4 multimodal")


def built(name: str) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    cls, config, inputs = MODELS[name][0]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls._from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model, inputs


def task(inputs: Mapping[str, Any], path: str | None) -> tg.Task:
    visual, before = tg.VisualTokens.ids(input="input_ids", equal=IMAGE), () if path is None else (path,)
    return tg.Task(forward, inputs, visual=visual, reads="text", precomputed=before)


@pytest.mark.parametrize(
    ("name", "frozen"), [*((n, False) for n in MODELS), *((n, True) for n in FROZEN)], ids=lambda x: str(x)
)
def test_towers_before_the_graph(name: str, frozen: bool) -> None:
    model, inputs = built(name)
    path = MODELS[name][1]
    for n, p in model.named_parameters():
        p.requires_grad_(not (frozen and any(part in n for part in ("visual", "embed_tokens_extend"))))
    program = tg.capture(tg.ModelSpec(model, {"understanding": task(inputs(0), path)}))
    facts = tg.analyze(program)
    accelerated = tg.apply(facts, tg.make_plan(facts, "exact"))
    tg.verify(accelerated).raise_if_failed()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batches = [inputs(0)] if name.startswith("Phi") else [inputs(0), {**inputs(0), **_other(inputs(1), inputs(0))}]
    for given in batches:
        reference, mine = forward(model, **given), accelerated["understanding"](**given)
        found = [torch.autograd.grad(x, list(trained.values()), allow_unused=True) for x in (mine, reference)]
        torch.testing.assert_close(mine, reference)
        scale = max(float(g.abs().max()) for g in found[1] if g is not None)
        for n, a, b in zip(trained, *found, strict=True):
            assert (a is None) == (b is None), n
            assert a is None or float((a - b).abs().max()) < 1e-5 * scale, n


def _other(batch: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x for key, x in batch.items() if x.shape == like[key].shape}


@pytest.mark.parametrize("name", ["GLM-4V", "Phi-4 multimodal"])
def test_what_export_refuses_names_the_line_and_what_to_leave_out(name: str) -> None:
    model, inputs = built(name)
    with pytest.raises(tg.CaptureError) as caught:
        tg.capture(tg.ModelSpec(model, {"understanding": task(inputs(0), None)}))
    assert caught.value.where is not None
    assert "modeling_" in (caught.value.where.source or "")
    assert caught.value.where.module
    assert f"precomputed=({MODELS[name][1]!r},)" in (caught.value.help or "")
