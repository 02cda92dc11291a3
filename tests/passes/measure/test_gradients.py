"""Measured gradients against eager autograd, against the rows of eager modules, and against pathway profiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import tokgraph as tg
from tests import tiny
from tests.harness import Captured, assert_same_gradients, gradients
from tests.passes import models
from tokgraph.errors import AnalysisError, BatchError
from tokgraph.passes.measure.gradients import GradientNorms, GradientSplit, gradient_cosines, measure_gradients
from tokgraph.spec import split_outputs

EXACT = 1e-10
TASKS = ("understanding", "generation")
ODD = [pytest.param(name, marks=pytest.mark.slow) for name in ("conv", "cumsum")]


@dataclass(frozen=True)
class Measured:
    """A captured model, and the gradients of its tasks in its own type."""

    captured: Captured
    splits: Mapping[str, GradientSplit]

    @classmethod
    def of(cls, captured: Captured) -> Measured:
        program, facts = captured.program, captured.facts
        return cls(captured, {task: measure_gradients(program[task], facts[task]) for task in program})


Measure = Callable[[str], Measured]


def loss_of(spec: tg.ModelSpec, task: str, inputs: Mapping[str, Any] | None = None) -> Tensor:
    return split_outputs(spec.tasks[task].forward(spec.model, **(inputs or spec.tasks[task].inputs)))[0]


def in_full(part: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A part's gradients under the names of the model: tied parameters have another, unused ones have none."""
    graph_names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in part}
    return {n: part.get(graph_names.get(id(p), n), torch.zeros_like(p)) for n, p in model.named_parameters()}


@pytest.fixture(scope="session")
def measured(janus_example: Captured, digits_example: Captured) -> Measure:
    """The examples and the tiny model, in float64, measured once."""
    found: dict[str, Measured] = {}
    made = {
        "janus": lambda: janus_example,
        "digits": lambda: digits_example,
        "tiny": lambda: Captured.of(tiny.build(dtype="float64")),
        "conv": lambda: Captured.of(tiny.build(dtype="float64", token_mixer="conv")),
        "cumsum": lambda: Captured.of(tiny.build(dtype="float64", token_mixer="cumsum")),
    }

    def get(name: str) -> Measured:
        if name not in found:
            found[name] = Measured.of(made[name]())
        return found[name]

    return get


# ------------------------------------------------------------------ the parts are the whole


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["digits", "tiny", pytest.param("janus", marks=pytest.mark.slow), *ODD])
def test_the_parts_add_up_to_the_gradient(measured: Measure, name: str, task: str) -> None:
    spec = measured(name).captured.spec
    whole = measured(name).splits[task].whole()
    assert whole.keys() <= dict(spec.model.named_parameters()).keys()
    assert_same_gradients(in_full(whole, spec.model), gradients(spec.model, loss_of(spec, task)), EXACT)


# ------------------------------------------------------------------ the parts are of rows: eager linear layers


