"""A vLLM server as the sampler: whose answers they are, what is kept of them, and all that may go wrong on the way.

A stand-in speaks its protocol (tests/vllm_server.py); where ALIGN_VLLM names an environment with a real one, that is
asked too.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from align import serve, servers
from align.artifact import DRAWN, SERVED
from align.cli import app
from align.errors import BadInput, Diverged, RunFailed
from align.models.roles import Bases
from align.parents import check_parents
from align.preflight import check_recipe
from align.recipe import load_recipe
from align.resumption import is_harmless
from align.rollout.choose import sampler_of
from align.rollout.reading import read_all
from align.rollout.sampler import Seeds
from align.rollout.vllm import version_of
from align.settings import STAGES, Lora, Model, Sampling
from align.stages import ppo, ppo_steps
from align.track import read_metrics
from tests import test_loop, tiny
from tests.apart import run_apart
from tests.vllm_server import serving
from tests.waiting import waited_for

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [[2, 4, 9, 10], [2, 4], [2, 4, 13, 6, 7]] * 4
SEEDS = Seeds(1, 2, 3, range(12))
HOW = {"end_ids": [3, 14], "pad_id": 0}
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def whole(base):
    return Bases(Model(base=str(base)), torch.device("cpu"))


@pytest.fixture
def role(whole):
    found = whole.role(None, method=Lora(r=4), trainable=True)
    move(found, 0)
    return found


@pytest.fixture
def engine(base):
    with serving(base) as one:
        yield one


@torch.no_grad()
def move(role, seed):
    """Other weights of the adapter, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in role.trained():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def sampling_of(engine, **changes):
    return Sampling(**{"engine": "vllm", "url": engine.url, "max_new_tokens": 6, "temperature": 0.7} | changes)


def drawn(role, engine, folder, prompts=PROMPTS, seeds=SEEDS, **changes):
    sampling = sampling_of(engine, **changes)
    return sampler_of(role, sampling, folder=folder, **HOW).sample(prompts, sampling, seeds)


def answers_asked(engine):
    """Requests but for those of probes."""
    return [body for body in engine.answered if "prompt_logprobs" not in body]


# ------------------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_its_prompts_its_seeds_and_the_policys(role, engine, tmp_path):
    found = drawn(role, engine, tmp_path / "one")
    assert found.reading is None and found.rollouts.prompts == tuple(map(tuple, PROMPTS))
    own = read_all(role, found.rollouts, temperature=0.7)
    torch.testing.assert_close(found.logprobs, own.logprobs, rtol=0, atol=1e-5)
    assert len(set(found.rollouts.answers)) > 6
    for answer, has_ended in zip(found.rollouts.answers, found.rollouts.ended.tolist(), strict=True):
        assert has_ended == (answer[-1] in HOW["end_ids"]) and not set(answer[:-1]) & set(HOW["end_ids"])
        assert has_ended or len(answer) == 6
    other = drawn(role, engine, tmp_path / "two", PROMPTS[::-1], Seeds(1, 2, 3, range(11, -1, -1)), max_retries=1)
    assert other.rollouts.answers == found.rollouts.answers[::-1]
    move(role, 1)
    assert drawn(role, engine, tmp_path / "two").rollouts.answers != found.rollouts.answers


def test_the_base_itself_answers_where_there_is_no_adapter(whole, engine, tmp_path):
    role = whole.role(None)
    found = drawn(role, engine, tmp_path)
    torch.testing.assert_close(
        found.logprobs, read_all(role, found.rollouts, temperature=0.7).logprobs, atol=1e-5, rtol=0
    )
    assert not engine.loads


def test_two_policies_in_turn_are_never_taken_for_each_other(role, engine, tmp_path):
    sampling = sampling_of(engine)
    sampler = sampler_of(role, sampling, folder=tmp_path, **HOW)
    for turn in range(6):
        move(role, turn % 2)
        found = sampler.sample(PROMPTS, sampling, Seeds(1, 2, turn, range(12)))
        own = read_all(role, found.rollouts, temperature=0.7)
        torch.testing.assert_close(found.logprobs, own.logprobs, rtol=0, atol=1e-5)
        (name,) = engine.adapters  # the one before is gone
        assert name.startswith(version_of(role)) and [path.name for path in (tmp_path / SERVED).iterdir()] == [name]
    assert engine.loads == [engine.loads[0], engine.loads[1]] * 3


