"""`align chat`: a conversation in the terminal with one policy, or two side by side, score and KL beside each answer.

Every answer is drawn as PPO draws it, and random numbers are those of the seed and the turn: the same words bring the
same answers. Which of two answers is better may be kept, as TRL's preference pairs.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from align.data import Message, Prompt, decode_completion, encode_prompt, end_token_ids
from align.errors import BadInput
from align.files import writing
from align.identity import base_of, has_adapter
from align.manifest import MANIFEST, check_parent, read_manifest
from align.maths.kl import kl_estimate
from align.models.base import stop_ids
from align.models.roles import Bases, Role
from align.rewards import Answers, RewardMix, build_rewards
from align.rollout.choose import sampler_of
from align.rollout.reading import read_all
from align.rollout.sampler import Sampler, Seeds
from align.settings import Model, Reward, Sampling
from align.settings.about import POLICIES, SCORERS
from align.wording import safe

STREAM = 7  # of random numbers: no stage's
BASE = "base"  # the name of the model that the first policy stands over
HELP = "/new begins anew, /again answers once more, /system TEXT, /quit (or ctrl-D) ends"


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    run: str
    other: str | None
    reward: str | None
    keep: str | None
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Speaker:
    """A policy, what draws its answers, and what KL is measured to: the base that it stands over."""

    name: str
    role: Role
    reference: Role
    tokenizer: Any
    sampler: Sampler
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a speaker said, and what is told of it."""

    text: str
    figures: str


def chat(order: Order) -> None:
    """Talks until the input ends.

    Raises:
        BadInput: a run is none, or not finished; nothing has been loaded.
    """
    _check(order)
    console = Console(highlight=False)
    bases = _bases(order.run)
    speakers = [_speaker(name, bases, order.sampling) for name in (order.run, *([order.other] if order.other else []))]
    reward = (
        build_rewards([Reward.model_validate({"use": "learned", "from": order.reward})], bases)
        if order.reward
        else None
    )
    console.print(Text(HELP, style="dim"))
    _Talk(console, speakers, reward, order).go()


def _check(order: Order) -> None:
    for name, what in ((order.run, "RUN"), (order.other, "OTHER")):
        if name is not None and not (what == "OTHER" and name == BASE):
            check_parent(name, POLICIES, f"align chat {what}")
    if order.reward is not None:
        check_parent(order.reward, SCORERS, "--reward")
    if order.keep is not None:
        if order.other is None:
            raise BadInput("--keep keeps which of two answers is better, and there is one policy; name another")
        if Path(order.keep).suffix != ".jsonl" or not Path(order.keep).absolute().parent.is_dir():
            raise BadInput(f"--keep: {order.keep} is no .jsonl file in a folder that is there")
        with writing(order.keep), Path(order.keep).open("a", encoding="utf-8"):
            pass  # else that it cannot be written is told after a choice


def _bases(run: str) -> Bases:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (Path(run) / MANIFEST).is_file():
        return Bases(Model(base=run), device, is_stages=False)
    manifest = read_manifest(run)
    settings = Model.model_validate(manifest["recipe"]["model"])
    own = {} if has_adapter(run) else {"revision": None}
    return Bases(settings.over(base=base_of(manifest, run), **own), device, is_stages=False)


def _speaker(name: str, bases: Bases, sampling: Sampling) -> Speaker:
    folder = None if name in (BASE, bases.settings.base) else name
    role, tokenizer = bases.role(folder), bases.tokenizer(folder)
    under = bases.base_of(folder) if folder is not None and has_adapter(folder) else bases.main
    reference = role if folder is None else bases.role(None if under is bases.main else under.name)
    end_ids = end_token_ids(tokenizer, stop_ids(role.causal))
    sampler = sampler_of(role, sampling, end_ids=end_ids, pad_id=tokenizer.pad_token_id, batch_size=1)
    return Speaker(Path(name).name, role, reference, tokenizer, sampler, end_ids)


