"""What theory says of asking people, measured with the project's own routing and gate."""

import math
import random

import pytest
import torch

from align.feedback.annotators import Annotator
from align.feedback.gate import confidence_and_agreement, length_bias, soft_label
from align.feedback.routing import Item, Shares, route
from align.maths.calibration import expected_calibration_error, fit_temperature, wilson_interval
from align.maths.ensembles import best_of_n_kl

# ---- how accurate labels are when people take some of them

GOLD, NOISE = 2.0, 1.5  # gold margins ~ N(0, 2^2), the judge's = gold + N(0, 1.5^2)
NUM_ITEMS = 20_000
RANDOM, UNCERTAIN = (
    Shares(audit=1.0, disagreement=0.0, uncertainty=0.0),
    Shares(audit=0.0, disagreement=0.0, uncertainty=1.0),
)


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def accuracy_in_theory(human_share: float, *, by_uncertainty: bool) -> float:
    """1 - the integral, over judge margins m that people do not see, of density(m) P(gold has the other sign | m).

    gold | m ~ N(s m, s NOISE^2) with s = GOLD^2 / (GOLD^2 + NOISE^2). People are right, and see |m| < cut, or any m.
    """
    scale = math.hypot(GOLD, NOISE)
    shrink = GOLD**2 / scale**2
    spread = math.sqrt(shrink) * NOISE
    step, errors, seen = 1e-3, 0.0, 0.0
    for i in range(int(10 * scale / step)):
        m = (i + 0.5) * step
        mass = 2.0 * step * math.exp(-0.5 * (m / scale) ** 2) / (scale * math.sqrt(2.0 * math.pi))  # of m and -m
        seen += mass
        if not by_uncertainty or seen > human_share:
            errors += mass * normal_cdf(-shrink * m / spread)
    return 1.0 - (errors if by_uncertainty else (1.0 - human_share) * errors)


@pytest.fixture(scope="module")
def judged() -> list[tuple[float, float]]:
    rng = random.Random(0)
    golds = [rng.gauss(0.0, GOLD) for _ in range(NUM_ITEMS)]
    return [(gold, gold + rng.gauss(0.0, NOISE)) for gold in golds]


@pytest.mark.parametrize(
    "shares, human_share, accuracy",
    [
        (RANDOM, 0.1, 0.815),
        (RANDOM, 0.2, 0.836),
        (RANDOM, 0.4, 0.877),
        (UNCERTAIN, 0.1, 0.842),
        (UNCERTAIN, 0.2, 0.882),
        (UNCERTAIN, 0.4, 0.942),
    ],
)
def test_accuracy_of_merged_labels(judged, shares, human_share, accuracy):
    items = [Item(key, uncertainty=-abs(margin)) for key, (_, margin) in enumerate(judged)]
    person, right, num_human = Annotator("always right"), 0, 0
    for to in route(items, round(human_share * NUM_ITEMS), shares, seed=0):
        gold, margin = judged[to.key]
        probability: float | None = float(margin > 0.0)
        if to.reason != "machine":
            probability = soft_label([person.label(gold, 0.0, person.rng(to.key, seed=0))])
            num_human += 1
        right += probability == float(gold > 0.0)
    assert num_human == human_share * NUM_ITEMS
    theory = accuracy_in_theory(human_share, by_uncertainty=shares is UNCERTAIN)
    assert theory == pytest.approx(accuracy, abs=1e-3)
    assert right / NUM_ITEMS == pytest.approx(theory, abs=0.01)  # standard deviation at most 0.0026


def test_the_integral_agrees_with_the_closed_form():
    # two normals of correlation r have the same sign with probability 1/2 + arcsin(r) / pi
    closed = 0.5 + math.asin(GOLD / math.hypot(GOLD, NOISE)) / math.pi
    assert accuracy_in_theory(0.0, by_uncertainty=False) == pytest.approx(closed, abs=1e-6)
    assert accuracy_in_theory(0.0, by_uncertainty=True) == pytest.approx(closed, abs=1e-6)
    assert accuracy_in_theory(1.0, by_uncertainty=True) == pytest.approx(1.0, abs=1e-6)


# ---- a bias that two machines share


