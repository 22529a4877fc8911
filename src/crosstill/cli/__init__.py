"""The command line: one file a verb, no logic."""


def main() -> None:
    """Entry point of the `crosstill` command."""
    from crosstill.cli.app import main as run

    run()