class _Talk:
    """A conversation, and what has been said in it."""

    def __init__(self, console: Console, speakers: list[Speaker], reward: RewardMix | None, order: Order):
        self.console, self.speakers, self.reward, self.order = console, speakers, reward, order
        self.system: list[Message] = []
        self.said: list[Message] = []
        self.turn = 0

    def go(self) -> None:
        commands = {"/new": self._new, "/again": self._again, "/system": self._instruct}
        while (line := self._ask("you> ")) is not None and line != "/quit":
            word, _, rest = line.partition(" ")
            if word in commands:
                commands[word](rest.strip())
            elif word.startswith("/"):
                self.console.print(Text(HELP, style="dim"))
            elif line:
                self.said.append(Message(role="user", content=line))
                self._answer()

    def _ask(self, prompt: str) -> str | None:
        """A line of input, shown too where no person types it; None: it has ended."""
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return None
        line = line.encode("utf-8", "replace").decode("utf-8")  # half characters are no text
        if not sys.stdin.isatty():
            print(safe(line))
        return line

    def _new(self, rest: str) -> None:
        self.said = []

    def _instruct(self, rest: str) -> None:
        self.system, self.said = [Message(role="system", content=rest)] if rest else [], []

    def _again(self, rest: str) -> None:
        if self.said and self.said[-1]["role"] == "assistant":
            self.said.pop()
        if self.said:
            self._answer()

    def _answer(self) -> None:
        self.turn += 1
        prompt = Prompt((*self.system, *self.said), {}, "the conversation")
        if why := self._too_long(prompt):
            self.said.pop()
            self.console.print(Text(why, style="yellow"))
            return
        answers = [self._of(speaker, prompt) for speaker in self.speakers]
        for number, (speaker, answer) in enumerate(zip(self.speakers, answers, strict=True), 1):
            name = f"{number} {speaker.name}" if len(answers) > 1 else speaker.name
            self.console.print(Text(safe(f"{name}> "), style="bold").append(safe(answer.text), style="not bold"))
            self.console.print(Text(answer.figures, style="dim"))
        self.said.append(Message(role="assistant", content=answers[self._choice(prompt, answers)].text))

    def _too_long(self, prompt: Prompt) -> str:
        """Why a speaker cannot answer: what it has positions for."""
        for speaker in self.speakers:
            most = getattr(speaker.role.causal.config.get_text_config(), "max_position_embeddings", None)
            length = len(encode_prompt(speaker.tokenizer, prompt)) + self.order.sampling.max_new_tokens
            if isinstance(most, int) and length > most:
                return (
                    f"{length:,} tokens with the answer are over the {most:,} that {speaker.name} has; /new begins anew"
                )
        return ""

    def _of(self, speaker: Speaker, prompt: Prompt) -> Answer:
        ids, temperature = encode_prompt(speaker.tokenizer, prompt), self.order.sampling.temperature
        seeds = Seeds(self.order.seed, STREAM, self.turn, [0])
        rollouts = speaker.sampler.sample([ids], self.order.sampling, seeds).rollouts
        own, reference = (
            read_all(role, rollouts, temperature=temperature) for role in (speaker.role, speaker.reference)
        )
        kl = float(kl_estimate(own.logprobs, reference.logprobs).sum())
        text = decode_completion(speaker.tokenizer, rollouts.answers[0], speaker.end_ids)
        ended = bool(rollouts.ended[0])
        figures = [f"{len(rollouts.answers[0])} tokens{'' if ended else ', cut off'}", f"KL to its base {kl:.2f} nats"]
        if self.reward is not None:
            answers = Answers([prompt], rollouts.prompts, [text], rollouts.answers, [ended], speaker.tokenizer)
            figures.insert(0, f"score {self.reward.told(answers).totals[0]:.3f}")
        return Answer(text, "  ".join(figures))

    def _choice(self, prompt: Prompt, answers: list[Answer]) -> int:
        """Which answer the conversation goes on with; kept, if that was asked for."""
        if len(answers) == 1:
            return 0
        line = self._ask("better (1, 2; nothing: neither)> ")
        if line not in ("1", "2"):
            return 0
        chosen = int(line) - 1
        texts = {answer.text.strip() for answer in answers}
        if self.order.keep is not None and (len(texts) == 1 or "" in texts):
            self.console.print(Text("not kept: the answers are the same, or one is empty", style="dim"))
        elif self.order.keep is not None:
            _keep(Path(self.order.keep), prompt, answers[chosen].text, answers[1 - chosen].text)
            self.console.print(Text(f"kept in {self.order.keep}", style="dim"))
        return chosen


def _keep(file: Path, prompt: Prompt, chosen: str, rejected: str) -> None:
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    line = json.dumps({"prompt": prompt.prompt, **answers}, ensure_ascii=False) + "\n"
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            line = line if lines.read() == b"\n" else f"\n{line}"  # an editor may have left the last one open
        lines.write(line.encode("utf-8", "backslashreplace"))
