"""Everything that can be wrong with a recipe is found here, before models are loaded and anything is written."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from align.artifact import MANIFEST, check_parent, fingerprint, read_manifest, state_of
from align.data import Loaded, load, looks_like_hub_id
from align.errors import BadInput
from align.plugins import users_code
from align.recipe import Recipe
from align.rewards import check_columns, check_reward, check_rewards
from align.rewards.judge import check_judge
from align.settings import (
    PEFT_METHODS_IN_4_BITS,
    STAGES,
    AnyMethod,
    Data,
    EvaluateSettings,
    Freeze,
    Full,
    Lora,
    OtherPeft,
    OwnMethod,
    PpoSettings,
    Prefix,
    RewardSettings,
    ScoreSettings,
    SftSettings,
    StageSettings,
)
from align.wording import did_you_mean_path


def check_recipe(recipe: Recipe) -> dict[str, str]:
    """Checks every stage of a recipe; returns what each output folder holds (new | running | finished).

    Raises:
        BadInput: with the stage's key, the reason and the cure.
    """
    makers = {_same(settings.output): name for name, settings in recipe.stages.items()}
    made: dict[str, StageSettings] = {}  # folder -> the earlier stage that makes it
    states = {}
    for name, settings in recipe.stages.items():
        with _naming(recipe, name):
            for key, (folder, _) in settings.parents().items():
                maker = makers.get(_same(folder), name)
                if maker != name and _same(folder) not in made:
                    raise BadInput(f"`{key}`: {folder} is made by stage `{maker}`, which comes later; put it before")
            states[name] = _check_stage(settings, made)
        made[_same(settings.output)] = settings
    return states


def check_stage(recipe: Recipe, name: str) -> str:
    """Checks one stage that is about to run: what it starts from must be there. Returns what its output holds."""
    with _naming(recipe, name):
        return _check_stage(recipe.stages[name], {})


@contextmanager
def _naming(recipe: Recipe, name: str) -> Iterator[None]:
    """Puts the recipe's file, and in a pipeline the stage, before what is wrong; what a stage of the user's own raises
    is wrong too."""
    kind = recipe.stages[name].stage
    try:
        with nullcontext() if kind in STAGES else users_code(kind, f"`{kind}`", raises=BadInput):
            yield
    except BadInput as error:
        stage = f"stage `{name}`: " if recipe.is_pipeline else ""
        raise BadInput(f"{recipe.path}: {stage}{error}") from error


def _check_stage(settings: StageSettings, made: dict[str, StageSettings]) -> str:
    """`made` maps the folders that earlier stages of the pipeline will have made to these."""
    check_model(settings)
    if isinstance(settings, PpoSettings):
        check_rewards(settings.rewards, "rewards")
    if isinstance(settings, EvaluateSettings):
        check_rewards(settings.judge, "judge")
        for name, reward in settings.beside.items():
            check_reward(reward, f"beside.{name}")
        if settings.pairwise_judge is not None:
            check_judge(settings.pairwise_judge, "pairwise_judge")
    if isinstance(settings, ScoreSettings) and settings.judge is not None:
        check_judge(settings.judge, "judge")
    for key, (folder, kinds) in settings.parents().items():
        if _same(folder) == _same(settings.output):
            raise BadInput(f"`{key}`: {folder} is this stage's own output; name the run to start from")
        maker = made.get(_same(folder))
        if maker is None:
            check_parent(folder, _kinds_that_do(folder, kinds), f"`{key}`")
            _check_run_before(settings, folder, key)
        else:
            _check_stage_before(settings, folder, key, maker, kinds)
    state = state_of(settings)
    if state != "finished":
        for key, (kind, data) in settings.data_sections().items():
            loaded = _check_data(key, kind, data)
            if kind == "prompts" and loaded is not None:
                check_columns(settings, (*loaded.train, *loaded.validation))
    return state


def _same(folder: str) -> str:
    return str(Path(folder).resolve())


def _is_on_hub(name: str) -> bool:
    """`owner/name` is a Hub id unless there is a folder `owner` here: then it is a path that leads nowhere."""
    return looks_like_hub_id(name) and not Path(name).parent.is_dir()


def check_model(settings: StageSettings) -> None:
    """Its base, chat template and tuning method, and whether they go together.

    Raises:
        BadInput: with the key, the reason and the cure.
    """
    model, (key, method) = settings.model, _method(settings)
    folder = Path(model.base)
    cure = "give a folder that save_pretrained wrote"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"`model.base`: {model.base} holds no config.json, so it is no transformers model; {cure}")
        if not list(folder.glob("*.safetensors")):
            raise BadInput(f"`model.base`: {model.base} holds no safetensors (pickled weights are not loaded); {cure}")
    elif not _is_on_hub(model.base):
        hint = did_you_mean_path(folder, folders=True) or f"; {cure}"
        what = f"is not in {folder.parent}, which is a folder here and so no owner on the Hub"
        if not looks_like_hub_id(model.base):
            what = "is neither a folder nor a Hub id (`owner/name`)"
        raise BadInput(f"`model.base`: {model.base} {what}{hint}")
    if model.chat_template is not None and not Path(model.chat_template).is_file():
        hint = did_you_mean_path(Path(model.chat_template)) or "; name a Jinja file"
        raise BadInput(f"`model.chat_template`: {model.chat_template} is not there{hint}")
    _check_method(settings, key, method)
    if isinstance(settings, SftSettings) and settings.packing and model.attn_implementation == "eager":
        raise BadInput(
            "`packing: true` is exact with `attn_implementation` sdpa or flash_attention_2; with eager set "
            "`packing: false`"
        )


def _check_method(settings: StageSettings, key: str, method: AnyMethod | None) -> None:
    """What this method cannot do on this base or in this stage, and the nearest thing that works."""
    load_in = settings.model.load_in
    if isinstance(method, Full) and load_in == "nf4":
        raise BadInput(
            f"`{key}.kind: full` cannot train a 4-bit base (`model.load_in: nf4`): use `kind: qlora`, or "
            "`load_in: float32`"
        )
    is_copied = isinstance(method, (Full, Freeze)) or (isinstance(method, OtherPeft) and method.kind == "ln_tuning")
    if method is not None and is_copied and load_in == "bfloat16":
        raise BadInput(
            f"`{key}.kind: {method.kind}` needs `model.load_in: float32`: in bfloat16 small updates round to nothing; "
            "or use `kind: lora`"
        )
    if isinstance(method, Lora) and method.kind == "qlora" and load_in != "nf4":
        raise BadInput(f"`{key}.kind: qlora` needs `model.load_in: nf4` (it is {load_in}); or use `kind: lora`")
    if isinstance(method, Prefix):
        _check_prefix(settings, key, f"`{key}.kind: prefix`")
    if isinstance(method, OtherPeft) and load_in == "nf4" and method.kind not in PEFT_METHODS_IN_4_BITS:
        raise BadInput(
            f"`{key}.kind: {method.kind}` needs weights in floating point, and `model.load_in` is nf4: use "
            f"`kind: qlora` (or one of {', '.join(PEFT_METHODS_IN_4_BITS)})"
        )
    if isinstance(method, (OtherPeft, OwnMethod)):  # what PEFT or the user's file says of it: heavy, and only here
        from align.models.methods import check_method

        check_method(method, key)


def _check_prefix(settings: StageSettings, key: str, what: str) -> None:
    """Keys and values before every sequence go through our own attention alone."""
    if settings.model.attn_implementation != "sdpa":
        raise BadInput(f"{what} needs `model.attn_implementation: sdpa`; or use `kind: lora`")
    if not isinstance(settings, (PpoSettings, EvaluateSettings)) or not key.startswith(("policy.", "policies.")):
        return  # nothing is sampled from it
    if settings.sampling.cache_implementation == "static":
        raise BadInput(f"{what} cannot sample with `sampling.cache_implementation: static`; leave it out")


def _method(settings: StageSettings) -> tuple[str, AnyMethod | None]:
    """The key and value of the stage's PEFT method."""
    if isinstance(settings, (SftSettings, RewardSettings)):
        return "method", settings.method
    return "policy.method", settings.policy.method if isinstance(settings, PpoSettings) else None


