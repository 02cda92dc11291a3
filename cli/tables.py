"""Tables of facts for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from .common import amount, overhead


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print a summary of facts (:func:`tokgraph.report.summarise`)."""
    tasks: dict[str, Any] = summary["tasks"]
    _print_tasks(tasks, console)
    shared = summary["shared_parameters"]
    console.print(
        f"{len(shared['names'])} parameters ({amount(shared['elements'])} elements) transform visual tokens of every task"
    )
    for i in range(len(next(iter(tasks.values()))["cost"]["at"])):
        _print_cost({name: task["cost"]["at"][i] for name, task in tasks.items()}, console)
    if "plan" in summary:
        plan = summary["plan"]
        console.print(f"plan: sharing index {plan['sharing_index']:.3f}, coverage {plan['coverage']:.3f}")
    _print_pathways(summary["pathways"], list(tasks), console)
    if "why_not" in summary:
        for name, groups in summary["why_not"].items():
            console.print(why_not_table(name, groups))
    if summary["gradient_cosines"] is not None:
        _print_measured(tasks, console)
        _print_asymmetry(summary["image_attention"], console)
        _print_cosines(summary["gradient_cosines"], console)


def _print_tasks(tasks: dict[str, Any], console: Console) -> None:
    table = Table(title="tasks")
    table.add_column("", no_wrap=True)
    for name in tasks:
        table.add_column(name, overflow="fold")
    each = list(tasks.values())
    rows = {
        "nodes": [str(t["nodes"]) for t in each],
        "dynamic": [", ".join(sorted({str(v) for v in t["dimensions"].values() if isinstance(v, str)})) for t in each],
        "fixed by the model": [
            ", ".join(f"{k} = {v}" for k, v in t["dimensions"].items() if isinstance(v, int)) or "-" for t in each
        ],
        "held against eager": [_check(t["capture_check"]) for t in each],
        "the graph does not": ["; ".join((t["capture_check"] or {}).get("notes", [])) or "-" for t in each],
        "right where": [_guards(t["taken_for_granted"]["guards"]) for t in each],
        "constants": [_constants(t["taken_for_granted"]["constants"]) for t in each],
        "visual tokens": [f"{t['visual']['count']} of {t['demand']['tokens']}" for t in each],
        "found as": [_source(t["visual"]) for t in each],
        "enter at": [t["visual"]["entry"] for t in each],
        "blocks": [_blocks(t["blocks"]) for t in each],
        "attention outside of blocks": [_outside(t["attention_outside_blocks"]) for t in each],
        "leave at": [", ".join(t["exits"]) for t in each],
        "loss reads": [f"{t['demand']['reads']}: {t['demand']['rows']} of {t['demand']['tokens']} rows" for t in each],
        "without a rule": [", ".join(t["operators_without_rule"]) or "-" for t in each],
        "FLOPs unknown": [", ".join(t["cost"]["uncounted"]) or "-" for t in each],
        "assumed at other sizes": ["; ".join(t["cost"]["assumed"]) or "-" for t in each],
    }
    if all("drop_overhead" in t for t in each):  # a plan was given
        rows["drop overhead"] = [overhead(t["drop_overhead"]) for t in each]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)


def why_not_table(task: str, groups: list[dict[str, Any]]) -> Table:
    """What keeps a task's selections where they stop: a row a reason, with the first of its places."""
    table = Table(
        title=f"{task}: why selections move no further up", caption="the nearest miss, and the first place, first"
    )
    for column in ("times", "reason", "value", "at"):
        table.add_column(column, overflow="fold", justify="right" if column == "times" else "left")
    for group in groups:
        first = group["at"][0]
        operator = group["operator"].removeprefix("aten.").removeprefix("tokgraph.").removesuffix(".default")
        reason = group["reason"] if operator in group["reason"] else f"{operator}: {group['reason']}"
        if group["end"]:
            reason += " (nothing lies further up)"
        source = (first["source"] or "").rpartition("/")[2]
        table.add_row(
            str(group["count"]), reason, first["value"], "\n".join(filter(None, (first["module"], source))) or "-"
        )
    return table


def _source(visual: dict[str, Any]) -> str:
    return str(visual["kind"] if visual["source"] is None else f"{visual['kind']} of {visual['source']}")