def test_a_name_is_made_of_weights_and_of_what_they_mean(role, whole):
    names = [version_of(role)]
    for seed in (1, 0):
        move(role, seed)
        names.append(version_of(role))
    assert names[0] == names[2] != names[1]
    other = whole.role(None, method=Lora(r=4, lora_alpha=8.0), trainable=True)
    move(other, 0)
    assert version_of(other) not in names and version_of(whole.role(None)) is None


# ------------------------------------------------------------------------------------------------------- what is kept


def test_what_was_drawn_is_not_drawn_again(role, engine, tmp_path, capsys):
    first = drawn(role, engine, tmp_path)
    (file,) = (tmp_path / DRAWN).iterdir()
    file.write_bytes(file.read_bytes()[:-20])  # the last line is torn
    again = drawn(role, engine, tmp_path)
    assert again.rollouts.answers == first.rollouts.answers and torch.equal(again.logprobs, first.logprobs)
    assert len(answers_asked(engine)) == len(PROMPTS) + 1
    assert "a line is damaged (line 12); what it held is asked again" in capsys.readouterr().out
    drawn(role, engine, tmp_path, temperature=0.8)
    drawn(role, engine, tmp_path, seeds=Seeds(1, 2, 4, range(12)))
    assert len(answers_asked(engine)) == len(PROMPTS) * 3 + 1
    sampling = sampling_of(engine)
    sampler = sampler_of(role, sampling, folder=tmp_path, **HOW)
    sampler.forget()  # the checkpoint may be damaged: what is older than it stays until the next
    sampler.sample(PROMPTS, sampling, SEEDS)
    sampler.sample(PROMPTS, sampling, Seeds(1, 2, 5, range(12)))
    assert len(answers_asked(engine)) == len(PROMPTS) * 4 + 1
    sampler.forget()
    (kept,) = (tmp_path / DRAWN).iterdir()
    assert len(kept.read_text().splitlines()) == len(PROMPTS)
    sampler.sample(PROMPTS, sampling, Seeds(1, 2, 5, range(12)))
    assert len(answers_asked(engine)) == len(PROMPTS) * 4 + 1
    sampler.sample(PROMPTS, sampling, SEEDS)
    assert len(answers_asked(engine)) == len(PROMPTS) * 5 + 1
    sampler.close()
    assert not engine.adapters and not (tmp_path / SERVED).exists()


def test_runs_of_the_same_policy_leave_each_others_alone(role, engine, tmp_path):
    for name in ("one", "two"):
        drawn(role, engine, tmp_path / name)
    one, two = engine.adapters
    assert one.rpartition("-")[0] == two.rpartition("-")[0] == version_of(role)
    sampler_of(role, sampling_of(engine), folder=tmp_path / "one", **HOW).close()
    assert list(engine.adapters) == [two]
    drawn(role, engine, tmp_path / "two", seeds=Seeds(1, 2, 4, range(12)))


def test_runs_that_share_a_folder_of_adapters_leave_each_others_alone(role, engine, tmp_path):
    for name in ("one", "two"):
        drawn(role, engine, tmp_path / name, adapter_dir=str(tmp_path / "both"))
    kept = sorted(path.name.partition("-")[0] for path in (tmp_path / "both").iterdir())
    assert kept == ["one", "two"] and not (tmp_path / "one" / SERVED).exists()
    sampler_of(role, sampling_of(engine, adapter_dir=str(tmp_path / "both")), folder=tmp_path / "one", **HOW).close()
    assert [path.name.partition("-")[0] for path in (tmp_path / "both").iterdir()] == ["two"]


def test_what_is_drawn_ahead_is_the_policys_of_then(role, engine, tmp_path):
    sampling = sampling_of(engine)
    sampler = sampler_of(role, sampling, folder=tmp_path, **HOW)
    sampler.ahead(PROMPTS, sampling, SEEDS)
    (old,) = engine.adapters
    move(role, 1)
    sampler.sample(PROMPTS[:3], sampling, Seeds(1, 9, 0, range(3)))  # an evaluation meanwhile, of the policy of now
    assert old in engine.adapters and len(engine.adapters) == 2
    found = sampler.sample(PROMPTS, sampling, SEEDS)
    move(role, 0)
    own = read_all(role, found.rollouts, temperature=0.7)
    torch.testing.assert_close(found.logprobs, own.logprobs, rtol=0, atol=1e-5)
    assert len(answers_asked(engine)) == len(PROMPTS) + 3
    move(role, 1)
    sampler.ahead(PROMPTS, sampling, Seeds(1, 2, 4, range(12)))
    sampler.sample(PROMPTS, sampling, Seeds(1, 2, 4, range(12)))
    move(role, 2)
    sampler.sample(PROMPTS, sampling, Seeds(1, 2, 5, range(12)))
    assert len(engine.adapters) == 1 and old not in engine.adapters


