"""Everything that can be wrong with a recipe is found here, before models are loaded and anything is written."""

from difflib import get_close_matches
from pathlib import Path

from align.artifact import check_parent, fingerprint, read_manifest, state_of
from align.data import load, looks_like_hub_id
from align.errors import BadInput
from align.recipe import Recipe
from align.rewards import check_rewards
from align.settings import Data, EvaluateSettings, Full, Lora, PpoSettings, RewardSettings, SftSettings, StageSettings


def check_recipe(recipe: Recipe) -> dict[str, str]:
    """Checks every stage of a recipe; returns what each output folder holds (new | running | finished).

    Raises:
        BadInput: with the stage's key, the reason and the cure.
    """
    made: dict[str, str] = {}  # folder -> kind, of the stages before
    states = {}
    for name, settings in recipe.stages.items():
        try:
            states[name] = check_stage(settings, made)
        except BadInput as error:
            if not recipe.is_pipeline:
                raise
            raise BadInput(f"stage `{name}`: {error}") from error
        made[_same(settings.output)] = settings.kind
    return states


def check_stage(settings: StageSettings, made: dict[str, str] | None = None) -> str:
    """Checks one stage; `made` maps the folders that earlier stages of the pipeline will have made to their kinds."""
    _check_model(settings)
    for key, (folder, kinds) in settings.parents().items():
        kind = (made or {}).get(_same(folder))
        if kind is None:
            check_parent(folder, (*kinds, "*") if _may_be_hub(folder, kinds) else kinds, f"`{key}`")
            _check_same_base(settings, folder, key)
        elif kind not in kinds:
            raise BadInput(f"`{key}`: {folder} will be a run of kind `{kind}`, and this needs `{kinds[0]}`")
    if isinstance(settings, PpoSettings):
        check_rewards(settings.rewards, "rewards")
    if isinstance(settings, EvaluateSettings):
        check_rewards(settings.judge, "judge")
    state = state_of(settings)
    if state != "finished":
        for key, (kind, data) in settings.data_sections().items():
            _check_data(key, kind, data)
    return state


def _same(folder: str) -> str:
    return str(Path(folder).resolve())


def _check_model(settings: StageSettings) -> None:
    model, method = settings.model, _method(settings)
    folder = Path(model.base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"`model.base`: {model.base} holds no config.json, so it is no transformers model")
        if not list(folder.glob("*.safetensors")):
            raise BadInput(f"`model.base`: {model.base} holds no safetensors weights (pickled ones are not loaded)")
    elif not looks_like_hub_id(model.base):
        near = (
            get_close_matches(folder.name, [p.name for p in folder.parent.glob("*")], n=1)
            if folder.parent.is_dir()
            else []
        )
        hint = f"; did you mean `{folder.parent / near[0]}`?" if near else ""
        raise BadInput(f"`model.base`: {model.base} is neither a folder nor a Hub id (`owner/name`){hint}")
    if model.chat_template is not None and not Path(model.chat_template).is_file():
        raise BadInput(f"`model.chat_template`: {model.chat_template} is not there; name a Jinja file")
    if isinstance(method, Full) and model.load_in == "nf4":
        raise BadInput(
            "`method: full` cannot train a 4-bit base (`model.load_in: nf4`): use `kind: qlora`, or `load_in: bfloat16`"
        )
    if isinstance(method, Lora) and method.kind == "qlora" and model.load_in != "nf4":
        raise BadInput(f"`method.kind: qlora` needs `model.load_in: nf4` (it is {model.load_in}); or use `kind: lora`")
    if isinstance(settings, SftSettings) and settings.packing and model.attn_implementation == "eager":
        raise BadInput(
            "`packing: true` is exact with `attn_implementation` sdpa or flash_attention_2; with eager set "
            "`packing: false`"
        )


def _method(settings: StageSettings) -> Lora | Full | None:
    if isinstance(settings, (SftSettings, RewardSettings)):
        return settings.method
    return settings.policy.method if isinstance(settings, PpoSettings) else None


def _may_be_hub(folder: str, kinds: tuple[str, ...]) -> bool:
    return "*" in kinds and looks_like_hub_id(folder)


def _check_same_base(settings: StageSettings, folder: str, key: str) -> None:
    """A policy's or critic's adapter fits only the base that it was trained over. Rewards bring their own."""
    if not (Path(folder) / "adapter_config.json").is_file() or key.startswith(("rewards", "judge")):
        return
    manifest = read_manifest(folder)
    if manifest.get("base_fingerprint") != fingerprint(settings.model.base):
        raise BadInput(
            f"`{key}`: {folder} was trained over the base {manifest.get('base')}, and this recipe's "
            f"`model.base` is {settings.model.base}; use the same base"
        )
    if isinstance(settings, PpoSettings) and key == "policy.from" and settings.policy.method is not None:
        raise BadInput(
            f"`policy.method`: {folder} holds an adapter already, and training goes on with it: leave "
            "`policy.method` out, or merge it first (`align merge`)"
        )


def _check_data(key: str, kind: str, data: Data) -> None:
    """Reads local files to their last row; a data set on the Hub is read by the stage."""
    sources = [*data.train, *data.validation]
    if any(looks_like_hub_id(source.path) for source in sources):
        return
    try:
        load(data, kind)  # type: ignore[call-overload]
    except BadInput as error:
        raise BadInput(f"`{key}`: {error}") from error
