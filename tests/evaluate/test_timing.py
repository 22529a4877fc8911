"""Seconds for a whole set, by a clock that moves only when a model works."""

from dataclasses import replace

import pytest
import torch

from crosstill.evaluate import compare, embedding
from crosstill.evaluate.embedding import Stopwatch
from crosstill.evaluate.evaluation import Cost, compared, figure
from crosstill.fusion import measure, rerank
from evaluate.judges import SmallJudge, pictures
from support import SmallTeacher

LOOK, READ, MATCH = 3.0, 0.5, 0.01  # seconds of one
IMAGES, CAPTIONS = 40, 4
TEXTS = IMAGES * CAPTIONS


@pytest.fixture(scope="module")
def pairs():
    return pictures(IMAGES, CAPTIONS)


@pytest.fixture
def clock(monkeypatch):
    """A list whose sum is the time."""
    spent = [0.0]
    monkeypatch.setattr(embedding.time, "perf_counter", lambda: sum(spent))
    return spent


class Judge(SmallJudge):
    def __init__(self, clock: list[float], log: list[str] | None = None) -> None:
        super().__init__()
        self.clock, self.log = clock, [] if log is None else log

    def encode_images(self, pixels):
        self._work("judge looks", LOOK * len(pixels))
        return super().encode_images(pixels)

    def encode_texts(self, tokens):
        self._work("judge reads", READ * len(tokens.hidden))
        return super().encode_texts(tokens)

    def score_states(self, images, texts):
        self._work("judge matches", MATCH * len(images.hidden))
        return super().score_states(images, texts)

    def _work(self, what, seconds):
        self.clock.append(seconds)
        self.log.append(what)


class Finder(SmallTeacher):
    def __init__(self, clock: list[float], log: list[str] | None = None) -> None:
        super().__init__()
        self.clock, self.log = clock, [] if log is None else log

    def embed_images(self, pixels):
        self.clock.append(LOOK * len(pixels))
        self.log.append("finder looks")
        return super().embed_images(pixels)

    def embed_texts(self, texts):
        self.clock.append(READ * len(texts))
        return super().embed_texts(texts)


def test_a_dual_encoder_is_timed_in_full(pairs, clock):
    found = compare.whole_set({"a": Finder(clock)}, pairs)["a"]
    assert found == Cost(IMAGES + TEXTS, pytest.approx(LOOK * IMAGES + READ * TEXTS))
    assert not found.estimated


@pytest.mark.parametrize("sample", [1, 7, 100, 1000, 6400, 10**9])
def test_a_fusion_model_is_extrapolated_from_a_sample(pairs, clock, sample):
    model = Judge(clock)
    found = compare.whole_set({"a": model}, pairs, sample)["a"]
    assert found.passes == IMAGES * TEXTS
    assert found.seconds == pytest.approx(LOOK * IMAGES + READ * TEXTS + MATCH * IMAGES * TEXTS)
    assert found.sample == min(sample, IMAGES * TEXTS) and found.estimated
    once_more = -(-found.sample // measure.ROUNDS)  # the first piece, to warm up
    assert model.pairs == found.sample + once_more


def test_a_full_run_is_timed_as_it_goes_without_decoding(pairs, clock):
    def slow(example):
        clock.append(1e6)
        return pairs.read(example)

    found = measure.score(Judge(clock), replace(pairs, read=slow))
    assert found.towers == pytest.approx(LOOK * IMAGES + READ * TEXTS)
    assert found.matching == pytest.approx(MATCH * IMAGES * TEXTS)


def test_the_seconds_of_re_ranking(pairs, clock):
    found = rerank(Finder(clock), Judge(clock), pairs, [2, 8])
    encoding = LOOK * IMAGES + READ * TEXTS
    assert found.seconds == pytest.approx(encoding)
    for stage in found.stages:
        assert stage.seconds == pytest.approx(2 * encoding + MATCH * stage.pairs)


def test_one_slow_round_does_not_count(pairs, clock):
    model = Judge(clock)
    rounds = iter([0, 1000] + 50 * [0])

    def score_pairs(*sides):
        clock.append(next(rounds))
        return SmallJudge.score_pairs(model, *sides)

    model.score_pairs = score_pairs
    found = compare.whole_set({"a": model}, pairs, 640)["a"]
    assert found.seconds == pytest.approx(LOOK * IMAGES + READ * TEXTS + MATCH * IMAGES * TEXTS)


def test_models_take_turns(pairs, clock, monkeypatch):
    monkeypatch.setattr(compare, "WARM_UP", 8)
    monkeypatch.setattr(measure, "LOOKED", 8)
    monkeypatch.setattr(embedding, "BATCH", 8)
    log = []
    compare.whole_set({"a": Finder(clock, log), "b": Judge(clock, log)}, pairs, 100)
    looks = [who for who in log if who.endswith("looks")]
    # each once without a clock, then by turns
    assert looks == ["finder looks", "finder looks", "judge looks", "judge looks"] + 4 * [
        "finder looks",
        "judge looks",
    ]


def test_one_thread_while_it_is_timed(pairs, monkeypatch):
    seen = []

    class Counting(SmallTeacher):
        def embed_images(self, pixels):
            seen.append(torch.get_num_threads())
            return super().embed_images(pixels)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare.whole_set({"a": Counting()}, pairs)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("images", "texts", "sample"), [(64, 256, 4096), (6, 30, 50), (3, 5, 15)])
def test_the_pairs_of_a_sample(images, texts, sample):
    rounds = measure._rounds(images, texts, sample)
    pairs = torch.cat(rounds)
    assert len(pairs) == len(pairs.unique(dim=0)) == sample
    assert len(rounds) == min(measure.ROUNDS, sample)
    assert pairs.min() == 0 and pairs[:, 0].max() < images and pairs[:, 1].max() < texts
    assert max(map(len, rounds)) - min(map(len, rounds)) <= 1
    middles = torch.tensor([part[:, 1].float().mean() for part in rounds])
    if images == 64:  # texts come sorted by length: every piece has short and long ones
        assert (middles - 127.5).abs().max() < 20


def test_decoding_is_not_counted(pairs, clock):
    def slow(example, read=pairs.read):
        clock.append(1e6)
        return read(example)

    found = compare.whole_set({"a": Finder(clock)}, replace(pairs, read=slow))["a"]
    assert found.seconds < 1e6


def test_a_stopwatch_adds_up_and_survives_an_error(clock):
    watch = Stopwatch()
    with watch.running():
        clock.append(2)
    clock.append(10)
    with pytest.raises(KeyError), watch.running():
        clock.append(3)
        raise KeyError
    assert watch.seconds == 5


def test_how_many_times_faster():
    costs = {"slow": Cost(100, 50.0, sample=10), "fast": Cost(20, 0.5), "mid": Cost(30, 5.0)}
    found = compared(costs)
    assert [found[name].faster for name in costs] == [1, 100, 10]
    assert [found[name].rough for name in costs] == [False, True, True]
    assert found["slow"].cells() == ["100", "≈50", "1"]
    assert found["fast"].cells() == ["20", "0.5", "≈100"]
    exact = compared({"a": Cost(100, 50.0), "b": Cost(20, 0.5)})
    assert exact["b"].cells() == ["20", "0.5", "100"]
    assert found["slow"].to_json()["estimated"] is True
    assert found["slow"].to_json()["sample"] == 10
    assert "sample" not in exact["b"].to_json() and exact["b"].to_json()["estimated"] is False


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.0, "1"), (12.34, "12.3"), (99.96, "100"), (123456.7, "123,457")],
)
def test_figures(value, text):
    assert figure(value) == text
