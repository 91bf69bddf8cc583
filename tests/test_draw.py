"""Draws against a plain cumulative sum in Python's floats."""

import math
import random

import pytest
import torch

from align.errors import RunFailed
from align.rollout import draw as drawing
from align.rollout.draw import check_finite, draw
from align.settings import Sampling
from tests import oracles

LAST = math.nextafter(1.0, 0.0)  # the largest number that is drawn with
SLACK = 2e-6  # of a cumulative probability: weights are float32
VOCABULARIES = [1, 2, 255, 256, 257, 511, 512, 513, 1000]


@pytest.fixture(autouse=True, params=["by blocks", "whole"])
def either_sum(request, monkeypatch):
    """What a CPU does and what a GPU does."""
    monkeypatch.setattr(drawing, "BY_BLOCKS", {"cpu"} if request.param == "by blocks" else set())


def kept_by(probabilities: list[float], top_k: int, top_p: float) -> set[int]:
    """The likeliest k, and of these the likeliest that make up the share p."""
    order = sorted(range(len(probabilities)), key=lambda v: -probabilities[v])
    order = order[: top_k or len(order)]
    total = math.fsum(probabilities[v] for v in order)
    kept, share = set(), 0.0
    for v in order:
        if share >= top_p:
            break
        kept.add(v)
        share += probabilities[v] / total
    return kept


def check_token(token: int, probabilities: list[float], number: float) -> bool:
    """Asserts that the token's stretch of the cumulative sum holds `number`; whether that left one token only."""
    total = math.fsum(probabilities)
    below = math.fsum(probabilities[:token]) / total
    assert probabilities[token] > 0.0
    above = below + probabilities[token] / total
    assert below - SLACK <= number < above + SLACK
    return below + SLACK < number < above - SLACK


def spread_logits(seed: int, count: int, size: int, scale: float) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("size", VOCABULARIES)
def test_a_draw_inverts_the_cumulative_sum(size, temperature):
    rng = random.Random(size)
    numbers = [0.0, LAST, 0.5, 0.25, 1e-12, 1 - 1e-12, *(rng.random() for _ in range(14))]
    logits = spread_logits(size, len(numbers), size, 3.0)
    drawn = draw(logits, torch.tensor(numbers, dtype=torch.float64), Sampling(temperature=temperature))
    clear = 0
    for row, number, token, logprob, entropy in zip(
        logits.tolist(), numbers, *(x.tolist() for x in (drawn.tokens, drawn.logprobs, drawn.entropies)), strict=True
    ):
        clear += check_token(token, oracles.softmax(row, temperature), number)
        assert logprob == pytest.approx(oracles.token_logprob(row, token, temperature), abs=1e-5)
        assert entropy == pytest.approx(oracles.entropy(row, temperature), abs=1e-5)
    assert clear >= 14 or size == 1


