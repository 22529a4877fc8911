"""`crosstill doctor`: is this machine ready, is this dataset sound?"""

from typing import Annotated

import typer

from crosstill.cli import common


def command(
    data: Annotated[str | None, typer.Argument(help=common.DATA)] = None,
    images: common.Images = None,
    splits: common.Splits = None,
    model: Annotated[
        str | None, typer.Option(help="Count the captions that this model would cut.")
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Describe the machine and, given DATA, dry-run the dataset: every image is decoded.

    What is wrong with the dataset is said with what to do about it: files that are not where
    they are listed, leaks between splits, unreadable images, captions that stand out.
    """
    if data is not None:
        common.check_data(data)
    from crosstill.doctor import machine

    environment = machine.installed()
    if not as_json:
        common.say(_table(environment))
    environment |= machine.device()
    if not as_json:
        common.say(_table({name: environment[name] for name in ("device", "bf16")}))
    report = None
    if data is not None:
        if model is not None:
            common.hush()
        from crosstill.doctor import dataset

        report = dataset.examine(data, images, model, splits)
    if as_json:
        common.dump({"environment": environment, **(report.to_json() if report else {})})
    elif report:
        common.say(f"\n{report.text()}")
    if report and report.error is not None:
        raise report.error


def _table(values: dict[str, str]) -> str:
    return "\n".join(f"{name:16} {value}" for name, value in values.items())