def linear_parts(
    spec: tg.ModelSpec, task: str, rows_of: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Visual and text parts of the gradients of every linear layer, from what goes in and what comes back.

    Args:
        rows_of: name of the module and its input -> the visual rows, of the input's shape without the last axis.
    """
    seen: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, m, args[0].detach(), out)))
        for name, module in spec.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    loss = loss_of(spec, task)
    for hook in hooks:
        hook.remove()
    found = torch.autograd.grad(loss, [out for *_, out in seen], allow_unused=True)
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for (name, module, x, _), back in zip(seen, found, strict=True):
        if back is None:
            continue
        visual = rows_of(name, x)
        for part, rows in zip(parts, (visual, ~visual), strict=True):
            add(part, f"{name}.weight", back[rows].T @ x[rows])
            if module.bias is not None:
                add(part, f"{name}.bias", back[rows].sum(0))
    return parts


def add(part: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    part[name] = part[name] + gradient if name in part else gradient


def visual_tokens(spec: tg.ModelSpec, task: str) -> Tensor:
    """``[batch, tokens]`` bool, by the definition of each model's tasks."""
    inputs = spec.tasks[task].inputs
    if "image_codes" in inputs:  # Janus: the image comes after the text
        text, image = inputs["input_ids"], inputs["image_codes"]
        return torch.cat([torch.zeros_like(text), torch.ones_like(image)], 1).bool()
    if "codes" in inputs:
        text, image = inputs["ids"], inputs["codes"]
        return torch.cat([torch.zeros_like(text), torch.ones_like(image)], 1).bool()
    if "visual_mask" in inputs:
        return inputs["visual_mask"]
    if "ids" in inputs:
        return inputs["ids"] == tiny.IMAGE_ID
    if "pixel_values" in inputs:
        return inputs["input_ids"] == 255
    return inputs["input_ids"] >= 23  # digits: the ids of image codes follow those of the words


IMAGE_ONLY = ("vision_model", "model.aligner", "model.generation_aligner", "patch_encoder", "patches", "codes")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["janus", "digits", "tiny", ODD[0]])
def test_the_parts_of_linear_layers(measured: Measure, name: str, task: str) -> None:
    """``dW = grad_out[rows].T @ x[rows]`` of the eager model, over the visual rows and over the others."""
    spec, split = measured(name).captured.spec, measured(name).splits[task]
    tokens = visual_tokens(spec, task)

    def rows_of(module: str, x: Tensor) -> Tensor:
        if any(part in module for part in IMAGE_ONLY):
            return torch.ones(x.shape[:-1], dtype=torch.bool)
        if x.shape[:2] == tokens.shape:
            return tokens
        image = tokens[0].sum()  # the heads of generation: one row before each image token
        assert x.shape[1] == image
        return tokens[:, -image - 1 : -1]

    visual, text = linear_parts(spec, task, rows_of)
    assert len(visual) >= 12
    assert_same_gradients({n: split.visual[n] for n in visual}, visual, EXACT)
    assert_same_gradients({n: split.text[n] for n in text}, text, EXACT)


# ------------------------------------------------------------------ the parts are of rows: every parameter of odd layouts


