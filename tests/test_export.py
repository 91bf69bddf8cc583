"""A run as plain weights on disk: merged policies, and reward models as transformers' classifiers."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.errors import BadInput
from align.models.export import export_classifier, merge
from align.models.roles import Bases
from align.models.scoring import score_sequences
from align.settings import Model
from tests import tiny

DEVICE = torch.device("cpu")
METHODS = ({"kind": "lora", "r": 4}, {"kind": "ia3"}, {"kind": "freeze"}, {"kind": "full"}, {"kind": "qlora", "r": 4})


@pytest.fixture(scope="module")
def rewards(base, data, tmp_path_factory):
    """A reward run of each method, by its kind."""
    folder = tmp_path_factory.mktemp("rewards")
    for method in METHODS:
        model = {"base": str(base), "load_in": "nf4" if method["kind"] == "qlora" else "float32"}
        tiny.run(tiny.settings("reward", base, data, folder / method["kind"], method=method, model=model))
    return folder


def sequences(folder):
    """Rows of unequal length, all but the first closed by the end token, which is often a tokenizer's pad too."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["please give me a red cup", "<s> thanks <end>", "<s> a red cup thanks <end>", "bad <end> <end>"]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("kind", [method["kind"] for method in METHODS])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_gives_the_runs_scores(kind, side, rewards, base, tmp_path):
    run = rewards / kind
    assert export_classifier(str(run), str(tmp_path / "plain")) < 1e-5
    rows = sequences(run)
    bases = Bases(
        Model(base=str(run if kind == "full" else base), load_in="nf4" if kind == "qlora" else "float32"), DEVICE
    )
    role = bases.role(str(run), head=True)
    with torch.no_grad():
        ours = score_sequences(role, [row[:1] for row in rows], [row[1:] for row in rows])
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain", padding_side=side)
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = plain(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits[:, 0]
    assert plain.config.num_labels == 1
    assert ours.abs().max() > 1e-3
    assert (ours - theirs).abs().max() < 1e-5


def test_a_pad_that_ends_texts_is_replaced(base, data, tmp_path):
    """As SmolLM2's is: a classifier would look for the last token before it."""
    own = tiny.make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(own)
    tiny.run(tiny.settings("reward", own, data, tmp_path / "run"))
    assert export_classifier(str(tmp_path / "run"), str(tmp_path / "plain")) < 1e-5
    plain = AutoTokenizer.from_pretrained(tmp_path / "plain")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").config
    assert config.pad_token_id == plain.pad_token_id != plain.eos_token_id
    assert plain("<s> a <end>")["input_ids"] == tokenizer("<s> a <end>")["input_ids"]


def test_a_classifier_of_ours_is_a_reward_again(rewards, base, data, tmp_path):
    """By its folder alone, without the run: as any classifier made elsewhere."""
    from align.data import encode_prompt, load
    from align.rewards import Answers
    from align.rewards.learned import learned
    from align.settings import Data, LearnedReward

    export_classifier(str(rewards / "lora"), str(tmp_path / "plain"))
    bases = Bases(Model(base=str(base), load_in="float32"), DEVICE)
    prompts = list(load(Data(train=str(data / "prompts.jsonl")), "prompts").train[:4])
    texts = ["a red cup thanks", "bad", "a blue hat", "the the"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = Answers(prompts, asked, texts, [[*tokenizer(text)["input_ids"], 3] for text in texts])
    ours, theirs = (
        learned(LearnedReward.model_validate({"from": str(path), "normalize": False}), bases)(answers)
        for path in (rewards / "lora", tmp_path / "plain")
    )
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_may_be_rounded_and_come_in_shards(dtype, runs, tmp_path):
    drift = merge(str(runs / "sft"), str(tmp_path / "merged"), dtype=dtype, max_shard_size="50KB")
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 1
    assert {w.dtype for file in files for w in load_file(file).values()} == {getattr(torch, dtype)}
    assert 0 < drift < 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(runs, rewards, tmp_path):
    target = tmp_path / "plain"
    with pytest.raises(BadInput, match=r"is no reward model but policy; name a reward run"):
        export_classifier(str(runs / "sft"), str(target))
    with pytest.raises(BadInput, match=r"OUT --as classifier"):
        merge(str(rewards / "lora"), str(target))
    with pytest.raises(BadInput, match=r"--dtype: int8 is none of float32, bfloat16, float16"):
        merge(str(runs / "sft"), str(target), dtype="int8")
    with pytest.raises(BadInput, match=r"--max-shard-size: large is no size"):
        merge(str(runs / "sft"), str(target), max_shard_size="large")
    assert not target.exists()
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(BadInput, match="is not empty"):
        export_classifier(str(rewards / "lora"), str(target))
