"""The hand-written reference: equal to the plain model where nothing is dropped, to masked execution where rows are.

No tokgraph here: this is what makes the reference fit to judge tokgraph by.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import janus as reference
from tests.reference.janus import Result, Site

TOLERANCE = 1e-12  # float64, relative to the largest magnitude of the tensor
ZERO = 1e-4  # a smaller largest magnitude counts as this: gradients of key biases are zero but for rounding
TASKS = ("understanding", "generation")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return reference.tiny_janus()


def batch_of(task: str) -> dict[str, Tensor]:
    return reference.tiny_understanding_batch() if task == "understanding" else reference.tiny_generation_batch()


def run(model: nn.Module, task: str, sites: tuple[Site, ...] = ()) -> Result:
    return getattr(reference, task)(model, **batch_of(task), sites=sites)


def visual_rows(task: str) -> Tensor:
    batch = batch_of(task)
    if task == "understanding":
        return batch["input_ids"] == 255
    return (torch.arange(28) >= 12).expand(3, 28)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter that `loss` depends on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=ZERO)
    assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


def assert_same_run(model: nn.Module, result: Result, loss: Tensor, logits: Tensor) -> None:
    assert_close(result.loss, loss, "loss")
    assert_close(result.logits, logits, "logits")
    actual, expected = gradients(model, result.loss), gradients(model, loss)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name)


def plain_understanding(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return transformers' own logits, and its loss without the cast to float32."""
    batch = batch_of("understanding")
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()), logits


def plain_generation(model: nn.Module) -> tuple[Tensor, Tensor]:
    batch = batch_of("generation")
    image = model.prepare_embeddings_for_image_generation(batch["image_codes"])
    embeddings = torch.cat([model.get_input_embeddings()(batch["input_ids"]), image], dim=1)
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    logits = model.model.generation_head(hidden[:, 11:27])
    return F.cross_entropy(logits.flatten(0, 1), batch["image_codes"].flatten()), logits


@pytest.mark.parametrize("task", TASKS)
def test_without_sites_it_is_the_plain_model(model, task):
    loss, logits = plain_understanding(model) if task == "understanding" else plain_generation(model)
    assert_same_run(model, run(model, task), loss, logits)


def test_loss_is_that_of_transformers(model):
    theirs = model(**batch_of("understanding"), use_cache=False).loss  # computed in float32
    torch.testing.assert_close(run(model, "understanding").loss.float(), theirs, rtol=1e-6, atol=0)


def test_right_padding_of_generation_changes_no_row_before_it(model):
    mask = torch.ones(3, 28, dtype=torch.long)
    mask[1, -4:] = 0
    padded = reference.generation(model, **batch_of("generation"), attention_mask=mask)
    assert_close(padded.logits[:, :-4], run(model, "generation").logits[:, :-4], "logits")
    assert not torch.equal(padded.logits[1, -3:], run(model, "generation").logits[1, -3:])


def masked_execution(model: nn.Module, task: str, sites: tuple[Site, ...], result: Result) -> tuple[Tensor, Tensor]:
    """Run every block on every row; rows that a site drops are masked as keys (hide) and do not change.

    Takes the selection from `result`, and lets transformers' own layers do the work. Returns loss and logits, the
    latter at the rows that `result` has.
    """
    batch, visual = batch_of(task), visual_rows(task)
    padding = batch.get("attention_mask", torch.ones_like(visual)).bool()
    language_model = model.model.language_model
    if task == "understanding":
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        hidden = model.get_input_embeddings()(batch["input_ids"]).masked_scatter(visual[..., None], features)
    else:
        image = model.prepare_embeddings_for_image_generation(batch["image_codes"])
        hidden = torch.cat([model.get_input_embeddings()(batch["input_ids"]), image], dim=1)
    depth, tokens = len(language_model.layers), hidden.shape[1]
    position_embeddings = language_model.rotary_emb(hidden, torch.arange(tokens)[None])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    hidden_in = torch.zeros(depth + 1, *visual.shape, dtype=torch.bool)  # [block, batch, S]: dropped and not a key
    frozen_in = torch.zeros_like(hidden_in)  # dropped, but still a key
    for site, kept in zip(sites, result.kept, strict=True):
        end = depth if site.end is None else site.end
        unavailable = hidden_in[site.start] | frozen_in[site.start]
        dropped = (visual & ~unavailable).scatter(1, kept, False)
        (hidden_in if site.mode == "hide" else frozen_in)[site.start : end] |= dropped
        if not site.restore:
            hidden_in[end:] |= dropped
            frozen_in[end:] &= ~dropped

    for block, layer in enumerate(language_model.layers):
        mask = causal & (padding & ~hidden_in[block])[:, None, None, :]
        after = layer(hidden, attention_mask=mask, position_embeddings=position_embeddings)
        hidden = torch.where((hidden_in[block] | frozen_in[block])[..., None], hidden, after)
    hidden = language_model.norm(hidden)
    hidden = hidden.gather(1, result.rows[..., None].expand(-1, -1, hidden.shape[-1]))
    if task == "generation":
        logits = model.model.generation_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), batch["image_codes"].flatten()), logits
    logits = model.lm_head(hidden)
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).gather(1, result.rows)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


