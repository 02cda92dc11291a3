"""Drop semantics in code: transformers' Janus decoder layers in a plain loop that really leaves rows out.

The specification that compiled graphs are compared with. It favours being read over being fast, works in any dtype,
and autograd goes through all of it. A *row* is one token position of the residual stream in one sample; a *site* drops
visual rows in the span of blocks `[start, end)`; a row is *demanded* when the loss of its task may read it.

The rules, each beside the function that holds it:

* `select`    which rows a site keeps; text rows always stay.
* `run_block` one decoder layer on fewer rows; mask and RoPE values are gathered, never recomputed.
* `run_span`  what dropped rows do inside a span, and where they are after it.
* `understanding`, `generation`  the two tasks: embeddings, blocks, head, loss on the surviving rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, repeat_kv, rotate_half

IGNORE = -100  # label of a row that no loss reads


@dataclass(frozen=True, eq=False)
class Site:
    """Drop visual rows in blocks `start` to `end - 1`.

    Args:
        start: First block of the span.
        end: The block after the last one; None for the end of the stack.
        keep: Share of the *original* visual rows that stays, in [0, 1].
        selector: "uniform"; "norm"; "random-given", which keeps the rows with the largest `scores`; or the token
            positions of the visual rows to keep, `[batch, k]`.
        mode: "hide": dropped rows are absent. "freeze": they do not change, but still serve as keys and values.
        restore: Whether dropped rows take their places again, unchanged, after the span.
        scores: For "random-given", one number for each original visual row, in order: `[batch, n]`.
    """

    start: int
    end: int | None
    keep: float
    selector: str | Tensor = "uniform"
    mode: str = "hide"
    restore: bool = True
    scores: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of the residual stream and where they stand; samples may hold different positions, but equally many.

    Args:
        positions: `[batch, rows]`, ascending in each sample.
        values: `[batch, rows, hidden]`.
    """

    positions: Tensor
    values: Tensor

    def take(self, index: Tensor) -> "Rows":
        """Return the rows at places `index` `[batch, k]` of this list (places, not positions)."""
        return Rows(self.positions.gather(1, index), gather_rows(self.values, index))

    def split(self, positions: Tensor) -> tuple["Rows", "Rows"]:
        """Return the rows at `positions` `[batch, k]`, and the others."""
        chosen = torch.stack([torch.isin(here, wanted) for here, wanted in zip(self.positions, positions, strict=True)])
        return self.take(places(chosen)), self.take(places(~chosen))

    def merge(self, other: "Rows") -> "Rows":
        """Return the rows of both, in order of position."""
        positions = torch.cat([self.positions, other.positions], dim=1)
        both = Rows(positions, torch.cat([self.values, other.values], dim=1))
        return both.take(positions.argsort(dim=1))


@dataclass(frozen=True)
class Stream:
    """What crosses a block boundary: the rows the next block computes, and the frozen rows it only attends to."""

    active: Rows
    frozen: Rows


