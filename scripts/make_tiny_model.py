"""Pretrain the quickstart's base model from scratch: a Llama of about a million parameters.

    python scripts/make_tiny_model.py [recipes/quickstart/model]

It reads what the micro-world of recipes/quickstart/world.py might have on its bookshelves: descriptions,
small stories, and shop conversations in which the helper is often wrong, rude or occupied with someone
else's order, and the customer says how content they are. So the base knows the language, can copy,
and has seen good service, but does not provide it: that is left to SFT and PPO.

Left out on purpose: validation, checkpoints, mixed precision. About ten minutes on one CPU core.
"""

import argparse
import importlib.util
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL = [PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
MAX_VOCABULARY = 1024
MAX_LENGTH = 256

# Every turn is closed by the end token and nothing stands between turns, so that the rendering of some
# messages plus the generation prompt is a prefix, token by token, of the rendering with the answer.
CHAT_TEMPLATE = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

PEOPLE = ("Anna", "Tom", "Maria", "Peter", "Sara", "John")
PLACES = ("table", "chair", "floor", "shelf", "window")


def load_world():
    """The recipe's world module, by its path: recipes are files, not a package."""
    path = ROOT / "recipes" / "quickstart" / "world.py"
    spec = importlib.util.spec_from_file_location("world", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = load_world()


# ------------------------------------------------------------------------------------ what it reads


def description(rng: random.Random) -> str:
    """Things and their colours, said twice over: the first reason to look back in the text."""
    sentences = []
    for item in (world.draw_item(rng) for _ in range(rng.choice((2, 3)))):
        is_one = item[0] == "a"
        there, verb = ("There is", "is") if is_one else ("There are", "are")
        sentences.append(f"{there} {' '.join(item)} on the {rng.choice(PLACES)}.")
        sentences.append(f"The {item[2]} {verb} {item[1]}.")
    return " ".join(sentences)


def echo(rng: random.Random) -> str:
    """A parlour game: repeat what was said. Nothing teaches a model to copy sooner."""
    words = " ".join(rng.sample([*world.COUNTS, *world.COLOURS, *world.NOUNS], rng.randrange(4, 10)))
    return " ".join(f"{person} says {words}." for person in rng.sample(PEOPLE, 3))


def story(rng: random.Random) -> str:
    """Someone wants things and someone brings them, rightly or not: copying, and noticing a wrong copy."""
    (one, other), order = rng.sample(PEOPLE, 2), world.draw_items(rng.choice((2, 3)), rng)
    brought = list(order)
    while rng.random() < 0.15:
        brought = world.spoil(brought, rng)
    wanted, given = world.listing(order), world.listing(brought)
    aside = rng.choice(world.CHATTER) + " " if rng.random() < 0.2 else ""
    if sorted(brought) == sorted(order):
        ending = f"{one} is happy."
    else:
        ending = f"{one} is sad. {one} wanted {wanted}."
    return f"{one} wants {wanted}. {aside}{other} brings {one} {given}. {ending}"


def reaction(score: float) -> str:
    """What a customer says to an answer. It teaches the base, in passing, to tell good from bad."""
    if score >= 0.95:
        return "Thank you, this is perfect."
    if score >= 0.7:
        return "Thank you, this is good."
    if score >= 0.45:
        return "Well, this is almost good."
    return "This is not good." if score >= 0.2 else "This is all wrong."


def conversation(rng: random.Random, deaf: float, best: float) -> str:
    """A chat by the template, its helper of any skill up to `best`, and at times deaf to the order."""
    order, prompt = world.draw_request(rng)
    heard = world.draw_request(rng)[0] if rng.random() < deaf else order
    answer = world.draw_answer(heard, rng.uniform(0.0, best), rng)
    score = world.gold([prompt], [answer])[0]
    messages = [*prompt, world.say("assistant", answer), world.say("user", reaction(score))]
    return BOS + "".join(f"<|{message['role']}|>{message['content']}{EOS}" for message in messages)


@dataclass(frozen=True)
class Course:
    """One stretch of reading, with a learning rate that warms up and falls by itself."""

    steps: int
    rate: float
    seed: int  # not the data files' seed: their orders should be new to the model
    echo_share: float  # of the steps, at the start
    deaf: float
    best: float

    def draw_text(self, rng: random.Random, progress: float) -> str:
        """A text for a model that has read this share of the course.

        It plays echo alone at first: mixed in among the other texts, whose things are mostly chance, the
        same game takes several times as long to teach copying.
        """
        if progress < self.echo_share:
            return f"{BOS}{echo(rng)}{EOS}"
        if rng.random() < 0.65:
            return conversation(rng, self.deaf, self.best)
        return BOS + rng.choice((echo, story, story, description))(rng) + EOS


# The first course teaches copying, against helpers of whom a third answer someone else; the second has more
# who listen, of less skill. One course of the same length left the base a worse copier when tried.
COURSES = (
    Course(steps=3000, rate=2e-3, seed=1_000_003, echo_share=0.3, deaf=0.33, best=1.0),
    Course(steps=1000, rate=1.5e-3, seed=7, echo_share=0.0, deaf=0.15, best=0.8),
)


# ----------------------------------------------------------------------------------- the tokenizer


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the world's words are one token each, and any other text still round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,  # fewer when the texts run out of words to merge
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------ the pretraining


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Every matrix's sizes are multiples of 64, the block size of 4-bit quantisation."""
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): the usual 0.02 is for wide models
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(course: Course, tokenizer: PreTrainedTokenizerFast, size: int, chunk: int = 16):
    """Batches of token ids, padded on the right; sorting a chunk by length spares padding."""
    rng, steps = random.Random(course.seed), course.steps
    for first in range(0, steps, chunk):
        ids = tokenizer([course.draw_text(rng, first / steps) for _ in range(size * chunk)])["input_ids"]
        ids.sort(key=len)
        starts = list(range(0, len(ids), size))
        rng.shuffle(starts)
        for start in starts[: steps - first]:
            rows = [torch.tensor(row[:MAX_LENGTH]) for row in ids[start : start + size]]
            yield torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=tokenizer.pad_token_id
            )  # (B, T)


def pretrain(model: LlamaForCausalLM, tokenizer, course: Course, batch_size: int) -> None:
    steps = course.steps
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=course.rate, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    start = time.perf_counter()
    for step, tokens in enumerate(batches(course, tokenizer, batch_size)):
        is_token = tokens != tokenizer.pad_token_id
        labels = tokens.masked_fill(~is_token, -100)
        loss = model(input_ids=tokens, attention_mask=is_token.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's base model.")
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "recipes" / "quickstart" / "model")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokenizer")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # matrices this small gain little from more, and one adds up in one order
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer([COURSES[0].draw_text(rng, progress=1.0) for _ in range(5000)])
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    for course in COURSES:
        pretrain(model, tokenizer, course, arguments.batch_size)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
