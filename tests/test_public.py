"""What a notebook uses: `import align` alone, without the command line."""

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


def test_a_run_that_fails_is_an_error(base, data, tmp_path):
    path = tmp_path / "recipe.yaml"
    values = tiny.recipe("sft", base, data, tmp_path / "sft")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values["data"] = {"train": str(tmp_path / "rows.jsonl")}
    path.write_text(yaml.safe_dump(values | {"max_length": 8}))
    with pytest.raises((align.RunFailed, align.BadInput)):
        align.run(path, {"method": {"kind": "lora", "target_modules": ["no_such_module"]}})
