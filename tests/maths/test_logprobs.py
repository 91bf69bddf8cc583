"""Log-probabilities and entropies, whole and in chunks."""

import math
import random

import pytest
import torch

from align.maths.logprobs import chunked_entropies, chunked_logprobs, entropies, frozen_choices, token_logprobs
from tests import oracles

SEEDS = range(6)
TEMPERATURES = [1.0, 0.7, 2.5]


def frozen_logprobs(*arguments, **settings):
    return frozen_choices(*arguments, **settings)[0]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-10, atol=1e-10)


def logits_and_tokens(seed: int):
    rng = random.Random(seed)
    count, vocabulary = rng.randint(1, 9), rng.randint(2, 12)
    logits = oracles.rows(rng, count, vocabulary, scale=rng.choice([0.5, 3.0, 20.0]))
    return logits, [rng.randrange(vocabulary) for _ in range(count)]


def head_problem(seed: int):
    """hidden (N, H), weight (V, H), bias (V,), tokens (N,) as numbers."""
    rng = random.Random(seed)
    count, width, vocabulary = rng.randint(2, 9), rng.randint(1, 5), rng.randint(2, 8)
    hidden, weight = oracles.rows(rng, count, width), oracles.rows(rng, vocabulary, width)
    return (
        hidden,
        weight,
        oracles.rows(rng, 1, vocabulary)[0],
        [rng.randrange(vocabulary) for _ in range(count)],
    )


def test_by_hand():
    # weights 1, 3, 4 of 8: log p(second) = log(3/8); entropy = 3/8 log(8/3) + 1/8 log 8 + 1/2 log 2
    logits = tensor([[0.0, math.log(3), math.log(4)]])
    logprobs, entropies = token_logprobs(logits, torch.tensor([1]))
    close(logprobs, [math.log(3 / 8)])
    close(entropies, [3 / 8 * math.log(8 / 3) + 1 / 8 * math.log(8) + 1 / 2 * math.log(2)])
    # T = 1/2 squares the weights: 1, 9, 16 of 26
    logprobs, entropies = token_logprobs(logits, torch.tensor([2]), temperature=0.5)
    close(logprobs, [math.log(16 / 26)])
    close(entropies, [math.log(26) - (9 * math.log(9) + 16 * math.log(16)) / 26])


def test_equal_logits_give_the_entropy_of_a_fair_die():
    logprobs, entropies = token_logprobs(torch.full((2, 6), -3.0, dtype=torch.float64), torch.tensor([0, 5]))
    close(logprobs, [-math.log(6)] * 2)
    close(entropies, [math.log(6)] * 2)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_token_logprobs_match_the_oracle(seed, temperature):
    rows, tokens = logits_and_tokens(seed)
    logits = tensor(rows).requires_grad_()
    logprobs, entropies = token_logprobs(logits, torch.tensor(tokens), temperature=temperature)
    close(
        logprobs.detach(),
        [oracles.token_logprob(r, t, temperature) for r, t in zip(rows, tokens, strict=True)],
    )
    close(entropies, [oracles.entropy(r, temperature) for r in rows])
    assert not entropies.requires_grad
    logprobs.sum().backward()
    expected = [oracles.token_logprob_gradient(r, t, temperature) for r, t in zip(rows, tokens, strict=True)]
    close(logits.grad, expected)


