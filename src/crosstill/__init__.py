"""crosstill: distil a large vision-language teacher into a small, fast dual encoder.

The floor, which needs no torch:

    errors      every exception raised on purpose
    extras      libraries that only some verbs need
    plugins     parts found by name, here or in other distributions
    formats     names and texts as people have them: endings, hidden files, UTF-8, lines
    files       atomic writes, checksums, locks
    artefacts   names, records and arrays that a stranger may have written
    progress    bars on stderr
    rasters     Pillow's formats, decoded strip by strip
    decoding    worker processes that decode, within one budget of memory
    jpeg        JPEG, whole or refused
    pixels      how a model wants its images; bytes → upright RGB → resized, one path for all
    bundle      exported students: the files, and the encoder that runs them

The distiller, which imports no annex:

    types       the nouns and the dimension key
    images      the same pixels for torch, and views of them
    data        sources → examples
    towers      Hugging Face towers and processors, of which models are made
    teachers    frozen big models
    students    image tower + text tower + heads
    models      opening of anything that is called a model
    cache       a teacher's outputs on disk
    objectives  one loss a file, wrappers beside them
    balance     one balancer a file: weights of several losses
    evaluate    recall and cost
    train       settings, loop, checkpoints, run folders
    recipes     published settings
    export      student → bundle, or a folder for other libraries

Annexes, which nothing above imports:

    fusion      models that read image and text together
    search      bundle → index → searcher → HTTP service and page, without torch
    ablate      grids of runs, and their tables
    report      one page a run or a grid
    doctor      checks of a machine and a dataset
    demo        the whole path on rendered scenes

The command line over all of it:

    cli         one file a verb

Imports only point up this list; a test holds that it agrees with the import contract. The parts
are loaded when they are first used, so `import crosstill` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstill import (
        ablate,
        balance,
        bundle,
        cache,
        data,
        evaluate,
        export,
        fusion,
        objectives,
        recipes,
        report,
        search,
        students,
        teachers,
        train,
    )
    from crosstill.models import open as open_model
    from crosstill.recipes import distill

__all__ = [
    "ablate",
    "balance",
    "bundle",
    "cache",
    "data",
    "distill",
    "evaluate",
    "export",
    "fusion",
    "objectives",
    "open_model",
    "recipes",
    "report",
    "search",
    "students",
    "teachers",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "distill":
        return import_module("crosstill.recipes").distill
    if name == "open_model":
        return import_module("crosstill.models").open
    if name == "__version__":
        return import_module("crosstill.files").VERSION
    if name in __all__:
        return import_module(f"crosstill.{name}")
    raise AttributeError(f"module 'crosstill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
