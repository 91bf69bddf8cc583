"""What a run would die of is one line at the door: the base's own files, paths, the environment, wandb, the Hub."""

import json
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import align.surroundings as surroundings
from align import preflight
from align.errors import BadInput
from align.launch import INHERITED, _environment
from align.launch_plan import plan
from align.models.facts import Facts, check_classifier
from align.preflight import check_recipe, remarks
from align.recipe import load_recipe
from align.settings import Track
from align.settings.fields import at_home
from align.surroundings import check_trackers, check_writable, wandb_mode
from align.track import read_metrics
from tests import tiny
from tests.test_bad_input import SOUND, Case, build, edit, inside, listing, ppo, reward, sft

NO_HOME = {"WANDB_API_KEY": "", "WANDB_MODE": "", "WANDB_DISABLED": "", "NETRC": "", "WANDB_BASE_URL": ""}


def safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A file of float32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def config(**values: Any) -> str:
    return json.dumps(values)


def over(name: str, files: dict[str, str | bytes], *says: str, edits: dict[str, Any] | None = None) -> Case:
    """The sound SFT recipe over a base whose files are replaced by these."""
    return sft(name, edits or {}, *says, files={f"model/{file}": content for file, content in files.items()})


GPT2 = {
    "model.safetensors": safetensors({"transformer.wpe.weight": (32, 4)}),
    "config.json": config(model_type="gpt2", n_positions=32),
}
OPT = {
    "model.safetensors": safetensors({"model.decoder.embed_positions.weight": (34, 4)}),
    "config.json": config(model_type="opt", max_position_embeddings=32),
}
GPTJ = {"config.json": config(model_type="gptj", n_positions=32)}
ROPE = {"config.json": config(model_type="llama", max_position_embeddings=32)}
WORDS = {f"w{i}": i for i in range(20)}


def tokenizer(added: dict[str, int], vocabulary: Any = WORDS) -> str:
    tokens = [{"id": id_, "content": token, "special": True} for token, id_ in added.items()]
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": tokens})


def embeddings(rows: int) -> dict[str, str | bytes]:
    return {
        "model.safetensors": safetensors({"model.embed_tokens.weight": (rows, 2)}),
        "config.json": config(vocab_size=rows),
    }


def quantised(**values: Any) -> dict[str, str | bytes]:
    return {"config.json": config(quantization_config=values)}