def test_what_was_drawn_ahead_of_a_kill_is_gone_on_with(role, engine, tmp_path):
    sampling = sampling_of(engine)
    sampler_of(role, sampling, folder=tmp_path, **HOW).ahead(PROMPTS, sampling, SEEDS)
    waited_for(lambda: len(answers_asked(engine)) == len(PROMPTS))
    (file,) = (tmp_path / DRAWN).iterdir()
    waited_for(lambda: len(file.read_text().splitlines()) == len(PROMPTS) + 1)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))  # four were still on their way
    engine.adapters.clear()
    move(role, 1)
    found = sampler_of(role, sampling, folder=tmp_path, **HOW).sample(PROMPTS, sampling, SEEDS)
    move(role, 0)
    own = read_all(role, found.rollouts, temperature=0.7)
    torch.testing.assert_close(found.logprobs, own.logprobs, rtol=0, atol=1e-5)
    assert len(answers_asked(engine)) == len(PROMPTS) + 4


def test_what_fails_ahead_is_told_when_it_is_asked_for(role, engine, tmp_path):
    sampling = sampling_of(engine, max_retries=0)
    sampler = sampler_of(role, sampling, folder=tmp_path, **HOW)
    complete = engine.complete
    engine.complete = lambda body: complete(body) if "prompt_logprobs" in body else (500, {"error": "out of order"})
    sampler.ahead(PROMPTS, sampling, SEEDS)
    with pytest.raises(RunFailed, match="out of order"):
        sampler.sample(PROMPTS, sampling, SEEDS)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_policy_that_is_not_this_one_ends_the_run(role, engine, tmp_path):
    drawn(role, engine, tmp_path)
    engine.faults.add("stale")
    move(role, 1)
    with pytest.raises(
        RunFailed, match=r"does not serve this policy: align-[\w-]+ is off by [\d.]+ nats .* over 0\.001"
    ):
        drawn(role, engine, tmp_path)


def test_a_small_step_is_told_from_none_where_much_is_let_pass(role, engine, tmp_path):
    sampling = sampling_of(engine, tolerance=5.0)
    sampler = sampler_of(role, sampling, folder=tmp_path, **HOW)
    sampler.sample(PROMPTS, sampling, SEEDS)
    with torch.no_grad():
        for _, parameter in role.trained():
            parameter.mul_(1.01)
    sampler.sample(PROMPTS, sampling, SEEDS)
    engine.faults.add("stale")
    with torch.no_grad():
        for _, parameter in role.trained():
            parameter.mul_(1.01)
    with pytest.raises(RunFailed, match="still answers with the policy before align-"):
        sampler.sample(PROMPTS, sampling, SEEDS)


def test_log_probabilities_of_another_temperature_end_the_run(role, engine, tmp_path):
    engine.faults.add("raw")
    with pytest.raises(RunFailed, match=r"see to its base, --dtype and --logprobs-mode"):
        drawn(role, engine, tmp_path)


def test_another_base_ends_the_run(role, tmp_path):
    with serving(tiny.make_base(tmp_path, seed=5)) as engine, pytest.raises(RunFailed, match="does not serve this"):
        drawn(role, engine, tmp_path / "run")


def test_a_server_that_is_started_again_is_given_the_policy_again(role, engine, base, tmp_path):
    sampling = sampling_of(engine, max_retries=30)
    sampler = sampler_of(role, sampling, folder=tmp_path, batch_size=2, **HOW)
    complete, first = engine.complete, []

    def stop_after(body):
        if len(answers_asked(engine)) == 5 and not first:
            first.append(body)
            engine.adapters.clear()  # what a new one begins with
        return complete(body)

    engine.complete = stop_after
    found = sampler.sample(PROMPTS, sampling, SEEDS)
    assert first and len(engine.loads) == 2 and len(set(engine.loads)) == 1
    assert len(answers_asked(engine)) == len(PROMPTS)  # nothing twice
    torch.testing.assert_close(
        found.logprobs, read_all(role, found.rollouts, temperature=0.7).logprobs, atol=1e-5, rtol=0
    )