class Scale(nn.Module):
    """A factor that is broadcast to all rows by hand."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.expand(*x.shape[:2], -1)


class Odd(models.PreNorm):
    """A layer that moves, merges and broadcasts the axes of its rows in every way we know of."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.tokens_first, self.merged, self.tokens_merged = (nn.Linear(hidden, hidden) for _ in range(3))
        self.scale = Scale(hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        a = self.tokens_first(h.transpose(0, 1)).transpose(0, 1)
        b = self.merged(h.flatten(0, 1)).unflatten(0, (batch, tokens))
        c = self.tokens_merged(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (tokens, batch)).transpose(0, 1)
        return x + self.scale(self.mlp(h + a + b + c))


class OddDecoder(models.Decoder):
    """Learned positions, and a head that reads merged rows and may be tied to the table of ids."""

    def __init__(self, tied: bool) -> None:
        super().__init__(Odd)
        self.positions = nn.Embedding(models.TOKENS, 4)
        if tied:
            self.head.weight = self.tokens.weight

    def stream(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))

    def logits(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return self.head(self.norm(x).flatten(0, 1))


def odd_loss(model: OddDecoder, ids: Tensor) -> Tensor:
    labels = F.pad(ids.masked_fill(ids == models.IMAGE_ID, -100), (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(model.logits(model.stream(ids)), labels.flatten())


def odd_spec(tied: bool = False, dynamic: bool = True, batch: int = 2) -> tg.ModelSpec:
    torch.manual_seed(0)
    ids = models.image_ids(batch)
    task = tg.Task(
        odd_loss,
        {"ids": ids},
        dynamic={"ids": {0: "batch"}} if dynamic else None,
        visual=tg.VisualTokens.ids(input="ids", equal=models.IMAGE_ID),
        reads="text",
    )
    return tg.ModelSpec(OddDecoder(tied).double(), {"t": task})


def eager_parts(
    spec: tg.ModelSpec, task: str, mask_of: Callable[[str, Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Visual and text parts of every parameter of a leaf module: each module runs on two copies of its parameters.

    Args:
        mask_of: name of the module and its output -> the visual rows, broadcasting against the output.
    """
    model = spec.model
    copies = [
        {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters(remove_duplicate=False)}
        for _ in range(2)
    ]
    busy = False

    def twice(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            nonlocal busy
            if busy:
                return None
            busy = True
            own = [{n: side[f"{name}.{n}"] for n, _ in module.named_parameters()} for side in copies]
            visual, text = (functional_call(module, parameters, args) for parameters in own)
            busy = False
            return torch.where(mask_of(name, out), visual, text)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children()) and list(m.parameters())]
    hooks = [module.register_forward_hook(twice(name)) for name, module in leaves]
    loss = loss_of(spec, task)
    for hook in hooks:
        hook.remove()
    names = [f"{n}.{p}" for n, m in leaves for p, _ in m.named_parameters()]
    visual, text = (gradients_of(loss, {n: side[n] for n in names}) for side in copies)
    return visual, text


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["tiny", *ODD])
def test_the_parts_of_every_module(measured: Measure, name: str, task: str) -> None:
    """Norms, tables and a convolution over tokens as well, of the tiny model."""
    spec, split = measured(name).captured.spec, measured(name).splits[task]
    tokens = visual_tokens(spec, task)

    def mask_of(module: str, out: Tensor) -> Tensor:
        if module in ("patches", "codes", "embed"):
            return torch.tensor(module != "embed")
        if isinstance(spec.model.get_submodule(module), nn.Conv1d):
            return tokens.unsqueeze(1)
        rows = tokens if module != "code_head" else tokens[:, tiny.TEXT - 1 : -1]
        return rows.unsqueeze(-1)

    visual, text = eager_parts(spec, task, mask_of)
    assert visual.keys() | text.keys() == split.visual.keys()
    for part, expected in ((split.visual, visual), (split.text, text)):
        assert_same_gradients({n: part[n] for n in expected}, expected, EXACT)


@pytest.mark.parametrize(("dynamic", "batch"), [(True, 2), (False, 2), (False, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_followed_through_odd_layouts(tied: bool, dynamic: bool, batch: int) -> None:
    spec = odd_spec(tied, dynamic, batch)
    captured = Captured.of(spec)
    split = Measured.of(captured).splits["t"]
    tokens = spec.tasks["t"].inputs["ids"] == models.IMAGE_ID

    def mask_of(module: str, out: Tensor) -> Tensor:
        if module == "positions":  # rows of no particular sample: looked at below
            return torch.tensor(False)
        if module.endswith("tokens_first"):
            return tokens.T.unsqueeze(-1)
        if module.endswith("tokens_merged"):
            return tokens.T.reshape(-1, 1)
        return tokens.reshape(-1, 1) if module.endswith((".merged", "head")) else tokens.unsqueeze(-1)

    visual, text = eager_parts(spec, "t", mask_of)
    if tied:
        for part in (visual, text):
            part["tokens.weight"] = part["tokens.weight"] + part.pop("head.weight")
    names = visual.keys() - {"positions.weight"}
    assert {f"stages.stage_1.0.{n}.weight" for n in ("merged", "scale", "norm1")} < names
    for part, expected in ((split.visual, visual), (split.text, text)):
        full = in_full(part, spec.model)
        assert_same_gradients({n: full[n] for n in names}, {n: expected[n] for n in names}, EXACT)
    assert_same_gradients(in_full(split.whole(), spec.model), gradients(spec.model, loss_of(spec, "t")), EXACT)
    assert_same_gradients({"": split.visual["positions.weight"]}, {"": visual_part_of_positions(spec, tokens)}, EXACT)

    assert {share for n, share in captured.facts["t"].profile.items() if "stage_0" in n or n == "positions.weight"} == {
        1
    }
    assert not disagreements(captured, "t", split)


def visual_part_of_positions(spec: tg.ModelSpec, tokens: Tensor) -> Tensor:
    """The gradient at the stream's first value, summed over the samples in which a position is visual."""
    ids = spec.tasks["t"].inputs["ids"]
    x = spec.model.stream(ids).detach().requires_grad_()
    labels = F.pad(ids.masked_fill(tokens, -100), (0, 1), value=-100)[:, 1:]
    (back,) = torch.autograd.grad(F.cross_entropy(spec.model.logits(x), labels.flatten()), x)
    return (back * tokens.unsqueeze(-1)).sum(0)


class Boundary(tiny.Unified):
    """An embedding of its own between the text and the image."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.begin = nn.Parameter(torch.rand(1, 1, 16))


def generate_after_boundary(model: Boundary, ids: Tensor, codes: Tensor) -> Tensor:
    begin = model.begin.expand(len(ids), -1, -1)
    x = torch.cat([model.embed(ids), begin, model.codes(codes)], 1)
    logits = model.code_head(model.backbone(x)[:, ids.shape[1] : -1])
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_parameter_that_is_a_text_row_itself(dynamic: bool) -> None:
    torch.manual_seed(0)
    model = Boundary().double()
    generation = tiny.build(dynamic=dynamic).tasks["generation"]
    task = replace(generation, forward=generate_after_boundary)
    captured = Captured.of(tg.ModelSpec(model, {"t": task}))
    split = Measured.of(captured).splits["t"]
    assert captured.facts["t"].profile["begin"] == 0
    assert not split.visual["begin"].any()
    assert split.text["begin"].any()
    assert not disagreements(captured, "t", split)


# ------------------------------------------------------------------ the parts and the profile


def disagreements(captured: Captured, task: str, split: GradientSplit) -> set[str]:
    """Parameters that pass visual tokens and get no gradient from them; it is an error the other way round."""
    shares = captured.facts[task].profile
    for name, part in split.visual.items():
        assert shares.get(name, 0) > 0 or not part.any(), f"{name} passes no visual token and gets a gradient from some"
    return {n for n, share in shares.items() if share > 0 and (n not in split.visual or not split.visual[n].any())}


def read_by_the_last_visual_row_only(captured: Captured, task: str) -> set[str]:
    facts = captured.facts[task]
    return {n for n, share in facts.profile.items() if 0 < share <= facts.demand.visual / facts.visual.count < 1}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["janus", "digits", "tiny", *ODD])
def test_gradients_are_visual_where_the_profile_says_so(measured: Measure, name: str, task: str) -> None:
    """Demand is a safe superset: it counts the last image row, which predicts the text after the image. Where the task
    ignores that text (a question, of which only the answer is learned) no gradient flows through the row.
    """
    found = measured(name)
    ignored = name in ("janus", "digits") and task == "understanding"
    expected = read_by_the_last_visual_row_only(found.captured, task) if ignored else set()
    assert bool(expected) == ignored
    assert disagreements(found.captured, task, found.splits[task]) == expected


@pytest.mark.parametrize("name", ["chameleon", "llava"])
def test_gradients_of_the_zoo_are_visual_where_the_profile_says_so(name: str) -> None:
    """Chameleon's image tokenizer makes visual tokens, but its codes are integers: no gradient passes them."""
    pytest.importorskip("transformers")
    from tests.test_zoo import task_of
    from tests.zoo import ZOO

    zoo = ZOO[name]("sdpa")
    tasks = {task: task_of(given, dynamic=False) for task, given in zoo.tasks.items()}
    found = Measured.of(Captured.of(tg.ModelSpec(zoo.model, tasks)))
    for task, split in found.splits.items():
        quantised = {n for n in found.captured.facts[task].profile if n.startswith("model.vqmodel.")}
        assert bool(quantised) == (name == "chameleon" and task == "understanding")
        assert disagreements(found.captured, task, split) == quantised
        reference = gradients(zoo.model, loss_of(found.captured.spec, task))
        assert_same_gradients(in_full(split.whole(), zoo.model), reference, 1e-4)  # float32


# ------------------------------------------------------------------ batches and types


def batch_of(task: str, samples: int, text: int, seed: int) -> dict[str, Tensor]:
    """A batch of the tiny model, of any size."""
    random = torch.Generator().manual_seed(seed)
    if task == "generation":
        return {
            "codes": torch.randint(0, tiny.CODES, (samples, tiny.IMAGE), generator=random),
            "ids": torch.randint(10, tiny.VOCABULARY, (samples, text), generator=random),
        }
    ids = torch.randint(10, tiny.VOCABULARY, (samples, text + tiny.IMAGE), generator=random)
    ids[:, 2 : 2 + tiny.IMAGE] = tiny.IMAGE_ID
    patches = torch.rand(samples, tiny.IMAGE, 4, dtype=torch.float64, generator=random)
    return {"patches": patches, "ids": ids, "labels": ids.masked_fill(ids == tiny.IMAGE_ID, -100)}


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_over_batches_of_any_size(measured: Measure, task: str) -> None:
    captured = measured("tiny").captured
    program, facts, spec = captured.program, captured.facts, captured.spec
    batches = [batch_of(task, 2, tiny.TEXT, 0), batch_of(task, 3, 9, 1), batch_of(task, 1, 7, 2)]
    with torch.no_grad():  # gradients are measured wherever it is called
        each = [measure_gradients(program[task], facts[task], [batch]) for batch in batches]
        mean = measure_gradients(program[task], facts[task], iter(batches))
    for batch, split in zip(batches, each, strict=True):
        whole = in_full(split.whole(), spec.model)
        assert_same_gradients(whole, gradients(spec.model, loss_of(spec, task, batch)), EXACT)
    visual, text = (
        {n: sum(getattr(split, part)[n] for split in each) / 3 for n in mean.visual} for part in ("visual", "text")
    )
    assert_same_gradients(mean.visual, visual, EXACT)
    assert_same_gradients(mean.text, text, EXACT)
    assert not disagreements(captured, task, mean)


def test_the_parts_of_another_batch(measured: Measure) -> None:
    """The visual rows are those of the batch, not those of the example."""
    captured = measured("tiny").captured
    batch = batch_of("understanding", 3, 9, 1)
    split = measure_gradients(captured.program["understanding"], captured.facts["understanding"], [batch])
    task = replace(captured.spec.tasks["understanding"], inputs=batch)
    tokens = batch["ids"] == tiny.IMAGE_ID

    def rows_of(module: str, x: Tensor) -> Tensor:
        return torch.ones(x.shape[:-1], dtype=torch.bool) if module == "patches" else tokens

    visual, text = linear_parts(tg.ModelSpec(captured.model, {"understanding": task}), "understanding", rows_of)
    assert_same_gradients({n: split.visual[n] for n in visual}, visual, EXACT)
    assert_same_gradients({n: split.text[n] for n in text}, text, EXACT)


def test_the_type_to_compute_in() -> None:
    """The model's own by default; in float64, a float32 model has the gradients of its float64 copy."""
    spec = tiny.build(dynamic=False)
    captured = Captured.of(spec)
    graph, facts = captured.program["generation"], captured.facts["generation"]
    own, double = (measure_gradients(graph, facts, dtype=dtype) for dtype in (None, torch.float64))
    assert {g.dtype for g in own.visual.values()} == {torch.float32}
    assert {g.dtype for g in double.text.values()} == {torch.float64}
    exact = tg.ModelSpec(copy.deepcopy(spec.model).double(), spec.tasks)
    reference = gradients(exact.model, loss_of(exact, "generation"))
    assert_same_gradients(in_full(double.whole(), spec.model), in_full(reference, exact.model), EXACT)
    assert_same_gradients({n: g.double() for n, g in own.whole().items()}, double.whole(), 1e-4)
    assert all(p.grad is None for p in spec.model.parameters())


def test_bfloat16() -> None:
    captured = Captured.of(tiny.build(layers=1, dtype="bfloat16", dynamic=False))
    split = Measured.of(captured).splits["understanding"]
    assert {g.dtype for g in split.visual.values()} == {torch.bfloat16}
    assert not disagreements(captured, "understanding", split)


def test_frozen_parameters_have_no_gradient() -> None:
    spec = tiny.build(layers=1, dynamic=False)
    spec.model.embed.weight.requires_grad_(False)
    spec.model.layers.requires_grad_(False)
    split = Measured.of(Captured.of(spec)).splits["understanding"]
    assert split.visual.keys() == split.text.keys()
    assert set(split.visual) == {f"{m}.{p}" for m in ("patches", "norm", "head") for p in ("weight", "bias")}
    spec.model.requires_grad_(False)
    assert not Measured.of(Captured.of(spec)).splits["understanding"].whole()


def test_what_is_refused(measured: Measure) -> None:
    captured = measured("tiny").captured
    graph, facts = captured.program["generation"], captured.facts["generation"]
    with pytest.raises(BatchError, match="no batch to measure"):
        measure_gradients(graph, facts, [])
    with pytest.raises(BatchError):
        measure_gradients(graph, facts, [{"ids": graph.task.inputs["ids"]}])
    spec = tiny.build(dynamic=False)
    meta = Captured.of(tg.ModelSpec(copy.deepcopy(spec.model).to("meta"), spec.tasks))
    with pytest.raises(AnalysisError, match="meta device"):
        measure_gradients(meta.program["generation"], meta.facts["generation"])


# ------------------------------------------------------------------ norms and cosines


def test_norms_are_plain_numbers() -> None:
    split = GradientSplit({"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([1.0, 0.0])})
    assert split.norms() == {"a": GradientNorms(5.0, 1.0)}
    assert type(split.norms()["a"].visual) is float
    assert split.whole()["a"].tolist() == [4.0, 4.0]


def test_cosines_by_hand(measured: Measure) -> None:
    facts = measured("tiny").captured.facts
    a = GradientSplit(
        {"layers.0.p": torch.tensor([1.0, 0.0]), "layers.0.q": torch.tensor([2.0]), "layers.1.p": torch.tensor([1.0])},
        {"layers.0.p": torch.tensor([0.0, 1.0]), "layers.0.q": torch.tensor([0.0]), "layers.1.p": torch.tensor([0.0])},
    )
    b = GradientSplit(
        {"layers.0.p": torch.tensor([1.0, 1.0]), "layers.1.p": torch.tensor([-2.0])},
        {"layers.0.p": torch.tensor([0.0, 3.0]), "layers.1.p": torch.tensor([1.0])},
    )
    first, second, third = gradient_cosines({"understanding": a, "generation": b}, facts)
    assert (first.tasks, first.block, first.module) == (("understanding", "generation"), 0, "layers.0")
    assert first.visual == pytest.approx(1 / (5**0.5 * 2**0.5))  # q is no parameter of the second task
    assert first.text == pytest.approx(1.0)
    assert first.whole == pytest.approx(5 / (6**0.5 * 17**0.5))
    assert (second.visual, second.whole) == (pytest.approx(-1.0), pytest.approx(-1.0))
    assert isnan(second.text)
    assert third.module == "layers.2"
    assert all(map(isnan, (third.whole, third.visual, third.text)))


def test_cosines_of_a_model(measured: Measure) -> None:
    """One a block, as the concatenated gradients have it; tasks that are alike agree."""
    found = measured("tiny")
    blocks = gradient_cosines(found.splits, found.captured.facts)
    assert [b.block for b in blocks] == [0, 1, 2]
    for block in blocks:
        names = [n for n in found.splits["generation"].visual if n.startswith(f"{block.module}.")]
        assert len(names) == 12
        for part, cosine in (("visual", block.visual), ("text", block.text)):
            x, y = (torch.cat([getattr(s, part)[n].flatten() for n in names]) for s in found.splits.values())
            assert cosine == pytest.approx(float(F.cosine_similarity(x, y, dim=0)), abs=1e-12)
    facts = found.captured.facts["generation"]
    twins = gradient_cosines(dict.fromkeys(("a", "b"), found.splits["generation"]), {"a": facts, "b": facts})
    assert [b.whole for b in twins] == [pytest.approx(1.0)] * 3


def test_blocks_without_a_counterpart_are_left_out(measured: Measure) -> None:
    found = measured("tiny")
    generation = found.captured.facts["generation"]
    unknown = replace(
        generation, blocks=tuple(replace(b, module="" if b.index else b.module) for b in generation.blocks)
    )
    blocks = gradient_cosines(
        found.splits, {"understanding": found.captured.facts["understanding"], "generation": unknown}
    )
    assert [b.module for b in blocks] == ["layers.0"]
