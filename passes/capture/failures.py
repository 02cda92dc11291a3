"""What to tell a user whose forward cannot run or be traced: the place in the model's code, the cause, and what to do."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tokgraph.errors import CaptureError, Where
from tokgraph.ir.frames import causes, methods_of, text_of, where_raised

_VALUES = ("data-dependent", "data dependent", "DataDependent", "DynamicOutputShape", "unbacked")
"""Words by which torch says that it needs the value of a tensor."""
_BY_LINE: Mapping[str, str] = {
    r"^assert\b": "the line asserts something about values: torch._assert(condition, message) stays a check at run "
    "time; an assertion about sizes is no problem",
    r"\.tolist\(|\.item\(|\b(int|float|bool|range|list)\(": "the line takes values of a tensor into Python, where no graph "
    "can follow them: pass these numbers as plain Python inputs of the task, or compute with the tensor itself",
    r"^for\b.*\bin\b": "the loop runs as often as values say, as one over the experts that were hit: compute all of them as "
    "batched or grouped products, which models of transformers do after model.set_experts_implementation('batched_mm') or "
    "'grouped_mm' (where a class of experts lacks that choice, transformers.integrations.moe.use_experts_implementation(cls) "
    "before the model is built and config._experts_implementation = 'batched_mm' of the decoder give it); or loop over all of "
    "them, with weights of 0",
    r"repeat_interleave": "how often a row is repeated is the value of a tensor: work the repeated rows out before the forward "
    "and pass them, or say how many there are with output_size=",
    r"nonzero|masked_select|unique|torch\.where\([^,]*\)|\[[^\[\]]*(==|!=|<|>|~|&|mask|keep|valid)[^\[\]]*\]": "how many "
    "rows the line takes depends on values: keep all rows and use torch.where, masked_scatter or a factor of 0; a cross "
    "entropy leaves rows out by its ignore_index; where every batch has a row for each of n others, take them and say so "
    "before anything else reads them: torch._check(rows.shape[0] == n)",
    r"\b(if|elif|while|and|or|not)\b.*\.(any|all)\(\)": "the forward branches on the value of a tensor: replace the branch by "
    "torch.where or torch.cond, or pass the value as a plain Python input. Where every batch gives one answer, and the line is "
    "not yours, give the answer with the tensor that you pass there, and check it: torch._assert(mask.any(), 'no image'), then "
    "mask.any = lambda: True",
    r"\b(if|elif|while|and|or|not)\b": "the forward branches on the value of a tensor: replace the branch by torch.where or "
    "torch.cond, or pass the value as a plain Python input",
}
"""Pattern of a line that needs values -> what to do; the first that fits."""
_OTHER_VALUES = (
    "the forward needs the value of a tensor to go on, as a size, an index or for a branch: work it out before the forward "
    "and pass it as a plain Python input, or use torch.where or torch.cond"
)
_OTHER_SIZES = (
    "how many rows a tensor of this line has depends on values, by a boolean index, nonzero or unique before it: keep all rows "
    "and weigh them instead, as (loss_of_rows * mask).sum() / mask.sum(), or use torch.where; or, where every batch has a row "
    "for each of n others, say so behind the index: torch._check(rows.shape[0] == n)"
)
_BY_MESSAGE: Mapping[str, str] = {
    r"\.numpy\(\)": "the forward leaves PyTorch for NumPy: compute with tensors, or do it before the forward and "
    "pass the result",
    r"fake tensor in the exported program": "the forward reaches a tensor past PyTorch's dispatcher: by x.data (write "
    "x.detach()), in another thread, by a gradient taken inside, or through an attribute that it keeps tensors in",
    r"Cannot access data pointer": "the line reads the memory of a tensor, as a copy of a module or a kernel from outside of "
    "PyTorch does: copy before the forward; make the kernel an operator with torch.library.custom_op",
    r"UnsupportedOperator|NotImplementedError": "torch.export has no rule for this operator (nested, sparse and quantized "
    "tensors have few): use another, or make it one of your own with torch.library.custom_op",
    r"Unsupported input type .*BlockMask": "give the task what the mask of flex attention is made of, and let the "
    "forward make it (create_block_mask): it is then one of every batch",
    r"SymIntArrayRef": "this operator takes no sizes that are symbols: leave out dynamic= for this task, or write the line "
    "with another operator",
    r"recursion": "the forward calls itself without an end on the values that torch.export traces with",
}
"""Pattern of torch's message -> what to do; the first that fits."""
_ELSE = "torch.export.export(..., strict=False) of the forward shows the whole of torch's error"
_OUTSIDE = (
    "; or leave it out of the graph: precomputed=({part!r},) of the task runs it before the graph, as it is, with its "
    "gradients; or give the task its features as an input"
)
_FEATURES = re.compile(r"image|visual|vision|video|feature|pixel|patch")
_GRID = {"grid_thw", "image_grid_thw", "cu_seqlens"}
_GRID_HELP = (
    "the model works sizes out from the image grid, which no graph can follow: make what it takes from the grid before the "
    "forward, and let the forward pass it: image_grid_thw and image_cu_seqlens as NumPy arrays, image_position_ids, "
    "image_interp_indices and image_interp_weights as tensors (transformers.vision_utils has a function for each)"
)


