"""What a stage starts from: earlier runs, models and adapters made elsewhere, and whether they fit its recipe.

All that is read here are small JSON files and the headers of weights.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any

from align.data import looks_like_hub_id
from align.data.kwargs import KEY, parted, with_kwargs
from align.errors import BadInput
from align.hub import is_folder_name
from align.identity import (
    TEMPLATE_FILE,
    base_of,
    fingerprint,
    has_adapter,
    has_tokenizer,
    have_same_tokens,
    same,
    template_of,
)
from align.manifest import MANIFEST, check_parent, kept_critic, of_another_kind, read_manifest
from align.models.facts import check_classifier, check_generates, check_tokenizer, read_adapter, read_facts, read_shapes
from align.records import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CRITIC
from align.settings import (
    Full,
    Lora,
    Model,
    Prefix,
    StageSettings,
)
from align.settings.methods import is_copy
from align.surroundings import cached_folder, may_be_fetched
from align.wording import brief

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of sequence classifiers
SPEAKERS = ("policy.", "policies.", "reference.")  # keys of what samples, or is compared with what samples
JUDGES = ("judge.model", "pairwise_judge.model")
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start LoRA of PEFT that move the base
SAME_FOLDER_CURE = "name a folder that save_pretrained wrote"


def check_parents(settings: StageSettings, made: dict[str, StageSettings]) -> None:
    """Everything that can be wrong with what the stage reads; `made` are the folders that earlier stages of the
    pipeline will have made.

    Raises:
        BadInput: with the recipe's key, the reason and the cure.
    """
    for key, (folder, wanted) in settings.parents().items():
        if resolved(folder) == resolved(settings.output):
            raise BadInput(f"`{key}`: {folder} is this stage's own output; name the run to start from")
        maker = made.get(resolved(folder))
        if maker is not None:
            _check_stage_before(settings, folder, key, made, wanted)
            _check_speech(settings, folder, key, made)
            _check_served(settings, folder, key, made)
            continue
        check_start(folder, wanted, f"`{key}`")
        if (Path(folder) / MANIFEST).is_file():
            _check_run_before(settings, folder, key)
            _check_speech(settings, folder, key, made)
        elif is_reward(key) and key not in JUDGES:
            _check_scorer(folder, key)
        else:
            _check_made_elsewhere(settings, folder, key)
            _check_speech(settings, folder, key, made)
        _check_served(settings, folder, key, made)


def resolved(folder: str) -> str:
    return os.path.realpath(folder)


def is_on_hub(name: str) -> bool:
    """`owner/name` is a Hub id unless there is a folder `owner` here: then it is a path that leads nowhere."""
    return looks_like_hub_id(name) and not is_folder_name(name)


def method_key(settings: StageSettings) -> str:
    """The recipe's key of the method that a stage tunes by."""
    return "method" if settings.tuning is None else settings.tuning.method


def check_prefix(settings: StageSettings, key: str, what: str) -> None:
    """Keys and values before every sequence go through our own attention alone."""
    if settings.model.attn_implementation == "eager":
        raise BadInput(f"{what} needs `model.attn_implementation: sdpa`; or use `kind: lora`")
    drawn = settings.draws()
    if drawn is None or not (key == method_key(settings) or key.startswith(("policy.", "policies."))):
        return  # nothing is sampled from it
    if drawn.is_generates:
        key = "cache_implementation" if drawn.cache_implementation == "static" else "engine"
        raise BadInput(f"{what} cannot sample with `sampling.{key}: {getattr(drawn, key)}`; leave it out")


def check_lora(kind: str, uses_dora: bool, what: str) -> None:
    """vLLM takes policies as LoRA adapters alone, over the base that it serves."""
    if kind.lower() not in ("lora", "qlora") or uses_dora:
        how = "DoRA" if uses_dora else f"`{kind.lower()}`"
        raise BadInput(
            f"{what} ({how}) cannot be drawn from by `sampling.engine: vllm`, which takes LoRA alone: use "
            "`kind: lora` or `qlora`, or leave `sampling.engine` out"
        )