def _check(found: dict[str, Any] | None) -> str:
    """What of a capture was compared with the user's own forward."""
    if found is None or found["skipped"]:
        return "no" if found is None else f"no: {found['skipped']}"
    gradients = f"{found['gradients']} gradients ({found['without_gradient']} parameters without one)"
    buffers = f", {len(found['buffers'])} changed buffers" if found["buffers"] else ""
    random = {"none": "", "equal": ", the same random numbers"}.get(found["random"], ", other random numbers")
    outputs = f"{found['outputs']} outputs"
    return f"{found['batches']} batches: loss, {outputs}, {gradients}{buffers}{random}; worst {found['error']:.0e}"


def _guards(guards: list[dict[str, Any]]) -> str:
    """Relations between sizes, those that the forward branched on with their lines."""
    texts = [g["relation"] + (f" ({g['source'].rpartition('/')[2]})" if g["source"] else "") for g in guards]
    return "; ".join(texts) or "-"


def _constants(constants: list[dict[str, Any]]) -> str:
    """Attributes of the user's modules that the forward read, as ``heads = 4 (6 modules)``."""
    texts = [
        f"{c['name']} = {c['value']}" + (f" ({len(c['modules'])} modules)" if len(c["modules"]) > 1 else "")
        for c in constants
        if not c["of_torch"]
    ]
    return ", ".join(texts) or "-"


def _blocks(blocks: list[dict[str, Any]]) -> str:
    first, last = blocks[0], blocks[-1]
    kinds = sorted({kind for block in blocks for kind in block["attention"]})
    return f"{len(blocks)} ({', '.join(kinds)}): {first['module'] or first['end']} .. {last['module'] or last['end']}"


def _outside(found: list[dict[str, Any]]) -> str:
    """How many attentions are in no block of their own layer, and where."""
    if not found:
        return "-"
    first, last = found[0], found[-1]
    return (
        f"{len(found)}: {first['module'] or first['node']} .. {last['module'] or last['node']} (no site can be placed)"
    )


def _print_cost(costs: dict[str, Any], console: Console) -> None:
    """For one set of sizes a table a task, and one more after a plan."""
    for name, cost in costs.items():
        sizes = cost["sizes"]
        title = f"{name}: batch {sizes['batch']}, {sizes['tokens']} tokens, {sizes['visual']} visual"
        console.print(_cost_table(title, cost, cost["total"], "share of FLOPs"))
        if "after" in cost:
            after = cost["after"]
            console.print(_cost_table(f"{title}, after the plan", after, cost["total"], "share of FLOPs before it"))