def does_not_run(task: str, error: Exception, forward: Callable[..., Any], model: nn.Module) -> CaptureError:
    """The error of a forward that fails on its example batch."""
    return CaptureError(
        f"task {task!r}: forward fails on its example batch: {_summary(error)}",
        where=where_raised(error, model) or _defined(forward),
        help="call spec.tasks[name].forward(model, **inputs) yourself and make it run first",
    )


def not_traceable(task: str, error: Exception, forward: Callable[..., Any], model: nn.Module) -> CaptureError:
    """The error of a forward that runs, and that ``torch.export`` cannot trace."""
    where = where_raised(error, model)
    return CaptureError(
        f"task {task!r}: torch.export cannot trace its forward: {_summary(error)}",
        where=where or _defined(forward),
        help=_help(error, where, model),
    )


def _defined(forward: Callable[..., Any]) -> Where | None:
    """Where a forward begins, for want of the line that fails."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return Where(source=f"{code.co_filename}:{code.co_firstlineno}") if code is not None else None


def _summary(error: Exception) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _help(error: Exception, where: Where | None, model: nn.Module) -> str:
    said = f"{type(error).__name__}: {error}"
    part = _part(error, model)
    outside = "" if part is None else _OUTSIDE.format(part=part)
    if any(word in said for word in _VALUES):
        if _reads_grid(error, inside_a_part=part is not None):
            return _GRID_HELP + outside
        line = text_of(where.source if where is not None else None)
        other = _OTHER_SIZES if re.search(r"Size-like symbols: u\d", said) else _OTHER_VALUES
        return next((help for pattern, help in _BY_LINE.items() if re.search(pattern, line)), other) + outside
    return next((help + outside for pattern, help in _BY_MESSAGE.items() if re.search(pattern, said)), _ELSE + outside)


def _reads_grid(error: Exception, inside_a_part: bool) -> bool:
    """Whether an image grid is at hand where an error arose: in a tower, or in the innermost module; every decoder is called
    by something that has one.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [i for i, frame in enumerate(frames) if isinstance(frame.f_locals.get("self"), nn.Module)]
    return any(_GRID & frame.f_locals.keys() for frame in frames[0 if inside_a_part or not own else own[-1] :])


def _part(error: Exception, model: nn.Module) -> str | None:
    """The path of the part of a model, a tower or a method that gets features, in which an error arose; none of the decoder.

    That is the outermost submodule that is beside the embeddings of tokens, and no layer among others, or method with the name
    of one for features, in which the error lies.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tokens = max(tables, key=lambda m: (m.embedding_dim, m.num_embeddings), default=None)
    frames = (frame for cause in causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__))
    for path, name in methods_of(frames, model):
        module = model.get_submodule(path)
        if path and name == "forward" and tokens is not None and all(m is not tokens for m in module.modules()):
            return None if path.rpartition(".")[2].isdigit() else path
        if _FEATURES.search(name) and hasattr(type(module), name):
            return f"{path}.{name}" if path else name
    return None