SITES = {
    "hide and restore": (Site(1, 3, 0.5),),
    "hide, all out, and restore": (Site(1, 3, 0.0),),
    "hide from the first block": (Site(0, 2, 0.25, "norm"),),
    "hide for good": (Site(1, 3, 0.5, restore=False),),
    "hide for good, all out": (Site(2, None, 0.0, restore=False),),
    "freeze and restore": (Site(1, 3, 0.5, "norm", mode="freeze"),),
    "freeze all": (Site(0, None, 0.0, mode="freeze"),),
    "freeze, then gone": (Site(1, 3, 0.25, mode="freeze", restore=False),),
    "nested, for good": (Site(1, None, 0.5, "norm", restore=False), Site(2, None, 0.25, restore=False)),
    "nested, restored": (Site(0, 4, 0.75), Site(1, 3, 0.25, "norm")),
    "gone for good inside a restored span": (Site(0, 3, 0.75), Site(1, 2, 0.25, restore=False)),
    "hide inside freeze": (Site(0, 4, 0.5, mode="freeze"), Site(1, 3, 0.25)),
    "freeze inside hide": (Site(0, 4, 0.5), Site(1, 3, 0.25, mode="freeze", restore=False)),
    "one after the other": (Site(0, 2, 0.5), Site(2, 3, 0.25, mode="freeze"), Site(3, 4, 0.5, "norm", restore=False)),
    "keep all": (Site(1, 3, 1.0, restore=False),),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sites", SITES.values(), ids=SITES.keys())
def test_dropping_rows_is_masking_them(model, task, sites):
    result = run(model, task, sites)
    assert_same_run(model, result, *masked_execution(model, task, sites, result))


@pytest.mark.parametrize("task", TASKS)
def test_keep_all_is_the_plain_run(model, task):
    plain, kept_all = run(model, task), run(model, task, (Site(0, None, 1.0, restore=False), Site(1, 3, 1.0)))
    assert torch.equal(kept_all.rows, plain.rows)
    assert_same_run(model, kept_all, plain.loss, plain.logits)


def test_dropped_rows_are_really_left_out(model):
    layers = model.model.language_model.layers
    seen: list[tuple[int, int]] = []
    handles = [
        hook
        for layer in layers
        for hook in (
            layer.self_attn.k_proj.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], 0))),
            layer.mlp.register_forward_pre_hook(lambda _, args: seen.append((seen.pop()[0], args[0].shape[1]))),
        )
    ]
    try:
        run(model, "understanding", (Site(1, 2, 0.25), Site(2, 3, 0.5, mode="freeze"), Site(3, None, 0.0)))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [(28, 28), (16, 16), (28, 20), (12, 12)]  # rows that get keys, rows that get the FFN


def test_uniform_ranks(model):
    (kept,) = run(model, "generation", (Site(1, 3, 0.3),)).kept  # floor(0.3 * 16 + 0.5) = 5; ranks floor(16 j / 5)
    assert kept.tolist() == [[12 + rank for rank in (0, 3, 6, 9, 12)]] * 3