def _cost_table(title: str, cost: dict[str, Any], whole: dict[str, int], share: str) -> Table:
    """A row a region (equal neighbouring blocks together) and a kind of token.

    Args:
        title: of the table.
        cost: rolled up.
        whole: what shares are of.
        share: what they are called.
    """
    table = Table(title=title, caption=f"FLOPs; bytes moved; bytes kept for backward; {share}")
    table.add_column("", no_wrap=True)
    for column in ("forward", "backward", "moved", "kept", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, work in _grouped(cost["by_region"]):
        table.add_row(label, *_cells(work, whole))
    table.add_section()
    for kind, work in cost["by_kind"].items():
        table.add_row(f"{kind} tokens" if kind != "other" else "no token axis", *_cells(work, whole))
    table.add_section()
    table.add_row("training step", *_cells(cost["total"], whole))
    if "convention" in cost:
        label = f"{cost['convention']['name']}, one sample"
        table.add_row(label, amount(cost["convention"]["forward_flops"]), "-", "-", "-", "-")
    return table


def _grouped(regions: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """Runs of blocks that cost the same become one row, ``blocks 0-29, each``."""
    return [(label, regions[first]) for label, first in runs(list(regions), lambda name: _flops(regions[name]))]


def runs(names: list[str], looks: Callable[[str], Any]) -> list[tuple[str, str]]:
    """``(label, first name)``: neighbouring blocks that look alike become one, all else stays as it is."""
    rows: list[tuple[str, str]] = []
    run: list[str] = []
    for name, after in zip(names, [*names[1:], ""], strict=False):  # there may be none, as where nothing trains
        if not name.startswith("block "):
            rows.append((name, name))
            continue
        run.append(name)
        if not after.startswith("block ") or looks(after) != looks(name):
            first, last = (x.removeprefix("block ") for x in (run[0], run[-1]))
            rows.append((run[0] if len(run) == 1 else f"blocks {first}-{last}, each", run[0]))
            run = []
    return rows


def _flops(work: dict[str, int]) -> int:
    return work["forward_flops"] + work["backward_flops"]


def _cells(work: dict[str, int], total: dict[str, int]) -> list[str]:
    moved = sum(work[f"{phase}_{way}"] for phase in ("forward", "backward") for way in ("read", "written"))
    share = _flops(work) / _flops(total) if _flops(total) else 0.0
    amounts = (work["forward_flops"], work["backward_flops"], moved, work["saved"])
    return [*map(amount, amounts), f"{share:.1%}"]


def _print_pathways(pathways: list[dict[str, Any]], tasks: list[str], console: Console) -> None:
    """A row a group of parameters (neighbouring blocks that look alike together)."""
    groups = {entry["group"]: entry for entry in pathways}
    measured = bool(pathways) and pathways[0]["visual_gradient"] is not None

    def cells(group: str) -> list[str]:
        entry = groups[group]
        found = [f"{entry['profile'][task]:.3f}" for task in tasks]
        return found + ([_number(entry["visual_gradient"][task]) for task in tasks] if measured else [])

    table = Table(title="pathways: share of the visual tokens that parameters transform")
    for column in ("parameters", "elements"):
        table.add_column(column, overflow="fold", justify="left" if column == "parameters" else "right")
    for column in (*tasks, *(f"{task} gradient" for task in tasks if measured)):
        table.add_column(column, justify="right", overflow="fold")
    for label, first in runs(list(groups), lambda group: (groups[group]["elements"], *cells(group))):
        table.add_row(label, amount(groups[first]["elements"]), *cells(first))
    console.print(table)
    if measured:
        console.print("gradient: share of its norm that flows through visual rows")


def _print_asymmetry(found: list[dict[str, Any]], console: Console) -> None:
    """Attention to the image, the tasks side by side, and what is left of it in the later half of the blocks."""
    if not found:
        return
    table = Table(title="asymmetry: attention to the image")
    table.add_column("block", justify="right", no_wrap=True)
    for one in found:
        table.add_column(f"{one['task']}, from {one['query']}", justify="right")
    for block in range(max(len(one["mass"]) for one in found)):
        table.add_row(str(block), *(_percent(one["mass"][block : block + 1]) for one in found))
    console.print(table)
    for one in found:
        early, late = one["early"], one["late"]
        kept = f"{late / early:.2f}x" if early and late is not None else "-"
        console.print(
            f"{one['task']}: {_percent([early])} in the first half of the blocks, {_percent([late])} in the second ({kept})"
        )


def _percent(values: list[float | None]) -> str:
    return f"{values[0]:.1%}" if values and values[0] is not None else "-"


def _print_measured(tasks: dict[str, Any], console: Console) -> None:
    """One table a task: a row a block."""
    for name, task in tasks.items():
        allocation, redundancy = task["measured"]["allocation"], task["measured"]["redundancy"]
        table = Table(title=f"{name}: attention to the image, visual rows")
        table.add_column("block", justify="right", no_wrap=True)
        for column in (*allocation["queries"], "cosine", "rank"):
            table.add_column(column, justify="right")
        image = allocation["keys"].index("image") if "image" in allocation["keys"] else None
        for block, heads in enumerate(allocation["mass"]):
            shares = [_share(heads, query, image) for query in range(len(allocation["queries"]))]
            change, rank = redundancy["cosine"][block], redundancy["effective_rank"][block]
            table.add_row(str(block), *shares, _number(change), _number(rank, 1))
        console.print(table)
    console.print("attention: of each segment, mean over heads; visual rows: cosine before and after, rank")


def _share(heads: list[list[list[float | None]]], query: int, key: int | None) -> str:
    found = [head[query][key] for head in heads if key is not None and head[query][key] is not None]
    return f"{sum(x for x in found if x is not None) / len(found):.1%}" if found else "-"


def _number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def _print_cosines(cosines: list[dict[str, Any]], console: Console) -> None:
    """One table a pair of tasks: a row a block."""
    for pair in dict.fromkeys(tuple(c["tasks"]) for c in cosines):
        table = Table()
        for column in ("block", "whole", "visual", "text"):
            table.add_column(column, justify="right", no_wrap=True)
        for c in cosines:
            if tuple(c["tasks"]) == pair:
                table.add_row(str(c["block"]), *(_number(c[part]) for part in ("whole", "visual", "text")))
        console.print(f"gradient cosines: {pair[0]}, {pair[1]} (whole; through visual rows; through others)")
        console.print(table)
