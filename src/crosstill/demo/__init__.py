"""The whole path in a few minutes, on rendered scenes, with nothing to download.

Scenes are rendered, each with five sentences and a few short captions. A teacher is trained on
them, its features are cached, a student a fraction of its size is distilled from the cache, and
both are measured on the sentences of scenes that neither has seen. Then the student is exported,
those scenes are indexed, and it answers three short queries.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from crosstill import cache, data, export, extras, images, recipes, search, students
from crosstill.data import Pairs, scenes
from crosstill.evaluate import Embedded, embed
from crosstill.evaluate.evaluation import judge, table
from crosstill.search import Searcher
from crosstill.students import student_config
from crosstill.students.student import Student
from crosstill.students.student_config import FusionConfig, StudentConfig
from crosstill.train import Run, folder

log = logging.getLogger(__name__)

COUNT = 4000  # scenes: 80 % to train on, 10 % to choose the best epoch, 10 % held out
# 32 scenes in a batch with four captions each: which colour goes with which shape is learnt from
# many short captions, and these cost little beside a scene's pixels
SHARED = (
    "batch_size=128",
    "captions_per_image=4",
    "steps_per_epoch=240",
    "epochs=2",
    "schedule=cosine",
    "warmup_steps=40",
)
TEACHER = ("lr=1e-3", "clip_norm=1.0", *SHARED)
STUDENT = ("lr=1.5e-3", "init_heads=ridge", *SHARED)
DIM = 128
QUERIES = ("a red heart", "a blue ring", "a yellow star")


def run(out: Path, count: int = COUNT) -> str:
    """Do everything in the folder `out`, or what of it is still to do; return what to print.

    Raises:
        ConfigError: a library of the extras is not installed.
    """
    extras.need("the demo", "export", *export.FORMS.find_class("onnx", export.Form).needs)
    extras.need("the demo", "search", "faiss")
    out.mkdir(parents=True, exist_ok=True)
    pairs = _scenes(out / "scenes", count)
    written = sum(len(example.captions) for example in pairs.examples)
    log.info("1/5  %d scenes with %d captions in %s", count, written, out / "scenes")
    log.info("2/5  a teacher learns them (InfoNCE, no teacher of its own)")
    captions = cache.build(None, pairs, out / "captions")
    teacher = _train(out / "teacher", _teacher(), captions, "info_nce", TEACHER).best
    log.info("3/5  the teacher reads every scene once")
    features = cache.build(teacher, pairs, out / "cache")
    log.info("4/5  a student learns from what the teacher said (DSMD and InfoNCE)")
    student = _train(
        out / "student", students.load_config("tiny"), features, "recommended", STUDENT
    )
    held_out = _sentences(pairs.split("test"))
    report = _report(out, held_out, teacher, student)
    log.info("5/5  the student is exported, and answers queries without torch")
    return "\n".join([*report, "", *_search(out, held_out), "", *_next()])


def _scenes(where: Path, count: int) -> Pairs:
    if not (where / "dataset.json").is_file():
        scenes.write(where, count, seed=0, plain=True)
    return data.open(str(where / "dataset.json"))


def _sentences(pairs: Pairs) -> Pairs:
    """Leave the short captions out, many of which are true of several scenes."""
    kept = (replace(example, captions=example.captions[:5]) for example in pairs.examples)
    return replace(pairs, examples=tuple(kept))


def _teacher() -> StudentConfig:
    """Configure a teacher that sees as much as the student and reads more.

    Shapes take many steps to learn, so its steps have to be cheap.
    """
    config = students.load_config("tiny-teacher").model_dump()
    config["image"] = students.load_config("tiny").model_dump()["image"]
    config["text"]["config"]["num_hidden_layers"] = 2
    return student_config.parse(config, "the demo's teacher")


def _train(
    out: Path,
    model: StudentConfig | FusionConfig,
    source: cache.CacheBase,
    recipe: str,
    changes: tuple[str, ...],
) -> Run:
    resume = folder.is_run(out)
    learner = None if resume else model.model_copy(update={"dim": source.dim or DIM})
    return recipes.distill(learner, source, recipe, out=out, changes=changes, resume=resume)


def _report(out: Path, held_out: Pairs, teacher: Student, run: Run) -> list[str]:
    student, untrained = run.best, run.untrained
    embedded = embed(student, held_out)
    rows = [
        ("teacher", judge(teacher, embed(teacher, held_out))),
        ("student", judge(student, embedded)),
        ("student, untrained", judge(untrained, embed(untrained, held_out))),
    ]
    named = [row.renamed(name) for name, row in rows]
    sheet(held_out, embedded, out / "found.png")
    big, small = named[0], named[1]
    assert big.parameters and small.parameters
    return [
        f"{len(held_out)} held-out scenes, {5 * len(held_out)} captions",
        "",
        table(named),
        "",
        f"The student has {small.parameters / big.parameters:.0%} of the teacher's parameters "
        f"and {small.recall.value / big.recall.value:.0%} of its RSUM.",
        f"What it finds for five captions: {out / 'found.png'}",
    ]


def _search(out: Path, held_out: Pairs) -> list[str]:
    """Export the student, index the held-out scenes, and ask three short queries."""
    if not (out / "bundle").is_dir():
        export.onnx(out / "student", out / "bundle")
    photos = out / "photos"
    photos.mkdir(exist_ok=True)
    for example in held_out.examples:
        place = photos / Path(example.path).name
        if not place.exists():
            place.write_bytes(held_out.read(example))
    search.build(out / "bundle", photos, out / "index")
    searcher = Searcher.open(out / "index")
    lines = [f"Exported to {out / 'bundle'}; {len(searcher)} held-out scenes in {out / 'index'}:"]
    for text, hits in zip(QUERIES, searcher.find(searcher.encode_texts(QUERIES), 3), strict=True):
        lines.append(f'  "{text}"')
        lines += [f"    {hit.score:.3f}  {photos / hit.path}" for hit in hits]
    searcher.close()
    return [*lines, "", "Search them in a browser:", f"  crosstill serve {out / 'index'}"]


def _next() -> list[str]:
    return [
        "Now with your own photos (a Karpathy JSON, a CSV, or a folder with .txt captions):",
        "  crosstill doctor DATA --images DIR",
        "  crosstill cache openai/clip-vit-base-patch32 DATA --images DIR --out caches/mine",
        "  crosstill train caches/mine --student mobile --out runs/mine",
        "  crosstill evaluate runs/mine DATA --images DIR --split test",
        "  crosstill export runs/mine --to onnx --out bundles/mine",
        "  crosstill index bundles/mine PHOTOS --out mine.index",
        '  crosstill search mine.index "two dogs on snow"',
    ]


def sheet(pairs: Pairs, embedded: Embedded, path: Path, queries: int = 5, top: int = 5) -> None:
    """Draw a picture: a row a caption, the images found for it, the right one framed."""
    cell, head, gap = 128, 24, 4
    canvas = Image.new("RGB", (top * (cell + gap) + gap, queries * (cell + head + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    by_id = {example.image_id: example for example in pairs.examples}
    texts = [text for key in embedded.image_ids for text in by_id[key].captions]
    for line, row in enumerate(torch.linspace(0, len(texts) - 1, queries).long().tolist()):
        y = line * (cell + head + gap)
        size = min(14, 1.9 * canvas.width / len(texts[row]))
        draw.text((gap, y + gap), texts[row], fill="black", font_size=size)
        order = (embedded.image @ embedded.text[row]).argsort(descending=True)[:top].tolist()
        for column, place in enumerate(order):
            x = gap + column * (cell + gap)
            example = by_id[embedded.image_ids[place]]
            photo = images.decode(pairs.read(example), example.path).numpy()
            canvas.paste(Image.fromarray(photo).resize((cell, cell)), (x, y + head))
            if place == embedded.owner[row]:
                frame = (x - gap, y + head - gap, x + cell + gap - 1, y + head + cell + gap - 1)
                draw.rectangle(frame, outline="limegreen", width=gap)
    canvas.save(path)