BASES = [
    over("learned positions", GPT2, "`max_length`", "1,024", "32 positions"),
    over("learned positions with an offset", OPT, "`max_length`", "1,024", "32 positions"),
    over("a table that is no weight", GPTJ, "`max_length`", "32 positions"),
    over("a prefix before them", GPT2, "and a prefix of 20", "32 positions", edits={"max_length": 16, "method": {"kind": "prefix"}}),
    ppo("prompts and answers over them", {"max_prompt_length": 30, "sampling": {"max_new_tokens": 3}, "policy": {}, "critic": {}, "rewards": [{"use": "fns.py:brevity", "target_words": 3}]}, "`max_prompt_length` and `sampling.max_new_tokens`", "33 tokens", "32 positions", files={f"model/{k}": v for k, v in GPT2.items()}),
    reward("pairs over them", {}, "`max_length`", "32 positions", files={f"model/{k}": v for k, v in GPT2.items()}),
    over("an end token beyond the embeddings", embeddings(20) | {"tokenizer.json": tokenizer({"<end>": 20}), "tokenizer_config.json": config(eos_token="<end>")}, "ids up to 20 (`<end>`)", "20 rows"),
    over("a template's token beyond them", embeddings(20) | {"tokenizer.json": tokenizer({"<user>": 23}), "chat_template.jinja": "<user>{{ messages }}"}, "ids up to 23 (`<user>`)", "20 rows"),
    over("a vocabulary beyond them", embeddings(19) | {"tokenizer.json": tokenizer({})}, "ids up to 19 (`w19`)", "19 rows"),
    over("a list of words beyond them", embeddings(2) | {"tokenizer.json": tokenizer({}, [["a", 0.0], ["b", 0.0], ["c", 0.0]])}, "ids up to 2 (`c`)", "2 rows"),
    over("4 bits without nf4", quantised(quant_method="bitsandbytes", load_in_4bit=True), "quantised already", "`model.load_in: nf4`"),
    over("8 bits", quantised(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes in 8 bits", "16 or 32 bits"),
    over("GPTQ", quantised(quant_method="gptq", bits=4), "gptq in 4 bits", edits={"model.load_in": "nf4"}),
    over("mxfp4", quantised(quant_method="mxfp4"), "(mxfp4)"),
    over("a damaged configuration", {"config.json": '{"a": '}, "config.json is damaged"),
    over("a configuration that is a list", {"config.json": "[]"}, "config.json is damaged"),
    over("a damaged tokenizer", {"tokenizer.json": '{"model": '}, "tokenizer.json is damaged"),
    over("empty weights", {"model.safetensors": b""}, "model.safetensors", "cut off"),
    over("weights cut off", {"model.safetensors": safetensors({"a": (8,)})[:-1]}, "model.safetensors is cut off", "bytes"),
    over("weights that are none", {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "model.safetensors", "no safetensors"),
    over("a header that is none", {"model.safetensors": struct.pack("<Q", 4) + b"oops"}, "model.safetensors is damaged"),
    over("a missing shard", {"model.safetensors.index.json": config(weight_map={"a": "model-1.safetensors"})}, "model-1.safetensors, which is not there"),
    over("an encoder and a decoder", {"config.json": config(architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)}, "a T5ForConditionalGeneration", "encoder and a decoder"),
    over("an encoder", {"config.json": config(architectures=["BertForMaskedLM"])}, "BertForMaskedLM, an encoder"),
    over("no output layer", {"config.json": config(architectures=["LlamaModel"], tie_word_embeddings=False), "model.safetensors": safetensors({"a": (1,)})}, "LlamaModel", "output layer", "random"),
    over("a classifier's", {"config.json": config(architectures=["LlamaForSequenceClassification"], tie_word_embeddings=False), "model.safetensors": safetensors({"score.weight": (1, 2)})}, "output layer"),
]  # fmt: skip

PLACES = [
    sft("no such user", {"output": "~nobody_at_all/out"}, "`output` in recipe.yaml", "no user `nobody_at_all`"),
    sft("a null character", {"output": "a\0b"}, "`output` in recipe.yaml", "control characters"),
    sft("a name too long", {"output": "a" * 256}, "`output` in recipe.yaml", "a name of 256 bytes"),
    sft("a name too long for what stands beside", {"output": "a" * 250}, "`output`", "too long"),
    sft("a path too long", {"output": "a/" * 2100}, "`output` in recipe.yaml", "4200 bytes"),
    sft("no name", {"output": ""}, "`output` in recipe.yaml", "name a folder"),
    sft("the kernel's", {"output": "/sys/align/out"}, "`output`: /sys/align/out cannot be written", "another folder"),
    sft("processes", {"output": "/proc/align"}, "`output`: /proc/align cannot be written"),
    sft("the base", {"output": "model"}, "`output`: model is `model.base`"),
    sft("in the place of a Hub's base", {"output": "org/name", "model.base": "org/name"}, "`output`: org/name is `model.base`"),
    sft("a seed past NumPy's", {"seed": 2**64}, "`seed` in recipe.yaml", "below 4293918720"),
    sft("a count of no machine's", {"train.save_steps": 10**30}, "`train.save_steps`", "at most 9007199254740992"),
    Case("inside another stage's", "pipeline", {"stages.reward.output": "out/sft/reward"}, ("`stages.reward.output` in recipe.yaml", "inside that of `stages.sft`")),
    Case("around another stage's", "pipeline", {"stages.reward.output": "out"}, ("`stages.sft.output` in recipe.yaml", "inside that of `stages.reward`")),
    Case("of a pipeline in a list", "pipeline", {"output": ["out"]}, ("`output` in recipe.yaml must be text",)),
    Case("a stage's name too long", "pipeline", {"stages." + "s" * 300: SOUND["sft"]}, ("`stages.sss", "60 at the most")),
]  # fmt: skip

HEAD = "stage: sft\nmodel: {base: model}\noutput: out\ndata: {train: data/sft.jsonl}\n"
LAUGHS = "vars:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
REFERENCES = "vars:\n  a0: xxxxxxxxxx\n" + "".join(f"  a{i}: {f'${{vars.a{i - 1}}}' * 4}\n" for i in range(1, 40))
TEXTS = [
    sft(name, {}, *says, files={"recipe.yaml": HEAD + more})
    for name, more, says in (
        ("nested deeply", "vars: " + "[" * 3000 + "]" * 3000, ("nested too deep",)),
        ("mappings nested deeply", "vars: " + "{a: " * 3000 + "1" + "}" * 3000, ("nested too deep",)),
        ("a billion laughs", LAUGHS, ("holds over 100,000 values",)),
        ("an anchor within itself", "vars: &a [*a]\n", ("holds over 100,000 values",)),
        ("a number of 5,000 digits", "seed: " + "9" * 5000, ("cannot be read",)),
        ("a billion references", REFERENCES, ("holds over 10,000,000 letters",)),
        ("two documents", "---\na: 1\n", ("recipe.yaml:5", "another document")),
        ("a key that is null", "train: {null: 2}\n", ("`train` in recipe.yaml",)),
        ("a key that is a list", "train: {[1]: 2}\n", ("recipe.yaml:5",)),
        ("a set", "vars: !!set {a, b}\n", ("`vars` in recipe.yaml",)),
    )
]
CASES = [*BASES, *PLACES, *TEXTS]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    build(tmp_path)
    for name, value in NO_HOME.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with inside(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_door_says_it_in_one_line_and_nothing_is_written(place: Path, case: Case) -> None:
    assert len({each.name for each in CASES}) == len(CASES) >= 50
    case.prepare()
    if "model.safetensors.index.json" in " ".join(case.files):
        (place / "model" / "model.safetensors").unlink()
    before = listing(place)
    line = case.line()
    assert all(part in line for part in case.says), line
    assert len(line.splitlines()) == 1 and len(line) < 400, line
    assert listing(place) == before


@pytest.mark.parametrize(
    "files, edits",
    [
        (GPT2, {"max_length": 32}),
        (OPT, {"max_length": 32}),
        (embeddings(64) | {"tokenizer.json": tokenizer({"<end>": 20})}, {}),  # rows that were padded
        (embeddings(20) | {"tokenizer.json": tokenizer({"<image>": 20})}, {}),  # a token that no text here has
        ({"config.json": config(model_type="falcon", alibi=True, max_position_embeddings=8)}, {}),
        (quantised(quant_method="bitsandbytes", load_in_4bit=True), {"model.load_in": "nf4"}),
        ({"config.json": config(architectures=["GPT2Model"])}, {}),  # its output layer is its input's
    ],
)
def test_what_can_run_is_let_in_without_a_word(place: Path, files: dict[str, Any], edits: dict[str, Any]) -> None:
    case = over("", files, edits=edits)
    case.prepare()
    recipe = load_recipe("recipe.yaml")
    assert check_recipe(recipe) == {"recipe": "new"} and remarks(recipe) == []


def test_rope_past_its_training_is_said_and_let_in(place: Path) -> None:
    over("", ROPE).prepare()
    recipe = load_recipe("recipe.yaml")
    check_recipe(recipe)
    (line,) = remarks(recipe)
    assert "`max_length`" in line and "1,024" in line and "32" in line
    scaled = {"rope_type": "yarn", "factor": 64.0, "original_max_position_embeddings": 16}
    facts = Facts(Path(), {"max_position_embeddings": 16, "rope_scaling": scaled}, {})
    assert facts.positions() == (1024, False)


def test_a_table_that_counts_from_the_pad_token_on_has_so_many_positions_fewer():
    """As RoBERTa's has: 514 rows, of which the first two are nobody's."""
    config = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    table = {"roberta.embeddings.position_embeddings.weight": (514, 8)}
    assert Facts(Path("base"), config, table).positions() == (512, True)
    assert Facts(Path("base"), config | {"model_type": "gpt2"}, table).positions() == (514, True)


SCORE = {"score.weight": (1, 4)}


@pytest.mark.parametrize(
    "values, shapes, says",
    [
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}}, SCORE, None),
        ({"architectures": ["BertForSequenceClassification"]}, {"classifier.weight": (1, 4)}, None),
        ({"architectures": ["RobertaForSequenceClassification"]}, {"classifier.out_proj.weight": (2, 4)}, "2 labels"),
        ({"architectures": ["LlamaForSequenceClassification"]}, {"score.weight": (3, 4)}, "3 labels"),
        ({"architectures": ["LlamaForCausalLM"]}, {"lm_head.weight": (9, 4)}, "head would be random"),
        ({"architectures": ["LlamaForSequenceClassification"]}, {"norm.weight": (4,)}, "head would be random"),
        ({"architectures": ["LlamaModel"]}, SCORE, "head would be random"),
        ({}, SCORE, "head would be random"),
        ({"architectures": ["LlamaForSequenceClassification"]}, {}, "no model.safetensors"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            SCORE,
            "an encoder and a decoder",
        ),
        ({"architectures": ["T5ForSequenceClassification"], "is_encoder_decoder": True}, SCORE, None),
    ],
)
def test_a_classifier_is_looked_at(tmp_path: Path, values: Any, shapes: Any, says: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    if shapes:
        (tmp_path / "model.safetensors").write_bytes(safetensors(shapes))
    if says is None:
        check_classifier(tmp_path, "`rewards`")
        (tmp_path / "tokenizer_config.json").unlink()
        says = "holds no tokenizer"
    with pytest.raises(BadInput, match=says):
        check_classifier(tmp_path, "`rewards`")


@pytest.mark.parametrize("task, is_in", [("SEQ_CLS", True), ("CAUSAL_LM", False), (None, False)])
def test_an_adapter_as_a_reward_is_one_for_classes(place: Path, task: str | None, is_in: bool) -> None:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text(json.dumps({"task_type": task, "peft_type": "LORA"}))
    ppo("", {"rewards.0.from": "adapter"}).prepare()
    recipe = load_recipe("recipe.yaml")
    if is_in:
        assert check_recipe(recipe) == {"recipe": "new"}
    else:
        with pytest.raises(BadInput, match="`rewards.0..from`: adapter is an adapter for"):
            check_recipe(recipe)


# ------------------------------------------------------------------------------------------------------------ paths


def paths_of(stage: Any) -> list[str]:
    return [text for text in yaml.safe_dump(json.loads(stage.model_dump_json(by_alias=True))).split() if "HOME" in text]


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "evaluate", "pipeline"])
def test_a_tilde_means_the_home_folder_in_every_path(place: Path, name: str) -> None:
    """Every path of the sound recipes, from a home folder that holds all that they name."""
    here = {"model", "data", "runs", "fns.py", "out"}

    def at_home_too(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: at_home_too(each) for key, each in value.items()}
        if isinstance(value, list):
            return [at_home_too(each) for each in value]
        is_path = isinstance(value, str) and value.partition(":")[0].partition("/")[0] in here
        return f"~/{value}" if is_path else value

    (place / "home").symlink_to(place)
    Path("recipe.yaml").write_text(yaml.safe_dump(at_home_too(SOUND[name]), sort_keys=False))
    recipe = load_recipe("~/recipe.yaml")
    assert set(check_recipe(recipe).values()) == {"new"}
    for stage in recipe.stages.values():
        assert "~" not in stage.model_dump_json(by_alias=True)
        assert stage.output.startswith(f"{place}/home/")
    assert not (place / "~").exists()