@dataclass
class Context:
    """What the whole stack shares, all of it made once from the full sequence of S tokens.

    Args:
        layers: The model's own decoder layers.
        mask: `[batch, 1, S, S]`, True where a query (dimension 2) may see a key (dimension 3).
        cos, sin: RoPE values `[batch, S, head size]`.
        visual: `[batch, S]`, True at visual rows; each sample has equally many.
        demanded: `[batch, S]`, True at the rows that a site without restore may not drop.
        kept: Filled by the run: for each site, in the order the spans open, the positions of its surviving visual rows.
    """

    layers: Sequence[nn.Module]
    mask: Tensor
    cos: Tensor
    sin: Tensor
    visual: Tensor
    demanded: Tensor
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a task returns.

    Args:
        loss: Scalar.
        logits: `[batch, rows, classes]`, of the surviving rows that the head reads.
        rows: `[batch, rows]`, the token position of each row of `logits`.
        surviving: `[batch, survivors]`, the positions alive after the last block.
        kept: For each site, in the order the spans open (outer first), the visual positions it kept, `[batch, k]`.
    """

    loss: Tensor
    logits: Tensor
    rows: Tensor
    surviving: Tensor
    kept: tuple[Tensor, ...]


def understanding(
    model: JanusForConditionalGeneration,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    sites: Sequence[Site] = (),
) -> Result:
    """Image and text in, text out: next-token loss on `labels` `[batch, S]`, logits of all surviving rows."""
    visual = input_ids == model.config.image_token_id
    text_embeddings = model.get_input_embeddings()(input_ids)
    features = model.model.aligner(model.model.vision_model(pixel_values).last_hidden_state)
    embeddings = text_embeddings.masked_scatter(visual[..., None], features)

    context = make_context(model, embeddings, attention_mask, visual, demanded=reads_text(visual))
    rows = run_decoder(model, embeddings, sites, context)
    logits = model.lm_head(rows.values)
    targets = next_of(labels, fill=IGNORE).gather(1, rows.positions)  # a row keeps the label it had in the full run
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    return Result(loss, logits, rows.positions, rows.positions, tuple(context.kept))


def generation(
    model: JanusForConditionalGeneration,
    input_ids: Tensor,
    image_codes: Tensor,
    attention_mask: Tensor | None = None,
    sites: Sequence[Site] = (),
) -> Result:
    """Text in, image codes out, teacher-forced: logits of the rows before each image row, `[batch, n, codebook]`.

    Args:
        input_ids: `[batch, text tokens]`.
        image_codes: `[batch, n]`; they follow the text, so S = text tokens + n.
        attention_mask: `[batch, S]`, or None where nothing is padded.
    """
    text = model.get_input_embeddings()(input_ids)
    image = model.model.generation_aligner(model.model.generation_embeddings(image_codes))
    embeddings = torch.cat([text, image], dim=1)
    batch, tokens, _ = embeddings.shape
    if attention_mask is None:
        attention_mask = torch.ones(batch, tokens, dtype=torch.long)
    visual = (torch.arange(tokens) >= input_ids.shape[1]).expand(batch, tokens)

    context = make_context(model, embeddings, attention_mask, visual, demanded=reads_visual(visual))
    survivors = run_decoder(model, embeddings, sites, context)
    predicting = next_of(visual, fill=False).gather(1, survivors.positions)  # all of them are demanded: none is gone
    rows = survivors.take(places(predicting))
    logits = model.model.generation_head(rows.values)
    loss = F.cross_entropy(logits.flatten(0, 1), image_codes.flatten())
    return Result(loss, logits, rows.positions, survivors.positions, tuple(context.kept))


def reads_text(visual: Tensor) -> Tensor:
    """Return the rows a text loss may read: text rows, and rows whose successor is text."""
    return ~visual | next_of(~visual, fill=False)


def reads_visual(visual: Tensor) -> Tensor:
    """Return the rows a loss on image tokens may read: visual rows, and rows whose successor is visual."""
    return visual | next_of(visual, fill=False)


def next_of(row_values: Tensor, fill: int | bool) -> Tensor:
    """Return, at each row, the value at the row after it (`fill` at the last row). Shape `[batch, S]` in and out."""
    return F.pad(row_values[:, 1:], (0, 1), value=fill)


def make_context(
    model: JanusForConditionalGeneration, embeddings: Tensor, attention_mask: Tensor, visual: Tensor, demanded: Tensor
) -> Context:
    """Return the mask, RoPE values and row kinds of the full sequence `embeddings` `[batch, S, hidden]`."""
    batch, tokens, _ = embeddings.shape
    positions = torch.arange(tokens)
    causal = positions[:, None] >= positions[None, :]
    mask = causal & attention_mask[:, None, None, :].bool()
    cos, sin = model.model.language_model.rotary_emb(embeddings, positions[None])
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    return Context(model.model.language_model.layers, mask, cos, sin, visual, demanded)


def run_decoder(
    model: JanusForConditionalGeneration, embeddings: Tensor, sites: Sequence[Site], context: Context
) -> Rows:
    """Return the surviving rows after all blocks and the final norm."""
    batch, tokens, _ = embeddings.shape
    positions = torch.arange(tokens).expand(batch, tokens)
    nothing = Rows(positions[:, :0], embeddings[:, :0])
    depth = len(context.layers)
    sites = [replace(site, end=depth if site.end is None else site.end) for site in sites]
    for site in sites:
        if not 0 <= site.start < site.end <= depth:
            raise ValueError(f"span [{site.start}, {site.end}) is empty or outside the {depth} blocks")
    sites.sort(key=lambda site: (site.start, -site.end))  # outer before inner; equal spans in the order given
    stream = run_blocks(Stream(Rows(positions, embeddings), nothing), 0, depth, sites, context)
    return Rows(stream.active.positions, model.model.language_model.norm(stream.active.values))


def run_blocks(stream: Stream, start: int, end: int, sites: list[Site], context: Context) -> Stream:
    """Run blocks `start` to `end - 1`, with the sites that open among them."""
    block = start
    while block < end:
        if sites and sites[0].start == block:
            site, *others = sites
            if site.end > end:
                raise ValueError(f"span [{site.start}, {site.end}) crosses the end of the span around it, {end}")
            inner = [other for other in others if other.start < site.end]
            sites = others[len(inner) :]
            stream = run_span(stream, site, inner, context)
            block = site.end
        else:
            stream = run_block(stream, context.layers[block], context)
            block += 1
    return stream


def run_span(stream: Stream, site: Site, inner: list[Site], context: Context) -> Stream:
    """Run the blocks of one site without the rows it drops.

    Inside: hidden rows are absent; frozen rows stand beside the active ones, as keys and values only. After it: with
    restore, the dropped rows take their places, unchanged; without, they are gone for good, frozen ones included.
    Rows that an inner site lost for good do not come back with the outer site's rows.
    """
    kept, dropped = stream.active.split(select(stream.active, site, context))
    frozen = stream.frozen.merge(dropped) if site.mode == "freeze" else stream.frozen
    inside = run_blocks(Stream(kept, frozen), site.start, site.end, inner, context)
    active = inside.active.merge(dropped) if site.restore else inside.active
    return Stream(active, stream.frozen)


def run_block(stream: Stream, layer: nn.Module, context: Context) -> Stream:
    """Run one decoder layer: keys and values of active and frozen rows; all the rest of active rows only."""
    attention = layer.self_attn
    active, visible = stream.active, stream.active.merge(stream.frozen)
    keyed = Rows(visible.positions, layer.input_layernorm(visible.values))
    queried, _ = keyed.split(active.positions)

    def heads(projected: Tensor) -> Tensor:  # [batch, rows, heads * size] -> [batch, heads, rows, size]
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = rotate(heads(attention.q_proj(queried.values)), queried.positions, context)
    key = rotate(heads(attention.k_proj(keyed.values)), keyed.positions, context)
    value = heads(attention.v_proj(keyed.values))
    attended = F.scaled_dot_product_attention(
        query,
        repeat_kv(key, attention.num_key_value_groups),
        repeat_kv(value, attention.num_key_value_groups),
        attn_mask=gather_mask(context.mask, queried.positions, keyed.positions),
        scale=attention.head_dim**-0.5,
    )
    hidden = active.values + attention.o_proj(attended.transpose(1, 2).flatten(2))
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return Stream(Rows(active.positions, hidden), stream.frozen)


def rotate(heads: Tensor, positions: Tensor, context: Context) -> Tensor:
    """Apply the RoPE values of the original `positions` `[batch, rows]` to `[batch, heads, rows, head size]`."""
    cos = gather_rows(context.cos, positions)[:, None]
    sin = gather_rows(context.sin, positions)[:, None]
    return heads * cos + rotate_half(heads) * sin


def gather_mask(mask: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Return the rows and columns of the full mask that are left: `[batch, 1, queries, keys]`."""
    samples = torch.arange(mask.shape[0])[:, None, None]
    return mask[samples, 0, query_positions[:, :, None], key_positions[:, None, :]][:, None]


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` `[batch, k]` of `values` `[batch, rows, width]`, sample by sample."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def places(chosen: Tensor) -> Tensor:
    """Return where each sample of `chosen` `[batch, rows]` is True, in order; equally often in each sample."""
    return torch.stack([sample.nonzero().flatten() for sample in chosen])


def select(active: Rows, site: Site, context: Context) -> Tensor:
    """Return the positions `[batch, rows]` that stay active in the span of `site`, in order.

    The candidates are the visual rows still active, m of them; all other active rows stay. Of n *original* visual
    rows a site keeps `k = floor(keep * n + 0.5)` (m, if fewer are left). A site without restore keeps its d demanded
    candidates whatever the selector says; they count among the k, and where k < d, k is d.
    """
    original = int(context.visual[0].sum())
    kept, stays = [], []
    for sample, positions in enumerate(active.positions):
        is_candidate = context.visual[sample, positions]
        candidates = positions[is_candidate]
        must_stay = context.demanded[sample, candidates] & (not site.restore)
        demanded, free = candidates[must_stay], candidates[~must_stay]
        count = max(min(math.floor(site.keep * original + 0.5), len(candidates)), len(demanded))
        free_values = active.values[sample, torch.isin(positions, free)]
        chosen = choose(site, sample, count - len(demanded), free, free_values, context)
        survivors = torch.cat([demanded, chosen]).sort().values
        if isinstance(site.selector, Tensor):
            check_given(site.selector[sample], survivors, count)
        kept.append(survivors)
        stays.append(torch.cat([positions[~is_candidate], survivors]).sort().values)
    context.kept.append(torch.stack(kept))
    return torch.stack(stays)


def choose(site: Site, sample: int, count: int, free: Tensor, values: Tensor, context: Context) -> Tensor:
    """Return `count` of the positions `free` `[m]` of one sample, as the selector of `site` would have it.

    Args:
        values: The rows at `free` at the start of the span, `[m, hidden]`.
    """
    if isinstance(site.selector, Tensor):
        return free[torch.isin(free, site.selector[sample])]
    if site.selector == "uniform":
        return free[[rank * len(free) // count for rank in range(count)]]
    if site.selector == "norm":
        return free[largest(values.norm(dim=-1), count)]
    if site.selector == "random-given":
        visual_rank = context.visual[sample].cumsum(0) - 1
        return free[largest(site.scores[sample, visual_rank[free]], count)]
    raise ValueError(f"unknown selector {site.selector!r}")


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest of `scores` `[m]`; of equal ones the earlier comes first."""
    return scores.detach().sort(descending=True, stable=True).indices[:count]


def check_given(given: Tensor, survivors: Tensor, count: int) -> None:
    """Refuse positions given by hand that are not `count` candidates with all demanded ones among them."""
    if given.sort().values.tolist() != survivors.tolist() or len(survivors) != count:
        raise ValueError(f"{count} visual positions to keep, given {given.tolist()}, possible {survivors.tolist()}")


class UnroundedRMSNorm(LlamaRMSNorm):
    """transformers' RMS norm without its cast to float32.

    With the cast, two float64 runs that differ in the last bit round apart now and then, and then differ by 1e-8.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `[..., hidden]` in its own dtype."""
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def tiny_janus(layers: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> JanusForConditionalGeneration:
    """Return a Janus with hidden size 64, 4 heads, 2 key and value heads and 16 image tokens, in the sdpa attention.

    Noise on every parameter makes rows differ enough that a wrong one is seen: initial weights are near zero, initial
    norm weights all one. The norms of the decoder work in the dtype of the model.
    """
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_image_tokens=16,
            projection_dim=64,
        ),
        vq_config=JanusVQVAEConfig(
            num_embeddings=64,
            base_channels=32,
            channel_multiplier=(1,),
            latent_channels=64,
            projection_dim=64,
            image_token_embed_dim=64,
        ),
        image_token_id=255,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration._from_config(config, attn_implementation="sdpa").to(dtype)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = UnroundedRMSNorm
    return model


def tiny_understanding_batch(batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Return 12 text and 16 image tokens a row: the image at another place in each, right padding in every second."""
    generator = torch.Generator().manual_seed(seed)
    text, image = 12, 16
    tokens = text + image
    input_ids = torch.randint(1, 255, (batch, tokens), generator=generator)
    attention_mask = torch.ones(batch, tokens, dtype=torch.long)
    labels = torch.full((batch, tokens), IGNORE)
    for row in range(batch):
        start, end = 2 + row % 3, tokens - 2 * (row % 2)
        input_ids[row, start : start + image] = 255
        labels[row, end - 4 : end] = input_ids[row, end - 4 : end]
        input_ids[row, end:] = 0
        attention_mask[row, end:] = 0
    pixel_values = torch.randn(batch, 3, 32, 32, generator=generator, dtype=dtype)
    return {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask, "labels": labels}


def tiny_generation_batch(batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Return 12 text tokens and 16 image codes a row."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, 255, (batch, 12), generator=generator),
        "image_codes": torch.randint(0, 64, (batch, 16), generator=generator),
    }
