"""How many tokens a pass holds: from a fixed memory on a CPU, from what is free on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from align.models.budget import answers_at_a_time, reading_tokens, training_tokens

GIB = 2**30


class Card:
    """Stands for a GPU: so many bytes are free, and so many the allocator keeps without using them."""

    def __init__(self, monkeypatch, free, unused=0, fraction=1.0):
        self.free, self.unused = free, unused
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, max(80 * GIB, self.free)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB + self.unused)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)


class Base:
    def __init__(self, device="cuda", dtype=torch.bfloat16, layers=32, hidden=4096, of_config=(), **others):
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8} | dict(of_config)
        shape = SimpleNamespace(num_hidden_layers=layers, hidden_size=hidden, **heads)
        self.config = SimpleNamespace(get_text_config=lambda: shape)
        self.device, self.dtype, self.is_activation_checkpointing = torch.device(device), dtype, False
        self.__dict__ |= others


def test_a_pass_takes_half_of_what_is_free(monkeypatch):
    """8B in bfloat16: 24 numbers of 2 bytes a layer and hidden unit, 6.3 MB a token, of which 5,120 fit."""
    Card(monkeypatch, 60 * GIB)
    assert training_tokens(Base(), None) == 4096
    assert reading_tokens(Base(), None) == 4 * 4096
    assert training_tokens(Base(is_activation_checkpointing=True), None) == 65_536
    assert training_tokens(Base(), 300) == reading_tokens(Base(), 300) == 300


def test_what_the_allocator_keeps_is_free_and_a_run_keeps_its_size(monkeypatch):
    card, base = Card(monkeypatch, 20 * GIB, unused=40 * GIB), Base()
    assert training_tokens(base, None) == 4096
    card.unused = 0
    assert training_tokens(base, None) == 4096 and training_tokens(Base(), None) == 1024


def test_a_process_that_may_have_a_part_of_the_card_takes_half_of_what_is_left_of_that(monkeypatch):
    Card(monkeypatch, 60 * GIB, fraction=0.2)  # 16 GiB, of which one is taken
    assert training_tokens(Base(), None) == 1024
    Card(monkeypatch, 60 * GIB, fraction=0.001)
    assert training_tokens(Base(), None) == 256


@pytest.mark.parametrize("free, tokens", [(0, 256), (80_000 * GIB, 65_536)])
def test_there_are_bounds(monkeypatch, free, tokens):
    Card(monkeypatch, free)
    assert training_tokens(Base(), None) == tokens
    assert reading_tokens(Base(), None) == min(4 * tokens, 65_536)


def test_a_cpu_has_a_memory_of_its_own(monkeypatch):
    assert training_tokens(Base("cpu", torch.float32, layers=30, hidden=576), None) == GIB // (24 * 4 * 30 * 576)


def test_answers_in_the_making_take_half_of_what_is_free(monkeypatch):
    """8B in bfloat16: 131,072 bytes a token of keys and values, 64 MiB an answer of 512."""
    Card(monkeypatch, 60 * GIB)
    assert answers_at_a_time(Base(), 512, None) == 256  # 480 fit
    assert answers_at_a_time(Base(dtype=torch.float32), 512, None) == 128
    assert answers_at_a_time(Base(of_config={"num_key_value_heads": None}), 512, None) == 64  # a key to each query
    assert answers_at_a_time(Base(of_config={"head_dim": 256}), 512, None) == 128  # not 4096 / 32
    assert answers_at_a_time(Base(of_config={"num_key_value_heads": [8, 4]}), 512, None) == 32
    assert answers_at_a_time(Base(), 100_000, None) == 8 and answers_at_a_time(Base(), 2, None) == 512
    assert answers_at_a_time(Base(), 512, 3) == answers_at_a_time(Base("cpu"), 512, 3) == 3
    assert answers_at_a_time(Base("cpu"), 512, None) == 32