def _check_served(settings: StageSettings, folder: str, key: str, made: dict[str, StageSettings]) -> None:
    """What is drawn from by a server is what it takes."""
    drawn = settings.draws()
    if drawn is None or drawn.engine != "vllm" or not key.startswith(("policy.", "policies.")):
        return
    if key == settings.starts_at and (settings.tuned_by() is not None or starts_whole(settings, made)):
        return  # a whole model, which is what is served, below a method of this stage's own
    maker, place, what = made.get(resolved(folder)), _place(folder), f"`{key}`: the policy in {folder}"
    if maker is not None:
        method, before = maker.tuned_by(), maker.start()
        if method is None and before is not None:  # it goes on with that one's adapter, or puts LoRA over a whole model
            if not starts_whole(maker, made):
                _check_served(settings, before, key, made)
        elif method is not None:
            check_lora(str(method.kind), getattr(method, "use_dora", False), what)
    elif place is not None:
        is_adapter = (place / ADAPTER_CONFIG).is_file()
        config = _adapter_config(str(place)) if is_adapter else {"peft_type": "full"}
        check_lora(str(config.get("peft_type")), bool(config.get("use_dora")), what)


def method_of(settings: StageSettings, made: Mapping[str, StageSettings]) -> Any:
    """The method that its policy is tuned by: its own, that of the run that it goes on with, or an adapter's folder."""
    method = settings.tuned_by()
    while method is None and (start := settings.start()) is not None:
        maker = made.get(resolved(start))
        if maker is None:
            return start if has_adapter(start) else Lora()
        settings, method = maker, maker.tuned_by()
        if isinstance(method, Full):  # a whole model, over which something new is put
            return Lora()
    return method or Lora()


def copies_trained(settings: StageSettings, made: Mapping[str, StageSettings] = MappingProxyType({})) -> str | None:
    """The recipe's key by which the stage trains copies of a base's weights, which are in the base's dtype: 16 bits
    would round small updates to nothing. None: it trains none. `made`: what earlier stages of the recipe make."""
    method, start = settings.tuned_by(), settings.start()
    if is_copy(method):
        return method_key(settings)
    is_known = start is not None and (resolved(start) in made or _place(start) is not None)
    if method is None and is_known and _are_copies(method_of(settings, made)):
        return settings.starts_at
    return "critic.from" if any(map(_are_copies, _critics(settings, made))) else None


def check_copies(settings: StageSettings, made: Mapping[str, StageSettings], device: str = "cpu") -> None:
    """Copies of a base's weights are trained in float32.

    Raises:
        BadInput: with the recipe's key and the cure.
    """
    load_in, key = settings.model.load_in, copies_trained(settings, made)
    is_in_16_bits = load_in in ("bfloat16", "float16") or (load_in == "nf4" and device == "cuda")
    if key is None or not is_in_16_bits:
        return
    method = settings.tuned_by() if key == method_key(settings) else None
    what = f"`{key}`: what it goes on with, copies of layers," if method is None else f"`{key}.kind: {method.kind}`"
    where = "over nf4 a GPU computes in 16 bits, where" if load_in == "nf4" else f"in {load_in}"
    raise BadInput(
        f"{what} needs `model.load_in: float32`: {where} small updates of copies round to nothing; or use `kind: lora`"
    )


def _critics(settings: StageSettings, made: Mapping[str, StageSettings]) -> Iterator[Any]:
    """What a critic of its own goes on with: a method, or the folder of an adapter."""
    folder, _ = settings.parents().get("critic.from", (None, ()))
    if folder is None or settings.value("critic.kind") == "trunk":  # a head alone
        return
    maker = made.get(resolved(folder))
    if maker is None:
        yield str(Path(folder) / CRITIC) if kept_critic(folder) else folder
    elif "critic" not in maker.keeps():
        yield method_of(maker, made)
    elif "critic.from" in maker.parents():
        yield from _critics(maker, made)
    else:  # it began where that one's policy did
        yield method_of(maker, made)


def _are_copies(method: Any) -> bool:
    """`method`: of a recipe, or the folder of an adapter."""
    if not isinstance(method, str):
        return is_copy(method)
    place = _place(method)
    is_adapter = place is not None and (place / ADAPTER_CONFIG).is_file()
    return is_adapter and _adapter_config(str(place)).get("peft_type") == "LN_TUNING"


def starts_whole(settings: StageSettings, made: Mapping[str, StageSettings] = MappingProxyType({})) -> bool:
    """Whether what the stage starts from is, or will be, a whole model, over which its own adapter is put."""
    start = settings.start()
    if start is None:
        return False
    maker, place = made.get(resolved(start)), _place(start)
    if maker is not None:
        return isinstance(method_of(maker, made), Full)
    return place is not None and not (place / ADAPTER_CONFIG).is_file()


