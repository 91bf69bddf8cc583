"""A reward of one's own: TRL's signature, settings as keyword arguments."""


def brevity(prompts, completions, *, target_words=120, **columns):
    """0 up to `target_words`, then falling by 1 for each further `target_words` words."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-max(0.0, len(text.split()) / target_words - 1.0) for text in texts]
