"""Models of transformers: checks and errors name the library's line, and the user's that led there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tokgraph as tg
from tests.field.models import assert_same

tf = pytest.importorskip("transformers")
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids  # noqa: E402

from tests import zoo  # noqa: E402
from tests.test_zoo import task_of  # noqa: E402

pytestmark = pytest.mark.slow
IMAGE, BATCH, GRID = 110, 2, (1, 8, 8)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())


@pytest.mark.parametrize(("policy", "sample"), [("none", 0), ("exact", 1), ("shared", 0)])
def test_a_truncated_image_is_refused(policy: str, sample: int) -> None:
    llava = zoo.llava()
    spec = tg.ModelSpec(llava.model, {"understanding": task_of(llava.tasks["understanding"])})
    batch = dict(spec.tasks["understanding"].inputs)
    ids = batch["input_ids"] = batch["input_ids"].clone()
    task = tg.optimize(spec, policy, **({"span": (0, 1)} if policy == "shared" else {}))["understanding"]
    task(**batch)
    ids[sample, (ids[sample] == zoo.IMAGE_ID).nonzero()[-1]] = 7
    with pytest.raises(ValueError, match="do not match"):
        spec.tasks["understanding"].forward(llava.model, **batch)
    with pytest.raises(tg.BatchError) as refused:
        task(**batch)
    if policy == "none":
        count, features = BATCH * 16 - 1, (refused.value.message.rpartition(" ")[2])
        assert f"Image features and image tokens do not match, tokens: {count}, features: {features}" in str(
            refused.value
        )
        assert refused.value.where is not None
        assert "transformers/models/llava/modeling_llava.py:" in str(refused.value.where.source)


def qwen3() -> nn.Module:
    torch.manual_seed(0)
    config = tf.Qwen3VLConfig(
        text_config={
            "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e4,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
        },
        image_token_id=IMAGE, video_token_id=111, vision_start_token_id=108, vision_end_token_id=109,
    )  # fmt: skip
    model: nn.Module = tf.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return model


def qwen3_batch(seed: int = 0) -> dict[str, Tensor]:
    some = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 100, (BATCH, 9), generator=some)
    image = torch.tensor([108, *[IMAGE] * 16, 109]).expand(BATCH, -1)
    ids = torch.cat([text[:, :3], image, text[:, 3:]], 1)
    labels = ids.clone()
    labels[:, :-3] = -100
    positions = torch.arange(ids.shape[1]).expand(3, BATCH, -1).clone()
    pixels = torch.randn(BATCH * 64, 96, generator=some)
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels, "position_ids": positions}


def qwen3_spec(model: nn.Module, fixed: dict[str, Any]) -> tg.ModelSpec:
    def forward(model: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
        return loss_of(model(**inputs, **fixed, use_cache=False).logits, labels)

    visual = tg.VisualTokens.ids(input="input_ids", equal=IMAGE)
    return tg.ModelSpec(model, {"understanding": tg.Task(forward, qwen3_batch(), visual=visual, reads="text")})


def test_an_image_grid_in_a_tensor_is_refused_where_the_library_reads_it() -> None:
    spec = qwen3_spec(qwen3(), {"image_grid_thw": torch.tensor([GRID] * BATCH)})
    with pytest.raises(tg.CaptureError) as refused:
        tg.capture(spec)
    where = refused.value.where
    assert where is not None
    assert "transformers/models/qwen3_vl/modeling_qwen3_vl.py:" in str(where.source)
    assert str(where.caller).startswith(f"{__file__}:")
    assert where.module == "model.visual.blocks.0.attn"
    assert "image_grid_thw and image_cu_seqlens as NumPy arrays" in str(refused.value.help)


def test_the_help_for_an_image_grid_helps() -> None:
    model: Any = qwen3()
    grid, tower = np.array([GRID] * BATCH), model.model.visual
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.from_numpy(grid),
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.config.spatial_merge_size,
    )
    fixed = {
        "image_grid_thw": grid,
        "image_cu_seqlens": np.arange(BATCH + 1) * 64,
        "image_position_ids": get_vision_position_ids(torch.from_numpy(grid), 2),
        "image_interp_indices": indices,
        "image_interp_weights": weights,
    }
    task = tg.optimize(qwen3_spec(model, fixed), "exact")["understanding"]
    eager, batch = qwen3_spec(model, {"image_grid_thw": torch.tensor([GRID] * BATCH)}), qwen3_batch(seed=4)
    assert_same(model, lambda: eager.tasks["understanding"].forward(model, **batch), lambda: task(**batch))


@pytest.mark.parametrize("train", [False, True])
def test_gemma3(train: bool) -> None:
    """A sliding window, and images that see themselves both ways."""
    torch.manual_seed(0)
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(
            vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=256, query_pre_attn_scalar=8,
            pad_token_id=0,
        ),
        vision_config=tf.SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8,
        ),
        mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=108, eoi_token_index=109,
    )  # fmt: skip
    model = tf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").train(train)

    def batch(seed: int) -> dict[str, Tensor]:
        some = torch.Generator().manual_seed(seed)
        text = torch.randint(1, 100, (BATCH, 9), generator=some)
        ids = torch.cat([text[:, :3], torch.full((BATCH, 16), IMAGE), text[:, 3:]], 1)
        labels = ids.clone()
        labels[:, :-3] = -100
        pixels = torch.randn(BATCH, 3, 32, 32, generator=some)
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long(), "labels": labels}

    def forward(model: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
        return loss_of(model(**inputs, use_cache=False).logits, labels)

    visual = tg.VisualTokens.ids(input="input_ids", equal=IMAGE)
    task = tg.optimize(
        tg.ModelSpec(model, {"understanding": tg.Task(forward, batch(0), visual=visual, reads="text")}), "exact"
    )["understanding"]
    assert_same(model, lambda: forward(model, **batch(4)), lambda: task(**batch(4)))


def test_gated_delta_attention() -> None:
    """Its state is written chunk by chunk, and rotary embeddings of three axes are put together in place."""
    torch.manual_seed(0)
    config = tf.Qwen3_5TextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, layer_types=["linear_attention", "full_attention"],
        rope_parameters={
            "rope_type": "default", "mrope_section": [1, 1, 0], "mrope_interleaved": True, "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    )  # fmt: skip
    model: Any = tf.Qwen3_5ForCausalLM._from_config(config, attn_implementation="sdpa")

    def batch(seed: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 100, (BATCH, 13), generator=torch.Generator().manual_seed(seed))
        ids[:, 3:7] = IMAGE
        return {"input_ids": ids, "labels": ids}

    def forward(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
        return loss_of(model(input_ids, use_cache=False).logits, labels)

    visual = tg.VisualTokens.ids(input="input_ids", equal=IMAGE)
    program = tg.capture(tg.ModelSpec(model, {"u": tg.Task(forward, batch(0), visual=visual, reads="text")}))
    task = tg.apply(program, tg.make_plan(program, "none"))["u"]
    assert_same(model, lambda: forward(model, **batch(4)), lambda: task(**batch(4)))