def test_uniform_positions_follow_the_image_of_each_sample(model):
    (kept,) = run(model, "understanding", (Site(1, 3, 0.125),)).kept
    assert kept.tolist() == [[2, 10], [3, 11], [4, 12]]


def test_keep_of_a_nested_site_is_relative_to_all_visual_rows(model):
    outer, inner = run(model, "generation", (Site(0, 4, 0.5), Site(1, 3, 0.25))).kept
    assert outer.tolist() == [list(range(12, 28, 2))] * 3
    assert inner.tolist() == [list(range(12, 28, 4))] * 3
    assert run(model, "generation", (Site(0, 4, 0.25), Site(1, 3, 0.5))).kept[1].shape == (3, 4)  # no more are left


def test_without_restore_demanded_rows_stay_and_count(model):
    (kept,) = run(model, "understanding", (Site(1, None, 0.25, restore=False),)).kept
    assert kept.tolist() == [[start, start + 5, start + 10, start + 15] for start in (2, 3, 4)]
    (kept,) = run(model, "understanding", (Site(1, None, 0.0, restore=False),)).kept
    assert kept.tolist() == [[17], [18], [19]]  # the last image row, which predicts the first text token after it
    (kept,) = run(model, "understanding", (Site(1, None, 0.0),)).kept
    assert kept.shape == (3, 0)
    (kept,) = run(model, "generation", (Site(1, None, 0.25, restore=False),)).kept
    assert kept.shape == (3, 16)  # a loss on image tokens may read every visual row


def test_surviving_rows_keep_their_own_labels(model):
    result = run(model, "understanding", (Site(1, 3, 0.25, restore=False),))
    assert result.logits.shape == (3, 16, 256)
    assert torch.equal(result.rows, result.surviving)
    assert result.surviving[0].tolist() == [0, 1, 2, 7, 12, 17, *range(18, 28)]


def test_norm_keeps_the_longest_rows_of_each_sample_and_the_earlier_of_equals(model):
    values = torch.tensor([[[9.0], [1.0], [-3.0], [2.0], [3.0], [3.0]], [[9.0], [5.0], [0.0], [0.0], [0.0], [0.0]]])
    rows = reference.Rows(torch.arange(6).expand(2, 6), values)
    visual = torch.tensor([[False, True, True, True, True, True]]).expand(2, 6)
    context = reference.Context([], visual, visual, visual, visual, reference.reads_text(visual))
    reference.select(rows, Site(0, 1, 0.4, "norm"), context)
    reference.select(rows, Site(0, 1, 0.4, torch.tensor([[2, 3], [1, 5]])), context)
    reference.select(rows, Site(0, 1, 0.4, "random-given", scores=torch.eye(5)[[3, 4]]), context)
    assert [kept.tolist() for kept in context.kept] == [[[2, 4], [1, 2]], [[2, 3], [1, 5]], [[1, 4], [1, 5]]]


def test_given_positions_select_as_the_rule_that_gave_them(model):
    ruled = run(model, "understanding", (Site(1, 3, 0.5, "norm", restore=False),))
    given = run(model, "understanding", (Site(1, 3, 0.5, ruled.kept[0], restore=False),))
    assert torch.equal(given.loss, ruled.loss)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((Site(2, 2, 0.5),), "empty or outside"),
        ((Site(3, 5, 0.5),), "empty or outside"),
        ((Site(0, 2, 0.5), Site(1, 3, 0.5)), "crosses"),
        ((Site(0, 2, 0.5, "nearest"),), "unknown selector"),
        ((Site(0, 2, 0.0625, torch.tensor([[0], [3], [4]])),), "possible"),  # a text row
        ((Site(0, 2, 0.0625, torch.tensor([[2], [3], [4]]), restore=False),), "possible"),  # a demanded row is missing
        ((Site(0, 2, 0.5, torch.tensor([[2], [3], [4]])),), "8 visual positions"),
    ],
)
def test_nonsense_is_refused(model, sites, message):
    with pytest.raises(ValueError, match=message):
        run(model, "understanding", sites)