def test_a_server_that_is_away_is_waited_for(role, base, tmp_path):
    with serving(base) as engine:
        port = int(engine.url.rpartition(":")[2])
        first = drawn(role, engine, tmp_path / "one")
    back = threading.Event()

    def come_back():
        time.sleep(0.5)
        with serving(base, port):
            back.wait(60)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        again = drawn(role, engine, tmp_path / "two", max_retries=30)
    finally:
        back.set()
        thread.join()
    assert again.rollouts.answers == first.rollouts.answers


def test_weights_that_are_not_finite_go_to_no_server(role, engine, tmp_path):
    with torch.no_grad():
        for _, parameter in role.trained():
            parameter.fill_(torch.nan)
    for prompts in (PROMPTS, [[2]] * 12):
        with pytest.raises(Diverged):
            drawn(role, engine, tmp_path, prompts)
    assert not engine.loads


WRONG = {
    "rank": (BadInput, r"does not take the policy in .*rank 4 is greater than.*; start it as `align serve"),
    "no adapters": (BadInput, "takes no adapters while it runs; start it as `align serve RECIPE` says"),
    "403": (BadInput, "lets nobody in with this key; set what `sampling.api_key_env` names"),
    "500": (RunFailed, r"failed 2 times: HTTP 500: .*out of order.*; see to it and run the same command again"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_it_cannot_do_is_one_line(fault, role, engine, tmp_path):
    engine.faults.add(fault)
    kind, words = WRONG[fault]
    with pytest.raises(kind, match=words) as error:
        drawn(role, engine, tmp_path, max_retries=1)
    assert "\n" not in str(error.value)


def test_sequences_that_it_has_no_room_for_are_refused(role, engine, tmp_path):
    engine.room = 10
    with pytest.raises(BadInput, match=r"holds 10 tokens, and .* has 11: start it with --max-model-len 11 or more"):
        drawn(role, engine, tmp_path)


def test_a_folder_that_it_does_not_see_is_said(role, engine, tmp_path, monkeypatch):
    load = engine.load
    engine.load = lambda name, path: load(name, "/nowhere")
    with pytest.raises(BadInput, match=r"does not take the policy in .*No adapter found.*`sampling.adapter_dir`"):
        drawn(role, engine, tmp_path)


ODD = {
    "tokens that the base does not have": {"token_ids": [5, 10**6], "logprobs": {"token_logprobs": [-1.0, -1.0]}},
    "an answer that goes on after its end": {"token_ids": [3, 5], "logprobs": {"token_logprobs": [-1.0, -1.0]}},
    "which is none of its ends": {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}},
    "0 tokens, where 6 are most": {"token_ids": [], "logprobs": {"token_logprobs": []}},
    "and 1 log-probabilities": {"token_ids": [5, 3], "logprobs": {"token_logprobs": [-1.0]}},
    "its response is not as vLLM's are": {"token_ids": [5, 3], "logprobs": {"token_logprobs": [-1.0, 2.0]}},
    r"not as vLLM's are \(choices.0.token_ids: Field required": {"logprobs": {"token_logprobs": [-1.0]}},
}


@pytest.mark.parametrize("words", ODD)
def test_an_answer_that_cannot_be_is_not_learnt_from(words, role, engine, tmp_path):
    complete = engine.complete
    engine.complete = lambda body: complete(body) if "prompt_logprobs" in body else (200, {"choices": [ODD[words]]})
    with pytest.raises(RunFailed, match=words):
        drawn(role, engine, tmp_path, max_retries=1)
    assert not list((tmp_path / DRAWN).glob("*"))


# -------------------------------------------------------------------------------------------------------------- stages


def values_of(stage, base, data, runs, out, engine, **changes):
    values = tiny.recipe(stage, base, data, out)
    values |= {
        "policy": {"from": str(runs / "sft")},
        "sampling": {"engine": "vllm", "url": engine.url, "max_new_tokens": 8},
    }
    if stage == "ppo":
        values |= {"critic": {"from": str(runs / "reward")}}
        values["rewards"] = [{"use": "learned", "from": str(runs / "reward")}]
    return values | changes


def settings_of(values, folder):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    recipe = load_recipe(str(path))
    check_recipe(recipe)
    (stage,) = recipe.stages.values()
    return stage


@pytest.mark.parametrize("staleness", [0, 1])
def test_ppo_learns_from_it_and_a_killed_run_goes_on_with_the_same_answers(
    staleness, base, data, runs, tmp_path, engine, monkeypatch
):
    values = values_of("ppo", base, data, runs, tmp_path / "whole", engine)
    values["ppo"] |= {"save_steps": 2, "staleness": staleness}
    tiny.run(settings_of(values, tmp_path))
    rows = [row for row in read_metrics(tmp_path / "whole") if "sampler_kl" in row]
    stale, fresh = (rows[1:], rows[:1]) if staleness else ([], rows)
    assert len(rows) == 4 and all(row["sampler_kl"] > 1e-5 for row in stale)
    assert all(abs(row["sampler_kl"]) < 1e-5 for row in fresh)
    assert all(row["importance_weight"] == pytest.approx(1.0, abs=1e-4) for row in fresh)
    assert not (tmp_path / "whole" / DRAWN).exists() and not (tmp_path / "whole" / SERVED).exists()
    assert not engine.adapters
    asked = len(answers_asked(engine))

    values |= {"output": str(tmp_path / "killed")}
    improve, calls = ppo_steps.improve, []

    def killed(*arguments, **how):
        calls.append(how["iteration"])
        if len(calls) == 4:
            raise KeyboardInterrupt  # as good as a kill: nothing is saved
        return improve(*arguments, **how)

    monkeypatch.setattr(ppo, "improve", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(settings_of(values, tmp_path))
    assert list((tmp_path / "killed" / DRAWN).iterdir())
    tiny.run(settings_of(values, tmp_path))
    assert calls == [1, 2, 3, 4, 3, 4]
    assert len(answers_asked(engine)) == 2 * asked  # those of iterations 3 and 4 once
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_two_processes_draw_what_one_does(base, data, runs, tmp_path, engine):
    values = values_of("ppo", base, data, runs, tmp_path / "one", engine)
    values["ppo"] |= {"num_iterations": 3, "staleness": 1}
    tiny.run(settings_of(values, tmp_path))
    values |= {"output": str(tmp_path / "two")}
    run_apart(values, tmp_path)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    assert not engine.adapters


def test_two_processes_compare_policies_and_collect_their_answers_by_it(base, data, runs, tmp_path, engine):
    few = tmp_path / "prompts.jsonl"
    few.write_text("".join((data / "prompts.jsonl").read_text().splitlines(keepends=True)[:6]))
    tiny.run(tiny.settings("sft", base, data, tmp_path / "other", seed=1))
    common = {
        "model": {"base": str(base)},
        "launch": "cpu",
        "policies": {"base": None, "sft": str(runs / "sft"), "other": str(tmp_path / "other")},
        "prompts": {"train": str(few)},
        "sampling": {"engine": "vllm", "url": engine.url, "max_new_tokens": 8},
    }
    rewards = [{"use": "learned", "from": str(runs / "reward")}]
    run_apart(common | {"stage": "evaluate", "rewards": rewards, "output": str(tmp_path / "evaluate")}, tmp_path)
    found = json.loads((tmp_path / "evaluate" / "results.json").read_text())["policies"]
    assert found["base"]["kl_to_base"] == 0.0 < found["sft"]["kl_to_base"] != found["other"]["kl_to_base"]
    run_apart(common | {"stage": "collect", "output": str(tmp_path / "collect")}, tmp_path)
    assert len((tmp_path / "collect" / "candidates.jsonl").read_text().splitlines()) == 6 * 3 * 4
    assert not engine.adapters
    assert not [path for name in (DRAWN, SERVED) for path in tmp_path.glob(f"*/{name}")]


# ------------------------------------------------------------------------------------------------------------ the door


REFUSED = [
    ({"sampling": {}, "ppo": {"staleness": 1}}, "`ppo.staleness: 1` draws while the policy is trained, which a server"),
    ({"ppo": {"staleness": 1, "importance_cap": None}}, "which `importance_cap` weighs: leave `importance_cap: null` out"),
    ({"sampling": {"engine": "vllm"}}, "`engine: vllm` needs the server's `url`"),
    ({"sampling": {"url": "http://127.0.0.1:1"}}, "`url` is of `engine: vllm`; the engine is auto"),
    ({"sampling": {"engine": "vllm", "url": "127.0.0.1:1"}}, "`sampling.url`.* no .*address; write it as in http://127"),
    ({"sampling": {"engine": "vllm", "url": "http://a:b@c"}}, "`sampling.url` holds more than an address"),
    ({"sampling": {"engine": "vllm", "url": "http://127.0.0.1:1", "api_key_env": "NO_KEY_HERE"}}, "NO_KEY_HERE is not set"),
    ({"policy": {"method": {"kind": "ia3"}}}, r"`policy.method` \(`ia3`\) cannot be drawn from"),
    ({"policy": {"method": {"kind": "lora", "use_dora": True}}}, r"`policy.method` \(DoRA\) cannot be drawn from"),
    ({"policy": {"method": {"kind": "full"}}}, r"`policy.method` \(`full`\) cannot .* use `kind: lora` or `qlora`"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_cannot_be_is_refused_at_the_door(change, words, base, data, runs, tmp_path, engine):
    values = values_of("ppo", base, data, runs, tmp_path / "ppo", engine, **change)
    with pytest.raises(BadInput, match=words) as error:
        settings_of(values, tmp_path)
    assert "\n" not in str(error.value) and "a:b" not in str(error.value)
    assert not (tmp_path / "ppo").exists() and not engine.answered


def test_a_run_of_another_method_is_refused_at_the_door(base, data, runs, tmp_path, engine):
    sft = tiny.recipe("sft", base, data, tmp_path / "ia3", method={"kind": "ia3"})
    values = values_of("ppo", base, data, runs, tmp_path / "ppo", engine, policy={"from": str(tmp_path / "ia3")})
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stages": {"sft": sft, "ppo": values}}, sort_keys=False))
    words = r"`policy.from`: the policy in .*ia3 \(`ia3`\) cannot be drawn from"
    with pytest.raises(BadInput, match=words):
        check_recipe(load_recipe(str(path)))
    tiny.run(tiny.settings("sft", base, data, tmp_path / "ia3", method={"kind": "ia3"}))
    with pytest.raises(BadInput, match=words):
        settings_of(values, tmp_path)


def test_a_run_goes_on_with_a_server_at_another_place():
    assert all(is_harmless(f"sampling.{name}") for name in ("url", "adapter_dir", "api_key_env", "max_retries"))
    assert not is_harmless("sampling.engine") and not is_harmless("judge.url")


# ----------------------------------------------------------------------------------------------------------- align serve


def test_the_command_of_the_server(base, data, runs, tmp_path, engine, monkeypatch):
    values = values_of("ppo", base, data, runs, tmp_path / "ppo", engine)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    said = CliRunner().invoke(app, ["serve", str(tmp_path / "recipe.yaml")])
    host, port = engine.url.removeprefix("http://").split(":")
    assert said.exit_code == 0 and max(map(len, said.stdout.splitlines()[1:])) < 80
    words = said.stdout.replace("\\\n", "").split()
    assert words[:4] == ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "vllm", "serve", str(base)]
    options = dict(itertools.pairwise(words))
    assert (options["--host"], options["--port"]) == (host, port)
    assert options["--dtype"] == "float32" and options["--max-lora-rank"] == "8"  # r 4, and vLLM has 1, 8, 16, ...
    (stage,) = load_recipe(str(tmp_path / "recipe.yaml")).stages.values()
    assert int(options["--max-model-len"]) == min(stage.max_prompt_length + 8, 128)  # tiny's positions
    assert options["--logprobs-mode"] == "processed_logprobs"
    monkeypatch.setenv("MY_KEY", "sk-secret")
    said = CliRunner().invoke(app, ["serve", str(tmp_path / "recipe.yaml"), "sampling.api_key_env=MY_KEY"])
    assert 'VLLM_API_KEY="$MY_KEY" vllm serve' in said.stdout and "secret" not in said.stdout
    with pytest.raises(BadInput, match="no stage draws by vLLM"):
        CliRunner().invoke(app, ["serve", str(ROOT / "recipes/quickstart/quickstart.yaml")], catch_exceptions=False)


def stand_in(folder):
    """A program `vllm` that writes down its number and what it was told, and sleeps; and where it writes."""
    program = folder / "vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho $$ $VLLM_ALLOW_RUNTIME_LORA_UPDATING $@ > $0.said; exec sleep 600\n")
    program.chmod(0o755)
    return program.with_name("vllm.said")


def test_it_starts_one_that_ends_with_it(base, data, runs, tmp_path, engine):
    said = stand_in(tmp_path)
    values = values_of("ppo", base, data, runs, tmp_path / "ppo", engine)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    environment = os.environ | {"ALIGN_VLLM": str(tmp_path / "vllm")}
    command = [sys.executable, "-m", "align.cli", "serve", str(tmp_path / "recipe.yaml"), "--start"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
    pid, allowed, serve, *_ = waited_for(lambda: said.is_file() and said.read_text().split())
    assert (allowed, serve) == ("True", "serve")
    process.kill()  # not even asked
    process.wait()
    waited_for(lambda: not is_running(int(pid)))


def test_a_signal_that_was_ignored_before_stays_so(tmp_path):
    """As Ctrl-C is for what a shell starts in the background."""
    said = stand_in(tmp_path)
    code = (
        "import signal, sys; from align.serve import Command, serve_here; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); sys.exit(serve_here(Command(('vllm', 'serve'), {}, None)))"
    )
    environment = os.environ | {"ALIGN_VLLM": str(tmp_path / "vllm")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
    pid = int(waited_for(lambda: said.is_file() and said.read_text().split())[0])
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert is_running(pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM and not is_running(pid)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------------------- a real one


REAL = os.environ.get("ALIGN_VLLM")
MODEL = ROOT / "recipes" / "quickstart" / "model"


class Real:
    """`align serve --start` as a process of its own."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.folder, self.process = folder, None
        stage = {"stage": "ppo", "model": {"base": str(MODEL), "load_in": "float32"}, "output": str(folder / "run")}
        stage |= {"policy": {"method": {"kind": "lora", "r": 16}}, "critic": {"kind": "none"}}
        stage |= {
            "rewards": [{"use": f"{ROOT}/recipes/custom/brevity.py:brevity"}],
            "ppo": {"advantage": "reinforce++"},
        }
        stage |= {"prompts": {"train": str(MODEL.parent / "data" / "prompts.jsonl")}, "max_prompt_length": 100}
        stage |= {"sampling": {"engine": "vllm", "url": self.url, "max_new_tokens": 24}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(stage))

    def start(self):
        own = {} if torch.cuda.is_available() else {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [sys.executable, "-m", "align.cli", "serve", str(self.folder / "recipe.yaml"), "--start"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, cwd=ROOT)

    def is_up(self):
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self):
        self.process.kill()
        self.process.wait()
        waited_for(lambda: not self.is_listening())

    def is_listening(self):
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except OSError:
            return False
        return True


@pytest.mark.timeout(1200)
@pytest.mark.skipif(REAL is None, reason="ALIGN_VLLM names no environment with a vLLM")
def test_a_real_one(tmp_path, monkeypatch):
    """Policies in turn, the base, several ends, and a kill in the middle."""
    whole = Bases(Model(base=str(MODEL), load_in="float32"), torch.device("cpu"))
    role, ends = whole.role(None, method=Lora(r=16), trainable=True), [2, 17]
    prompts = [[1, 40 + i, 50, 60] for i in range(24)]
    engine = Real(tmp_path)
    engine.start()
    try:
        waited_for(engine.is_up, 600)
        sampling = sampling_of(engine, max_new_tokens=24)
        sampler = sampler_of(role, sampling, folder=tmp_path / "drawing", end_ids=ends, pad_id=0)

        def check(turn):
            move(role, turn % 2)
            found = sampler.sample(prompts, sampling, Seeds(1, 2, turn, range(24)))
            own = read_all(role, found.rollouts, temperature=0.7)
            torch.testing.assert_close(found.logprobs, own.logprobs, rtol=1e-4, atol=1e-4)
            assert {answer[-1] for answer in found.rollouts.answers} & set(ends)

        for turn in range(4):
            check(turn)
        base = sampler_of(whole.role(None), sampling, folder=tmp_path / "drawing", end_ids=ends, pad_id=0)
        found = base.sample(prompts[:12], sampling, SEEDS)
        own = read_all(base.role, found.rollouts, temperature=0.7)
        torch.testing.assert_close(found.logprobs, own.logprobs, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(servers, "LONGEST_WAIT", 2.0)
        engine.kill()
        engine.start()
        check(5)  # while it is still starting
        sampler.close()
    finally:
        engine.process.terminate()
        engine.process.wait()


def test_the_rank_of_what_is_on_the_hub_is_read_from_the_cache_or_asked_for(base, tmp_path, monkeypatch):
    values = {"stage": "collect", "model": {"base": str(base)}, "policies": {"theirs": "owner/adapter"}, "output": "o"}
    values |= {"prompts": {"train": "p.jsonl"}, "sampling": {"engine": "vllm", "url": "http://127.0.0.1:1"}}
    stage = STAGES["collect"](**values)
    with pytest.raises(BadInput, match=r"the rank of owner/adapter is not known .* \(`hf download owner/adapter`\)"):
        list(serve._ranks(stage, {}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 64}))
    monkeypatch.setattr(serve, "cached_folder", lambda name, revision: tmp_path)
    assert list(serve._ranks(stage, {})) == [64]


def test_a_whole_model_is_served_below_the_lora_that_ppo_puts_over_it(base, data, runs, tmp_path, engine):
    values = values_of("ppo", base, data, runs, tmp_path / "ppo", engine)
    tiny.run(tiny.settings("sft", base, data, tmp_path / "whole", method={"kind": "full"}))
    stage = STAGES["ppo"](**values | {"policy": {"from": str(tmp_path / "whole")}})
    check_parents(stage, {})
    assert serve._bases(stage, {}) == {str(tmp_path / "whole")} and max(serve._ranks(stage, {})) == Lora().r


@pytest.mark.parametrize("method", [{"kind": "lora", "r": 24}, {"kind": "full"}])
def test_the_server_of_a_pipeline_is_the_same_whatever_of_it_has_run(method, base, data, runs, tmp_path, engine):
    sft = tiny.recipe("sft", base, data, tmp_path / "sft", method=method)
    own = {"policy": {"from": str(tmp_path / "sft")}, "critic": {"kind": "trunk"}}
    ppo = values_of("ppo", base, data, runs, tmp_path / "ppo", engine, **own)
    evaluate = {name: ppo[name] for name in ("model", "launch", "prompts", "sampling", "rewards") if name in ppo}
    evaluate |= {"stage": "evaluate", "policies": {"ppo": str(tmp_path / "ppo")}, "output": str(tmp_path / "evaluate")}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stages": {"sft": sft, "ppo": ppo, "evaluate": evaluate}}, sort_keys=False))

    def command():
        words = serve.command_of(load_recipe(str(path))).words
        return words[2], words[words.index("--max-lora-rank") + 1]

    is_full = method["kind"] == "full"
    expected = (str(tmp_path / "sft"), "16") if is_full else (str(base), "32")
    assert command() == expected  # nothing has
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "manifest.json").write_text("{}")
    assert command() == expected  # sft has begun
    shutil.rmtree(tmp_path / "sft")
    tiny.run(STAGES["sft"](**sft))
    assert command() == expected
    stage = STAGES["evaluate"](**evaluate | {"policies": {"base": None, "sft": str(tmp_path / "sft")}})
    assert serve._bases(stage, {}) == ({str(base), str(tmp_path / "sft")} if is_full else {str(base)})
    shutil.copytree(base, tmp_path / "copy")
    other = {"model": {"base": str(tmp_path / "copy")}, "policies": {"base": None, "sft": str(runs / "sft")}}
    assert serve._bases(STAGES["evaluate"](**evaluate | other), {}) == {str(tmp_path / "copy")}  # the same weights


def test_a_loop_has_one_server(base, data, tmp_path, engine):
    path = test_loop.recipe(base, data, tmp_path, sampling={"engine": "vllm", "url": engine.url, "max_new_tokens": 8})
    said = CliRunner().invoke(app, ["serve", path, "sft.method.r=24"], catch_exceptions=False)
    words = said.stdout.replace("\\\n", "").split()
    assert words[1:4] == ["vllm", "serve", str(base)] and words[words.index("--max-lora-rank") + 1] == "32"
    assert not (tmp_path / "loop").exists()


def test_the_server_computes_in_what_the_stage_does(base, data, runs, tmp_path, engine, monkeypatch):
    """In float32 where `auto` trains copies of weights, here the critic's."""
    monkeypatch.setattr("align.models.base.best_precision", lambda device: "bfloat16")
    tiny.run(tiny.settings("reward", base, data, tmp_path / "copies", method={"kind": "ln_tuning"}))
    values = values_of("ppo", base, data, runs, tmp_path / "ppo", engine, model={"base": str(base)})
    assert serve._dtype(STAGES["ppo"](**values), {}) == "bfloat16"
    values["critic"] = {"from": str(tmp_path / "copies")}
    assert serve._dtype(STAGES["ppo"](**values), {}) == "float32"
