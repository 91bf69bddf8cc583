"""A sampler of your own, `sampling: {engine: recipes/custom/echo.py:Echo}`: the prompt's end comes back as the answer.

A server or an engine of yours stands in the same place: it gets token ids and gives token ids, with its own
log-probabilities of them. The trainer reads its own, and weighs the loss of each token by its probability under the
policy over the sampler's, 2 at the most (`ppo.importance_cap`): give what the tokens were really drawn with. In the
figures `sampler_kl` says how far the two are apart, and `importance_weight` what that makes of the loss.
"""

import torch

from align.rollout.rollouts import rollouts_of
from align.rollout.sampler import Sampled, Sampler


class Echo(Sampler):
    """Certain of what it says: every log-probability is 0."""

    def sample(self, prompts, sampling, seeds):
        answers = [list(prompt[-sampling.max_new_tokens :]) for prompt in prompts]
        rollouts = rollouts_of(prompts, answers, end_ids=self.end_ids)
        return Sampled(rollouts, torch.zeros(rollouts.response_mask.shape))
