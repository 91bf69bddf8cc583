"""`align chat`: a conversation in the terminal with one policy, or two side by side, score and KL beside each answer.

Every answer is drawn as PPO draws it, and random numbers are those of the seed and the turn: the same words bring the
same answers. Which of two answers is better may be kept, as TRL's preference pairs.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from align.data import Message, Prompt, decode_completion, encode_prompt, end_token_ids, ending_of
from align.data.templates import TEMPLATE_CURE
from align.errors import BadInput
from align.files import writing
from align.identity import base_of, has_adapter
from align.manifest import MANIFEST, read_manifest
from align.maths.kl import kl_estimate
from align.models.base import stop_ids
from align.models.facts import quantised_by
from align.models.loading import load_adapter_config, load_config
from align.models.roles import Bases, Role
from align.models.tokenizer import first_line, tokenizer_of
from align.parents import check_start, is_another_base, may_be_loaded
from align.rewards import Answers, RewardMix, build_rewards
from align.rollout.choose import sampler_of
from align.rollout.reading import read_all
from align.rollout.sampler import Sampler, Seeds
from align.settings import Model, Reward, Sampling
from align.settings.about import POLICIES, SCORERS
from align.wording import safe

STREAM = 7  # of random numbers: no stage's
BASE = "base"  # the name of the model that the first policy stands over
PLAIN = "has no chat template: it goes on from what you type as plain text, each line by itself"
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

    @property
    def takes_turns(self) -> bool:
        """Whether it reads a conversation, by a chat template."""
        return self.tokenizer.chat_template is not None

    @property
    def positions(self) -> float:
        """Tokens of a sequence, as far as its configuration says."""
        most = getattr(self.role.causal.config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) else math.inf


@dataclass(frozen=True)
class Answer:
    """What a speaker said, and what is told of it."""

    text: str
    figures: str


def chat(order: Order) -> None:
    """Talks until the input ends.

    Raises:
        BadInput: a run is none, or not finished, or its base is not here; nothing has been loaded.
    """
    model = _checked(order)
    console = Console(highlight=False)
    bases = Bases(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), is_stages=False)
    speakers = [_speaker(name, bases, order) for name in (order.run, *([order.other] if order.other else []))]
    reward = (
        build_rewards([Reward.model_validate({"use": "learned", "from": order.reward})], bases)
        if order.reward
        else None
    )
    for speaker in speakers:
        if not speaker.takes_turns:
            console.print(Text(f"{speaker.name} {PLAIN}", style="dim"))
    console.print(Text(HELP, style="dim"))
    _Talk(console, speakers, reward, order).go()


def _checked(order: Order) -> Model:
    """What RUN stands over, once everything is known to be what it should be.

    Raises:
        BadInput: something is not, in one line.
    """
    policies = [(order.run, "align chat RUN")]
    if order.other not in (None, BASE):
        policies.append((str(order.other), "align chat OTHER"))
    for name, where in policies:
        check_start(name, POLICIES, where)
    if order.reward is not None:
        check_start(order.reward, SCORERS, "--reward")
    if order.keep is not None:
        if order.other is None:
            raise BadInput("--keep keeps which of two answers is better, and there is one policy; name another")
        if Path(order.keep).suffix != ".jsonl" or not Path(order.keep).absolute().parent.is_dir():
            raise BadInput(f"--keep: {order.keep} is no .jsonl file in a folder that is there")
        with writing(order.keep), Path(order.keep).open("a", encoding="utf-8"):
            pass  # else that it cannot be written is told after a choice
    model = _model_of(*policies[0])
    for name, where in policies:
        named, revision = _named_base(name, where)
        if is_another_base(named, revision, model):
            raise BadInput(
                f"{where}: the adapter in {name} is for the base {named}, and {order.run} stands over {model.base}; "
                "talk with each by itself"
            )
        _check_template(tokenizer_of(model, None if name == model.base else name), where)
    return model


def _model_of(run: str, where: str) -> Model:
    """What a policy stands over: the base of a run or of an adapter; another whole model stands for itself."""
    if (Path(run) / MANIFEST).is_file():
        manifest = read_manifest(run)
        settings = Model.model_validate(manifest["recipe"]["model"])
        own = {} if has_adapter(run) else {"revision": None}
        return settings.over(base=base_of(manifest, run), **own)
    base, revision = _named_base(run, where) if has_adapter(run) else (run, None)
    if not may_be_loaded(base):
        raise BadInput(
            f"{where}: the base that {run} names, {base or 'none'}, is neither a folder here nor a Hub id "
            "(`owner/name`); correct `base_model_name_or_path` in its adapter_config.json"
        )
    try:
        by, _ = quantised_by(load_config(base, revision).to_dict()) or ("", None)
    except (OSError, ValueError) as error:
        raise BadInput(f"{where}: {base} cannot be loaded: {first_line(error)}") from error
    return Model(base=base, revision=revision, load_in="nf4" if by == "bitsandbytes" else "auto")


def _named_base(name: str, where: str) -> tuple[str, str | None]:
    """The base that an adapter made elsewhere names (nothing: it names none, or this is something else) and its
    revision."""
    if (Path(name) / MANIFEST).is_file() or not has_adapter(name):
        return "", None
    config: Any = load_adapter_config(name)
    if config.task_type == "SEQ_CLS":
        raise BadInput(f"{where}: {name} is a classifier's adapter, which writes no text; name it by --reward")
    return config.base_model_name_or_path or "", config.revision


def _check_template(tokenizer: Any, where: str) -> None:
    """Raises BadInput where the chat template, if any, does not even take a question."""
    try:
        ending_of(tokenizer)
    except BadInput as error:
        raise BadInput(f"{where}: {_without_cure(error)}; correct the template beside its tokenizer") from error


def _without_cure(error: BadInput) -> str:
    """What is wrong with a template, without the key of a recipe that would give another."""
    return str(error).removesuffix(f"; {TEMPLATE_CURE}")


def _speaker(name: str, bases: Bases, order: Order) -> Speaker:
    folder, reader = (None if each in (BASE, bases.settings.base) else each for each in (name, order.run))
    role = bases.role(folder)
    tokenizer = bases.tokenizer(reader if name == BASE else folder)  # the base reads what RUN does
    under = bases.base_of(folder) if folder is not None and has_adapter(folder) else bases.main
    reference = role if folder is None else bases.role(None if under is bases.main else under.name)
    end_ids = end_token_ids(tokenizer, stop_ids(role.causal))
    sampler = sampler_of(role, order.sampling, end_ids=end_ids, pad_id=tokenizer.pad_token_id, batch_size=1)
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
        prompts = [self._prompt_of(speaker) for speaker in self.speakers]
        if why := self._why_not(prompts):
            self.said.pop()
            self.console.print(Text(safe(why), style="yellow"))
            return
        answers = [self._of(speaker, prompt) for speaker, prompt in zip(self.speakers, prompts, strict=True)]
        for number, (speaker, answer) in enumerate(zip(self.speakers, answers, strict=True), 1):
            name = f"{number} {speaker.name}" if len(answers) > 1 else speaker.name
            self.console.print(Text(safe(f"{name}> "), style="bold").append(safe(answer.text), style="not bold"))
            self.console.print(Text(answer.figures, style="dim"))
        self.said.append(Message(role="assistant", content=answers[self._choice(prompts, answers)].text))

    def _prompt_of(self, speaker: Speaker) -> Prompt:
        """What a speaker goes on from: the conversation, or without a chat template the last words."""
        turns = (*self.system, *self.said)
        return Prompt(turns if speaker.takes_turns else turns[-1]["content"], {}, "the conversation")

    def _why_not(self, prompts: list[Prompt]) -> str:
        """Why a speaker cannot answer: what its template takes, or it has positions for."""
        for speaker, prompt in zip(self.speakers, prompts, strict=True):
            try:
                length = len(encode_prompt(speaker.tokenizer, prompt))
            except BadInput as error:  # a template may refuse a system message, or want one
                cure = "/system alone begins anew without a" if self.system else "/system TEXT begins anew with a"
                return f"{_without_cure(error)}; {cure} system message"
            if length >= speaker.positions:
                most = f"{speaker.name}'s {speaker.positions:,}"
                return f"{length:,} tokens leave none of {most} for an answer; /new begins anew"
        return ""

    def _of(self, speaker: Speaker, prompt: Prompt) -> Answer:
        ids, temperature = encode_prompt(speaker.tokenizer, prompt), self.order.sampling.temperature
        seeds = Seeds(self.order.seed, STREAM, self.turn, [0])
        room = int(min(self.order.sampling.max_new_tokens, speaker.positions - len(ids)))
        sampling = self.order.sampling.model_copy(update={"max_new_tokens": room})
        rollouts = speaker.sampler.sample([ids], sampling, seeds).rollouts
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

    def _choice(self, prompts: list[Prompt], answers: list[Answer]) -> int:
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
            prompt = next((each for each in prompts if not isinstance(each.prompt, str)), prompts[0])  # says the most
            _keep(Path(self.order.keep), prompt, answers[chosen].text, answers[1 - chosen].text)
            self.console.print(Text(f"kept in {self.order.keep}", style="dim"))
        return chosen


def _keep(file: Path, prompt: Prompt, chosen: str, rejected: str) -> None:
    answers: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if not isinstance(prompt.prompt, str):
        answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    line = json.dumps({"prompt": prompt.prompt, **answers}, ensure_ascii=False) + "\n"
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            line = line if lines.read() == b"\n" else f"\n{line}"  # an editor may have left the last one open
        lines.write(line.encode("utf-8", "backslashreplace"))
