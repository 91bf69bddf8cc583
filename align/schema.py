"""JSON Schema of recipes, made of the settings' own fields: editors read it, and `align keys` shows it.

A file's whole is one of three: a stage, a pipeline of stages, or a loop. Any value but a text may also be a reference
to another key, `${...}`.
"""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from align.recipe import SHARED_KEYS
from align.settings import STAGES, EnsembleReward, EvaluateSettings, LearnedReward, StageSettings, Track
from align.settings.loop import OURS, Evaluation, LoopSettings

DRAFT = "http://json-schema.org/draft-07/schema#"  # what editors understand throughout
OF_TOP = ("model", "output")  # which the top of a pipeline may have instead of a stage
REWARDS: dict[str, type[BaseModel]] = {
    "learned": LearnedReward,
    "ensemble": EnsembleReward,
}  # whose arguments stand beside `use`
OTHER_KEY = {"type": "string", "pattern": r"\$\{", "description": "Another key, or a file beside this one."}
REFERENCE = {"$ref": "#/$defs/OtherKey"}
ANY_MAPPING = {"type": "object", "description": "Values that other keys refer to, as ${vars.name}."}

Node = dict[str, Any]


def recipe_schema() -> Node:
    """The schema of a recipe's file (draft 7)."""
    models: list[type[BaseModel]] = [*STAGES.values(), StageSettings, LoopSettings, *REWARDS.values()]
    _, made = models_json_schema([(model, "validation") for model in models], by_alias=True)
    definitions: dict[str, Node] = made["$defs"]
    for node in definitions.values():
        _tidy(node)
    for renaming in (Track, EvaluateSettings, Evaluation):
        keys = definitions[renaming.__name__]["properties"]
        keys |= {old: {**keys[new], "deprecated": True} for old, new in renaming.renamed.items()}
    for kind, cls in STAGES.items():
        definitions[cls.__name__]["properties"]["stage"] = {"const": kind, "description": "What is done."}
    definitions[StageSettings.__name__]["additionalProperties"] = True  # the user's own stages
    _rewards_with_arguments(definitions)
    _sections_of_loop(definitions)
    definitions["OtherKey"] = OTHER_KEY
    by_stage = [{"if": _says("stage", kind), "then": _ref(cls)} for kind, cls in STAGES.items()]
    no_ours = {"properties": {"stage": {"not": {"enum": list(STAGES)}}}}
    is_stage = {"required": ["stage"], "allOf": [*by_stage, {"if": no_ours, "then": _ref(StageSettings)}]}
    definitions["Stage"] = {"type": "object", **is_stage}
    definitions["Pipeline"] = _pipeline(definitions[StageSettings.__name__]["properties"])
    for name in (StageSettings.__name__, *(stage.__name__ for stage in STAGES.values())):
        node = definitions[name]
        node["properties"]["vars"] = ANY_MAPPING
        node["required"] = [key for key in node["required"] if key not in OF_TOP]
    return {
        "$schema": DRAFT,
        "title": "A recipe of align",
        "type": "object",
        "if": {"required": ["stages"]},
        "then": {"$ref": "#/$defs/Pipeline"},
        "else": {
            "if": {
                "anyOf": [{"required": ["num_rounds"]}, {"required": ["evaluation"]}],
                "not": {"required": ["stage"]},
            },
            "then": _ref(LoopSettings),
            "else": {**is_stage, "required": ["stage", *OF_TOP]},
        },
        "$defs": definitions,
    }


def _ref(cls: type) -> Node:
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _says(key: str, value: str) -> Node:
    return {"properties": {key: {"const": value}}, "required": [key]}


def _tidy(node: Node) -> None:
    """Takes out what says nothing, and lets every value but a text refer to another key."""
    node.pop("title", None)
    if "oneOf" in node:  # of which a method by a name of one's own would be two
        node["anyOf"] = node.pop("oneOf")
    for name in ("properties", "$defs"):
        for key, inner in node.get(name, {}).items():
            _tidy(inner)
            node[name][key] = _or_reference(inner)
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            _tidy(node[name])
            node[name] = _or_reference(node[name])
    for inner in node.get("anyOf", ()):
        _tidy(inner)


def _or_reference(node: Node) -> Node:
    if not node or _takes_text(node):
        return node
    about: Node = {key: node.pop(key) for key in ("description", "default") if key in node}
    kinds = node.pop("anyOf") if set(node) == {"anyOf"} else [node]
    return {"anyOf": [*kinds, dict(REFERENCE)], **about}


def _takes_text(node: Node) -> bool:
    if "anyOf" in node:
        return any(map(_takes_text, node["anyOf"]))
    return node.get("type") == "string" and not {"enum", "const", "pattern"} & set(node)


def _rewards_with_arguments(definitions: dict[str, Node]) -> None:
    given = [
        {
            "if": _says("use", name),
            "then": {"properties": definitions[cls.__name__]["properties"], "required": ["from"]},
        }
        for name, cls in REWARDS.items()
    ]
    definitions["Reward"]["allOf"] = given


def _sections_of_loop(definitions: dict[str, Node]) -> None:
    """The loop's sections that hold keys of a stage: all of them but those that are the loop's to set."""
    sections = definitions[LoopSettings.__name__]["properties"]
    sections["vars"] = ANY_MAPPING
    for section, kind in (("sft", "sft"), ("ensemble", "ensemble"), ("ppo", "ppo")):
        taken = {"stage", "output", *SHARED_KEYS, *OURS.get(section, ())}
        keys = definitions[STAGES[kind].__name__]["properties"]
        own: Node = {key: node for key, node in keys.items() if key not in taken}
        if section == "sft":
            own["from"] = {"type": "string", "description": "Folder of an SFT run, instead of all other keys."}
        about = sections[section].get("description", "")
        a_run = [{"type": "string"}] if section == "sft" else []
        sections[section] = {
            "anyOf": [{"type": "object", "properties": own, "additionalProperties": False}, *a_run, dict(REFERENCE)],
            "description": about,
        }


def _pipeline(of_all: Node) -> Node:
    shared = {key: of_all[key] for key in (*SHARED_KEYS, "output")}
    stages = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"$ref": "#/$defs/Stage"},
        "description": "Name -> stage, in the order in which they run.",
    }
    return {
        "type": "object",
        "properties": {**shared, "vars": ANY_MAPPING, "stages": stages},
        "required": ["stages"],
        "additionalProperties": False,
    }
