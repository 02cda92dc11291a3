"""bfloat16 graphs on runtimes without bfloat16 kernels: the same graph in float32, to check it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


@contextmanager
def widened(path: Path) -> Iterator[tuple[Path, torch.dtype | None]]:
    """A file that ONNX Runtime's CPU provider can run.

    Args:
        path: an exported graph.

    Yields:
        ``path`` and ``None``; or, where the graph computes in bfloat16, a temporary copy of it in float32 and that type.
    """
    import onnx_ir as ir

    model = ir.load(path)
    narrow = ir.DataType.BFLOAT16
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    if not any(value.dtype == narrow for value in values):
        yield path, None
        return
    for value in values:
        if value.dtype == narrow:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None and value.const_value.dtype == narrow:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[attribute.name] = ir.AttrTensor(
                    attribute.name, ir.tensor(attribute.as_tensor().numpy().astype("float32"))
                )
            elif attribute.type == ir.AttributeType.INT and node.op_type == "Cast" and attribute.as_int() == narrow:
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, ir.DataType.FLOAT)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        ir.save(model, copy, external_data=f"{path.name}.data")
        yield copy, torch.float32