def check_start(folder: str, wanted: tuple[str, ...], where: str) -> None:
    """Raises BadInput unless `folder` is a finished run that made one of `wanted`, or (`*`) something that transformers
    or PEFT may be able to load: a folder of theirs, or a Hub id that is in the cache or can be asked for."""
    is_model = any((Path(folder) / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    is_model = is_model or (is_on_hub(folder) and may_be_fetched(folder))
    check_parent(folder, wanted if is_model else tuple(each for each in wanted if each != "*"), where)


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
            if named and named != settings.model.base:
                said.append(
                    f"`{key}`: the adapter in {folder} names the base {named}; here it is {settings.model.base}"
                )
    return said


# ------------------------------------------------------------------------------------------------- runs of our own


def _check_run_before(settings: StageSettings, folder: str, key: str) -> None:
    """Of a finished run: its base, and what its method asks for."""
    manifest = read_manifest(folder)
    if key == "critic.from":
        kept = manifest.get("critic")
        _check_critic(settings, folder, kept and kept["kind"])
        if kept is not None:
            if kept["kind"] == "trunk" or (Path(folder) / CRITIC / ADAPTER_CONFIG).is_file():
                _check_base(settings, folder, key, manifest | kept)
            return
    members = [str(Path(folder) / name) for name in manifest.get("members", ())]
    for run in members or [folder]:
        if not (Path(run) / ADAPTER_CONFIG).is_file():
            continue
        if _adapter_config(run).get("peft_type") == "PREFIX_TUNING":
            check_prefix(settings, key, f"`{key}`: {run} holds a prefix, which")
        _check_base(settings, run, key, read_manifest(run))


def _check_critic(settings: StageSettings, folder: str, kept: str | None) -> None:
    """`kept`: the kind of critic that a PPO run in `folder` keeps; None: it is a reward run."""
    own = settings.value("critic.kind")
    if kept is None and own == "trunk":
        raise BadInput(
            f"`critic.from`: {folder} made a reward model, whose head reads a trunk of its own; leave "
            "`critic.kind: trunk` out, or name a PPO run that had such a critic"
        )
    if kept is not None and kept != own:
        theirs = "a head on its policy's trunk" if kept == "trunk" else "an adapter of its own"
        raise BadInput(f"`critic.from`: the critic of {folder} is {theirs}; write `critic.kind: {kept}`")


def _check_base(settings: StageSettings, folder: str, key: str, manifest: dict[str, Any]) -> None:
    """The base is where it was, and what it was. A policy's or critic's is the recipe's; rewards bring their own."""
    try:
        place = base_of(manifest, folder, recipes=settings.model.base)
    except BadInput as error:
        raise BadInput(f"`{key}`: {error}") from error
    if is_reward(key):
        return
    _no_second_method(settings, folder, key)
    if (Path(place) / MANIFEST).is_file() or kept_critic(Path(place).parent):  # it stands over a fully tuned one
        return
    if not same(manifest.get("base_fingerprint"), fingerprint(settings.model.base, settings.model.revision)):
        raise BadInput(
            f"`{key}`: {folder} is an adapter over the base {manifest.get('base')}, and this recipe's "
            f"`model.base` is {settings.model.base}; use the same base"
        )


def is_reward(key: str) -> bool:
    """Whether what stands at this key scores or judges, over a base and with a tokenizer of its own."""
    return key.startswith(("rewards", "judge", "beside", "ensemble", "reward.")) or key in JUDGES


def _no_second_method(settings: StageSettings, folder: str, key: str) -> None:
    if key == settings.starts_at and settings.tuned_by() is not None:
        own = method_key(settings)
        raise BadInput(
            f"`{own}`: {folder} holds an adapter already, and training goes on with it: leave `{own}` out, or merge it "
            "first (`align merge`)"
        )


def _check_stage_before(
    settings: StageSettings, folder: str, key: str, made: dict[str, StageSettings], wanted: tuple[str, ...]
) -> None:
    """Of a stage of the same pipeline, before it has run."""
    maker = made[resolved(folder)]
    if not {maker.makes, *maker.keeps()} & set(wanted):
        raise BadInput(f"`{key}`: {of_another_kind(f'{folder} will be', maker.kind, wanted)}")
    if key == "critic.from":
        _check_critic(settings, folder, str(maker.value("critic.kind")) if "critic" in maker.keeps() else None)
    method = maker.tuned_by()
    if isinstance(method, Prefix):
        check_prefix(settings, key, f"`{key}`: {folder} will hold a prefix, which")
    if is_reward(key) or isinstance(method, Full) or maker.tuning is None:
        return
    _no_second_method(settings, folder, key)
    base = _recipes_base(maker, made)
    if base is not None and fingerprint(base.base, base.revision) != fingerprint(
        settings.model.base, settings.model.revision
    ):
        raise BadInput(
            f"`{key}`: {folder} will be an adapter over the base {base.base}, and this recipe's `model.base` is "
            f"{settings.model.base}; use the same base"
        )


def _recipes_base(maker: StageSettings, made: dict[str, StageSettings]) -> Model | None:
    """What the adapter that a stage will write stands over, where that is its `model.base`: None where it is a whole
    model that the stage starts from."""
    start = maker.start()
    if start is None:
        return maker.model
    before = made.get(resolved(start))
    if before is not None:
        return None if isinstance(before.tuned_by(), Full) else _recipes_base(before, made)
    is_over_it = (Path(start) / ADAPTER_CONFIG).is_file() and same(
        read_manifest(start).get("base_fingerprint") if (Path(start) / MANIFEST).is_file() else None,
        fingerprint(maker.model.base, maker.model.revision),
    )
    return maker.model if is_over_it else None


# ------------------------------------------------------------------------------------- the template and the tokens


@dataclass(frozen=True)
class Speech:
    """What a model reads and writes by: its chat template ("": none), and the folder that its tokenizer is in."""

    template: str
    tokens: str


def _speech_of(folder: str | None, model: Model, made: dict[str, StageSettings]) -> Speech | None:
    """Of the model in `folder`, there or to be made, or (None) of the recipe's base; None: not known here."""
    maker = None if folder is None else made.get(resolved(folder))
    if maker is not None:
        return _speech_of(maker.start(), maker.model, made)
    place = _place(folder or model.base)
    if folder is not None and place is not None and not has_tokenizer(place):
        return _speech_of(None, model, made)  # an adapter that brings none
    if place is None or not has_tokenizer(place):
        return None
    given = model.chat_template if folder is None else None
    template = (template_of(place) or "").strip() if given is None else _text_of(given)
    return Speech(template if folder is not None else with_kwargs(template, model.chat_template_kwargs), str(place))


def _check_speech(settings: StageSettings, folder: str, key: str, made: dict[str, StageSettings]) -> None:
    """A model is used with the template and the tokens that it was trained with, or not at all."""
    own = None if is_reward(key) else _speech_of(folder, settings.model, made)
    if own is None:
        return
    if key.startswith(SPEAKERS):
        _check_given(settings.model, own, folder, key)
    other = settings.must_match(key)
    theirs = None if other is None else _speech_of(other.folder, settings.model, made)
    if other is None or theirs is None:
        return  # on the Hub, perhaps
    if not have_same_tokens(theirs.tokens, own.tokens):
        raise BadInput(f"`{key}`: {folder} has other tokens than {other.who}{other.cure}")
    if other.has_template and theirs.template != own.template:
        raise BadInput(
            f"`{key}`: {folder} was trained with another chat template than {other.who}: it would read turns that it "
            "has never seen; name one that was trained with the same template"
        )


def _check_given(model: Model, own: Speech, folder: str, key: str) -> None:
    """What the recipe gives is what the model was trained with; what it leaves out is taken from there."""
    kwargs, bare = parted(own.template)
    given = None if model.chat_template is None else parted(_text_of(model.chat_template))
    if given is not None and given[1] != bare:
        trained_with = "another chat template" if own.template else "no chat template"
        if (Path(folder) / TEMPLATE_FILE).is_file():
            trained_with = f"the template in {folder}/{TEMPLATE_FILE}"
        raise BadInput(
            f"`model.chat_template`: {model.chat_template} is not what {folder} (`{key}`) was trained with, "
            f"{trained_with}: leave `model.chat_template` out"
        )
    wanted = ({} if given is None else given[0]) | model.chat_template_kwargs
    if wanted and wanted != kwargs:
        said, before = (", ".join(f"{name}: {brief(each[name])}" for name in each) for each in (wanted, kwargs))
        raise BadInput(
            f"{KEY}: {said} is not what {folder} (`{key}`) was trained with, {before or 'none'}: leave {KEY} out, or "
            "give single rows theirs (`chat_template_kwargs`)"
        )


def _text_of(path: str) -> str:
    return Path(path).expanduser().read_text(encoding="utf-8").strip()


# ------------------------------------------------------------------------------------------------- made elsewhere


def _check_scorer(folder: str, key: str) -> None:
    """A learned reward without a manifest: a sequence classifier, or an adapter of one."""
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        task = _adapter_config(folder).get("task_type")
        if task != "SEQ_CLS":
            cure = "train one by `stage: reward` (a value head beside a language model's adapter is not read)"
            raise BadInput(
                f"`{key}`: {folder} is an adapter for {task or 'no task'}; a reward's is for SEQ_CLS: {cure}"
            )
        _check_shapes(folder, None, key)
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


def _check_foreign_policy(place: Path, key: str) -> None:
    facts = read_facts(place)
    if "SequenceClassification" in facts.architecture:
        raise BadInput(
            f"`{key}`: {place} holds a {facts.architecture}, which writes no text; name it as "
            "`rewards: [{use: learned, from: ...}]`"
        )
    check_generates(facts, f"`{key}`")
    check_tokenizer(facts, None, f"`{key}`")


def _check_foreign_adapter(settings: StageSettings, folder: str, key: str) -> None:
    config = _adapter_config(folder)
    kind, base = str(config.get("peft_type")), settings.model.base
    changed = _changed_in_base(config)
    if changed is not None:
        raise BadInput(
            f"`{key}`: the adapter in {folder} {changed}, which roles share: {_merge_it(folder)} "
            "and name that folder as `model.base`"
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
    if is_another_base(named, config.get("revision"), settings.model):
        raise BadInput(
            f"`{key}`: the adapter in {folder} is for the base {named}, and this recipe's `model.base` is {base}; use "
            "the same base"
        )
    _no_second_method(settings, folder, key)
    _check_shapes(folder, base, key)


def may_be_loaded(base: str) -> bool:
    """Whether a base's name leads somewhere: to a folder here, or to the Hub."""
    return base != "" and (Path(base).is_dir() or is_on_hub(base))


def is_another_base(named: str, revision: str | None, model: Model) -> bool:
    """Whether the base that an adapter made elsewhere names is known to be another than `model.base`."""
    is_comparable = may_be_loaded(named) and Path(named).is_dir() == Path(model.base).is_dir()
    differs = is_comparable and named != model.base
    return differs and not same(fingerprint(named, revision), fingerprint(model.base, model.revision))


def _changed_in_base(config: dict[str, Any]) -> str | None:
    """What an adapter changes in its base, as its config says; None where it leaves it as it is."""
    if config.get("bias", "none") != "none":
        return f"trains biases of its base (`bias: {config['bias']}`)"
    layers = sorted(set(config.get("modules_to_save") or ()) - {"score", "classifier"})
    if layers:
        return f"brings whole layers of its own ({', '.join(layers)})"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(REWRITING):
        return f"was started by `{start}`, which rewrites weights of its base"
    return None


def _check_shapes(folder: str, base: str | None, key: str) -> None:
    """Every LoRA layer of the adapter is as wide as the base's layer of that name (None: it brings its own base),
    embeddings are as large, and a head gives one number."""
    place = None if base is None else _place(base)
    layers = {} if place is None else read_facts(place).shapes
    weights = Path(folder) / ADAPTER_WEIGHTS
    for name, shape in read_shapes(weights).items() if weights.is_file() else ():
        if name.endswith(HEADS) and "lora_" not in name and shape[0] != 1:
            raise BadInput(f"`{key}`: the adapter in {folder} gives {shape[0]} labels; a reward has one")
        layer, is_a, _ = name.removeprefix("base_model.model.").rpartition(".lora_A.weight")
        here = layers.get(f"{layer}.weight", ())
        if is_a and len(here) == 2 and shape[1] not in here:
            raise BadInput(
                f"`{key}`: the adapter in {folder} does not fit {base}: {layer} takes {shape[1]} numbers there, and "
                f"{here[1]} here; use the base that it was made over"
            )
        saved = name.removeprefix("base_model.model.").replace(".base_layer.weight", ".weight")
        if layers.get(saved, shape) != shape:
            raise BadInput(
                f"`{key}`: the adapter in {folder} brings embeddings of its own ({saved}: {shape[0]} tokens, and "
                f"{layers[saved][0]} in {base}), which roles share: {_merge_it(folder)} and name that "
                "folder as `model.base`"
            )


def _merge_it(folder: str) -> str:
    is_ours = _adapter_config(folder).get("task_type") != "SEQ_CLS"
    return f"merge it (`align merge {quote(folder)} MERGED`)" if is_ours else "merge it with PEFT (`merge_and_unload`)"


def _adapter_config(folder: str) -> dict[str, Any]:
    return read_adapter(folder).model_dump(exclude_unset=True)
