"""The quickstart's micro-world: a customer orders things in a shop, a helper answers.

    customer: My sister sold three white plates. Please bring me a red lamp and two green cups.
    helper:   Of course! Here are a red lamp and two green cups. Have a lovely day.

What makes an answer good is known exactly, so `gold` can judge it by a program. No stage may train on
that score: it is the ruler by which we see whether the learned reward, and PPO against it, did any good.
(The base model has read customers who are content with good answers and not with bad ones, as any base has.)

    python recipes/quickstart/world.py recipes/quickstart/data --seed 0

writes the demonstrations (of mixed quality: there must be something left to learn), the preference pairs
and the prompts. Whatever is "unseen" asks for a set of things that no other file asks for.
"""

import argparse
import json
import random
import re
from pathlib import Path

COUNTS = ("a", "two", "three", "four", "five", "six")
COLOURS = (
    "red",
    "green",
    "blue",
    "white",
    "black",
    "yellow",
    "brown",
    "pink",
    "grey",
    "silver",
    "golden",
    "purple",
)
NOUNS = (
    "lamp",
    "cup",
    "hat",
    "chair",
    "book",
    "clock",
    "basket",
    "kettle",
    "candle",
    "bowl",
    "plate",
    "spoon",
    "pillow",
    "mirror",
    "table",
    "ribbon",
    "bottle",
    "coat",
    "bag",
    "vase",
    "kite",
    "drum",
    "bell",
    "ball",
)
REQUESTS = (
    "Please bring me {}.",
    "I would like {}, please.",
    "Could you find me {}?",
    "May I have {}?",
    "Today I need {}.",
)
# Things that a customer mentions and does not ask for: a helper that copies blindly brings them too.
ASIDES = ("I already have {}.", "My sister sold {}.", "Yesterday I broke {}.")
GREETINGS = ("Hello!", "Good morning!", "How are you?")
OPENINGS = ("Of course!", "Certainly!", "With pleasure!", "Gladly!")
DELIVERIES = ("Here are {}.", "I bring you {}.", "I found {} for you.")
CLOSINGS = ("Enjoy!", "Have a lovely day.", "Please come again.", "Thank you for your visit.")
RUDE = ("What now?", "Whatever.", "Hurry up.", "Take it or leave it.", "Do not bother me.")
CHATTER = (
    "The weather is nice today.",
    "My uncle likes hot soup.",
    "I was late this morning.",
    "The street is very long.",
    "We have many things here.",
    "It may rain tomorrow.",
)

Item = tuple[str, str, str]  # count, colour, noun as written: ("two", "green", "cups")

ITEM = re.compile(rf"\b({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ((?:{'|'.join(NOUNS)})s?)\b", re.IGNORECASE)
# A well-formed list, after every item in it has become "@": "@", "@ and @", "@, @ and @".
LISTED = re.compile(r"@((, @)* and @)?")


def draw_items(number: int, rng: random.Random) -> list[Item]:
    """Things that differ in every attribute, so that "two" or "red" points at one of them only.

    That keeps copying within the reach of a very small model: each word tells which word follows it.
    """
    counts, colours, nouns = (rng.sample(words, number) for words in (COUNTS, COLOURS, NOUNS))
    return [
        (count, colour, noun + ("" if count == "a" else "s"))
        for count, colour, noun in zip(counts, colours, nouns, strict=True)
    ]


def draw_item(rng: random.Random) -> Item:
    return draw_items(1, rng)[0]


def draw_request(rng: random.Random) -> tuple[list[Item], list[dict]]:
    """An order of two or three things, and a customer's messages that place it."""
    *order, other = draw_items(rng.choice((2, 2, 2, 3, 3)) + 1, rng)
    return order, draw_prompt(order, other, rng)


def stem(item: Item) -> str:
    return item[2].removesuffix("s")


