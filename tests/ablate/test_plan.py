from pathlib import Path

import pytest

from crosstill import cache, objectives
from crosstill.ablate import plan
from crosstill.errors import ConfigError, MismatchError
from crosstill.evaluate.bootstrap import FEWEST
from support import FAST


def make(many, toml, table="table10", changes=FAST, seeds=(0, 1), chosen=None):
    return plan.make(table, many, [toml] if chosen is None else chosen, changes, seeds)


def refusal(many, toml, **options) -> str:
    with pytest.raises((ConfigError, MismatchError)) as caught:
        make(many, toml, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_row_and_seed_has_a_run(many, toml):
    jobs = list(make(many, toml).jobs())
    assert len(jobs) == len({job.key for job in jobs}) == 8
    assert [job.settings.seed for job in jobs] == [0] * 4 + [1] * 4
    assert {job.settings.balance.get("temperature", 1.0) for job in jobs} == {0.05, 0.2, 0.5, 1.0}
    assert all(job.settings.batch_size == 16 for job in jobs)


def test_options_of_a_loss_reach_the_rows_that_have_it(many, toml):
    jobs = make(many, toml, "table2").jobs()
    for job in jobs:
        slots = job.settings.losses.get("contrastive", {}).get("queue_size")
        assert slots == (64 if "contrastive" in job.settings.losses else None)


def test_equal_settings_share_a_run_across_tables(many, toml):
    keys = {name: {job.row: job.key for job in make(many, toml, name).jobs()} for name in SHARED}
    assert len({keys[name][row] for name, row in SHARED.items()}) == 1


SHARED = {
    "table4": "CD + FD + SD + HND",
    "table5": "DSMD, as published",
    "table6": "both normalised",
    "table9": "m = 0.2",
    "table10": "T = 1",
}


def test_all_methods_of_table2_have_one_optimizer_and_one_start(many, toml):
    jobs = [job.settings for job in make(many, toml, "table2", changes=[*FAST, "lr=2e-3"]).jobs()]
    fields = ("lr", "schedule", "batch_size", "epochs", "shuffle", "init_heads", "warmup_share")
    assert len({tuple(getattr(one, field) for field in fields) for one in jobs}) == 1
    assert jobs[0].lr == 2e-3 and jobs[0].schedule == "cosine"


def test_a_run_is_named_by_all_that_decides_it(many, toml, tmp_path):
    first = next(make(many, toml).jobs()).key
    other = tmp_path / "student.toml"
    other.write_text(
        Path(toml).read_text().replace("hidden_dropout_prob = 0.1", "hidden_dropout_prob = 0.2")
    )
    assert next(make(many, str(other)).jobs()).key != first
    assert next(make(many, toml, changes=[*FAST, "lr=2e-3"]).jobs()).key != first
    assert next(make(many, toml, seeds=[7]).jobs()).key != first
    assert next(make(many, toml).jobs()).key == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "table3"}, "no table named 'table3'"),
        ({"changes": ["balance.temperature=2"]}, "table10 varies that itself; leave it out"),
        ({"changes": ["balance=dwa"]}, "table10 varies that itself"),
        ({"table": "table5", "changes": ["balance.total=3"]}, "table5 varies that itself"),
        ({"table": "table4", "changes": ["losses=feature"]}, "table4 varies that itself"),
        ({"table": "table7", "changes": ["losses.contrastive.temperature=1.0"]}, "varies that"),
        ({"changes": ["seed=3"]}, "a grid counts its seeds; give --seeds"),
        ({"changes": ["epoch=3"]}, "did you mean 'epochs'"),
        ({"seeds": ()}, "seeds must be distinct and at least one"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"chosen": ["tiny", "mobile"]}, "one student in all rows; give --student once"),
        ({"table": "towers"}, "towers compares 3 students; give --student as often"),
        (
            {"table": "table8", "changes": []},
            "too few captions for two rows of 'Queue length' (K = 2048, longer than the 1,280",
        ),
        ({"changes": ["losses.contrastiv.queue_size=9"]}, "did you mean 'contrastive'"),
        ({"changes": [*FAST, "losses.crd.negatives=9"]}, "no row of table10 has that loss"),
        (
            {"changes": ["losses.contrastive.queue_size=8192"]},
            "queue of 8,192 slots is longer than the 1,280 captions of split 'train'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_run(many, toml, options, message):
    assert message in refusal(many, toml, **options)


SECOND = """
from crosstill.objectives.contrastive import Contrastive


class Second(Contrastive):
    pass
"""


def test_the_queue_of_any_loss_shrinks_unless_its_length_is_set(
    many, toml, tmp_path, monkeypatch, caplog
):
    (tmp_path / "second.py").write_text(SECOND)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    changes = ["losses=similarity+contrastive+second", *FAST]
    with caplog.at_level("INFO", "crosstill"):
        job = next(make(many, toml, changes=changes).jobs())
    assert job.settings.losses["contrastive"] == {"queue_size": 64}
    assert job.settings.losses["second"] == {"queue_size": 1280}
    said = [line for line in caplog.messages if "slots" in line]
    assert len(said) == 1 and said[0].startswith("second: a queue of 1,280 slots in place of 8,192")
    message = refusal(many, toml, changes=[*changes, "losses.second.queue_size=1281"])
    assert "1,281 slots" in message and "--set losses.second.queue_size=1280" in message


def test_too_few_images_for_the_bootstrap(cached, toml):
    with pytest.raises(ConfigError, match=f"split 'val' has 6 images.*needs {FEWEST}"):
        make(cached, toml)


def test_a_method_without_its_noun_is_refused(scenes, toml, tmp_path, many):
    alone = cache.build(None, many_scenes(), tmp_path / "captions")
    with pytest.raises(MismatchError, match="has not both image and text features"):
        make(alone, toml)


def many_scenes():
    from crosstill import data

    return data.open("scenes:320")


def test_a_table_can_be_planned_anew(many, toml, tmp_path):
    make(many, toml).save(tmp_path)
    written = (tmp_path / "table10.json").read_bytes()
    make(many, toml).save(tmp_path)
    assert (tmp_path / "table10.json").read_bytes() == written
    make(many, toml, seeds=(0, 1, 2)).save(tmp_path)
    more = plan.load(tmp_path / "table10.json")
    assert {job.key for job in make(many, toml).jobs()} < {job.key for job in more.jobs()}


def test_a_student_of_another_width_is_refused(many, toml, tmp_path):
    other = tmp_path / "wide.toml"
    other.write_text("dim = 48\n" + Path(toml).read_text())
    assert "its dim = 48 does not fit the teacher's 16" in refusal(many, str(other))
