"""Sampling and reading: the distribution is the softmax, and no answer depends on what it is batched with."""

import math

import pytest
import torch

from align.models.roles import Bases, Role
from align.rollout.reading import read_all
from align.rollout.rollouts import Rollouts, cut_at_end, rollouts_of
from align.settings import Model, Sampling
from tests import tiny
from tests.drawing import sample, uniforms

END, PAD = 3, 0
PROMPTS = [[2, 4, 9, 10], [2, 4], [2, 4, 13, 12, 11, 6, 8], [2, 9, 9]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def role(request, tmp_path_factory) -> Role:
    folder = tiny.make_base(tmp_path_factory.mktemp(request.param), kind=request.param)
    return Bases(Model(base=str(folder)), torch.device("cpu")).role(None)


def draw(role: Role, prompts, rows, *, batch_size=4, sampling=None) -> Rollouts:
    sampling = sampling or Sampling(max_new_tokens=12)
    numbers = uniforms(0, 0, 1, rows, sampling.max_new_tokens)
    return sample(role, prompts, numbers, sampling, end_ids=[END], pad_id=PAD, batch_size=batch_size)[0]


def test_an_answer_does_not_depend_on_its_batch(role):
    together = draw(role, PROMPTS, range(4))
    for batch_size in (1, 2, 3):
        assert draw(role, PROMPTS, range(4), batch_size=batch_size).answers == together.answers
    for row in range(4):
        assert draw(role, [PROMPTS[row]], [row]).answers == (together.answers[row],)
    backwards = draw(role, PROMPTS[::-1], range(3, -1, -1))
    assert backwards.answers == together.answers[::-1]


def test_tokens_come_from_the_softmax(role):
    """4000 first tokens against the probabilities: a chi-squared statistic within its 99.9 % bound."""
    count, temperature = 4000, 0.7
    numbers = uniforms(5, 0, 0, range(count), 1)
    sampling = Sampling(max_new_tokens=1, temperature=temperature)
    drawn, _ = sample(role, [PROMPTS[0]] * count, numbers, sampling, end_ids=[END], pad_id=PAD, batch_size=1000)
    ids = torch.tensor([PROMPTS[0]])
    logits = role.logits(role.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1]
    expected = torch.softmax(logits.double() / temperature, -1) * count
    seen = torch.bincount(torch.tensor(drawn.answers)[:, 0], minlength=len(expected)).double()
    statistic = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert statistic < freedom + 3.3 * math.sqrt(2 * freedom) + 8


def test_a_draw_inverts_the_cumulative_sum(role):
    ids = torch.tensor([PROMPTS[0]])
    logits = role.logits(role.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1]
    cumulative = torch.softmax(logits.float(), -1).double().cumsum(0)
    for u in (0.0, 0.3, 0.77, 1 - 1e-12):
        number = torch.tensor([[u]], dtype=torch.float64)
        out, _ = sample(role, [PROMPTS[0]], number, Sampling(max_new_tokens=1), end_ids=[END], pad_id=PAD, batch_size=1)
        assert out.answers[0][0] == int((cumulative <= u * cumulative[-1]).sum())


def test_top_k_keeps_to_the_largest(role):
    greedy = draw(role, PROMPTS, range(4), sampling=Sampling(max_new_tokens=6, top_k=1))
    plain = role.model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False, eos_token_id=END, pad_token_id=PAD
    )
    assert list(greedy.answers[0]) == cut_at_end(plain[0, len(PROMPTS[0]) :].tolist(), [END])


def test_masks_come_from_lengths_and_not_from_pads():
    made = rollouts_of([[2], [2, 4]], [[5, END], [PAD, PAD, 7]], end_ids=[END])
    assert made.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert made.ended.tolist() == [True, False]
    equal = rollouts_of([[2]], [[5, END]], end_ids=[END])  # pad == end: the end token stays real
    assert equal.response_mask.tolist() == [[True, True]] and equal.lengths.tolist() == [2]


def test_empty_full_and_immediate_ends():
    made = rollouts_of([[2], [2], [2]], [[], [END], [5, 6, 7]], end_ids=[END])
    assert made.lengths.tolist() == [0, 1, 3] and made.ended.tolist() == [False, True, False]
    assert rollouts_of([[2]], [[]], end_ids=[END]).response_mask.shape == (1, 0)
    assert cut_at_end([5, END, 6, END], [END]) == [5, END] and cut_at_end([], [END]) == []


def test_reading_equals_the_models_own_logits_at_any_padding(role):
    rollouts = draw(role, PROMPTS, range(4))
    reading = read_all(role, rollouts, temperature=0.7)
    singles = [rollouts_of([p], [a], end_ids=[END]) for p, a in zip(PROMPTS, rollouts.answers, strict=True)]
    alone = [read_all(role, single, temperature=0.7) for single in singles]
    for row, (prompt, answer) in enumerate(zip(PROMPTS, rollouts.answers, strict=True)):
        logits = role.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert torch.allclose(reading.logprobs[row, : len(answer)], expected, atol=1e-5)
        assert torch.allclose(alone[row].logprobs[0, : len(answer)], expected, atol=1e-5)
        assert (reading.logprobs[row, len(answer) :] == 0).all()


def test_uniforms_are_a_function_of_their_arguments():
    whole = uniforms(1, 0, 2, range(6), 5)
    assert torch.equal(whole[[4, 1]], uniforms(1, 0, 2, [4, 1], 5))
    assert not torch.equal(whole, uniforms(1, 1, 2, range(6), 5)) and not torch.equal(
        whole, uniforms(1, 0, 3, range(6), 5)
    )


def test_a_static_cache_samples_the_same_answers(role):
    static = Sampling(max_new_tokens=12, cache_implementation="static")
    assert draw(role, PROMPTS, range(4), sampling=static).answers == draw(role, PROMPTS, range(4)).answers