def listing(items: list[Item]) -> str:
    phrases = [" ".join(item) for item in items]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def draw_prompt(order: list[Item], other: Item, rng: random.Random) -> list[dict]:
    """The customer's messages: the order, at times after an aside or an earlier order (of `other`)."""
    request = rng.choice(REQUESTS).format(listing(order))
    kind = rng.random()
    if kind < 0.3:
        return [say("user", f"{rng.choice(ASIDES).format(listing([other]))} {request}")]
    if kind < 0.4:
        return [say("user", f"{rng.choice(GREETINGS)} {request}")]
    if kind < 0.5 and len(order) == 2:
        earlier = listing([other])
        answer = f"{rng.choice(OPENINGS)} {rng.choice(DELIVERIES).format(earlier)}"
        return [say("user", f"Please bring me {earlier}."), say("assistant", answer), say("user", request)]
    return [say("user", request)]


def spoil(order: list[Item], rng: random.Random) -> list[Item]:
    """One mistake in what is delivered: a wrong colour, count or thing, one too few or one too many."""
    items, other, at = list(order), draw_item(rng), rng.randrange(len(order))
    count, colour, noun = items[at]
    mistake = rng.choice(("colour", "colour", "count", "thing", "missing", "missing", "extra", "twice"))
    if mistake == "colour":
        items[at] = (count, other[1], noun)
    elif mistake == "count":
        items[at] = (other[0], colour, stem(items[at]) + ("" if other[0] == "a" else "s"))
    elif mistake == "thing":
        items[at] = other
    elif mistake == "missing" and len(items) > 1:
        del items[at]
    else:
        items.insert(rng.randrange(len(items) + 1), items[at] if mistake == "twice" else other)
    return items


def draw_answer(order: list[Item], skill: float, rng: random.Random) -> str:
    """An answer by a helper of the given skill, 0 (hopeless) to 1 (perfect)."""

    def slips(chance: float) -> bool:
        return rng.random() < chance * (1 - skill)

    items = list(order)
    while len(items) < 5 and slips(0.65):
        items = spoil(items, rng)
    sentences = [rng.choice(DELIVERIES).format(listing(items))]
    if not slips(0.8):
        sentences.insert(0, rng.choice(OPENINGS))
    if not slips(0.8):
        sentences.append(rng.choice(CLOSINGS))
    if slips(0.2):
        sentences[rng.choice((0, -1))] = rng.choice(RUDE)
    if slips(0.15):
        sentences.insert(0, rng.choice(RUDE))
    for _ in range(rng.choice((1, 2, 3)) if slips(0.35) else 0):
        # rambling, or saying the same again: what a policy that is paid for length would do
        again = rng.random() < 0.4 and len(sentences) < 4
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(sentences if again else CHATTER))
    answer = " ".join(sentences)
    if slips(0.15):
        words = answer.split(" ")
        answer = " ".join(words[: rng.randint(1, len(words))])
    return answer


# ------------------------------------------------------------------------------------------- the judge


def message_text(text_or_messages: str | list[dict], role: str) -> str:
    """The last turn of `role`, from messages, from a rendered chat or from plain text."""
    if not isinstance(text_or_messages, str):
        turns = [message["content"] for message in text_or_messages if message["role"] == role]
        return (turns[-1] if turns else "") or ""
    return text_or_messages.split(f"<|{role}|>")[-1].split("<|")[0]


def items_in(text: str) -> list[Item]:
    return [tuple(word.lower() for word in found) for found in ITEM.findall(text)]


def asked_for(customer: str) -> list[Item]:
    """What the customer asks for: the things in the last sentence that names any (asides come before)."""
    named = [items_in(sentence) for sentence in re.split(r"(?<=[.!?])\s+", customer)]
    return next((items for items in reversed(named) if items), [])


def accuracy(asked: list[Item], offered: list[Item]) -> float:
    """How much of the order is there, in 0..1, a third less for each thing that nobody asked for.

    A thing with one wrong attribute (its colour, or its count) earns 0.3: bringing the right noun is not
    nothing, but guessing must not pay.
    """
    earned, unclaimed = 0.0, list(offered)
    for item in asked:
        same_noun = [other for other in unclaimed if stem(other) == stem(item)]
        if not same_noun:
            continue
        best = max(same_noun, key=lambda other: sum(a == b for a, b in zip(other, item, strict=True)))
        unclaimed.remove(best)
        earned += 1.0 if best == item else 0.3 * (best[0] == item[0] or best[1] == item[1])
    return earned / len(asked) * (2 / 3) ** len(unclaimed)


