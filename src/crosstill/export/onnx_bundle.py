"""The form "onnx": a student as a bundle, two ONNX graphs in fp32 or in 8 bits, and their record.

Normalisation of the pixels and of the rows is part of the graphs, so that who runs them need
only resize and tokenize.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from crosstill import artefacts, files
from crosstill import bundle as bundles
from crosstill.bundle import runtime
from crosstill.errors import ConfigError, ExportError
from crosstill.export import gates
from crosstill.export.base import Form, Options
from crosstill.export.card import Facts, Rounding
from crosstill.export.held_out import Measured
from crosstill.export.provenance import Provenance
from crosstill.progress import quiet
from crosstill.students.student import Student
from crosstill.teachers.exported import BundleModel

CAPTIONS = 1000  # that a bundle keeps at most, to calibrate a threshold on
BATCH = 4096  # the greatest batch that the graphs promise to take

# Convolutions stay in fp32: their activations would share one scale for all channels, which on a
# MobileNet left a cosine of 0.24 and took ten times as long (docs/log.md).
OPERATORS = ["MatMul", "Gemm"]
_TABLE = 100_000  # numbers, from which on a table of embeddings is worth rounding


class OnnxBundle(Form):
    """A bundle for `crosstill.search`: see `crosstill.bundle` for its files."""

    name = "onnx"
    int8 = True
    needs = ("onnx", "onnxscript", "onnxruntime")
    loading = """\
Needs onnxruntime and crosstill; no torch.

```sh
crosstill index BUNDLE PHOTOS --out INDEX
crosstill search INDEX "two dogs on snow"
```

```python
from pathlib import Path
from crosstill.bundle import Bundle, Encoder

encoder = Encoder(Bundle.open(Path("BUNDLE")))
pixels = encoder.load(Path("photo.jpg").read_bytes(), "photo.jpg")
print(encoder.encode_images(pixels[None]) @ encoder.encode_texts(["two dogs on snow"]).T)
```

Rows are of unit length."""

    def require(self, source: Provenance, options: Options) -> None:
        if options.int8 and source.held_out is None:
            why = "; ".join(source.notes) or "no validation photos are known"
            raise ConfigError(
                f"--int8: is judged by its recall, but {why}; give --data and --images"
            )

    def write(
        self, source: Provenance, folder: Path, facts: Facts, options: Options
    ) -> tuple[Facts, list[str]]:
        student, pairs = source.student, source.pairs
        write_graphs(student, folder)
        student.tokenizer.backend_tokenizer.save(str(folder / bundles.TOKENIZER))
        _record(student, folder, facts, "fp32")
        model = BundleModel(folder, student.name)
        agreement = gates.compare(student, model, pairs)
        agreement.require("fp32")
        lines = [f"fp32: {agreement}"]
        precision = "int8" if options.int8 else "fp32"
        if options.int8:
            quantise(folder)
            _record(student, folder, facts, precision)
            model = BundleModel(folder, student.name)
            lines.append(f"int8: {gates.compare(student, model, pairs)}")
        facts = replace(facts, fingerprint=model.bundle.fingerprint)
        if source.held_out is not None:
            bundled = source.held_out.measure(model)
            after = bundled.evaluation.recall
            recalls = gates.Recalls(source.held_out.measure(student).evaluation.recall, after)
            if options.int8:
                recalls.require(options.max_loss)
            lines.append(str(recalls))
            rounding = Rounding(source.split, recalls.before.value, after.value, after.name)
            facts = replace(
                facts,
                scores=source.scores(after),
                rounding=rounding if options.int8 else None,
            )
            if len(bundled.texts):
                write_calibration(bundled, folder / bundles.CALIBRATION)
        _record(student, folder, facts, precision)
        return facts, lines


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


def write_graphs(student: Student, folder: Path) -> None:
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

    tables = {table.name: table for table in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather"]:
        table = tables.get(node.input[0])
        if table is None or table.data_type != TensorProto.FLOAT or math.prod(table.dims) < _TABLE:
            continue
        rows = numpy_helper.to_array(table)
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
            graph.initializer.remove(table)


def _write(tower: nn.Module, example: tuple[Tensor, ...], shapes: Any, path: Path) -> None:
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


def write_calibration(measured: Measured, path: Path) -> None:
    """Write rows of captions, evenly drawn, with the ids of their photos: `searcher.calibrate`."""
    count = min(CAPTIONS, len(measured.texts))
    chosen = torch.linspace(0, len(measured.texts) - 1, count).round().long()
    owners = [measured.owners[row] for row in chosen.tolist()]
    rows = measured.texts[chosen].numpy().astype(np.float16)
    np.savez(path, rows=rows, images=np.array(owners, "S64"))


def _record(student: Student, folder: Path, facts: Facts, precision: str) -> None:
    """Write `bundle.json`, which comes last: a folder with one is whole."""
    identity = student.identity()
    identity = {key: identity[key] for key in ("weights", "preprocess", "tokenizer", "activation")}
    apart = {bundles.RECORD, bundles.CARD}
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in apart)
    record: dict[str, Any] = {
        "format": bundles.FORMAT,
        "name": student.name,
        "dim": student.dim,
        "precision": precision,
        "preprocess": student.preprocess.to_json(),
        "max_length": student.config.max_length,
        "padding": student.tokenizer.pad_token_id or 0,
        "identity": {**identity, "precision": precision},
        "parameters": student.parameters_by_part(),
        "licence": student.licence,
        "licences": {
            "teacher": facts.teacher.licence if facts.teacher else None,
            "data": facts.data.licence,
            **{f"{side} tower": tower.licence for side, tower in facts.towers.items()},
        },
        "files": artefacts.digests(folder, names),
    }
    files.write_json(folder / bundles.RECORD, files.sealed(record))
