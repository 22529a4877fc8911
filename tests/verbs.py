"""The command line as tests call it."""

from typer.testing import CliRunner, Result

from crosstill.cli.app import app


def crosstill(*arguments: object, code: int = 0) -> Result:
    """Run a verb in this process; its exit code must be `code`, and nothing may escape it."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refusal(*arguments: object) -> str:
    """The one line with which a verb refuses wrong input."""
    lines = crosstill(*arguments, code=2).stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    return errors[0]


# a student of two one-layer towers
TOML = """
name = "small"

[image.config]
model_type = "vit"
image_size = 16
patch_size = 8
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 16

[text.config]
model_type = "bert"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 16
"""
