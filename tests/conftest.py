"""A tiny random model and small data files, made once a session; nothing is downloaded, nothing is left behind."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a random two-layer Llama with a chat template."""
    return tiny.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder with demonstrations, pairs and prompts of the tiny language."""
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(base, data, tmp_path_factory):
    """Finished sft and reward runs over the tiny base, for the stages that need parents."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("sft", "reward"):
        tiny.run(tiny.settings(stage, base, data, folder / stage))
    return folder
