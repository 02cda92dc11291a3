"""The judge of a plan on a model file: eager, with the drops by hand, and the oracle. Any difference is a failure.

Refusals are counted, not judged, but for three kinds: a raw traceback, one that asks for a report, and one that comes only
when numbers are compared.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tokgraph as tg
from tests.fuzz.hand import Drops

TASK = "task"
TOLERANCE = 1e-9
LOOSE = 3e-5
"""Where the model itself computes in float32: a softmax over fewer columns rounds otherwise."""
FLOOR = 1e-4
"""Of the largest gradient: smaller ones are compared with it, for many are zero but for rounding."""
FLOOR_LOOSE = 1e-2


@dataclass(frozen=True)
class Verdict:
    """What became of a plan.

    Args:
        kind: ``"accepted"``, ``"refused"``, or a kind of failure.
        reason: of a refusal: its code and message without names and numbers; of a failure: what it is about.
        detail: the whole message.
    """

    kind: str
    reason: str = ""
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.kind not in ("accepted", "refused")


class Broken(Exception):
    """The generated model does not run by itself, so that there is nothing to judge."""


class Subject:
    """A model file at work.

    Args:
        names: what the file defines: ``build``, ``batch``, ``seen_as_image``, sizes.
        loose: the model itself computes in float32 in places.
        dynamic: batch and tokens may have other sizes.
    """

    def __init__(self, names: Mapping[str, Any], loose: bool = False, dynamic: bool = False) -> None:
        self.names, self.loose = names, loose
        self.spec: tg.ModelSpec = names["build"]()
        self.task, self.module = self.spec.tasks[TASK], self.spec.model
        self.batches = [dict(self.task.inputs), names["batch"](1)]
        if dynamic:
            self.batches.append(names["batch"](2, size=names["BATCH"] + 1, tokens=names["TOKENS"] + 3))

    @cached_property
    def facts(self) -> tg.Facts | Verdict:
        """Facts of the captured model, or why there are none."""
        return attempted(lambda: tg.analyze(tg.capture(self.spec)))

    def by_hand(self, number: int, sites: list[dict[str, Any]]) -> Run:
        """The model's own forward with drops in its loop, on a batch; each is a training step."""
        batch = self.batches[number]
        drops = Drops(sites, self.names["seen_as_image"](batch["ids"]), self.task.reads, step=number)
        return Run.of(self.module, self.module(**batch, drops=drops))


def attempted(call: Callable[[], Any], late: bool = False) -> Any:
    """What a call returns, or the verdict on what it raises.

    Args:
        call: of tokgraph.
        late: a refusal comes too late here.
    """
    try:
        return call()
    except tg.TokgraphError as error:
        text = f"{error}"
        if "report" in text and "please" in text:
            return Verdict("asks for a report", reason_of(error), text)
        return Verdict("refused late" if late else "refused", reason_of(error), text)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].name}"
        return Verdict("raw traceback", f"{type(error).__name__} in {where}", traceback.format_exc())


def reason_of(error: tg.TokgraphError) -> str:
    """The code and the message, without what is of one case."""
    text = error.message.split("\n")[0]
    text = re.sub(r"^task '[^']*':\s*", "", text)
    for pattern, instead in (
        (r"layers\.\d+(\.\w+)*", "LAYER"), (r"'[^']*'", "'…'"), (r"\[\d+, \d+\)", "[a, b)"), (r"\b\d+\b", "N"),
        (r"\b(\w+?)(_N|_\d+)\b", r"\1"), (r"(N, )+N", "N"), (r"\(N\)", "N"),
    ):  # fmt: skip
        text = re.sub(pattern, instead, text)
    return f"{error.code}: {text[:160]}"


