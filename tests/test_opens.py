"""What align makes opens in other tools and says there what it says here, in processes that cannot import align.

PEFT and transformers always; vLLM where ALIGN_VLLM names an environment that has it, the Language Model Evaluation
Harness where ALIGN_LM_EVAL does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from align.models.export import merge
from align.models.roles import Bases
from align.models.tokenizer import load_tokenizer
from align.rollout.reading import read_all
from align.rollout.rollouts import Rollouts
from align.settings import Model
from tests import tiny

BASE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart" / "model"  # whose shape vLLM takes
ROWS = [("Please bring me", " two pink clocks."), ("My sister sold", " a green bell and"), ("I", " have seen")]
WITHOUT = "import sys; sys.modules['align'] = None\n"
VLLM, HARNESS = (os.environ.get(name) for name in ("ALIGN_VLLM", "ALIGN_LM_EVAL"))

PLAIN = """
import json, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, kinds, rows, size = json.loads(sys.argv[1])
tokenizer, found = AutoTokenizer.from_pretrained(f"{folder}/adapter"), []
ids = [[tokenizer(text)["input_ids"] for text in row] for row in rows]
assert all(tokenizer("".join(row))["input_ids"] == asked + said for row, (asked, said) in zip(rows, ids))
for kind in kinds:
    by = {"adapter": AutoPeftModelForCausalLM, "merged": AutoModelForCausalLM}[kind]
    opened = by.from_pretrained(f"{folder}/{kind}").float().eval()
    for asked, said in ids:
        whole = torch.tensor(asked + said)
        with torch.no_grad():
            each = opened(input_ids=whole[None]).logits[0, :-1, :size].log_softmax(-1).gather(1, whole[1:, None])
        found.append(float(each[len(asked) - 1 :].sum()))
print(json.dumps(found))
"""

BY_VLLM = """
import json
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    folder, kind, rows, base = json.loads(sys.argv[1])
    how = {"model": base, "enable_lora": True} if kind == "adapter" else {"model": folder}
    llm = LLM(**how, dtype="float32", enforce_eager=True, max_model_len=128, disable_log_stats=True)
    lora = LoRARequest("own", 1, folder) if kind == "adapter" else None
    found, tokenizer = [], llm.get_tokenizer()
    for asked, said in rows:
        ids, before = tokenizer(asked + said)["input_ids"], len(tokenizer(asked)["input_ids"])
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        told = llm.generate([{"prompt_token_ids": ids}], params, lora_request=lora, use_tqdm=False)[0].prompt_logprobs
        found.append(sum(told[i][ids[i]].logprob for i in range(before, len(ids))))
    print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """An SFT run and what `align merge` makes of it, by kind; and what align says of `ROWS` with it."""
    folder = tmp_path_factory.mktemp("made")
    train = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 0}
    tiny.run(tiny.settings("sft", BASE, data, folder / "adapter", train=train))
    merge(str(folder / "adapter"), str(folder / "merged"))
    bases = Bases(Model(base=str(BASE), load_in="float32"), torch.device("cpu"))
    ids = [tuple(tuple(bases.main.tokenizer(text)["input_ids"]) for text in row) for row in ROWS]
    rollouts = Rollouts(tuple(p for p, _ in ids), tuple(a for _, a in ids), torch.zeros(len(ids), dtype=torch.bool))
    role = bases.role(str(folder / "adapter"))
    said = read_all(role, rollouts, temperature=1.0).logprobs.sum(dim=1).tolist()
    plain = read_all(bases.role(None), rollouts, temperature=1.0).logprobs.sum(dim=1).tolist()
    assert max(abs(a - b) for a, b in zip(said, plain, strict=True)) > 0.1  # the adapter says something of its own
    return folder, said


def run(python, code, *given, **environment):
    """The last line that a program prints, elsewhere than where align can be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), "-c", WITHOUT + code, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rstrip().splitlines()[-1].removeprefix("FOUND "))


def test_in_peft_and_transformers(made):
    folder, said = made
    found = run(sys.executable, PLAIN, str(folder), ["adapter", "merged"], ROWS, None)
    assert found == pytest.approx([*said, *said], abs=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.skipif(VLLM is None, reason="ALIGN_VLLM names no environment with a vLLM")
def test_in_vllm(made, kind):
    folder, said = made
    own = {} if torch.cuda.is_available() else {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    python = Path(str(VLLM)) / "bin" / "python"
    found = run(python, BY_VLLM, str(folder / kind), kind, ROWS, str(BASE), VLLM_ENABLE_V1_MULTIPROCESSING="0", **own)
    assert found == pytest.approx(said, abs=1e-3)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.skipif(HARNESS is None, reason="ALIGN_LM_EVAL names no environment with the evaluation harness")
def test_in_the_evaluation_harness(made, kind, tmp_path):
    folder, said = made
    rows = [{"prompt": asked, "completion": answer} for asked, answer in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "own", "output_type": "loglikelihood", "test_split": "test", "target_delimiter": ""}
    task |= {"doc_to_text": "{{prompt}}", "doc_to_target": "{{completion}}", "metric_list": [{"metric": "acc"}]}
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    opened = f"pretrained={BASE},peft={folder / kind}" if kind == "adapter" else f"pretrained={folder / kind}"
    words = ["--model", "hf", "--model_args", f"{opened},dtype=float32", "--tasks", "own", "--include_path", "."]
    words += ["--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", "out"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    code = WITHOUT + "sys.argv[0] = 'lm_eval'; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [str(Path(str(HARNESS)) / "bin" / "python"), "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("out/**/samples_own_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])
    if kind == "adapter":  # under which the harness leaves a base only the rows that its tokenizer has words for
        said = run(sys.executable, PLAIN, str(folder), [kind], ROWS, len(load_tokenizer(Model(base=str(BASE)))))
    assert [float(row["resps"][0][0][0]) for row in samples] == pytest.approx(said, abs=1e-4)
