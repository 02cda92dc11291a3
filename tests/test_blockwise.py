"""One module of blocks: the same bits as the flat graphs, the model's parameters once, its keys, its checks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel

import tokgraph as tg
from tests import tiny
from tests.distributed.programs import batch_of, program
from tests.field import decoder, models, structures, test_checks
from tests.harness import captured_tiny
from tests.test_compile import Averaged, averaging, broken
from tokgraph.calls.parts import Part
from tokgraph.passes.lower.kept import kept_bytes

Batches = Mapping[str, Mapping[str, Any]]


def result(
    acc: tg.Accelerated, call: Callable[[], Any]
) -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
    """Outputs, gradients and buffers of a call, which are put back."""
    parameters = dict(acc.named_parameters())
    before = {name: x.clone() for name, x in acc.model.named_buffers()}
    for task in acc.values():
        task.step = 3
    torch.manual_seed(0)
    outputs = [x for x in torch.utils._pytree.tree_leaves(call()) if isinstance(x, Tensor)]
    loss = sum(x for x in outputs if x.dim() == 0)
    found = torch.autograd.grad(loss, [p for p in parameters.values() if p.requires_grad], allow_unused=True)  # type: ignore[arg-type]
    buffers = {name: x.clone() for name, x in acc.model.named_buffers()}
    with torch.no_grad():
        for name, x in acc.model.named_buffers():
            x.copy_(before[name])
    named = [name for name, p in parameters.items() if p.requires_grad]
    return [x.detach() for x in outputs], dict(zip(named, found, strict=True)), buffers


def assert_same(acc: tg.Accelerated, batches: Batches, tolerance: float = 0.0, **options: Any) -> tg.Blockwise:
    """Each task, and all of them in one forward, as the flat graphs."""
    module = acc.module(**options)
    for task, inputs in batches.items():
        compare(result(acc, partial(acc[task], **inputs)), result(acc, partial(module, task=task, **inputs)), tolerance)
    if len(batches) > 1:
        flat = result(acc, lambda: {task: acc[task](**x) for task, x in batches.items()})
        compare(flat, result(acc, lambda: module(batches=batches)), max(tolerance, 1e-13))  # sums in another order
    assert {id(p) for p in module.parameters()} <= {id(p) for p in acc.parameters()}
    assert module.state_dict().keys() == acc.state_dict().keys()
    return module


def compare(expected: Any, found: Any, tolerance: float) -> None:
    def close(a: Tensor, b: Tensor, name: str) -> None:
        assert torch.allclose(a, b, rtol=0, atol=tolerance * float(a.abs().max()) if tolerance else 0), name

    for i, (a, b) in enumerate(zip(expected[0], found[0], strict=True)):
        close(a, b, f"output {i}")
    for a, b in ((expected[1], found[1]), (expected[2], found[2])):
        assert a.keys() == b.keys()
        for name, x in a.items():
            assert (x is None) == (b[name] is None), name
            if x is not None:
                close(x, b[name], name)


def inputs_of(acc: tg.Accelerated) -> Batches:
    return {name: task.task_graph.example() for name, task in acc.items()}


def planned(policy: str, **options: Any) -> tg.Accelerated:
    captured = captured_tiny(3)
    return captured.apply(tg.make_plan(captured.program, policy, facts=captured.facts, **options))


@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_same_step(checkpoint: bool) -> None:
    """In float32: gradients of several readers may be added up in another order."""
    acc = planned("shared")
    module = assert_same(acc, inputs_of(acc), 1e-6, checkpoint=checkpoint)
    assert len(module.blocks) == 3
    names = dict(module.named_parameters())
    assert names["blocks.1.layers.1.attention.qkv.weight"] is acc.model.layers[1].attention.qkv.weight
    assert names["epilogue.head.weight"] is acc.model.head.weight
    assert len(names) == len(list(acc.parameters()))


def test_keys_are_the_models() -> None:
    acc = planned("himix")
    module = acc.module()
    state = {name: x.clone() for name, x in module.state_dict().items()}
    assert [*nn.ModuleDict({"m": module}).state_dict()] == [f"m.{name}" for name in state]
    weight = acc.model.layers[0].mlp[0].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    assert not nn.ModuleDict({"m": module}).load_state_dict({f"m.{name}": x for name, x in state.items()}).missing_keys
    assert torch.equal(weight, before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({**state, "head.bias": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({name: x for name, x in state.items() if name != "head.bias"})
    keyed = dict(module.keyed().named_parameters())
    assert keyed == dict(acc.named_parameters())


def test_what_is_called_wrongly() -> None:
    acc = planned("shared")
    module = acc.module()
    batch = inputs_of(acc)["understanding"]
    for wrong in ({}, {"task": "understanding", "batches": {"understanding": batch}}, {"batches": {}}):
        with pytest.raises(tg.BatchError, match="a task and its inputs, or batches"):
            module(**wrong)
    with pytest.raises(tg.BatchError, match="'drawing'"):
        module(task="drawing", **batch)
    with pytest.raises(tg.BatchError, match="takes the inputs"):
        module(task="understanding")
    with pytest.raises(tg.BatchError, match="such tokens than the 6"):
        module(task="understanding", **{**batch, "ids": test_checks.one_image_token_less()["ids"]})
    with pytest.raises(tg.BatchError, match="out of range"):
        module(task="understanding", **{**batch, "ids": batch["ids"].clamp(max=9).masked_fill(batch["ids"] > 9, 99)})

    for keep in ("no", 3, [torch.add], torch.ops.aten.mm.default, [torch.ops.aten.mm]):
        with pytest.raises(tg.PlanError, match="in no list of operators"):
            acc.module(checkpoint=keep)
    for whole in (acc, module, acc.trainable()):
        with pytest.raises(tg.FileError, match="is not pickled"):
            pickle.dumps(whole)


def test_copies_look_at_their_own_model() -> None:
    """As averages of weights keep: modes and changes of the copy count for it, and those of the original do not."""
    spec = tiny.build(layers=2)
    spec.model.layers[0].mlp.append(nn.Dropout())
    task, batch = "understanding", spec.tasks["understanding"].inputs
    acc = tg.optimize(tg.ModelSpec(spec.model, {task: spec.tasks[task]}), "himix", verify=False)
    module = acc.module()
    average = AveragedModel(module)
    mine = average.module
    assert not {id(p) for p in mine.parameters()} & {id(p) for p in acc.parameters()}
    with torch.no_grad():
        for p in mine.parameters():
            p.mul_(1.5)
    copied = mine._programs[""]
    found = result(copied, partial(average, task=task, **batch))
    compare(result(copied, partial(copied[task], **batch)), found, 1e-6)
    assert not torch.equal(found[0][0], result(acc, partial(module, task=task, **batch))[0][0])

    own, original = (x._tasks[""][task].variants.first for x in (mine, module))
    mine.eval()
    assert acc.model.training
    assert (own.holds(), original.holds()) == (False, True)  # else it would drop out as in training
    mine.train()
    acc.eval()
    assert (own.holds(), original.holds()) == (True, False)
    acc.train()
    mine._model[0].layers[0].mlp[1] = nn.ReLU()
    module(task=task, **batch)
    with pytest.raises(tg.StaleError, match="was replaced"):
        mine(task=task, **batch)


@pytest.mark.slow
def test_tensors_of_a_checkpoint_take_the_places() -> None:
    """``assign=True``, as models on the meta device need it; what a plan added follows."""
    acc = copy.deepcopy(planned("himix"))
    module = acc.module()
    state = {name: x.clone() for name, x in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    assert acc.model.head.weight.data_ptr() == state["head.weight"].data_ptr()
    own = next(iter(acc.own_parameters))
    assert acc.own_parameters[own].data_ptr() == state[own].data_ptr()
    assert_same(acc, {"generation": inputs_of(acc)["generation"]}, 1e-6)


@pytest.mark.slow
def test_compilation_of_the_whole_module_is_that_of_its_pieces() -> None:
    acc = planned("none")
    module, batch = acc.module(), inputs_of(acc)["generation"]
    whole = torch.compile(module, backend="eager", fullgraph=False)
    counters.clear()
    assert torch.equal(whole(task="generation", **batch)[0], acc["generation"](**batch)[0])
    assert not counters["stats"]


@pytest.mark.slow
def test_checks_and_writes() -> None:
    """Checks raise before anything is written, and blocks that are computed again write nothing again."""
    task = tiny.build(layers=2).tasks["generation"]
    batch = {**task.inputs, "codes": task.inputs["codes"] % 7}
    model = Averaged()
    acc = tg.optimize(
        tg.ModelSpec(model, {"g": tg.Task(averaging, batch, visual_inputs=("codes",), reads="visual")}),
        "none",
        verify=False,
    )
    module = assert_same(acc, {"g": batch}, 1e-6, checkpoint=True)
    seen = model.seen.clone()
    with pytest.raises(tg.BatchError, match="a code is too large"):
        module(task="g", ids=batch["ids"], codes=torch.full_like(batch["codes"], 7))
    assert torch.equal(model.seen, seen)


@pytest.mark.slow
def test_changes_of_the_model() -> None:
    model = models.seeded(lambda: models.VLM(2, dropout=0.3))
    acc, b = tg.optimize(models.spec(model), "exact", verify=False), models.batch(seed=3)
    module = acc.module(checkpoint=True)
    compare(result(acc, lambda: acc["u"](**b)), result(acc, lambda: module(task="u", **b)), 1e-6)  # dropout, again
    module.eval()
    assert not model.training
    compare(result(acc, lambda: acc["u"](**b)), result(acc, lambda: module(task="u", **b)), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(result(acc, lambda: acc["u"](**b)), result(acc, lambda: module(task="u", **b)), 1e-6)
    model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(tg.StaleError, match="hooks of norm"):
        module(task="u", **b)
    acc.refresh()
    with pytest.raises(tg.StaleError, match="refreshed"):
        module(task="u", **b)
    acc.module()(task="u", **b)


def kept_by(call: Callable[[], Any], leave: list[Tensor]) -> int:
    """Bytes that hooks on saved tensors see between forward and backward, beside some."""
    known = {x.untyped_storage().data_ptr() for x in leave}
    storages: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = call()
    assert held is not None
    return sum(x.nbytes() for at, x in storages.items() if at not in known)


@pytest.mark.parametrize("policy", ["none", pytest.param("shared", marks=pytest.mark.slow)])
def test_bytes_that_are_kept(policy: str) -> None:
    """Flat, by block, by block computed again, and by block but for products: what the graph promises."""
    acc = planned(policy)
    blocks, again = acc.module(), acc.module(checkpoint=True)
    products = acc.module(checkpoint=[torch.ops.aten.addmm.default, torch.ops.aten.mm.default])
    for task, inputs in inputs_of(acc).items():
        leave = [*acc.parameters(), *(x for x in inputs.values() if isinstance(x, Tensor))]
        graph = acc.program[task]
        flat = kept_by(partial(acc[task], **inputs), leave)
        assert kept_by(partial(blocks, task=task, **inputs), leave) == flat
        assert kept_bytes(graph, checkpoint=False) == pytest.approx(flat, rel=0.05)
        found = kept_by(partial(again, task=task, **inputs), leave)
        assert kept_bytes(graph, checkpoint=True) == pytest.approx(found, rel=0.05)
        assert found < flat / 2
        compare(result(acc, partial(acc[task], **inputs)), result(acc, partial(products, task=task, **inputs)), 1e-6)


def test_blocks_that_others_wrap() -> None:
    acc = planned("shared")
    module = acc.module()
    apply_activation_checkpointing(module, check_fn=lambda x: isinstance(x, Part) and x in set(module.blocks))
    for task, inputs in inputs_of(acc).items():
        compare(result(acc, partial(acc[task], **inputs)), result(acc, partial(module, task=task, **inputs)), 1e-6)


def test_several_plans() -> None:
    """One module, its parameters once; each plan as its own flat graphs, one after the other and back."""
    accs = {name: planned(name) for name in ("none", "shared", "himix")} | {"again": planned("himix")}
    module = tg.Blockwise(accs)
    assert module.plan == "none"
    inputs = inputs_of(accs["none"])["understanding"]
    for plan in ("himix", "none", "shared", "himix"):
        module.use(plan)
        acc = accs[plan]
        compare(
            result(acc, partial(acc["understanding"], **inputs)),
            result(acc, partial(module, task="understanding", **inputs)),
            1e-6,
        )
    added = accs["himix"].own_parameters
    assert added
    assert {id(p) for p in added.values()} == {id(p) for p in accs["again"].own_parameters.values()}
    assert {id(p) for p in module.parameters()} == {id(p) for p in accs["himix"].parameters()}
    assert module.state_dict().keys() == accs["himix"].state_dict().keys()
    assert dict(module.keyed().named_parameters()) == dict(accs["himix"].named_parameters())

    state = {name: x.clone() for name, x in module.state_dict().items()}
    with torch.no_grad():
        for p in added.values():
            p.zero_()
    assert not any(module.load_state_dict(state))
    assert all(torch.equal(p, state[name]) for name, p in added.items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({**state, "another": torch.zeros(1)})
    holder = module.blocks[0]._modules["tokgraph_own"]  # what shards a parameter puts another there
    of, leaf = next((m, leaf) for m in holder.modules() for leaf in m._parameters)
    of._parameters[leaf] = nn.Parameter(of._parameters[leaf].detach().clone())
    assert {id(p) for p in accs["himix"].own_parameters.values()} == {
        id(p) for p in accs["again"].own_parameters.values()
    }
    assert {id(p) for p in accs["himix"].own_parameters.values()} != {id(p) for p in added.values()}


def test_plans_that_are_not_there() -> None:
    acc = planned("shared")
    with pytest.raises(tg.PlanError, match="no plan 'none'; it holds 'shared'"):
        tg.Blockwise({"shared": acc}).use("none")
    with pytest.raises(tg.PlanError, match="these are of none"):
        tg.Blockwise({})
    other: Any = SimpleNamespace(model=nn.Linear(1, 1))
    captured = captured_tiny(3)
    fastv = captured.apply(tg.make_plan(captured.program, "fastv", facts=captured.facts), "understanding")
    module, batches = tg.Blockwise({"fastv": fastv, "shared": acc}), inputs_of(acc)
    module(task="understanding", **batches["understanding"])
    with pytest.raises(tg.BatchError, match=r"plan 'fastv' is in force(.|\n)*module.use\('shared'\)"):
        module(batches=batches)
    assert {*module.use("shared")(batches=batches)} == {"understanding", "generation"}
    with pytest.raises(tg.BatchError, match="'drawing', which the model does not have"):
        module(task="drawing")
    with pytest.raises(tg.PlanError, match="these are of 2"):
        tg.Blockwise({"shared": acc, "other": other})


# ------------------------------------------------------------------ slow: in float64, bit for bit


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["shared", "random-ltd", "fastv", "pyramiddrop", "himix", "hmgen"])
def test_every_policy(policy: str) -> None:
    checkpoint = policy != "shared"
    acc = program(policy)
    assert_same(acc, inputs_of(acc), checkpoint=checkpoint)
    assert_same(acc, {task: batch_of(task, 5) for task in acc}, checkpoint=checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["features again", "experts", "two streams", "early exit"])
def test_every_structure(structure: str) -> None:
    model = structures.model(structure)
    facts = tg.analyze(tg.capture(decoder.spec(model, decoder.batch(), structures.loss)))
    for site in (tg.DropSite(decoder.TASK, 1, 3, 0.5), tg.DropSite(decoder.TASK, 2, 4, 0.5, "norm", restore=False)):
        try:
            acc = tg.apply(facts, tg.Plan((site,)))
        except tg.IllegalRewriteError:
            continue
        module = assert_same(acc, {decoder.TASK: decoder.batch((5, 1), seed=3)}, 1e-14, checkpoint=True)
        assert len(module.blocks) == 4


class Twice(models.VLM):
    """Goes through its second block again, and ties what reads and what writes words."""

    def __init__(self) -> None:
        super().__init__(3)
        self.head.weight = self.embedding.weight

    def hidden(self, ids: Tensor, patches: Tensor | None = None) -> Tensor:
        x = self.embed(ids, patches)
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return self.norm(x)


@pytest.mark.slow
def test_parameters_of_several_parts() -> None:
    """They are nobody's but the whole module's: a part that gathered them would do so for itself only."""
    model = models.seeded(Twice).double()
    b = {k: x.double() if x.is_floating_point() else x for k, x in models.batch(seed=2).items()}
    acc = tg.optimize(models.spec(model, inputs=b), "none", verify=False)
    module = assert_same(acc, {"u": b}, 1e-14, checkpoint=True)
    shared = {name for name, _ in module.shared.named_parameters(remove_duplicate=False)}
    assert {"embedding.weight", "head.weight"} <= shared
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(module.parameters())) == len(list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, models.OPEN])
def test_adapters_and_open_sizes(dynamic: Any) -> None:
    model = models.seeded(lambda: models.VLM(3)).requires_grad_(False)
    for block in model.blocks:
        block.q, block.v = models.Adapted(block.q), models.Adapted(block.v)
    acc = tg.optimize(models.spec(model, dynamic=dynamic), tg.Plan((tg.DropSite("u", 1, 2, 0.5),)), verify=False)
    for b in (models.batch(seed=1), models.batch(3, 4, 6) if dynamic else models.batch(seed=2)):
        module = assert_same(acc, {"u": b}, 1e-6, checkpoint=True)
    assert sum(p.requires_grad for p in module.parameters()) == 12
    with torch.no_grad() if dynamic else nullcontext():
        module(task="u", **models.batch(seed=1))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning"
)
def test_compiled_pieces() -> None:
    """Equal blocks of both tasks once, checks outside, computed again or not."""
    torch._dynamo.reset()
    counters.clear()
    acc = planned("none")
    batches = inputs_of(acc)
    for checkpoint in (False, True):
        module = acc.module(checkpoint=checkpoint).compile(backend="aot_eager")
        for task, inputs in batches.items():
            compare(result(acc, partial(acc[task], **inputs)), result(acc, partial(module, task=task, **inputs)), 1e-5)
        if not checkpoint:
            assert counters["stats"]["unique_graphs"] == 5  # a block; before and after the blocks, of each task
    wrong = {**batches["understanding"], "ids": test_checks.one_image_token_less()["ids"]}
    shared = planned("shared").module().compile(backend="aot_eager")
    with pytest.raises(tg.BatchError, match="such tokens than the 6"):
        shared(task="understanding", **wrong)
    with pytest.raises(tg.CompileError, match="no kernel for aten.gelu"):
        acc.module().compile(backend=broken)(task="generation", **batches["generation"])


@pytest.mark.slow
def test_a_loaded_program(tmp_path: Any) -> None:
    planned("himix").save(tmp_path)
    acc = tg.load_accelerated(tmp_path)
    assert_same(acc, inputs_of(acc), 1e-6)