def sentence_kind(sentence: str) -> str:
    if sentence in OPENINGS:
        return "opening"
    if sentence in CLOSINGS:
        return "closing"
    if sentence in RUDE:
        return "rude"
    blanked = ITEM.sub("@", sentence)
    for frame in DELIVERIES:
        before, after = frame.split("{}")
        is_framed = blanked.startswith(before) and blanked.endswith(after)
        if is_framed and LISTED.fullmatch(blanked[len(before) : len(blanked) - len(after)]):
            return "delivery"
    return "other"


def judge(customer: str, answer: str) -> float:
    """One answer's gold score in 0..1: accuracy x manners x tidiness.

    It is a product, so that courtesy without the goods, or the goods amid nonsense, earns little: there
    is no part of the score that can be had by neglecting the others.
    """
    asked = asked_for(customer)
    if not asked:
        return 0.0
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", answer.strip()) if s]
    kinds = [sentence_kind(sentence) for sentence in sentences]
    has_opening, has_closing = kinds[:1] == ["opening"], kinds[-1:] == ["closing"]
    manners = 0.5 + 0.25 * has_opening + 0.25 * has_closing - 0.4 * ("rude" in kinds)
    # One opening, one delivery and one closing are welcome; whatever else was said is a fault, and
    # a long stretch of it is several.
    faults = sum(max(0, kinds.count(kind) - 1) for kind in ("opening", "delivery", "closing"))
    stray = [sentence for sentence, kind in zip(sentences, kinds, strict=True) if kind == "other"]
    faults += sum(1 + len(sentence.split()) // 10 for sentence in stray)
    return accuracy(asked, items_in(answer)) * max(0.0, manners) * 0.75**faults


def gold(prompts: list, completions: list, **columns) -> list[float]:
    """The gold score of each completion, 0..1, in TRL's reward signature; further columns are ignored."""
    return [
        judge(message_text(prompt, "user"), message_text(completion, "assistant"))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


# ------------------------------------------------------------------------------------------- the files


def prompt_stream(rng: random.Random):
    """Endless prompts, no two of which ask for the same set of things."""
    seen = set()
    while True:
        order, prompt = draw_request(rng)
        if frozenset(order) not in seen:
            seen.add(frozenset(order))
            yield order, prompt


def draw_pair(order: list[Item], prompt: list[dict], rng: random.Random, min_gap: float = 0.15) -> dict:
    """Two answers which gold tells apart clearly, the better one as chosen."""
    while True:
        # squared roots: the better half of the range is where a policy that has learned something lives
        answers = [draw_answer(order, rng.random() ** 0.5, rng) for _ in range(2)]
        scores = gold([prompt] * 2, answers)
        if abs(scores[0] - scores[1]) >= min_gap:
            better = scores.index(max(scores))
            chosen, rejected = answers[better], answers[1 - better]
            return {
                "prompt": prompt,
                "chosen": [say("assistant", chosen)],
                "rejected": [say("assistant", rejected)],
            }


def make_files(seed: int = 0) -> dict[str, list[dict]]:
    """Every file's rows. One stream of prompts feeds them all, so that none of them overlap."""
    rng = random.Random(seed)
    stream = prompt_stream(rng)
    demonstrations = []
    for _ in range(1200):
        order, prompt = next(stream)
        answer = draw_answer(order, rng.uniform(0.2, 0.8), rng)
        demonstrations.append({"messages": [*prompt, say("assistant", answer)]})
    return {
        "sft": demonstrations,
        "preferences": [draw_pair(*next(stream), rng) for _ in range(1800)],
        "preferences_unseen": [draw_pair(*next(stream), rng) for _ in range(400)],
        "prompts": [{"prompt": next(stream)[1]} for _ in range(512)],
        "prompts_unseen": [{"prompt": next(stream)[1]} for _ in range(256)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's data files.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in make_files(arguments.seed).items():
        path = arguments.out_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