def test_a_tilde_is_read_as_a_shell_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home("~") == "/home/me" and at_home("~/a/~") == "/home/me/a/~"
    assert [at_home(path) for path in ("./~", "a~", "org/name", "${x}~", "")] == ["./~", "a~", "org/name", "${x}~", ""]


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "file", "file above", "read-only"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind.startswith("link"):
        path.symlink_to(path if kind.endswith("itself") else tmp_path / "nothing")
    if kind.startswith("file"):
        path.write_text("")
    output = str(path / "deep" if kind == "file above" else Path("/sys/kernel") if kind == "read-only" else path)
    before = listing(tmp_path)
    with pytest.raises(BadInput, match="`output`: .*name a folder|cannot be written"):
        check_writable(output)
    assert listing(tmp_path) == before


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("new", "new/deep", "there", "link", "exp[/b] [v2]"):
        check_writable(str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "there"]


@pytest.mark.parametrize("folder", ["exp[/b]", "exp [v2]", "[bold]", "\\[x]", ":smile:"])
def test_paths_are_shown_as_written(place: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    from align.report.checking import show

    sft("", {"output": f"{folder}/out", "model.base": "org/far"}).prepare()
    (place / folder).mkdir(parents=True)
    Path("recipe.yaml").rename(Path(folder) / "recipe.yaml")
    recipe = load_recipe(f"{folder}/recipe.yaml")
    show(recipe, check_recipe(recipe), {"recipe": f"one process ({folder}/a.yaml)"}, [f"of {folder}"])
    shown = capsys.readouterr().out
    assert shown.startswith("note    ")  # the last words are of the stage, and the verdict
    for text in (f"{folder}/recipe.yaml: sound", f"{folder}/out", f"({folder}/a.yaml)", f"of {folder}"):
        assert "".join(text.split()) in "".join(shown.split()), shown


# -------------------------------------------------------------------------------------------------- the environment


def test_what_a_scheduler_left_does_not_reach_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = (*INHERITED, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    left += ("MV2_COMM_WORLD_RANK", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_TORCH_DEVICE", "PET_NNODES")
    for name in left:
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # nothing reads it but who wants to know
    given = _environment(plan("cpu"), tmp_path / "status", "launch", 1.0)
    assert not set(left) & given.keys()
    assert given["SLURM_JOB_ID"] == "7" and given["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    "line, says",
    [
        ("mixed_precision: bf16", "mixed_precision 'bf16' is not obeyed"),
        ("mixed_precision: fp8", "`model.load_in: bfloat16`"),
        ("downcast_bf16: true", "downcast_bf16 is not obeyed"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_config is not obeyed"),
        ("fp8_config: {backend: TE}", "fp8_config is not obeyed"),
        ("fsdp_config: {fsdp_version: 2}", "fsdp_config is not obeyed"),
        ("gradient_accumulation_steps: 4", "gradient_accumulation_steps is not obeyed"),
        ("tpu_use_cluster: true", "tpu_use_cluster is not obeyed"),
        ("num_proceses: 1", "`num_proceses` is no key of accelerate's; did you mean `num_processes`?"),
        ("num_processes: [1]", "num_processes must be a whole number"),
        ("num_processes: true", "num_processes must be a whole number"),
        ("num_machines: -1", "num_machines must be a whole number"),
        ("machine_rank: 3", "machine_rank must be a whole number from 0 to 0"),
        ("main_process_port: 70000", "main_process_port must be"),
        ("use_cpu: often", "use_cpu must be true or false"),
        ("gpu_ids: [0]", "gpu_ids must be `all` or numbers"),
        *(
            (f"{key}:", f"{key} is empty")
            for key in ("compute_environment", "num_machines", "num_processes", "use_cpu")
        ),
    ],
)
def test_what_a_config_asks_for_is_obeyed_or_refused(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"distributed_type: 'NO'\n{line}\n")
    with pytest.raises(BadInput) as refused:
        plan(str(path))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_what_a_config_leaves_off_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    values = {"distributed_type": "NO", "mixed_precision": False, "downcast_bf16": "no", "dynamo_config": {}}
    values |= {"machine_rank": None, "main_process_port": None}
    values |= {"fsdp_config": {}, "fp8_config": None, "tpu_use_sudo": False, "gpu_ids": "all", "debug": False}
    values |= {"main_training_function": "main", "rdzv_backend": "static", "same_network": True, "use_cpu": True}
    path.write_text(yaml.safe_dump(values))
    assert plan(str(path)).expected_processes == 1


@pytest.mark.parametrize("name", ["ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"])
def test_a_precision_of_the_environment_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "no")
    plan("cpu")
    monkeypatch.setenv(name, "bf16")
    with pytest.raises(BadInput, match=f"{name}=bf16 in the environment is not obeyed"):
        plan("cpu")


ASKED = {"wandb_project": "x"}


@pytest.mark.parametrize(
    "track, environment, mode",
    [
        ({}, {"WANDB_PROJECT": "y", "WANDB_MODE": "online"}, None),
        (ASKED, {}, "online"),
        (ASKED, {"WANDB_MODE": "offline"}, "offline"),
        (ASKED, {"WANDB_MODE": "dryrun"}, "offline"),
        (ASKED, {"WANDB_MODE": "disabled"}, "disabled"),
        (ASKED, {"WANDB_DISABLED": "true"}, "disabled"),
        (ASKED | {"wandb_mode": "offline"}, {"WANDB_MODE": "online"}, "offline"),
        (ASKED | {"wandb_mode": "online"}, {"WANDB_MODE": "offline"}, "online"),
    ],
)
def test_wandb_is_as_the_recipe_says_or_else_its_variables(
    place: Path, monkeypatch: pytest.MonkeyPatch, track: Any, environment: dict[str, str], mode: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Track(**track)
    assert wandb_mode(settings) == mode
    if mode != "online":
        check_trackers(settings)
        return
    with pytest.raises(BadInput, match="nobody is logged in"):
        check_trackers(settings)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    check_trackers(settings)


@pytest.mark.parametrize("host", ["api.wandb.ai", "wandb.example", "noted.example", "other.example"])
def test_a_login_is_of_the_server_that_is_asked(place: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    home = place / "home"
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".netrc").write_text(f"machine {host} login user password secret\n")
    (home / ".netrc").chmod(0o600)
    if host == "wandb.example":
        monkeypatch.setenv("WANDB_BASE_URL", f"https://{host}:8080")
    if host == "noted.example":
        (home / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = https://{host}\n")
    monkeypatch.delenv("NETRC")
    if host != "other.example":
        check_trackers(Track(**ASKED))
        return
    with pytest.raises(BadInput, match="nobody is logged in"):
        check_trackers(Track(**ASKED))


# ---------------------------------------------------------------------------------------------------------- the Hub


class _Hub:
    """Stands for huggingface_hub's HfApi: what it is asked, and what it answers with or raises."""

    answer: Any = None

    def repo_info(self, name: str, *, revision: str | None, repo_type: str, timeout: float) -> Any:
        assert timeout <= 10
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def _answers() -> dict[str, tuple[Any, str, bool]]:
    """Name -> what the Hub answers, a part of the line, whether it is a fault."""
    from types import SimpleNamespace

    import httpx
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))

    def holding(*names: str) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    return {
        "there": (holding("config.json", "model.safetensors"), "", False),
        "pickled": (holding("config.json", "pytorch_model.bin"), "holds no safetensors", True),
        "not there": (RepositoryNotFoundError("no", response=response), "the Hub has no model org/far", True),
        "no revision": (RevisionNotFoundError("no", response=response), "has no revision", True),
        "gated": (GatedRepoError("no", response=response), "is gated", True),
        "no network": (httpx.ConnectError("no"), "does not answer", False),
        "too slow": (httpx.ReadTimeout("no"), "does not answer", False),
    }


@pytest.mark.parametrize("name", ["there", "pickled", "not there", "no revision", "gated", "no network", "too slow"])
def test_the_hub_is_looked_at(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import huggingface_hub

    answer, says, is_fault = _answers()[name]
    monkeypatch.setattr(_Hub, "answer", answer)
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    surroundings.look_at_hub.cache_clear()
    sft("", {"model.base": "org/far", "model.revision": "main"}).prepare()
    recipe = load_recipe("recipe.yaml")
    if is_fault:
        with pytest.raises(BadInput, match=f"`model.base`: .*{says}"):
            check_recipe(recipe)
    else:
        check_recipe(recipe)
        assert [says in line for line in remarks(recipe)] == ([True] if says else [])
    surroundings.look_at_hub.cache_clear()


def test_what_the_recipe_will_make_is_not_looked_for_at_the_hub(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`output: demo` is no folder yet, so that `demo/sft` could be a name there."""
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("align.preflight.look_at_hub", lambda name, *_: asked.append(name))
    stages = {}
    for stage in ("sft", "reward", "ppo"):
        stages[stage] = tiny.recipe(stage, base, data, tmp_path / "demo" / stage) | {"output": f"demo/{stage}"}
    stages["ppo"] |= {"policy": {"from": "demo/sft"}, "rewards": [{"use": "learned", "from": "demo/reward"}]}
    stages["evaluate"] = {"stage": "evaluate", "model": {"base": str(base)}, "output": "demo/evaluate"}
    stages["evaluate"] |= {"policies": {"sft": "demo/sft"}, "rewards": stages["ppo"]["rewards"]}
    stages["evaluate"] |= {"prompts": {"train": str(data / "prompts.jsonl")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    recipe = load_recipe("recipe.yaml")
    check_recipe(recipe)
    remarks(recipe)
    assert not asked


def test_a_hub_that_never_ends_its_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    never = threading.Event()

    class Dripping:
        def repo_info(self, *args: Any, **settings: Any) -> Any:
            never.wait(30)

    monkeypatch.setattr(huggingface_hub, "HfApi", Dripping)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(surroundings, "HUB_SECONDS", 0.1)
    surroundings.look_at_hub.cache_clear()
    begun = time.monotonic()
    assert "the Hub does not answer (TimeoutError)" in surroundings.look_at_hub("org/far", None, "`model.base`")
    assert time.monotonic() - begun < 5.0
    never.set()
    surroundings.look_at_hub.cache_clear()


def test_offline_it_says_that_it_cannot_look_and_the_cache_is_looked_at(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sft("", {"model.base": "org/far"}).prepare()
    recipe = load_recipe("recipe.yaml")
    check_recipe(recipe)
    assert ["HF_HUB_OFFLINE" in line for line in remarks(recipe)] == [True]
    for name, content in GPT2.items():
        (place / "model" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(preflight, "cached_folder", lambda name, revision: place / "model")
    with pytest.raises(BadInput, match="32 positions that org/far has"):
        check_recipe(recipe)


# ------------------------------------------------------------------------------------------------------------- JSON


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_what_is_written_is_json_and_read_again(tmp_path: Path) -> None:
    from align.files import write_json, write_lines
    from align.track import Tracker

    odd = {"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}], "d": (1.5, float("nan")), "e": 2, "f": True}
    write_json(tmp_path / "a.json", odd)
    write_lines(tmp_path / "b.jsonl", [odd, odd])
    settings = load_settings(tmp_path)
    for start in (0, 1):
        tracker = Tracker(settings, total=2, start=start, shown=("loss",), is_main=True)
        tracker.log(start + 1, {"loss": float("nan"), "kl": 0.5, "big": float("inf")})
        tracker.close()
    texts = [(tmp_path / "a.json").read_text(), *(tmp_path / "b.jsonl").read_text().splitlines()]
    texts += (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(texts) == 5
    found = [json.loads(text, parse_constant=refuse) for text in texts]
    assert found[0] == {"a": None, "b": [None, {"c": None}], "d": [1.5, None], "e": 2, "f": True}
    assert read_metrics(tmp_path) == [{"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.5}]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n[]\n3\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}]


def load_settings(folder: Path) -> Any:
    values: dict[str, Any] = json.loads(json.dumps(SOUND["sft"]))
    edit(values, ["output"], str(folder))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(str(path)).stages["recipe"]
