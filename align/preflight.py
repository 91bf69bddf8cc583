"""Everything that can be wrong with a recipe is found here, before models are loaded and anything is written."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from align.data import Loaded, load, looks_like_hub_id
from align.data.formats import load_converter
from align.data.kwargs import KEY, check_kwargs
from align.errors import BadInput
from align.files import reading
from align.hub import INDEX, WEIGHTS, name_all
from align.identity import has_templates, has_tokenizer, template_of
from align.launch_plan import LaunchPlan, plan
from align.models.facts import (
    Facts,
    check_generates,
    check_quantised,
    check_tokenizer,
    read_facts,
)
from align.parents import (
    SPEAKERS,
    check_copies,
    check_lora,
    check_parents,
    check_prefix,
    is_on_hub,
    method_key,
    resolved,
)
from align.plugins import is_reference, users_code
from align.recipe import Recipe
from align.resumption import named_none, state_of
from align.rewards import check_columns, check_reward
from align.rewards.judge import check_judge
from align.settings import (
    PEFT_METHODS_IN_4_BITS,
    STAGES,
    Adapter,
    AnyMethod,
    Data,
    Full,
    Ia3,
    Lora,
    OtherPeft,
    OwnMethod,
    Prefix,
    Source,
    StageSettings,
)
from align.surroundings import cached_folder, check_trackers, check_writable, look_at_hub
from align.wording import did_you_mean_path


def check_recipe(recipe: Recipe, changes: Sequence[str] = ()) -> dict[str, str]:
    """Checks every stage of a recipe; returns what each output folder holds (new | running | finished). `changes` are
    the overrides by which a run under way may become another.

    Raises:
        BadInput: with the stage's key, the reason and the cure.
    """
    _take_at_its_word(recipe)
    makers = {resolved(settings.output): name for name, settings in recipe.stages.items()}
    made: dict[str, StageSettings] = {}  # folder -> the earlier stage that makes it
    states = {}
    for name, settings in recipe.stages.items():
        with _naming(recipe, name):
            for key, (folder, _) in settings.parents().items():
                maker = makers.get(resolved(folder), name)
                if maker != name and resolved(folder) not in made:
                    raise BadInput(f"`{key}`: {folder} is made by stage `{maker}`, which comes later; put it before")
            _check_order(settings, makers, made)
            states[name] = _check_stage(settings, made, recipe.names(name, changes))
            _hub_remarks(settings, makers)
        made[resolved(settings.output)] = settings
    return states


def _check_order(settings: StageSettings, makers: dict[str, str], made: dict[str, StageSettings]) -> None:
    for key, (_, data) in settings.data_sections().items():
        for source in (*data.train, *data.validation):
            folder = resolved(str(Path(source.path).parent))
            if folder in makers and folder not in made and not Path(source.path).exists():
                raise BadInput(
                    f"`{key}`: {source.path} is written by stage `{makers[folder]}`, which comes later; put it before"
                )


def remarks(recipe: Recipe) -> list[str]:
    """What a sound recipe's user should know beforehand, a line each: lengths past the trained ones, an unseen Hub."""
    found, made = [], {resolved(settings.output) for settings in recipe.stages.values()}
    for settings in recipe.stages.values():
        found += [line for line, is_fault in _over_length(settings) if not is_fault]
        found += _hub_remarks(settings, made)
    return list(dict.fromkeys(found))


def check_stage(recipe: Recipe, name: str) -> str:
    """Checks one stage that is about to run: what it starts from must be there. Returns what its output holds."""
    _take_at_its_word(recipe)
    with _naming(recipe, name):
        return _check_stage(recipe.stages[name], {})


def _take_at_its_word(recipe: Recipe) -> None:
    """What the user's recipe names may be asked for at the Hub, here and in the stages."""
    for settings in recipe.stages.values():
        name_all(settings.model_dump(mode="json", by_alias=True))


@contextmanager
def _naming(recipe: Recipe, name: str) -> Iterator[None]:
    """Puts the recipe's file, and in a pipeline the stage, before what is wrong; what a stage of the user's own raises
    is wrong too."""
    kind = recipe.stages[name].stage
    try:
        with nullcontext() if kind in STAGES else users_code(kind, what=f"`{kind}`", raises=BadInput), reading():
            yield
    except BadInput as error:
        stage = f"stage `{name}`: " if recipe.is_pipeline else ""
        raise BadInput(f"{recipe.path}: {stage}{error}") from error


