"""Students with random weights, so small that one is made in a tenth of a second."""

import io
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from crosstill import bundle, students
from crosstill.export import onnx_bundle
from crosstill.export.base import Options
from crosstill.export.export_folder import aside
from crosstill.export.gates import Parity
from crosstill.export.library_folders import LibraryFolder
from crosstill.export.provenance import Provenance
from crosstill.students.student import Student
from crosstill.students.student_config import StudentConfig

CAPTIONS = [
    f"A {one} {shape} left of a {other} {shape}."
    for one in ("red", "blue", "green")
    for other in ("violet", "yellow")
    for shape in ("cube", "ball", "cone")
]
CARD = "---\nlicense: mit\n---\n\n# small\n"
_LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
_SIDE = {"image_size": 32}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", "patch_size": 8, **_SIDE, **_LAYERS},
    "clip_vision_model": {
        "model_type": "clip_vision_model",
        "patch_size": 8,
        **_SIDE,
        **_LAYERS,
    },
    "mobilenet_v2": {
        "model_type": "mobilenet_v2",
        "depth_multiplier": 0.1,
        "initializer_range": 0.2,
        **_SIDE,
    },
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "layer_type": "basic",
        **_SIDE,
    },
    "bert": {"model_type": "bert", "initializer_range": 0.2, **_LAYERS},
    "roberta": {"model_type": "roberta", "initializer_range": 0.2, **_LAYERS, "pad_token_id": 0},
    "albert": {
        "model_type": "albert",
        "embedding_size": 16,
        "initializer_range": 0.2,
        **_LAYERS,
    },
    "distilbert": {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2},
}
_OURS = re.compile(r"crosstill(\.|$)")
# run before anything else, so that a folder is loaded as where crosstill is not installed
_ALONE = """
import sys, warnings

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "crosstill":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
torch.set_num_threads(1)
folder = sys.argv[1]
"""


def small(
    image: str = "vit", text: str = "bert", poolings: str = "pooler pooler", **rest: Any
) -> Student:
    """A student of two of those towers, in eval mode, whose rows differ from photo to photo."""
    names = (("image", image), ("text", text))
    towers = {
        side: {"config": TOWERS[name], "pooling": pooling}
        for (side, name), pooling in zip(names, poolings.split(), strict=True)
    }
    config = StudentConfig.model_validate({"name": "small", **towers, **rest})
    student = students.build(config, 24, CAPTIONS)
    with torch.no_grad():
        for head in (student.image_head, student.text_head):
            if head.bias is not None:
                head.bias.normal_()
        for _ in range(20):  # what batch norms take in before they are frozen
            student.pool_image(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    return student.eval()


def write(form: LibraryFolder, student: Student, out: Path, text: str = CARD) -> Parity:
    """Export a student with a card of this text; return what the gate measured."""
    source = Provenance(student, student.name)
    form.require(source, Options())
    facts = source.facts("", None, None)
    with aside(out) as new:
        form.write(source, new, facts, Options())
        (new / "README.md").write_text(text, encoding="utf-8")
    return form.check(student, out)


def take_graphs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have exports to ONNX take the graphs of this bundle for those that they write."""

    def copy(student: Student, new: Path) -> None:
        for name in (bundle.IMAGE, bundle.TEXT):
            shutil.copy(folder / name, new / name)

    monkeypatch.setattr(onnx_bundle, "write_graphs", copy)


def said_by(card: str, folder: Path) -> str:
    """What the first Python lines of a card print, with a photo in the current folder."""
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert lines
    Image.new("RGB", (50, 40), "red").save("photo.jpg")
    told = io.StringIO()
    with redirect_stdout(told):
        exec(lines[1], {"FOLDER": str(folder)})
    return told.getvalue()


def _hidden(script: str, *arguments: Path) -> None:
    """Run a script in this process, as where crosstill is not installed."""
    ours = {name: sys.modules.pop(name) for name in [*sys.modules] if _OURS.match(name)}
    finders, arguments_of_tests = list(sys.meta_path), sys.argv
    sys.argv = ["alone", *map(str, arguments)]
    try:
        with warnings.catch_warnings():
            exec(_ALONE + script, {})
    finally:
        sys.argv, sys.meta_path[:] = arguments_of_tests, finders
        sys.modules.update(ours)


def _in_a_process(script: str, *arguments: Path) -> None:
    """Run a script in a fresh interpreter without crosstill and without a network."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _ALONE + script, *arguments],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr


# runs a script where crosstill is absent
alone = pytest.mark.parametrize(
    "alone",
    [
        pytest.param(_hidden, id="hidden"),
        pytest.param(_in_a_process, id="process", marks=pytest.mark.slow),
    ],
)
