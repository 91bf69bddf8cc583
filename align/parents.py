"""What a stage starts from: earlier runs, models and adapters made elsewhere, and whether they fit its recipe.

All that is read here are small JSON files and the headers of weights.
"""

import json
import os
from pathlib import Path
from typing import Any

from align.artifact import MANIFEST, check_parent, read_manifest
from align.data import looks_like_hub_id
from align.errors import BadInput
from align.identity import (
    ADAPTER_CONFIG,
    base_of,
    fingerprint,
    has_tokenizer,
    have_same_tokens,
    is_folder_name,
    same,
    template_of,
)
from align.models.facts import check_classifier, check_generates, read_facts, read_shapes
from align.settings import (
    AnyMethod,
    EvaluateSettings,
    Full,
    PpoSettings,
    Prefix,
    RewardSettings,
    SftSettings,
    StageSettings,
)
from align.surroundings import cached_folder, may_be_fetched
from align.wording import one_line

HEAD = "score.weight"  # of a sequence classifier, as transformers and PEFT name it
SPEAKERS = ("policy.", "policies.", "reference.")  # keys of what samples, or is compared with what samples
SAME_FOLDER_CURE = "name a folder that save_pretrained wrote"


def check_parents(settings: StageSettings, made: dict[str, StageSettings]) -> None:
    """Everything that can be wrong with what the stage reads; `made` are the folders that earlier stages of the
    pipeline will have made.

    Raises:
        BadInput: with the recipe's key, the reason and the cure.
    """
    for key, (folder, kinds) in settings.parents().items():
        if resolved(folder) == resolved(settings.output):
            raise BadInput(f"`{key}`: {folder} is this stage's own output; name the run to start from")
        maker = made.get(resolved(folder))
        if maker is not None:
            _check_stage_before(settings, folder, key, maker, kinds)
            continue
        check_start(folder, kinds, f"`{key}`")
        if (Path(folder) / MANIFEST).is_file():
            _check_run_before(settings, folder, key)
        elif is_reward(key):
            _check_scorer(folder, key)
        else:
            _check_made_elsewhere(settings, folder, key)


def resolved(folder: str) -> str:
    return os.path.realpath(folder)


def is_on_hub(name: str) -> bool:
    """`owner/name` is a Hub id unless there is a folder `owner` here: then it is a path that leads nowhere."""
    return looks_like_hub_id(name) and not is_folder_name(name)


def method_of(settings: StageSettings) -> tuple[str, AnyMethod | None]:
    """The key and value of the stage's PEFT method."""
    if isinstance(settings, (SftSettings, RewardSettings)):
        return "method", settings.method
    return "policy.method", settings.policy.method if isinstance(settings, PpoSettings) else None


def check_prefix(settings: StageSettings, key: str, what: str) -> None:
    """Keys and values before every sequence go through our own attention alone."""
    if settings.model.attn_implementation != "sdpa":
        raise BadInput(f"{what} needs `model.attn_implementation: sdpa`; or use `kind: lora`")
    if not isinstance(settings, (PpoSettings, EvaluateSettings)) or not key.startswith(("policy.", "policies.")):
        return  # nothing is sampled from it
    if settings.sampling.cache_implementation == "static":
        raise BadInput(f"{what} cannot sample with `sampling.cache_implementation: static`; leave it out")