def check_ahead(settings: StageSettings, made: dict[str, StageSettings]) -> None:
    """What can be wrong with a stage whose turn comes when others have run: all but its data and its output.

    Raises:
        BadInput: with the key, the reason and the cure.
    """
    with reading():
        _check_settings(settings, made)
        _hub_remarks(settings, made)


def _check_settings(settings: StageSettings, made: dict[str, StageSettings]) -> None:
    """`made` maps the folders that earlier stages of the pipeline will have made to these."""
    check_model(settings)
    check_sampler(settings)
    for key, reward in settings.terms().items():
        check_reward(reward, key)
    for key, judge in settings.judges().items():
        check_judge(judge, key)
    if resolved(settings.output) == resolved(settings.model.base):
        raise BadInput(
            f"`output`: {settings.output} is `model.base`, or would stand in its place; choose another folder"
        )
    check_trackers(settings.track)
    check_parents(settings, made)
    check_copies(settings, made)
    _check_lengths(settings)


def _check_stage(
    settings: StageSettings, made: dict[str, StageSettings], named: Callable[[str], bool] = named_none
) -> str:
    _check_settings(settings, made)
    state = state_of(settings, named)
    if state != "finished":
        check_writable(settings.output)
        for key, (kind, data) in settings.data_sections().items():
            loaded = check_data(key, kind, data, made)
            if kind == "prompts" and loaded is not None:
                check_columns(settings, (*loaded.train, *loaded.validation))
        check_columns_beside(settings)
    return state


def check_columns_beside(settings: StageSettings) -> None:
    """What reward functions need of rows that are no prompts, and have no further columns: pairs, in DPO."""
    if settings.terms() and settings.reads is not None and settings.reads[1] == "preferences":
        check_columns(settings, ())


def check_sampler(settings: StageSettings) -> None:
    """A sampler of the user's own, or a server, where the stage samples with one.

    Raises:
        BadInput: its file has none; the server's address is none, or it takes no policy of this stage's method.
    """
    drawn, method = settings.draws(), settings.tuned_by()
    if drawn is not None and drawn.engine == "vllm":
        from align.servers import api_key_of, check_url  # a tenth of a second: only for a server

        secret = ", and put a key in the variable of `sampling.api_key_env`"
        check_url(str(drawn.url), "sampling.url", example="http://127.0.0.1:8000", secret=secret)
        api_key_of(drawn.api_key_env, "sampling.api_key_env")
        if method is not None:
            check_lora(str(method.kind), getattr(method, "use_dora", False), f"`{method_key(settings)}`")
    if drawn is not None and is_reference(drawn.engine):
        from align.rollout.choose import own_sampler  # heavy, and only here

        own_sampler(drawn.engine)


def launches(recipe: Recipe, names: Iterable[str]) -> dict[str, LaunchPlan]:
    """How each of these stages will be started, by its name.

    Raises:
        BadInput: with the stage's name: it cannot be started so.
    """
    found: dict[str, LaunchPlan] = {}
    made = {resolved(settings.output): settings for settings in recipe.stages.values()}
    for name in names:
        try:
            found[name] = plan(recipe.stages[name].launch)
            if found[name].is_sharded:
                check_sharded(recipe.stages[name])
            check_copies(recipe.stages[name], made, found[name].expected_device)
        except BadInput as error:
            raise BadInput(f"{recipe.path}: {f'stage `{name}`: ' if recipe.is_pipeline else ''}{error}") from error
    return found


def check_sharded(settings: StageSettings) -> None:
    """Whether a stage can do its work over a base that is spread over processes.

    Raises:
        BadInput: with the key, the reason and the cure.
    """
    cure = "use another `launch`"
    if isinstance(settings.tuned_by(), Full):
        raise BadInput(f"`{method_key(settings)}.kind: full` trains a copy that is whole on each process; {cure}")
    drawn = settings.draws()
    if drawn is not None and drawn.cache_implementation == "static":
        raise BadInput(f"`sampling.cache_implementation: static` compiles steps, whose weights may not move; {cure}")
    if drawn is not None and drawn.engine == "vllm":
        raise BadInput(f"`sampling.engine: vllm` does not go with a base that is spread over processes yet; {cure}")
    for key, judge in settings.judges().items():
        if judge.use == "model":
            raise BadInput(f"`{key}`: a model that judges is asked by one process alone; {cure}, or a server")


