def one(completions, **kwargs):
    return [1.0 for _ in completions]