@pytest.mark.parametrize("size", [3, 256, 700])
def test_the_ends_of_the_range_are_the_first_and_the_last_token_that_can_be(size):
    logits = torch.full((2, size), -torch.inf)
    logits[:, [1, size // 2]] = torch.tensor([0.3, -20.0])
    drawn = draw(logits, torch.tensor([0.0, LAST], dtype=torch.float64), Sampling())
    assert drawn.tokens.tolist() == [1, size // 2]


@pytest.mark.parametrize("size", VOCABULARIES)
def test_a_sure_token_is_always_drawn(size):
    numbers = torch.tensor([0.0, 1e-300, 0.5, LAST], dtype=torch.float64)
    for token in {0, size // 2, size - 1}:
        for elsewhere in (-torch.inf, -300.0):
            logits = torch.full((4, size), elsewhere)
            logits[:, token] = 7.0
            drawn = draw(logits, numbers, Sampling(temperature=0.7))
            assert drawn.tokens.tolist() == [token] * 4 and drawn.logprobs.tolist() == [0.0] * 4


def test_tokens_that_cannot_be_have_no_part_in_the_entropy():
    logits = torch.tensor([[0.0, -torch.inf, math.log(3.0), -torch.inf]])
    drawn = draw(logits, torch.tensor([0.5], dtype=torch.float64), Sampling())
    assert drawn.tokens.tolist() == [2] and drawn.logprobs.item() == pytest.approx(math.log(0.75))
    assert drawn.entropies.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-6)


def test_a_constant_added_to_the_logits_changes_nothing():
    logits = (spread_logits(6, 12, 500, 2.0) * 64).round() / 64  # so that the sum is exact
    numbers = torch.linspace(0.0, LAST, 12, dtype=torch.float64)
    plain = draw(logits, numbers, Sampling())
    for shift in (-128.0, 1024.0):
        moved = draw(logits + shift, numbers, Sampling())
        assert moved.tokens.tolist() == plain.tokens.tolist()
        for row, token, logprob, entropy in zip(
            logits.tolist(), *(x.tolist() for x in (moved.tokens, moved.logprobs, moved.entropies)), strict=True
        ):
            assert logprob == pytest.approx(oracles.token_logprob(row, token), abs=1e-5)
            assert entropy == pytest.approx(oracles.entropy(row), abs=1e-5)


def test_small_probabilities_are_drawn_as_often_as_they_should_be():
    """A tail of 30,000 tokens that holds 3 % of the mass: sums in float32 would lose it."""
    size, number = 30_001, 0.985
    logits = torch.zeros(1, size)
    logits[0, 0] = math.log(0.97 / 0.03 * (size - 1))
    token = int(draw(logits, torch.tensor([number], dtype=torch.float64), Sampling()).tokens)
    assert token == pytest.approx(1 + (number - 0.97) / 0.03 * (size - 1), abs=3)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.7), (0, 0.05), (20, 0.6), (10_000, 1.0)])
@pytest.mark.parametrize("size", [7, 257, 512])
def test_filters_narrow_the_draw_and_leave_the_readings(size, top_k, top_p):
    rng = random.Random(size)
    numbers = [0.0, LAST, *(rng.random() for _ in range(18))]
    logits = spread_logits(size + 1, len(numbers), size, 2.0)
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
    drawn = draw(logits, torch.tensor(numbers, dtype=torch.float64), sampling)
    for row, number, token, logprob, entropy in zip(
        logits.tolist(), numbers, *(x.tolist() for x in (drawn.tokens, drawn.logprobs, drawn.entropies)), strict=True
    ):
        whole = oracles.softmax(row, 0.8)
        kept = kept_by(whole, top_k, top_p)
        assert token in kept
        check_token(token, [p if v in kept else 0.0 for v, p in enumerate(whole)], number)
        assert logprob == pytest.approx(oracles.token_logprob(row, token, 0.8), abs=1e-5)
        assert entropy == pytest.approx(oracles.entropy(row, 0.8), abs=1e-5)


def test_a_row_is_drawn_as_it_is_alone():
    logits, numbers = spread_logits(3, 6, 300, 2.0), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    together = draw(logits, numbers, Sampling())
    for i in range(6):
        alone = draw(logits[i : i + 1], numbers[i : i + 1], Sampling())
        assert alone.tokens[0] == together.tokens[i] and alone.logprobs[0] == together.logprobs[i]


def test_16_bit_logits_are_widened():
    logits = spread_logits(4, 5, 400, 3.0).bfloat16()
    drawn = draw(logits, torch.linspace(0.1, 0.9, 5, dtype=torch.float64), Sampling())
    assert drawn.logprobs.dtype == drawn.entropies.dtype == torch.float32
    for row, token, logprob in zip(logits.tolist(), drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
        assert logprob == pytest.approx(oracles.token_logprob(row, token), abs=1e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_stop_the_run(wrong):
    logits = torch.zeros(3, 300)
    logits[1, 290] = wrong
    drawn = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), Sampling())
    assert torch.isfinite(drawn.logprobs).tolist() == [True, False, True]  # and no token is outside the vocabulary:
    assert bool(((drawn.tokens >= 0) & (drawn.tokens < 300)).all())
    with pytest.raises(RunFailed, match="not finite"):
        check_finite(drawn.logprobs)
    check_finite(drawn.logprobs[[0, 2]])
