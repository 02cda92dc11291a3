"""``tokgraph run``: a saved or exported program on a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from tokgraph.errors import ExportError, FileError
from tokgraph.export.files import ACCELERATED, BASELINE, ExportedFile, find_exported
from tokgraph.export.reference import Reference
from tokgraph.export.session import Session
from tokgraph.files import new_file
from tokgraph.ir.names import quoted
from tokgraph.runtime import Accelerated
from tokgraph.store.loading import load_accelerated
from tokgraph.store.weights import write_tensors

from .profile import exported_inputs, first
from .target import Batches, batches_in, example_of, holds_onnx, holds_program, move


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--batch", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Inputs.  [default: example]"
)
@click.option("--task", "tasks", multiple=True, help="Tasks to run; repeatable.  [default: all]")
@click.option("--runtime", type=click.Choice(["torch", "onnxruntime"]), help="[default: torch, if a program is saved]")
@click.option("--graph", type=click.Choice(["forward", "train-step"]), default="forward", show_default=True)
@click.option("--baseline", is_flag=True, help="Run the graphs as captured.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write outputs to this safetensors file."
)
def run(
    folder: Path,
    batch: Path | None,
    tasks: tuple[str, ...],
    runtime: str | None,
    graph: str,
    baseline: bool,
    device: Any,
    out: Path | None,
) -> None:
    """Run the program in OUT on a batch: print each task's loss as JSON, and write outputs, or gradients, to a file.

    The batch is a safetensors file of tensors TASK/0/INPUT, as tokgraph.save_batches writes it.
    """
    if not holds_program(folder) and not holds_onnx(folder):
        raise FileError(
            f"{folder} holds no saved program and no exported graphs",
            help="make them with `tokgraph optimize MODEL`, or `tokgraph export`",
        )
    chosen = runtime or ("torch" if holds_program(folder) else "onnxruntime")
    batches = batches_in(batch) if batch is not None else example_of(folder)
    wanted = tasks or tuple(batches)
    if chosen == "torch":
        found = _in_torch(load_accelerated(folder), batches, wanted, graph, baseline, device)
    else:
        if not holds_onnx(folder):
            raise ExportError(f"{folder} holds no exported graphs", help="make some with `tokgraph export`")
        variant = BASELINE if baseline else ACCELERATED
        files = {f.task: f for f in find_exported(folder) if (f.kind, f.variant) == (graph, variant)}
        found = _in_onnxruntime(files, batches, wanted, graph, device)
    if out is not None:
        tensors = {
            f"{quoted(task, '/')}/{name}": x.contiguous()
            for task, outputs in found.items()
            for name, x in outputs.items()
        }
        with new_file(out) as temporary:
            write_tensors(temporary, tensors)
    losses = {task: float(outputs["loss"]) for task, outputs in found.items()}
    click.echo(json.dumps({"schema": 1, "runtime": chosen, "graph": graph, "loss": losses}, indent=2))


def _in_onnxruntime(
    files: dict[str, ExportedFile], batches: Batches, tasks: tuple[str, ...], graph: str, device: Any
) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for task in tasks:
        if task not in files:
            raise ExportError(
                f"there is no exported {graph} graph of task {task!r}", help=f"there is {', '.join(files)}"
            )
        session = Session(files[task].path, device)
        found[task] = session.run(session.feeds(exported_inputs(files[task], {task: [first(batches, task)]})))
    return found


def _in_torch(
    accelerated: Accelerated, batches: Batches, tasks: tuple[str, ...], graph: str, baseline: bool, device: str
) -> dict[str, dict[str, torch.Tensor]]:
    move(accelerated.model, device)
    program = accelerated.variants(baseline, run=True)[BASELINE if baseline else ACCELERATED]
    found = {}
    for task in tasks:
        if task not in program:
            raise ExportError(f"there is no task {task!r}", help=f"the program has {', '.join(program)}")
        reference = Reference(program[task])
        inputs = program[task].example() | first(batches, task)
        found[task] = reference.gradients(inputs) if graph == "train-step" else reference.outputs(inputs)
    return found