def judge(subject: Subject, sites: list[dict[str, Any]], exact: bool) -> Verdict:
    """Try a plan.

    Args:
        subject: the model.
        sites: fields of drop sites, but for their task.
        exact: whether dead work goes.

    Raises:
        Broken: the model does not run by itself.
    """
    try:
        by_hand = [subject.by_hand(number, sites) for number in range(len(subject.batches))]
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    facts = subject.facts
    if isinstance(facts, Verdict):
        return facts
    # which rows attention chooses, only the oracle says: a loop by hand would have to keep the weights of every attention
    known = all(site["selector"] != "attention" for site in sites)
    plan = tg.Plan(tuple(tg.DropSite(TASK, **site) for site in sites), exact=exact)
    accelerated = attempted(lambda: tg.apply(facts, plan))
    if isinstance(accelerated, Verdict):
        return accelerated
    blocks = [block.module for block in facts[TASK].blocks]
    if sites and blocks != [
        f"layers.{number % len(subject.module.layers)}" for number in range(subject.names["LAYERS"])
    ]:
        return Verdict("another block", f"{len(blocks)} blocks", f"blocks are {blocks}")
    for number, (batch, expected) in enumerate(zip(subject.batches, by_hand, strict=True) if known else ()):
        found = compared(subject, accelerated, batch, expected)
        if found.failed and number == 2 and "the task was captured for" in found.detail:
            break  # capture said that it fixes a size
        if found.failed:
            return Verdict(found.kind, found.reason, f"batch {number}: {found.detail}")
    accelerated[TASK].step = 0
    oracle = attempted(lambda: tg.verify(accelerated), late=True)
    if isinstance(oracle, Verdict):
        asked = not known and oracle.reason.startswith(
            "TG007"
        )  # the prompt does not see all visual tokens of this batch
        return replace(oracle, kind="refused") if asked else oracle
    return Verdict("accepted") if oracle.passed else Verdict("oracle", "", str(oracle.tasks))


@dataclass(frozen=True)
class Run:
    """What a call gives: its result, gradients, and the rows that compact outputs hold."""

    result: Any
    gradients: dict[str, Tensor]
    rows: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, result: Any, rows: dict[str, Tensor] | None = None) -> Run:
        loss = result["loss"] if isinstance(result, dict) else result[0] if isinstance(result, tuple) else result
        named = dict(module.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
        return cls(pytree.tree_map_only(Tensor, Tensor.detach, result), gradients, rows or {})


def compared(subject: Subject, accelerated: tg.Accelerated, batch: dict[str, Any], by_hand: Run) -> Verdict:
    """A call on a batch against the loop by hand: loss, outputs at the rows that there are, gradients."""
    mine = attempted(lambda: Run.of(subject.module, *accelerated[TASK].with_rows(**batch)), late=True)
    if isinstance(mine, Verdict):
        return mine
    tolerance, floor = (LOOSE, FLOOR_LOOSE) if subject.loose else (TOLERANCE, FLOOR)
    for path, a, b in leaves(mine.result, by_hand.result):
        if path in mine.rows:
            b = b.gather(1, mine.rows[path].unsqueeze(-1).expand(-1, -1, b.shape[-1]))
        if a.shape != b.shape:
            return Verdict("outputs", "shape", f"output {path}: {tuple(a.shape)}, by hand {tuple(b.shape)}")
        if a.is_floating_point():
            error = distance(a, b, float(b.abs().max()) * 1e-3)
            if not error <= tolerance:
                return Verdict("loss" if a.dim() == 0 else "outputs", "", f"output {path}: relative error {error:.1e}")
        elif not torch.equal(a, b):
            return Verdict("outputs", "integers", f"output {path} differs")
    largest = max(float(g.abs().max()) for g in by_hand.gradients.values())
    errors = {n: distance(mine.gradients[n], g, floor * largest) for n, g in by_hand.gradients.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        told = ", ".join(f"{name} {error:.1e}" for name, error in sorted(wrong.items(), key=lambda x: -x[1])[:6])
        return Verdict("gradients", "", f"relative errors of gradients: {told}")
    return Verdict("accepted")


def leaves(mine: Any, by_hand: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    found, expected = (pytree.tree_flatten_with_path(x)[0] for x in (mine, by_hand))
    for (path, a), (_, b) in zip(found, expected, strict=True):
        yield pytree.keystr(path), a, b


def distance(a: Tensor, b: Tensor, floor: float) -> float:
    """The largest difference, relative to the largest magnitude of ``b``, or to a floor."""
    return float((a - b).abs().max() / max(float(b.abs().max()), floor, 1e-300)) if a.numel() else 0.0
