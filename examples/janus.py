"""Janus-Pro as a unified model: image and text in, text out; text in, image tokens out; one language model for both.

Built from configurations only, with random weights: nothing is downloaded. Run it as a script to train an accelerated
`tiny` model for a few steps on both tasks, or hand it to the command line:

    python examples/janus.py
    tokgraph optimize examples/janus.py --policy shared --set size=small

Sizes `1b` and `7b` have the dimensions of the published checkpoints and live on the meta device: they can be planned,
rewritten and costed on a laptop, but not run.

Sources: dimensions from `config.json` of deepseek-ai/Janus-Pro-1B and deepseek-ai/Janus-Pro-7B (Chen et al., 2025,
arXiv 2501.17811: SigLIP-L/16 at 384 px, 576 tokens an image, a VQ codebook of 16,384 codes of 8 numbers); modules from
`transformers.models.janus`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

import tokgraph as tg


@dataclass(frozen=True)
class Size:
    """What differs between the sizes; the vision and image-code sides follow the same pattern in all of them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    image_token_id: int  # the placeholder that image features replace; text ids stay below it
    text_tokens: int  # of the example batch, a row
    image_pixels: int
    patch_pixels: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    codebook: int
    vq_channels: int
    vq_multiplier: tuple[int, ...]
    device: str = "cpu"

    @property
    def image_tokens(self) -> int:
        """Visual tokens an image takes, on either task."""
        return (self.image_pixels // self.patch_pixels) ** 2


# fmt: off
SIZES = {
    "tiny": Size(layers=4, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=256, image_token_id=255,
                 text_tokens=12, image_pixels=32, patch_pixels=8, vision_hidden=32, vision_layers=2, vision_heads=4,
                 codebook=64, vq_channels=32, vq_multiplier=(1,)),
    "small": Size(layers=12, hidden=256, heads=8, kv_heads=4, intermediate=704, vocabulary=1024, image_token_id=1023,
                  text_tokens=32, image_pixels=64, patch_pixels=8, vision_hidden=128, vision_layers=4, vision_heads=4,
                  codebook=512, vq_channels=32, vq_multiplier=(1, 2)),
    "1b": Size(layers=24, hidden=2048, heads=16, kv_heads=16, intermediate=5632, vocabulary=102400,
               image_token_id=100581, text_tokens=64, image_pixels=384, patch_pixels=16, vision_hidden=1024,
               vision_layers=24, vision_heads=16, codebook=16384, vq_channels=128, vq_multiplier=(1, 1, 2, 2, 4),
               device="meta"),
    "7b": Size(layers=30, hidden=4096, heads=32, kv_heads=32, intermediate=11008, vocabulary=102400,
               image_token_id=100581, text_tokens=64, image_pixels=384, patch_pixels=16, vision_hidden=1024,
               vision_layers=24, vision_heads=16, codebook=16384, vq_channels=128, vq_multiplier=(1, 1, 2, 2, 4),
               device="meta"),
}
# fmt: on
CODE_WIDTH = 8  # numbers an image code is embedded in, before the aligner
IGNORE = -100  # label of a position that no loss reads


def build(
    size: str = "tiny",
    dtype: str = "float32",
    attn: str = "sdpa",
    layers: int | None = None,
    device: str | None = None,
    batch: int = 2,
    seed: int = 0,
    image_pixels: int | None = None,
    text_tokens: int | None = None,
    padded: bool = True,
) -> tg.ModelSpec:
    """Return a randomly initialised Janus with its two tasks and an example batch for each.

    Args:
        size: `tiny`, `small`, `1b` or `7b`.
        dtype: Name of a torch floating-point type, for the weights and the pixels.
        attn: Attention implementation of transformers, `sdpa` or `eager`.
        layers: Decoder layers, if other than the size's own number.
        device: Where the weights live, if not on the size's own device (`meta` for `1b` and `7b`, else `cpu`).
            The example batches are always real CPU tensors.
        batch: Rows of the example batches.
        seed: Seed of the weights and of the example batches.
        image_pixels: Height and width of an image, if other than the size's own.
        text_tokens: Text tokens of a row, if other than the size's own.
        padded: Whether understanding takes an `attention_mask`; without one, nothing is padded and attention is causal.

    Raises:
        ValueError: The size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"size is one of {', '.join(SIZES)}, not {size!r}")
    own = {"image_pixels": image_pixels, "text_tokens": text_tokens}
    dims = replace(SIZES[size], **{name: number for name, number in own.items() if number is not None})
    config = janus_config(dims, dims.layers if layers is None else layers)
    with torch.random.fork_rng(devices=[]), torch.device(device or dims.device):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration._from_config(config, attn_implementation=attn)
    model = model.to(getattr(torch, dtype))
    rows = {0: "batch", 1: "tokens"}
    return tg.ModelSpec(
        model=model,
        tasks={
            "understanding": tg.Task(
                forward=understanding_loss,
                inputs=understanding_batch(dims, batch, getattr(torch, dtype), seed, padded),
                dynamic={"input_ids": rows, "pixel_values": {0: "batch"}, "labels": rows}
                | ({"attention_mask": rows} if padded else {}),
                visual=tg.VisualTokens.ids(input="input_ids", equal=dims.image_token_id),
                reads="text",
                outputs="loss",
            ),
            "generation": tg.Task(
                forward=generation_loss,
                inputs=generation_batch(dims, batch, seed),
                dynamic={"input_ids": rows, "image_codes": {0: "batch", 1: "visual"}},
                visual=None,
                visual_inputs=("image_codes",),
                reads="visual",
                outputs="loss",
            ),
        },
    )


def janus_config(dims: Size, layers: int) -> JanusConfig:
    """Return the transformers configuration of one size.

    Both aligners (image features; image codes) end in the language model's width, and the generation head starts there.
    """
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=dims.vocabulary,
            hidden_size=dims.hidden,
            intermediate_size=dims.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=dims.heads,
            num_key_value_heads=dims.kv_heads,
            max_position_embeddings=16384,
            rms_norm_eps=1e-6,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=dims.vision_hidden,
            num_hidden_layers=dims.vision_layers,
            num_attention_heads=dims.vision_heads,
            image_size=dims.image_pixels,
            patch_size=dims.patch_pixels,
            num_image_tokens=dims.image_tokens,
            projection_dim=dims.hidden,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=CODE_WIDTH,
            num_embeddings=dims.codebook,
            base_channels=dims.vq_channels,
            channel_multiplier=dims.vq_multiplier,
            latent_channels=2 * dims.vq_channels,
            projection_dim=dims.hidden,
            image_token_embed_dim=dims.hidden,
        ),
        image_token_id=dims.image_token_id,
        tie_word_embeddings=False,  # as published; transformers' own default ties them
    )


def understanding_loss(
    model: JanusForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the next-token loss on the answer, and the logits `[batch, tokens, vocabulary]`.

    The loss is transformers' own, but in the dtype of the model: theirs is always float32, too coarse to check float64.
    """
    logits = model(
        input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, use_cache=False
    ).logits
    targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]  # row i predicts token i + 1
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE), logits