def test_any_leading_shape():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    logprobs, entropies = token_logprobs(logits, tokens, temperature=0.7)
    assert logprobs.shape == entropies.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            row = logits[b, t].tolist()
            close(logprobs[b, t], oracles.token_logprob(row, int(tokens[b, t]), 0.7))
            close(entropies[b, t], oracles.entropy(row, 0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_before_the_softmax(dtype):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).mul(5).to(dtype)
    tokens = torch.tensor([0, 10, 20, 49])
    logprobs, entropies = token_logprobs(logits, tokens, temperature=0.7)
    assert logprobs.dtype == entropies.dtype == torch.float32
    for n in range(4):
        row = logits[n].tolist()  # the rounded logits, exactly; bfloat16 arithmetic would miss by 1e-2
        assert logprobs[n].item() == pytest.approx(oracles.token_logprob(row, int(tokens[n]), 0.7), abs=1e-5)
        assert entropies[n].item() == pytest.approx(oracles.entropy(row, 0.7), abs=1e-4)


def test_adding_a_constant_to_the_logits_changes_nothing():
    rows, tokens = logits_and_tokens(4)
    plain = token_logprobs(tensor(rows), torch.tensor(tokens))
    for shift in (-1e4, 1e4):  # the exponential of either is out of range
        for a, b in zip(plain, token_logprobs(tensor(rows) + shift, torch.tensor(tokens)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def chunks(count: int) -> list[int]:
    return [1, 2, count - 1, count, count + 1, 1024]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_chunked_logprobs_match_the_oracle(seed, temperature):
    hidden, weight, bias, tokens = head_problem(seed)
    logits = [oracles.matmul(h, weight, bias) for h in hidden]
    expected = [oracles.token_logprob(r, t, temperature) for r, t in zip(logits, tokens, strict=True)]
    for chunk in chunks(len(hidden)):
        logprobs, entropies = chunked_logprobs(
            tensor(hidden),
            lambda h: h @ tensor(weight).T + tensor(bias),
            torch.tensor(tokens),
            temperature=temperature,
            chunk=chunk,
        )
        close(logprobs, expected)
        close(entropies, [oracles.entropy(r, temperature) for r in logits])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_chunked_gradients_match_the_oracle(seed, temperature):
    hidden, weight, bias, tokens = head_problem(seed)
    scales = [0.5 + 0.25 * n for n in range(len(hidden))]  # a gradient that differs by position
    d_hidden = [[0.0] * len(hidden[0]) for _ in hidden]
    d_weight = [[0.0] * len(hidden[0]) for _ in weight]
    for n, (h, token) in enumerate(zip(hidden, tokens, strict=True)):
        d_logits = oracles.token_logprob_gradient(oracles.matmul(h, weight, bias), token, temperature)
        for v, d in enumerate(d_logits):
            for k in range(len(h)):
                d_hidden[n][k] += scales[n] * d * weight[v][k]
                d_weight[v][k] += scales[n] * d * h[k]
    for chunk in chunks(len(hidden)):
        x, w = tensor(hidden).requires_grad_(), tensor(weight).requires_grad_()
        logprobs, entropies = chunked_logprobs(
            x,
            lambda h, w=w: h @ w.T + tensor(bias),
            torch.tensor(tokens),
            temperature=temperature,
            chunk=chunk,
        )
        assert logprobs.requires_grad and not entropies.requires_grad
        (logprobs * tensor(scales)).sum().backward()
        close(x.grad, d_hidden)
        close(w.grad, d_weight)


def test_a_head_trains_over_a_frozen_trunk():
    hidden, weight, _, tokens = head_problem(0)
    w = tensor(weight).requires_grad_()  # hidden carries no gradient
    whole = token_logprobs(tensor(hidden) @ w.T, torch.tensor(tokens))[0].sum()
    parts = chunked_logprobs(tensor(hidden), lambda h: h @ w.T, torch.tensor(tokens), chunk=2)[0].sum()
    expected, actual = torch.autograd.grad(whole, w)[0], torch.autograd.grad(parts, w)[0]
    close(actual, expected.tolist())


def test_the_head_never_sees_more_than_a_chunk():
    sizes = []

    def head(h: torch.Tensor) -> torch.Tensor:
        sizes.append(h.shape[0])
        return h @ torch.ones(3, 4, dtype=torch.float64)

    hidden = torch.ones(10, 3, dtype=torch.float64, requires_grad=True)
    chunked_logprobs(hidden, head, torch.zeros(10, dtype=torch.long), chunk=4)[0].sum().backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]  # forward, and again in the backward pass
    sizes.clear()
    with torch.no_grad():
        logprobs, _ = chunked_logprobs(hidden, head, torch.zeros(10, dtype=torch.long), chunk=4)
    assert sizes == [4, 4, 2] and not logprobs.requires_grad


def test_no_positions_at_all():
    logprobs, entropies = chunked_logprobs(torch.zeros(0, 3), torch.nn.Linear(3, 4), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)


def frozen_problem(seed: int):
    """states (N, H), weight (V, H), tokens (N,), and a weight of each position in the loss."""
    hidden, weight, _, tokens = head_problem(seed)
    return hidden, weight, tokens, [0.5 - 0.75 * n for n in range(len(hidden))]


def frozen_oracle(hidden, weight, tokens, scales, temperature):
    """Log-probabilities, and d sum(scales x log p) / d hidden."""
    logprobs, slopes = [], []
    for h, token, scale in zip(hidden, tokens, scales, strict=True):
        logits = oracles.matmul(h, weight, [0.0] * len(weight))
        logprobs.append(oracles.token_logprob(logits, token, temperature))
        d_logits = oracles.token_logprob_gradient(logits, token, temperature)
        slopes.append(
            [scale * math.fsum(d * row[k] for d, row in zip(d_logits, weight, strict=True)) for k in range(len(h))]
        )
    return logprobs, slopes


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_frozen_head_matches_the_oracle(seed, temperature):
    hidden, weight, tokens, scales = frozen_problem(seed)
    expected, slopes = frozen_oracle(hidden, weight, tokens, scales, temperature)
    for chunk in chunks(len(hidden)):
        x, w = tensor(hidden).requires_grad_(), tensor(weight)
        logprobs = frozen_logprobs(x, w, torch.tensor(tokens), temperature=temperature, chunk=chunk)
        close(logprobs.detach(), expected)
        (logprobs * tensor(scales)).sum().backward()
        close(x.grad, slopes)
        assert torch.equal(w, tensor(weight)) and torch.equal(x.detach(), tensor(hidden))
        with torch.no_grad():
            assert torch.equal(
                frozen_logprobs(x, w, torch.tensor(tokens), temperature=temperature, chunk=chunk), logprobs
            )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_frozen_heads_gradient_is_its_slope(temperature):
    hidden, weight, tokens, _ = frozen_problem(3)
    x = tensor(hidden).requires_grad_()
    for chunk in (1, 2, 100):
        assert torch.autograd.gradcheck(
            lambda h, chunk=chunk: frozen_logprobs(
                h, tensor(weight), torch.tensor(tokens), temperature=temperature, chunk=chunk
            ),
            x,
            atol=1e-8,
        )


def test_a_frozen_head_within_a_graph_gives_what_log_softmax_gives():
    """The states come from layers before, some of them twice, and one state is not used."""
    generator = torch.Generator().manual_seed(2)
    x, layer, weight = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((7, 4), (4, 3), (30, 3))
    )
    picked, tokens = torch.tensor([5, 0, 0, 3, 6, 1, 1, 1]), torch.arange(8) * 3
    gradients = []
    for frozen in (True, False):
        a = layer.clone().requires_grad_()
        states = (x @ a).tanh()[picked]
        if frozen:
            logprobs = frozen_logprobs(states, weight, tokens, temperature=0.7, chunk=3)
        else:
            logprobs = torch.log_softmax(states @ weight.T / 0.7, -1)[torch.arange(8), tokens]
        logprobs.exp().sum().backward()
        gradients.append(a.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_frozen_head_bears_large_logits(dtype):
    weight = torch.tensor([[5e3, 1.0], [5e3, 2.0], [-5e3, 0.0]], dtype=dtype)
    states = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], dtype=dtype, requires_grad=True)
    logprobs = frozen_logprobs(states, weight, torch.tensor([0, 2, 2]))
    logprobs.sum().backward()
    # logits 5001, 5002, -5000 | -4999, -4998, 5000 | 4999, 4998, -5000
    expected = [-math.log1p(math.e), 0.0, -9999.0 - math.log1p(math.exp(-1))]
    p = 1 / (1 + math.exp(-1))  # of the larger of the first two where they differ by one
    slopes = [[0.0, 1.0 - (1.0 + p)], [0.0, 0.0], [-1e4, -(2.0 - p)]]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(logprobs.double(), tensor(expected), rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(states.grad.double(), tensor(slopes), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_head_in_16_bits_rounds_no_logit(dtype):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(6, 8, generator=generator).to(dtype).requires_grad_()
    weight, tokens = torch.randn(50, 8, generator=generator).to(dtype), torch.arange(6) * 8
    logprobs = frozen_logprobs(states, weight, tokens, temperature=0.7, chunk=4)
    assert logprobs.dtype == torch.float32
    logits = (states.detach().double() @ weight.double().T).tolist()  # of the states as they are rounded
    for n, row in enumerate(logits):
        assert logprobs[n].item() == pytest.approx(oracles.token_logprob(row, int(tokens[n]), 0.7), abs=1e-5)
    logprobs.sum().backward()
    assert states.grad.dtype == dtype
    wide = states.detach().double().requires_grad_()
    frozen_logprobs(wide, weight.double(), tokens, temperature=0.7).sum().backward()
    assert float((states.grad - wide.grad).norm() / wide.grad.norm()) < 0.02


def test_a_frozen_head_without_positions_has_an_empty_gradient():
    states = torch.zeros(4, 3, requires_grad=True)
    logprobs = frozen_logprobs(states[:0], torch.ones(5, 3), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert torch.equal(states.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_slope_of_an_entropy_is_that_of_its_sum(temperature, chunk):
    generator = torch.Generator().manual_seed(3)
    states, weight = torch.randn(5, 4, generator=generator).double(), torch.randn(7, 4, generator=generator).double()
    states.requires_grad_()
    found = chunked_entropies(states, lambda part: part @ weight.T, temperature=temperature, chunk=chunk)
    p = (states @ weight.T / temperature).softmax(-1)
    expected = sum(-p[i, v] * torch.log(p[i, v]) for i in range(5) for v in range(7))
    assert found.shape == (5,)
    torch.testing.assert_close(found.sum(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, states)[0] for each in (found.sum(), expected)))


@pytest.mark.parametrize("lowest", [-math.inf, -1e4])
def test_a_token_that_cannot_be_drawn_adds_nothing_to_an_entropy_or_its_slope(lowest):
    logits = torch.tensor([[1.0, -0.5, lowest]]).requires_grad_()
    rest = logits.detach()[:, :2].requires_grad_()
    torch.testing.assert_close(entropies(logits), entropies(rest))
    found, expected = (torch.autograd.grad(entropies(each), each)[0] for each in (logits, rest))
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(1, 1)], 1))
