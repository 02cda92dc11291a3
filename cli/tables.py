"""Tables of facts for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .common import amount


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print a summary of facts (:func:`tokgraph.summary.summarise`)."""
    tasks: dict[str, Any] = summary["tasks"]
    _print_tasks(tasks, console)
    shared = summary["shared_parameters"]
    console.print(
        f"{len(shared['names'])} parameters ({amount(shared['elements'])} elements) transform visual tokens of every task"
    )
    for i in range(len(next(iter(tasks.values()))["cost"]["at"])):
        _print_cost({name: task["cost"]["at"][i] for name, task in tasks.items()}, console)
    if summary["gradient_cosines"] is not None:
        _print_measured(tasks, console)
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
        "visual tokens": [f"{t['visual']['count']} of {t['demand']['tokens']}" for t in each],
        "found as": [_source(t["visual"]) for t in each],
        "enter at": [t["visual"]["entry"] for t in each],
        "blocks": [_blocks(t["blocks"]) for t in each],
        "leave at": [", ".join(t["exits"]) for t in each],
        "loss reads": [f"{t['demand']['reads']}: {t['demand']['rows']} of {t['demand']['tokens']} rows" for t in each],
        "without a rule": [", ".join(t["operators_without_rule"]) or "-" for t in each],
        "FLOPs unknown": [", ".join(t["cost"]["uncounted"]) or "-" for t in each],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)


def _source(visual: dict[str, Any]) -> str:
    return str(visual["kind"] if visual["source"] is None else f"{visual['kind']} of {visual['source']}")


def _blocks(blocks: list[dict[str, Any]]) -> str:
    first, last = blocks[0], blocks[-1]
    kinds = sorted({kind for block in blocks for kind in block["attention"]})
    return f"{len(blocks)} ({', '.join(kinds)}): {first['module'] or first['end']} .. {last['module'] or last['end']}"


def _print_cost(costs: dict[str, Any], console: Console) -> None:
    """One table for one set of sizes: a row a region (equal neighbouring blocks together) and a kind of token."""
    for name, cost in costs.items():
        sizes = cost["sizes"]
        table = Table(
            title=f"{name}: batch {sizes['batch']}, {sizes['tokens']} tokens, {sizes['visual']} visual",
            caption="FLOPs; bytes moved; bytes kept for backward; share of FLOPs",
        )
        table.add_column("", no_wrap=True)
        for column in ("forward", "backward", "moved", "kept", "share"):
            table.add_column(column, justify="right", no_wrap=True)
        total = cost["total"]
        for label, work in _grouped(cost["by_region"]):
            table.add_row(label, *_cells(work, total))
        table.add_section()
        for kind, work in cost["by_kind"].items():
            table.add_row(f"{kind} tokens" if kind != "other" else "no token axis", *_cells(work, total))
        table.add_section()
        table.add_row("training step", *_cells(total, total))
        if "convention" in cost:
            label = f"{cost['convention']['name']}, one sample"
            table.add_row(label, amount(cost["convention"]["forward_flops"]), "-", "-", "-", "-")
        console.print(table)


def _grouped(regions: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """Runs of blocks that cost the same become one row, ``blocks 0-29, each``."""
    rows: list[tuple[str, dict[str, int]]] = []
    run: list[int] = []
    names = list(regions)
    for i, name in enumerate(names):
        if not name.startswith("block "):
            rows.append((name, regions[name]))
            continue
        run.append(int(name.removeprefix("block ")))
        after = names[i + 1] if i + 1 < len(names) else ""
        if not after.startswith("block ") or _flops(regions[after]) != _flops(regions[name]):
            label = f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}, each"
            rows.append((label, regions[f"block {run[0]}"]))
            run = []
    return rows


def _flops(work: dict[str, int]) -> int:
    return work["forward_flops"] + work["backward_flops"]


def _cells(work: dict[str, int], total: dict[str, int]) -> list[str]:
    moved = sum(work[f"{phase}_{way}"] for phase in ("forward", "backward") for way in ("read", "written"))
    share = _flops(work) / _flops(total) if _flops(total) else 0.0
    amounts = (work["forward_flops"], work["backward_flops"], moved, work["saved"])
    return [*map(amount, amounts), f"{share:.1%}"]


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