def check_start(folder: str, kinds: tuple[str, ...], where: str) -> None:
    """Raises BadInput unless `folder` is a finished run of one of `kinds`, or (`*`) something that transformers or PEFT
    may be able to load: a folder of theirs, or a Hub id that is in the cache or can be asked for."""
    is_model = any((Path(folder) / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    is_model = is_model or (is_on_hub(folder) and may_be_fetched(folder))
    check_parent(folder, kinds if is_model else tuple(kind for kind in kinds if kind != "*"), where)


def remarks_on_parents(settings: StageSettings) -> list[str]:
    """Sentences on what fits and is yet not quite what was trained: another precision, a base by another name."""
    said = []
    for key, (folder, _) in settings.parents().items():
        if (Path(folder) / MANIFEST).is_file():
            trained_in = read_manifest(folder).get("recipe", {}).get("model", {}).get("load_in")
            if trained_in not in (None, settings.model.load_in):
                said.append(
                    f"warning: `{key}`: {folder} was trained over its base in {trained_in}, and stands here over "
                    f"{settings.model.load_in}: its figures differ a little from those it was trained to"
                )
        elif (Path(folder) / ADAPTER_CONFIG).is_file() and not is_reward(key):
            named = _adapter_config(folder).get("base_model_name_or_path")
            if named != settings.model.base:
                said.append(
                    f"`{key}`: the adapter in {folder} names the base {named}; here it is {settings.model.base}"
                )
    return said


# ------------------------------------------------------------------------------------------------- runs of our own


def _check_run_before(settings: StageSettings, folder: str, key: str) -> None:
    """Of a finished run: its base, and the template and tokens that it was trained with."""
    manifest = read_manifest(folder)
    members = [str(Path(folder) / name) for name in manifest.get("members", ())]
    for run in members or [folder]:
        if not (Path(run) / ADAPTER_CONFIG).is_file():
            continue
        if _adapter_config(run).get("peft_type") == "PREFIX_TUNING":
            check_prefix(settings, key, f"`{key}`: {run} holds a prefix, which")
        _check_base(settings, run, key, read_manifest(run))
    if not members:
        _check_speech(settings, folder, key)


def _check_base(settings: StageSettings, folder: str, key: str, manifest: dict[str, Any]) -> None:
    """The base is where it was, and what it was. A policy's or critic's is the recipe's; rewards bring their own."""
    try:
        place = base_of(manifest, folder)
    except BadInput as error:
        if same(manifest.get("base_fingerprint"), fingerprint(settings.model.base, settings.model.revision)):
            return  # gone from where it was, and the recipe has it
        raise BadInput(f"`{key}`: {error}") from error
    if is_reward(key) or (Path(place) / MANIFEST).is_file():  # one that stands over a fully tuned run
        return
    if not same(manifest.get("base_fingerprint"), fingerprint(settings.model.base, settings.model.revision)):
        raise BadInput(
            f"`{key}`: {folder} is an adapter over the base {manifest.get('base')}, and this recipe's "
            f"`model.base` is {settings.model.base}; use the same base"
        )
    _no_second_method(settings, folder, key)


def is_reward(key: str) -> bool:
    """Whether what stands at this key scores, over a base and with a tokenizer of its own."""
    return key.startswith(("rewards", "judge", "beside", "ensemble", "reward."))


def _no_second_method(settings: StageSettings, folder: str, key: str) -> None:
    if isinstance(settings, PpoSettings) and key == "policy.from" and settings.policy.method is not None:
        raise BadInput(
            f"`policy.method`: {folder} holds an adapter already, and training goes on with it: leave "
            "`policy.method` out, or merge it first (`align merge`)"
        )


def _check_stage_before(
    settings: StageSettings, folder: str, key: str, maker: StageSettings, kinds: tuple[str, ...]
) -> None:
    """Of a stage of the same pipeline, before it has run."""
    if maker.kind not in kinds:
        wanted = " or ".join(f"`{kind}`" for kind in kinds if kind != "*")
        raise BadInput(f"`{key}`: {folder} will be a run of kind `{maker.kind}`; name one of kind {wanted}")
    method = method_of(maker)[1]
    if isinstance(method, Prefix):
        check_prefix(settings, key, f"`{key}`: {folder} will hold a prefix, which")
    is_over_ours = fingerprint(maker.model.base, maker.model.revision) == fingerprint(
        settings.model.base, settings.model.revision
    )
    if method is not None and not isinstance(method, Full) and not is_reward(key):
        if not is_over_ours:
            raise BadInput(
                f"`{key}`: {folder} will be an adapter over the base {maker.model.base}, and this recipe's "
                f"`model.base` is {settings.model.base}; use the same base"
            )
        _no_second_method(settings, folder, key)
    own, theirs = settings.model.chat_template, maker.model.chat_template
    if key.startswith(SPEAKERS) and own is not None and _text_of(own) != (None if theirs is None else _text_of(theirs)):
        trained_with = f"the template in {theirs}" if theirs else "its tokenizer's own template"
        raise BadInput(
            f"`model.chat_template`: {own} is not what {folder} (`{key}`) will be trained with, {trained_with}: leave "
            "it out, or give both stages the same"
        )


# ------------------------------------------------------------------------------------- the template and the tokens


def _check_speech(settings: StageSettings, folder: str, key: str) -> None:
    """A model is used with the template and the tokens that it was trained with, or not at all."""
    if is_reward(key) or not has_tokenizer(folder):
        return
    given, own = settings.model.chat_template, template_of(folder)
    if given is not None and key.startswith(SPEAKERS) and _text_of(given) != (own or "").strip():
        trained_with = f"the template in {folder}/chat_template.jinja" if own else "no chat template"
        raise BadInput(
            f"`model.chat_template`: {given} is not what {folder} (`{key}`) was trained with, {trained_with}: leave "
            "`model.chat_template` out"
        )
    if not isinstance(settings, PpoSettings) or key not in ("reference.from", "critic.from"):
        return
    policy = settings.policy.path
    place = policy or settings.model.base
    if not has_tokenizer(place):
        return  # on the Hub, or made by a stage that has yet to run
    if not have_same_tokens(place, folder):
        raise BadInput(f"`{key}`: {folder} has other tokens than the policy's {place}; name one with the same")
    theirs = _text_of(given) if policy is None and given is not None else (template_of(place) or "").strip()
    if theirs != (own or "").strip():
        raise BadInput(
            f"`{key}`: {folder} was trained with another chat template than the policy's {place}: it would read turns "
            "that it has never seen; name one that was trained with the same template"
        )


def _text_of(path: str) -> str:
    return Path(path).expanduser().read_text(encoding="utf-8").strip()


# ------------------------------------------------------------------------------------------------- made elsewhere


def _check_scorer(folder: str, key: str) -> None:
    """A learned reward without a manifest: a sequence classifier, or an adapter of one."""
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        task = _adapter_config(folder).get("task_type")
        if task != "SEQ_CLS":
            raise BadInput(f"`{key}`: {folder} is an adapter for {task or 'no task'}; a reward's is for SEQ_CLS")
        return
    place = _place(folder)
    if place is not None:
        check_classifier(place, f"`{key}`")


def _place(name: str) -> Path | None:
    """Where a model lies on this disk: its folder, or the Hub's cache; None where it has yet to be fetched."""
    return Path(name) if Path(name).is_dir() else cached_folder(name, None)


def _check_made_elsewhere(settings: StageSettings, folder: str, key: str) -> None:
    """A policy, a reference or a critic: an adapter by PEFT or TRL, or a transformers model."""
    place = _place(folder)
    if place is None:
        return
    if not list(place.glob("*.safetensors")):
        raise BadInput(f"`{key}`: {folder} holds no safetensors (pickled weights are not loaded); {SAME_FOLDER_CURE}")
    if (place / ADAPTER_CONFIG).is_file():
        _check_foreign_adapter(settings, str(place), key)
    elif key == "critic.from":
        check_classifier(place, f"`{key}`")
    else:
        _check_foreign_policy(place, key)
    _check_speech(settings, str(place), key)


def _check_foreign_policy(place: Path, key: str) -> None:
    facts = read_facts(place)
    if "SequenceClassification" in facts.architecture:
        raise BadInput(
            f"`{key}`: {place} holds a {facts.architecture}, which writes no text; name it as "
            "`rewards: [{use: learned, from: ...}]`"
        )
    check_generates(facts, f"`{key}`")


def _check_foreign_adapter(settings: StageSettings, folder: str, key: str) -> None:
    config = _adapter_config(folder)
    kind, base = str(config.get("peft_type")), settings.model.base
    if config.get("bias", "none") != "none":
        raise BadInput(
            f"`{key}`: the adapter in {folder} trains biases of its base (`bias: {config['bias']}`), which roles "
            "share: merge it with PEFT (`merge_and_unload`) and name that folder as `model.base`"
        )
    layers = sorted(set(config.get("modules_to_save") or ()) - {"score", "classifier"})
    if layers:
        raise BadInput(
            f"`{key}`: the adapter in {folder} brings whole layers of its own ({', '.join(layers)}), which roles "
            "share: merge it with PEFT (`merge_and_unload`) and name that folder as `model.base`"
        )
    if kind in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"):
        raise BadInput(f"`{key}`: {folder} holds an adapter of kind {kind}, which is not supported; use `kind: lora`")
    if kind == "PREFIX_TUNING":
        check_prefix(settings, key, f"`{key}`: {folder} holds a prefix, which")
    if (config.get("task_type") == "SEQ_CLS") != (key == "critic.from"):
        what = "a sequence classifier's" if key != "critic.from" else "a language model's, without a head,"
        cure = "as `rewards: [{use: learned, from: ...}]`" if key != "critic.from" else "a reward model"
        raise BadInput(f"`{key}`: the adapter in {folder} is {what} adapter; name it {cure}")
    named = str(config.get("base_model_name_or_path") or "")
    is_known = Path(named).is_dir() or is_on_hub(named)
    differs = named != base and is_known and Path(named).is_dir() == Path(base).is_dir()
    if differs and not same(fingerprint(named, config.get("revision")), fingerprint(base, settings.model.revision)):
        raise BadInput(
            f"`{key}`: the adapter in {folder} is for the base {named}, and this recipe's `model.base` is {base}; use "
            "the same base"
        )
    _no_second_method(settings, folder, key)
    _check_shapes(folder, base, key)


def _check_shapes(folder: str, base: str, key: str) -> None:
    """Every LoRA layer of the adapter is as wide as the base's layer of that name."""
    place = _place(base)
    layers = {} if place is None else read_facts(place).shapes
    for name, shape in read_shapes(Path(folder) / "adapter_model.safetensors").items():
        layer, is_a, _ = name.removeprefix("base_model.model.").rpartition(".lora_A.weight")
        here = layers.get(f"{layer}.weight", ())
        if is_a and len(here) == 2 and shape[1] not in here:
            raise BadInput(
                f"`{key}`: the adapter in {folder} does not fit {base}: {layer} takes {shape[1]} numbers there, and "
                f"{here[1]} here; use the base that it was made over"
            )


def _adapter_config(folder: str) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{folder}/{ADAPTER_CONFIG} cannot be read: {one_line(error)}") from error
