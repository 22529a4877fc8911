import pytest

from crosstill import recipes
from crosstill.errors import ConfigError
from crosstill.train import TrainConfig
from crosstill.train.config import parse
from crosstill.train.task import open_task


def test_the_defaults_are_the_papers():
    config = recipes.dsmd()
    assert set(config.losses) == {"contrastive", "feature", "similarity", "hard_negative"}
    assert (config.lr, config.weight_decay, config.batch_size, config.epochs) == (
        1e-4,
        1e-4,
        64,
        20,
    )
    assert (config.schedule, config.milestones, config.gamma) == ("step", (10,), 0.1)


def test_changes_reach_inside_and_keep_the_rest():
    config = TrainConfig().changed(
        ["lr=3e-4", "losses.contrastive.temperature=0.07", "losses.feature=false", "balance=dwa"]
    )
    assert config.lr == 3e-4
    assert config.losses["contrastive"] == {"temperature": 0.07}
    assert set(config.losses) == {"contrastive", "similarity", "hard_negative"}
    assert config.balance == {"name": "dwa"}


def test_values_are_toml_or_plain_words():
    config = TrainConfig().changed(
        ["schedule=cosine", "milestones=[2, 4]", "clip_norm=none", "losses=feature+similarity"]
    )
    assert config.schedule == "cosine"
    assert config.milestones == (2, 4)
    assert config.clip_norm is None
    assert config.losses == {"feature": {}, "similarity": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", "unknown key 'epoch'; did you mean 'epochs'"),
        ("batchsize.x=3", "unknown key 'batchsize.x'; did you mean 'batch_size'"),
        ("epochs=0", "epochs = 0"),
        ("lr=fast", "lr = 'fast'"),
        ("precision=fp16", "precision = 'fp16'"),
        ("epochs", "write it as key=value"),
        ("lr.x=1", "nothing inside"),
        ("losses={}", "at least one loss"),
        ("warmup_share=1.5", "warmup_share = 1.5"),
        ("betas=[0.9, 1.0]", "betas.1 = 1.0"),
        ("fusion_lr=0", "fusion_lr = 0"),
    ],
)
def test_a_wrong_change_is_one_line_that_names_it(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig().changed([change])
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="no recipe named 'dsmb'; did you mean 'dsmd'"):
        recipes.config("dsmb")


def test_a_removed_setting_is_refused_by_name_and_older_runs_are_read(cached):
    assert parse({"targets": "each"}).targets == "each"
    with pytest.raises(ConfigError, match="targets = each: was removed, .* leave it out"):
        open_task(cached, TrainConfig(targets="each"))
