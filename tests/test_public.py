"""What a notebook uses: `import align` alone, without the command line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import align
from align.models.roles import Bases
from align.settings import Model
from tests import tiny


def test_every_public_name_is_there_and_importing_is_light():
    assert all(getattr(align, name) is not None for name in align.__all__)
    assert sorted(align._PUBLIC) == align.__all__ and (Path(align.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        align.nothing  # noqa: B018
    code = "import sys, align; align.load_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_runs_and_its_policy_opens(base, data, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe("sft", base, data, tmp_path / "sft")))
    with pytest.raises(align.BadInput, match="max_stepz"):
        align.run(path, {"train.max_stepz": 1})
    assert align.load_recipe(path, {"train.max_steps": 3}).stages["recipe"].train.max_steps == 3
    manifests = align.run(path, {"train.max_steps": 1, "method": {"kind": "lora", "r": 2}})
    assert manifests["recipe"]["status"] == "finished" and manifests["recipe"]["metrics"]["eval_loss"] > 0
    model, tokenizer = align.open_policy(tmp_path / "sft")
    ids = torch.tensor([tokenizer("give me a red cup")["input_ids"]])
    with torch.no_grad():
        found = model(input_ids=ids).logits
        role = Bases(Model(base=str(base)), torch.device("cpu")).role(str(tmp_path / "sft"))
        assert torch.equal(found, role.causal(input_ids=ids).logits)
    assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[0] == 1
    with pytest.raises(align.BadInput, match="open_policy"):
        align.open_policy(data)


def test_a_run_that_fails_says_why(base, tmp_path):
    """Each by the class that its exit code stands for."""
    path, own = tmp_path / "recipe.yaml", tmp_path / "own.py"
    values = {"stage": f"{own}:Own", "model": {"base": str(base)}, "launch": "cpu", "output": str(tmp_path / "own")}
    path.write_text(yaml.safe_dump(values))
    for does, raised, said in (
        ("raise align.BadInput('nothing to train')", align.BadInput, "nothing to train"),
        ("1 / 0", align.RunFailed, r"own.py:4\): ZeroDivisionError"),
    ):
        own.write_text(f"import align\nclass Own(align.StageSettings):\n    def run(self, worker):\n        {does}\n")
        with pytest.raises(raised, match=said):
            align.run(path)


def test_policies_open_from_elsewhere_and_a_prefix_is_refused(base, data, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for name, method in (
        ("full", {"kind": "full"}),
        ("lora", {"kind": "lora", "r": 2}),
        ("prefix", {"kind": "prefix", "num_virtual_tokens": 2}),
    ):
        train = {"max_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0.0}
        tiny.run(tiny.settings("sft", Path("models"), data, tmp_path / name, method=method, train=train))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    whole, _ = align.open_policy(tmp_path / "full")
    with_adapter, _ = align.open_policy(tmp_path / "lora")
    plain = Bases(Model(base=str(base)), torch.device("cpu")).main.model
    ids = torch.tensor([[2, 4, 6, 7]])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert all(not torch.equal(model(input_ids=ids).logits, expected) for model in (whole, with_adapter))
    with pytest.raises(align.BadInput, match="holds a prefix"):
        align.open_policy(tmp_path / "prefix")
