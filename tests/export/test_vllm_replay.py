"""Golden rows through vLLM: how its process is started and what is read of it, with a stand-in for the package."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from rmjax.export import vllm_replay

CONFIG = '{"model_type": "%s", "architectures": ["%sForSequenceClassification"]}'
STAND_IN = """
import json, os, pathlib, sys, types

class PoolerConfig(dict):
    pass

sys.modules["vllm.config"] = types.SimpleNamespace(PoolerConfig=PoolerConfig)

class PoolingParams:
    def __init__(self, **options):
        self.options = options

class Outputs:
    def __init__(self, data):
        self.outputs, self.data = self, data

class LLM:
    def __init__(self, **options):
        pathlib.Path("seen.json").write_text(json.dumps({**options, "pid": os.getpid()}))
        print("vLLM says a lot")

    def encode(self, prompts, pooling_params, pooling_task):
        assert pooling_params.options == {"use_activation": False} and pooling_task == "classify"
        return [Outputs([sum(prompt["prompt_token_ids"]), 0.5]) for prompt in prompts]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    paths = [tmp_path, Path(vllm_replay.__file__).parents[2], os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, map(str, paths))))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(CONFIG % ("qwen2", "Qwen2"))
    return tmp_path


def test_it_has_a_process_and_a_share_of_memory_of_its_own(stand_in):
    found = vllm_replay.replay(stand_in / "export", [[1, 2, 3], np.array([4])])
    assert [x.tolist() for x in found] == [[[6.0, 0.5]], [[4.0, 0.5]]]
    seen = json.loads((stand_in / "seen.json").read_text())
    assert seen["pid"] != os.getpid() and seen["gpu_memory_utilization"] == vllm_replay.MEMORY < 0.9
    assert (seen["model"], seen["dtype"], seen["runner"]) == (str(stand_in / "export"), "float32", "pooling")
    assert seen["pooler_config"] == {"pooling_type": "LAST"} and seen["hf_overrides"] == {}
    assert "vllm" not in sys.modules


def test_a_class_that_vllm_would_not_find_is_named(stand_in):
    (stand_in / "export" / "config.json").write_text(CONFIG % ("gemma3_text", "Gemma3Text"))
    vllm_replay.replay(stand_in / "export", [[1]])
    seen = json.loads((stand_in / "seen.json").read_text())
    assert seen["hf_overrides"] == {"architectures": ["Gemma3ForSequenceClassification"]}


def test_what_it_says_when_it_fails_is_told(stand_in):
    (stand_in / "vllm.py").write_text("raise SystemError('no kernel for this card')")
    with pytest.raises(RuntimeError, match=r"(?s)vLLM ended with code 1.*no kernel for this card"):
        vllm_replay.replay(stand_in / "export", [[1]])
