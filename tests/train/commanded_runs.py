"""Runs that are started, killed and resumed by the command line, as a user does it.

    python commanded_runs.py < CASES

Reads a case a line, in JSON. A case is one run: the words after `crosstill train`, its folder,
and the deaths that it dies one after the other before it is resumed to its end; with
"finish": false it stays dead. Every command is a process of its own, forked from this one so that
only this one pays for the imports. Prints one JSON line a case: the exit code of the last command,
whether each death struck, and the moments and seconds of the last command.

A death is one of
    {"at": N}       at the Nth moment: before something in the run's folder is opened, renamed or
                    removed or a folder made there, and before and after a flush
    {"size": N}     inside the write that makes a file larger than N bytes, which stays half written
    {"after": S}    after so many seconds
    {"step": N}     before the command's Nth step
    {"validate": N} before the command's Nth validation
    {"signal": "SIGTERM", "step": N}    no kill: asked to stop before its Nth step
"""

import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

# what every child would import
import pyarrow  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402
import transformers.models.vit.modeling_vit  # noqa: E402, F401

import crosstill.recipes  # noqa: E402
from crosstill.cli import main as crosstill  # noqa: E402
from crosstill.fusion.list_task import ListTask  # noqa: E402
from crosstill.train.task import PairTask  # noqa: E402

pyarrow.array([1])  # the first imports pandas, where there is one

TASKS = (PairTask, ListTask)
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def watch_moments(out: str, act: Callable[[], None]) -> None:
    """Call `act` at every moment of the run in `out`."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and f"{args[0]}/".startswith(f"{out}/"):
            act()

    def flush_and_act(handle: int) -> None:
        act()
        flush(handle)
        act()

    sys.addaudithook(audit)
    flush, os.fsync = os.fsync, flush_and_act


def watch_calls(method: str, owners: Sequence[type], act: Callable[[int], None]) -> None:
    """Call `act` with a running number before each call of a method."""
    numbers = itertools.count(1)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_call(*args: Any) -> Any:
            act(next(numbers))
            return call(*args)

        return count_and_call

    for owner in owners:
        setattr(owner, method, watched(getattr(owner, method)))


def arm(death: dict[str, Any], out: str) -> None:
    """Prepare the death of this process."""
    if "at" in death:
        left = iter(range(death["at"] - 1))
        watch_moments(out, lambda: die() if next(left, None) is None else None)
    elif "size" in death:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (death["size"], death["size"]))
    elif "after" in death:
        threading.Timer(death["after"], die).start()
    elif "validate" in death:
        watch_calls("validate", TASKS, lambda n: die() if n == death["validate"] else None)
    else:
        number = getattr(signal, death.get("signal", "SIGKILL"))
        watch_calls("backward", TASKS, lambda n: die(number) if n == death["step"] else None)


def in_child(words: Sequence[str], prepare: Callable[[], None], log: Path) -> int:
    """Run `crosstill` with these words in a process of its own; its exit code, or -signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: Any = 70
    try:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        os.dup2(2, 1)
        sys.argv = ["crosstill", *words]
        prepare()
        crosstill()
    except SystemExit as done:
        code = done.code
    finally:
        os._exit(code or 0)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Start a run, kill it as often as the case says, and resume it to its end."""
    out, log = case["out"], Path(case["out"] + ".log")
    moments = Path(out + ".moments")
    moments.touch()

    def command(prepare: Callable[[], None]) -> int:
        started = Path(out, "config.json").is_file()
        how = [case["words"][0], "--resume"] if started else case["words"]
        return in_child(["train", *how, "--out", out], prepare, log)

    def count() -> None:
        handle = os.open(moments, os.O_WRONLY | os.O_APPEND)
        watch_moments(out, lambda: os.write(handle, b"."))

    struck = [command(lambda death=death: arm(death, out)) != 0 for death in case["deaths"]]
    began = time.monotonic()
    code = command(count) if case.get("finish", True) else 0
    figures = {"moments": moments.stat().st_size, "seconds": time.monotonic() - began}
    return {"out": out, "code": code, "struck": struck, **figures}


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