def generation_loss(
    model: JanusForConditionalGeneration, input_ids: Tensor, image_codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the teacher-forced loss on the image codes, and the logits `[batch, image tokens, codebook]`.

    The rows that predict the codes are the last text row and all image rows but the last.
    """
    text = model.get_input_embeddings()(input_ids)
    image = model.model.generation_aligner(model.model.generation_embeddings(image_codes))
    hidden = model.model.language_model(inputs_embeds=torch.cat([text, image], dim=1), use_cache=False)
    logits = model.model.generation_head(hidden.last_hidden_state[:, input_ids.shape[1] - 1 : -1])
    return F.cross_entropy(logits.flatten(0, 1), image_codes.flatten()), logits


def understanding_batch(dims: Size, batch: int, dtype: torch.dtype, seed: int, padded: bool) -> dict[str, Tensor]:
    """Return random rows: some text, an image, a question, an answer and, if asked for, padding in every second row.

    The image starts at another position in each of the first rows; token id 0 is the padding.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = dims.text_tokens + dims.image_tokens
    answer, padding = dims.text_tokens // 3, dims.text_tokens // 6 if padded else 0
    input_ids = torch.randint(1, dims.image_token_id, (batch, tokens), generator=generator)
    attention_mask = torch.ones(batch, tokens, dtype=torch.long)
    labels = torch.full((batch, tokens), IGNORE)
    for row in range(batch):
        start = 2 + row % 3
        end = tokens - padding * (row % 2)
        input_ids[row, start : start + dims.image_tokens] = dims.image_token_id
        labels[row, end - answer : end] = input_ids[row, end - answer : end]
        input_ids[row, end:] = 0
        attention_mask[row, end:] = 0
    pixels = torch.randn(batch, 3, dims.image_pixels, dims.image_pixels, generator=generator).to(dtype)
    inputs = {"input_ids": input_ids, "pixel_values": pixels, "labels": labels}
    return inputs | ({"attention_mask": attention_mask} if padded else {})


def generation_batch(dims: Size, batch: int, seed: int) -> dict[str, Tensor]:
    """Return random prompts `[batch, text tokens]` and the random image codes `[batch, image tokens]` to be learned."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        "input_ids": torch.randint(1, dims.image_token_id, (batch, dims.text_tokens), generator=generator),
        "image_codes": torch.randint(0, dims.codebook, (batch, dims.image_tokens), generator=generator),
    }


def main() -> None:
    """Train both tasks of an accelerated tiny Janus together: one set of parameters, one optimizer."""
    spec = build()
    accelerated = tg.optimize(spec, policy="shared", span=(1, 3), keep=0.5)
    optimizer = torch.optim.AdamW(spec.model.parameters(), lr=1e-3)
    for step in range(5):
        losses = {name: accelerated[name](**task.inputs)[0] for name, task in spec.tasks.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        print(f"step {step}: " + ", ".join(f"{name} loss {loss.item():.4f}" for name, loss in losses.items()))
    print(f"sharing index {accelerated.report['sharing_index']:.3f}")


if __name__ == "__main__":
    main()