def _kinds_that_do(folder: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """`kinds`, with `*` only for what transformers may be able to load."""
    is_model = _is_on_hub(folder) or (Path(folder) / "config.json").is_file()
    return kinds if is_model else tuple(kind for kind in kinds if kind != "*")


def _check_run_before(settings: StageSettings, folder: str, key: str) -> None:
    """Of a finished run with an adapter."""
    config = Path(folder) / "adapter_config.json"
    if config.is_file():
        if json.loads(config.read_text(encoding="utf-8")).get("peft_type") == "PREFIX_TUNING":
            _check_prefix(settings, key, f"`{key}`: {folder} holds a prefix, which")
        manifest = read_manifest(folder)
        _check_adapter(settings, folder, key, str(manifest.get("base")), manifest.get("base_fingerprint"))


def _check_stage_before(
    settings: StageSettings, folder: str, key: str, maker: StageSettings, kinds: tuple[str, ...]
) -> None:
    """Of a stage of the same pipeline, before it has run."""
    if maker.kind not in kinds:
        wanted = " or ".join(f"`{kind}`" for kind in kinds if kind != "*")
        raise BadInput(f"`{key}`: {folder} will be a run of kind `{maker.kind}`; name one of kind {wanted}")
    method = _method(maker)[1]
    if isinstance(method, Prefix):
        _check_prefix(settings, key, f"`{key}`: {folder} will hold a prefix, which")
    if method is not None and not isinstance(method, Full):
        _check_adapter(settings, folder, key, maker.model.base, fingerprint(maker.model.base))


def _check_adapter(settings: StageSettings, folder: str, key: str, base: str, base_fingerprint: str | None) -> None:
    """A policy's or critic's adapter fits only the base that it was trained over. Rewards bring their own."""
    if key.startswith(("rewards", "judge", "beside")):
        return
    is_over_a_run = (Path(base) / MANIFEST).is_file() and base_fingerprint == fingerprint(base)  # a fully tuned one
    if base_fingerprint != fingerprint(settings.model.base) and not is_over_a_run:
        raise BadInput(
            f"`{key}`: {folder} is an adapter over the base {base}, and this recipe's "
            f"`model.base` is {settings.model.base}; use the same base"
        )
    if isinstance(settings, PpoSettings) and key == "policy.from" and settings.policy.method is not None:
        raise BadInput(
            f"`policy.method`: {folder} holds an adapter already, and training goes on with it: leave "
            "`policy.method` out, or merge it first (`align merge`)"
        )


def _check_data(key: str, kind: str, data: Data) -> Loaded[Any] | None:
    """Reads local files to their last row; a data set on the Hub is read by the stage."""
    paths = [source.path for source in (*data.train, *data.validation) if looks_like_hub_id(source.path)]
    for path in paths:
        if not _is_on_hub(path):
            hint = did_you_mean_path(Path(path)) or "; name a data file, or a data set on the Hub"
            raise BadInput(f"`{key}`: {path} is not there{hint}")
    if paths:
        return None
    try:
        return load(data, kind)  # type: ignore[call-overload, no-any-return]
    except BadInput as error:
        raise BadInput(f"`{key}`: {error}") from error