def check_model(settings: StageSettings) -> None:
    """Its base, chat template and tuning method, and whether they go together.

    Raises:
        BadInput: with the key, the reason and the cure.
    """
    model = settings.model
    folder = Path(model.base)
    cure = "give a folder that save_pretrained wrote"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadInput(f"`model.base`: {model.base} holds no config.json, so it is no transformers model; {cure}")
        if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
            raise BadInput(f"`model.base`: {model.base} holds no safetensors (pickled weights are not loaded); {cure}")
    elif not is_on_hub(model.base):
        hint = did_you_mean_path(folder, folders=True) or f"; {cure}"
        what = f"is not in {folder.parent}, which is a folder here and so no owner on the Hub"
        if not looks_like_hub_id(model.base):
            what = "is neither a folder nor a Hub id (`owner/name`)"
        raise BadInput(f"`model.base`: {model.base} {what}{hint}")
    if model.chat_template is not None and not Path(model.chat_template).is_file():
        hint = did_you_mean_path(Path(model.chat_template)) or "; name a Jinja file"
        raise BadInput(f"`model.chat_template`: {model.chat_template} is not there{hint}")
    check_kwargs(model.chat_template_kwargs, None)
    facts = _facts(settings)
    if facts is not None:
        _check_facts(settings, facts)
    method = settings.tuned_by()
    if method is not None:
        _check_method(settings, method_key(settings), method)


def _facts(settings: StageSettings) -> Facts | None:
    """What the base says of itself; None for one on the Hub that is not in the cache."""
    model = settings.model
    folder = Path(model.base) if Path(model.base).is_dir() else cached_folder(model.base, model.revision)
    try:
        return None if folder is None else read_facts(folder)
    except BadInput as error:
        raise BadInput(f"`model.base`: {error}") from error


def _check_facts(settings: StageSettings, facts: Facts) -> None:
    """Whether the base can be what the recipe takes it for."""
    check_quantised(facts.config, settings.model.load_in, f"`model.base`: {settings.model.base}")
    check_generates(facts, "`model.base`")
    template = settings.model.chat_template
    written = None if template is None else Path(template).read_text(encoding="utf-8", errors="replace")
    check_tokenizer(facts, written, "`model.base`")
    kwargs = settings.model.chat_template_kwargs
    if kwargs and settings.start() is None:  # else it is the run's own template that they are for
        own = template_of(facts.folder) if written is None else written
        if own is None and has_tokenizer(facts.folder) and not has_templates(facts.folder):
            raise BadInput(
                f"{KEY}: {facts.folder} has no chat template that reads them; set `model.chat_template: path`"
            )
        check_kwargs(kwargs, own)


def _check_lengths(settings: StageSettings) -> None:
    """Raises BadInput where a model that reads the recipe's texts is not as long as these may be."""
    for line, is_fault in _over_length(settings):
        if is_fault:
            raise BadInput(line)


def _over_length(settings: StageSettings) -> Iterator[tuple[str, bool]]:
    """Lengths that the recipe allows and a model's positions do not reach: a line, and whether it cannot run."""
    for name, facts in _readers(settings):
        known = facts.positions()
        if known is None:
            continue
        positions, is_end = known
        for key, length in _lengths(settings):
            if length > positions and is_end:
                yield f"{key}: {length:,} tokens are over the {positions:,} positions that {name} has; lower it", True
            elif length > positions:
                yield f"{key}: {length:,} tokens are over the {positions:,} that {name} was trained for", False


def _readers(settings: StageSettings) -> Iterator[tuple[str, Facts]]:
    """The base, and every whole model that reads the same sequences, as far as they are on this disk."""
    facts = _facts(settings)
    if facts is not None:
        yield settings.model.base, facts
    for key, (folder, _) in settings.parents().items():
        place = Path(folder) if Path(folder).is_dir() else cached_folder(folder, None)
        if key.startswith((*SPEAKERS, "critic.")) and place is not None and (place / "config.json").is_file():
            yield folder, read_facts(place)


def _lengths(settings: StageSettings) -> Iterator[tuple[str, int]]:
    """Key and tokens of the longest sequences that a stage may give its base, after a prefix that it trains."""
    method = settings.tuned_by()
    prefix = method.num_virtual_tokens if isinstance(method, Prefix) else 0
    for key, length in settings.lengths().items():
        yield f"{key} and a prefix of {prefix}" if prefix else key, length + prefix