class Machines:
    """A judge and a reward model that see gold + bias x length, each with noise of its own, and an audit by people.

    The reward model is calibrated on the judge, as it would be were people not asked.
    """

    def __init__(self, bias: float, seed: int = 0, num_audit: int = 500) -> None:
        rng = random.Random(seed)
        gold, self.lengths = ([rng.gauss(0.0, scale) for _ in range(NUM_ITEMS)] for scale in (2.0, 1.0))
        judge, reward = (
            [g + bias * d + rng.gauss(0.0, 1.0) for g, d in zip(gold, self.lengths, strict=True)] for _ in range(2)
        )
        self.judged = [float(margin > 0.0) for margin in judge]
        margins = torch.tensor(reward, dtype=torch.float64)
        temperature = fit_temperature(margins, torch.tensor(self.judged))
        self.probability = torch.sigmoid(margins / temperature).tolist()

        items = [Item(key, uncertainty=-abs(margin)) for key, margin in enumerate(reward)]
        routed = route(items, 2 * num_audit, Shares(audit=0.5, disagreement=0.0, uncertainty=0.5), seed=seed)
        self.audit = [to.key for to in routed if to.reason == "audit"]
        person = Annotator("ada")
        labels = {key: soft_label([person.label(gold[key], 0.0, person.rng(key, seed=seed))]) for key in self.audit}
        self.people = {key: label for key, label in labels.items() if label is not None}

    def confidence_and_agreement_with(self, answers) -> tuple[float, float]:
        """Means over the audit of the reward model's confidence, and of the agreement with `answers`."""
        folded = [confidence_and_agreement(self.probability[key], answers[key]) for key in self.audit]
        return sum(c for c, _ in folded) / len(folded), sum(a for _, a in folded) / len(folded)

    def length_z_against(self, answers) -> float:
        columns = [(self.probability[key], answers[key], self.lengths[key]) for key in self.audit]
        return length_bias(*zip(*columns, strict=True)).z


@pytest.fixture(scope="module")
def fair() -> Machines:
    return Machines(bias=0.0)


@pytest.fixture(scope="module")
def biased() -> Machines:
    return Machines(bias=2.0)


def test_two_machines_with_one_bias_look_fine_to_each_other(fair, biased):
    agreements = {}
    for machines in (fair, biased):
        confidence, agreement = machines.confidence_and_agreement_with(machines.judged)
        low, high = wilson_interval(agreement, len(machines.audit))
        assert low < confidence < high
        calibration = expected_calibration_error(torch.tensor(machines.probability), torch.tensor(machines.judged))
        assert calibration < 0.03
        assert machines.length_z_against(machines.judged) < 2.0
        agreements[machines] = agreement
    assert agreements[biased] > agreements[fair]  # they look the better for it


def test_the_audit_reveals_the_bias_that_they_share(fair, biased):
    confidence, agreement = biased.confidence_and_agreement_with(biased.people)
    assert len(biased.people) == 500
    assert wilson_interval(agreement, 500, z=4.0)[1] < confidence
    assert biased.length_z_against(biased.people) > 6.0

    confidence, agreement = fair.confidence_and_agreement_with(fair.people)
    assert wilson_interval(agreement, 500)[1] > confidence
    assert fair.length_z_against(fair.people) < 3.0


# ---- the price of the best of n


@pytest.mark.parametrize("n", [2, 4, 16])
def test_divergence_of_the_best_of_n_samples(n):
    # outcomes 0, 1, ... of unequal probability, each better than the one before
    generator, rng = torch.Generator().manual_seed(n), random.Random(n)
    weights = torch.tensor([rng.uniform(0.2, 1.8) for _ in range(2000)], dtype=torch.float64)
    probability = weights / weights.sum()
    num_samples = 100_000
    drawn = torch.multinomial(probability, num_samples * n, replacement=True, generator=generator)
    best = drawn.view(num_samples, n).amax(1)
    reached = probability.cumsum(0)
    log_ratio = ((reached**n - (reached - probability) ** n) / probability).log()[best]  # log P(best is y) / P(y)
    measured, error = float(log_ratio.mean()), float(log_ratio.std()) / math.sqrt(num_samples)
    assert error < 0.01
    assert measured == pytest.approx(best_of_n_kl(n), abs=4.0 * error)
