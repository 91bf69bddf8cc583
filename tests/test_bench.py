"""The bench: it runs without a peer on each subcommand, both sides get the same tokens, and where TRL is installed
(scripts/bench_peers.sh) the two systems' figures of PPO, GRPO and RLOO agree."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "scripts" / "bench_peers"


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The bench with our program run in this process, which has everything imported, and temporary folders in sight."""
    monkeypatch.syspath_prepend(str(PROGRAMS))
    module, ours = load_script(ROOT / "scripts" / "bench.py"), load_script(PROGRAMS / "ours.py")

    def start(program, work, folder):
        assert program == "ours.py"
        return json.loads(json.dumps(ours.program(json.loads(json.dumps(work)))))

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(module.tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(module, "PEERS", tmp_path / "no-peers")
    module.in_process = ours
    yield module
    assert not list(scratch.glob("align-bench-*")), "the bench leaves something behind"


def report_of(bench, tmp_path, *arguments):
    file = tmp_path / "report.json"
    assert bench.main([*map(str, arguments), "--repeats", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_ppo_runs_its_cases(bench, base, tmp_path, capsys):
    cases, critic = ["fixed", "shared"], "trunk"
    words = [word for case in cases for word in ("--case", case)]
    report = report_of(bench, tmp_path, "ppo", "--model", base, "--iterations", 2, "--critic", critic, *words)
    for case in cases:
        found = report[case]
        assert found["sides"]["ours"]["seconds"] > 0 and found["sides"]["ours"]["peak_mib"] > 0
        assert found["phases"].keys() == {"sample", "score", "update"} and found["critic"] == critic
        assert all(0 < found["phases"][name]["share"] < 2 for name in ("score", "update"))
    shown = capsys.readouterr().out
    assert "matrix rate" in shown and all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_grpo_runs_its_cases(algorithm, bench, base, tmp_path):
    words = ["grpo", "--model", base, "--algorithm", algorithm, "--iterations", 1, "--epochs", 3, "--case", "mixed"]
    found = report_of(bench, tmp_path, *words)["mixed"]
    assert found["sides"]["ours"]["seconds"] > 0 and found["critic"] == "none"
    assert all(0 < found["phases"][name]["share"] < 2 for name in ("score", "update"))


def test_grpo_is_the_same_work_on_both_sides(bench, base, tmp_path):
    for algorithm, scale in (("grpo", 1), ("rloo", 32)):
        options = bench.parsed(["grpo", "--model", str(base), "--algorithm", algorithm, "--peer-micro-batch", "8"])
        work = bench.grpo_work(tmp_path, bench.made_prompts(str(base), *bench.GROUPED["fixed"]), options, epochs=3)
        ours, peer = work["recipe"]["ppo"], work["peer"]
        assert ours["prompts_per_iteration"] == 16 and ours["num_generations"] == peer["num_generations"] == 4
        assert peer["per_device_train_batch_size"] * peer["gradient_accumulation_steps"] == 64
        assert ours["num_ppo_epochs"] == peer["num_iterations"] == 3 and ours["advantage"] == algorithm
        assert ours["kl_coef"] == peer["beta"] > 0 and ours["cliprange"] == peer["epsilon"]
        assert scale * ours["adam_epsilon"] == peer["adam_epsilon"] and scale * ours["max_grad_norm"] == 1.0


def test_what_does_not_agree_is_said(bench):
    step = {"policy_loss": 0.5, "grad_norm_policy": 0.25, "clipfrac": 0.5}
    ours = {"metrics": [{"score": 1.0, "kl": 8.0, "response_length": 4.0}], "steps": [step, step]}
    other = {"loss": 0.5, "grad_norm": 0.25, "reward": 1.0, "kl": 2.0, "clip_ratio/region_mean": 0.5}
    work = {"peer": {"num_iterations": 2}, "recipe": {"sampling": {"max_new_tokens": 4}}, "trainer": "GRPO"}

    def wrong(second, moved=0.0, **changes):
        rows = bench.grpo_parity_rows(ours, {"steps": [other, other | second]}, work | changes, moved)
        return [row["name"] for row in rows if not row["agrees"]]

    assert wrong({}) == []
    assert wrong({"loss": 0.5001}) == ["loss, step 2"]
    assert wrong({"clip_ratio/region_mean": 0.0}) == ["clip fraction, step 2"]
    assert wrong({"grad_norm": 0.2501}, moved=0.5) == ["gradient's norm, step 2", "adapters, in rates"]
    assert wrong({"loss": 9.0}, trainer="RLOO") == ["gradient's norm, step 1", "gradient's norm, step 2"]
    ours["metrics"][0] |= {"kl": 8.1, "score": 1.1}
    assert wrong({}) == ["score, iteration 1", "KL a token, iteration 1"]


def test_answers_have_the_foreseen_lengths(bench, base, tmp_path):
    for case, (lengths, answers, samples) in bench.CASES.items():
        prompts = bench.made_prompts(str(base), lengths, answers, samples)
        assert [len(p["ids"]) for p in prompts] == lengths
        assert [[len(a) for a in p["answers"]] for p in prompts] == [[n] * samples for n in answers]
        options = bench.parsed(["ppo", "--model", str(base), "--iterations", "1"])
        work = bench.ppo_work(tmp_path, prompts, [{"use": "recipes/custom/brevity.py:brevity"}], options)
        work["recipe"]["output"] = str(tmp_path / case)
        metrics = bench.in_process.program(work)["metrics"][0]
        assert metrics["response_length"] == sum(answers) / len(answers) and metrics["eos_share"] == 1.0


def test_an_iteration_of_a_peer_is_all_its_steps(bench):
    measuring = sys.modules["measuring"]
    for every, count in ((1, 6), (2, 3), (3, 2)):
        clock = measuring.Clock()
        ticks = measuring.Ticks(clock, every=every)
        clock.start()
        for _ in range(6):
            ticks.on_step_end()
        assert len(clock.seconds) == count


def test_another_answer_than_the_foreseen_one_is_an_error(bench):
    answers = bench.in_process.Answers([{"ids": [1, 2], "answers": [[3], [4]]}])
    assert [answers.next([1, 2]) for _ in range(3)] == [[3], [4], [3]]
    with pytest.raises(RuntimeError, match="would not do the same"):
        answers.check([[3]], [[4]])
    with pytest.raises(RuntimeError, match="not in the work"):
        answers.next([2])


def test_useful_flops_by_hand(bench):
    prompts = [{"ids": [1] * 10, "answers": [[1] * 2] * 4}]  # 10 + 4 x 2 tokens: the prompt counts once
    machine = {"weights": 100, "vocabulary": 50, "hidden": 3}
    trunk, logits = 2 * 100 * 18, 2 * 50 * 3 * 8
    assert bench.useful_flops(prompts, machine, "trunk", 2) == {
        "score": 2 * trunk + logits,
        "update": 2 * 2 * (trunk + logits),
    }
    assert bench.useful_flops(prompts, machine, "adapter", 1)["update"] == 2 * (2 * trunk + logits)
    assert bench.useful_flops(prompts, machine, "none", 1) == {"score": trunk + logits, "update": 2 * (trunk + logits)}
    assert bench.dpo_flops([[9, 9], [10, 8]], machine) == 3 * (trunk + logits)  # the first step is left out


def test_growing_sizes(bench, base, tmp_path, monkeypatch):
    machine = {"weights": 100, "vocabulary": 50, "hidden": 3}
    run = {"seconds": [9.0, 2.0], "peak_mib": 7.0, "machine": machine}
    monkeypatch.setattr(bench, "prepared_reward", lambda folder, model: [])
    monkeypatch.setattr(bench, "in_turn", lambda sides, repeats: {"ours": [run]})
    rows = report_of(bench, tmp_path, "ppo", "--model", base, "--model", base, "--scaling")["rows"]
    assert len(rows) == 6 and {row["seconds"] for row in rows} == {2.0}
    assert rows[2]["flops"] == 2 * rows[0]["flops"] == 4 * rows[1]["flops"]


def test_sft_runs_alone_and_beside_ppo(bench, base, data, tmp_path):
    report = report_of(bench, tmp_path, "sft", "--model", base, "--data", data / "sft.jsonl", "--rows", 16)
    assert report["sides"]["ours"]["tokens/s"] > 0 and report["tokens"] > 100
    report = report_of(bench, tmp_path, "ppo", "--model", base, "--case", "shared", "--iterations", 1, "--peer", "sft")
    assert report["shared"]["sides"]["our SFT"]["ratio"]["peak_mib"] > 0


def test_bad_input_is_one_line_and_code_2(bench, base, data, tmp_path, capsys):
    model, pairs = ["--model", str(base)], str(data / "pairs.jsonl")
    for words, said in (
        (["ppo", "--model", str(tmp_path / "none")], "no transformers folder"),
        (["parity", *model], "bench_peers.sh"),
        (["ppo", *model, "--peer", "trl"], "bench_peers.sh"),
        (["grpo", *model, "--peer", "trl"], "bench_peers.sh"),
        (["grpo", *model, "--parity"], "bench_peers.sh"),
        (["grpo", *model, "--peer-micro-batch", "24"], "a divisor of 64"),
        (["reward", *model, "--data", pairs, "--peer", "trl"], "bench_peers.sh"),
        (["sft", *model, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ):
        assert bench.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_reward_runs_in_a_process_of_its_own(base, data, tmp_path):
    module = load_script(ROOT / "scripts" / "bench.py")
    words = ["reward", "--model", base, "--data", data / "pairs.jsonl", "--steps", 2]
    found = report_of(module, tmp_path, *words)["sides"]["ours"]
    assert found["pairs/s"] > 0 and found["peak_mib"] > 100 and abs(found["first_loss"] - 0.69) < 0.2


def test_it_is_a_command():
    command = [sys.executable, "scripts/bench.py", "reward", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0 and "--data" in done.stdout


def test_dpo_runs_on_pairs_from_an_adapter_that_is_not_at_zero(bench, base, data, tmp_path):
    words = ["dpo", "--model", base, "--data", data / "pairs.jsonl", "--steps", 2]
    report = report_of(bench, tmp_path, *words)
    found = report["sides"]["ours"]
    assert 0 < report["share"] < 2
    assert found["pairs/s"] > 0 and found["first_loss"] not in (0.0, pytest.approx(math.log(2), abs=1e-4))


@pytest.mark.parametrize(
    ("words", "version", "count"),
    [
        (["parity"], "1.12.0", 10),
        (["grpo", "--parity"], "1.16.0", 17),
        (["grpo", "--parity", "--algorithm", "rloo"], "1.16.0", 7),
    ],
    ids=["ppo", "grpo", "rloo"],
)
def test_figures_agree_with_trls(words, version, count, base, tmp_path):
    peers = load_script(ROOT / "scripts" / "bench.py").PEERS.expanduser()
    if not (peers / f"trl-{version}" / "ready").is_file():
        pytest.skip(f"no TRL {version} in $ALIGN_PEERS: bash scripts/bench_peers.sh installs it")
    file = tmp_path / "parity.json"
    command = [sys.executable, "scripts/bench.py", *words, "--model", str(base), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == count and all(row["agrees"] for row in rows)


def _environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}