def _hub_remarks(settings: StageSettings, made: Container[str]) -> list[str]:
    """Looks at what the recipe takes from the Hub and the cache does not hold; says where it could not look, and why.
    `made`: folders of the recipe's own, which may look like the Hub's names as long as they are not there.

    Raises:
        BadInput: it is not there.
    """
    model, found = settings.model, []
    if is_on_hub(model.base) and cached_folder(model.base, model.revision) is None:
        found.append(look_at_hub(model.base, model.revision, "`model.base`"))
    for key, (folder, wanted) in settings.parents().items():
        is_own = resolved(folder) in made
        if "*" in wanted and not is_own and is_on_hub(folder) and cached_folder(folder, None) is None:
            found.append(look_at_hub(folder, None, f"`{key}`"))
    for key, (_, data) in settings.data_sections().items():
        for source in (*data.train, *data.validation):
            if is_on_hub(source.path):
                found.append(look_at_hub(source.path, source.revision, f"`{key}`", "dataset"))
    return [line for line in found if line]


def _check_method(settings: StageSettings, key: str, method: AnyMethod) -> None:
    """What this method cannot do on this base or in this stage, and the nearest thing that works."""
    load_in = settings.model.load_in
    if isinstance(method, Full) and load_in == "nf4":
        raise BadInput(
            f"`{key}.kind: full` cannot train a 4-bit base (`model.load_in: nf4`): use `kind: qlora`, or "
            "`load_in: float32` or 16 bits"
        )
    if isinstance(method, Lora) and method.kind == "qlora" and load_in != "nf4":
        raise BadInput(f"`{key}.kind: qlora` needs `model.load_in: nf4` (it is {load_in}); or use `kind: lora`")
    if isinstance(method, Prefix):
        check_prefix(settings, key, f"`{key}.kind: prefix`")
    if isinstance(method, OtherPeft) and load_in == "nf4" and method.kind not in PEFT_METHODS_IN_4_BITS:
        raise BadInput(
            f"`{key}.kind: {method.kind}` needs weights in floating point, and `model.load_in` is nf4: use "
            f"`kind: qlora` (or one of {', '.join(kind for kind in PEFT_METHODS_IN_4_BITS if kind != 'ln_tuning')})"
        )
    own = {Adapter: "activation", Ia3: "feedforward_modules"}.get(type(method))  # keys that PEFT has a word on
    if isinstance(method, (OtherPeft, OwnMethod)) or own in method.model_fields_set:  # heavy, and only here
        from align.models.methods import check_method

        check_method(method, key)


def _will_be_made(key: str, kind: str, source: Source, made: Mapping[str, StageSettings]) -> bool:
    """Whether an earlier stage of the pipeline has still to write this file.

    Raises:
        BadInput: that stage says what it writes, and this is not among it, or has other rows.
    """
    path = Path(source.path)
    maker = None if path.exists() else made.get(resolved(str(path.parent)))
    if maker is None:
        return False
    files, rows = maker.data_files, maker.data_files.get(path.name)
    is_read = rows == kind or (rows is not None and (kind == "prompts" or source.format != "auto"))
    if files and not is_read:
        cure = " or ".join(name for name, each in files.items() if each == kind) or "a file that is there"
        what = "will write no such file" if rows is None else f"will hold {rows}, and {kind} are needed"
        raise BadInput(f"`{key}`: {path} {what}; name {cure}")
    return True


def check_data(key: str, kind: str, data: Data, made: Mapping[str, StageSettings]) -> Loaded[Any] | None:
    """Reads local files to their last row. Rows of the Hub, and of files that an earlier stage has still to write, are
    read by the stage; where there are some, nothing is returned: what holds of the whole is seen then."""
    unwritten = [source for source in _sources(data) if _will_be_made(key, kind, source, made)]
    for source in _sources(data):
        if source not in unwritten and looks_like_hub_id(source.path) and not is_on_hub(source.path):
            hint = did_you_mean_path(Path(source.path)) or "; name a data file, or a data set on the Hub"
            raise BadInput(f"`{key}`: {source.path} is not there{hint}")
    here = data.part(lambda source: source not in unwritten and not looks_like_hub_id(source.path))
    try:
        for source in _sources(data):
            load_converter(source.format)
        loaded: Loaded[Any] = load(here, kind, whole=data)  # type: ignore[call-overload]
    except BadInput as error:
        raise BadInput(f"`{key}`: {error}") from error
    return loaded if here == data else None


def _sources(data: Data) -> tuple[Source, ...]:
    return (*data.train, *data.validation)
