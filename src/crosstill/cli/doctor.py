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
    common.hush()
    from crosstill import doctor

    report = doctor.examine(data, images, model, splits)
    if as_json:
        common.dump(report.to_json())
    else:
        common.say(report.text())
    if report.error is not None:
        raise report.error
