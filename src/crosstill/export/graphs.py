"""A student's towers as ONNX graphs, and the same in 8 bits.

Normalisation of the pixels and of the rows is part of the graphs, so that who runs them need
only resize and tokenize.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from crosstill import bundle as bundles
from crosstill.bundle import runtime
from crosstill.errors import ConfigError, ExportError
from crosstill.progress import quiet
from crosstill.students.student import Student

BATCH = 4096  # the greatest batch that the graphs promise to take

# Convolutions stay in fp32: their activations would share one scale for all channels, which on a
# MobileNet left a cosine of 0.24 and took ten times as long (docs/log.md).
OPERATORS = ["MatMul", "Gemm"]
_TABLE = 100_000  # numbers, from which on a table of embeddings is worth rounding


class _Images(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> Tensor:
        return self.student.encode_image(pixels)


class _Texts(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = self.student.pool_text(input_ids, attention_mask)
        return self.student.embed_text(pooled)


def write(student: Student, folder: Path) -> None:
    """Write `image.onnx` and `text.onnx`, fp32, with any batch and any length.

    Raises:
        ConfigError: what the export needs is not installed.
        ExportError: a tower has an operation that ONNX does not.
    """
    height, width = student.preprocess.size
    pixels = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    batch, length = Dim("batch", max=BATCH), Dim("length", max=student.config.max_length)
    _write(_Images(student), (pixels,), {"pixels": {0: batch}}, folder / bundles.IMAGE)
    ids = torch.ones(2, min(7, student.config.max_length), dtype=torch.int64)
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    # a clone: of one tensor given twice the exporter would make one input
    _write(_Texts(student), (ids, ids.clone()), shapes, folder / bundles.TEXT)


def quantise(folder: Path) -> None:
    """Replace both graphs by 8-bit ones: dynamic, per channel, 7-bit weights.

    The narrower range costs little and keeps older processors, whose sums saturate, right.
    Embeddings are rounded by `_round_tables`.
    """
    runtime()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for path in (folder / bundles.IMAGE, folder / bundles.TEXT):
        model = onnx.load(path)
        # shapes that the exporter noted contradict those that the quantizer infers
        del model.graph.value_info[:]
        _round_tables(model.graph)
        with quiet():
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )


def _round_tables(graph: Any) -> None:
    """Keep tables of embeddings in 8 bits, a scale a row; onnxruntime would use one for all."""
    from onnx import TensorProto, helper, numpy_helper

    tables = {held.name: held for held in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather"]:
        held = tables.get(node.input[0])
        if held is None or held.data_type != TensorProto.FLOAT or math.prod(held.dims) < _TABLE:
            continue
        rows = numpy_helper.to_array(held)
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, 1e-12)
        name, ids, out = node.input[0], node.input[1], node.output[0]
        rounded = numpy_helper.from_array(np.rint(rows / scale).astype(np.int8), f"{name}.int8")
        scales = numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale")
        graph.initializer.extend([rounded, scales])
        new = [
            helper.make_node("Gather", [rounded.name, ids], [f"{out}.int8"], axis=0),
            helper.make_node("Cast", [f"{out}.int8"], [f"{out}.float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [scales.name, ids], [f"{out}.scale"], axis=0),
            helper.make_node("Mul", [f"{out}.float", f"{out}.scale"], [out]),
        ]
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for step in reversed(new):
            graph.node.insert(place, step)
        if not any(name in other.input for other in graph.node):
            graph.initializer.remove(held)


def _write(tower: nn.Module, example: tuple[Tensor, ...], shapes: Any, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("onnxscript is not installed; pip install 'crosstill[export]'") from None
    try:
        with quiet(), torch.inference_mode():
            program = torch.onnx.export(
                tower.eval(),
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(shapes),
                output_names=["rows"],
                verbose=False,
            )
            assert program is not None
    except Exception as error:  # the exporter has no common base for its own
        line = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{path.name}: this tower does not export to ONNX ({line}); "
            "use --to sentence-transformers"
        ) from None
    with quiet():
        program.save(path)
