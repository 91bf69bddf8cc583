"""A verifiable reward: 1 when the last number of the answer is the row's `answer`."""

import re


def final_number(prompts, completions, answer, **columns):
    """`answer` holds each prompt's right number as text; commas and a trailing point don't matter."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    found = [re.findall(r"-?\d[\d,]*\.?\d*", text) for text in texts]
    last = [numbers[-1].replace(",", "").rstrip(".") if numbers else None for numbers in found]
    return [float(number == str(right).replace(",", "")) for number, right in zip(last, answer, strict=True)]
