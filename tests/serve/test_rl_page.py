"""The reward functions of docs/rl.md, run as they stand there against a server."""

import re
from pathlib import Path

import pytest
from test_serve import conversation, model, serve, stand_in  # noqa: F401
from test_serve_rollouts import reward  # noqa: F401
from test_serve_stop import running

PAGE = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()
QUESTION, ANSWERS = "What is a tree?", ["A plant.", "It grows."]


def functions(title, port):
    """What the first Python block of a section defines, asking this port."""
    section = PAGE.partition(f"\n## {title}\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1].replace("localhost:8000", f"127.0.0.1:{port}")
    defined = {}
    exec(code, defined)
    return defined


def test_trl_and_verl(serve, reward):  # noqa: F811
    wanted = [reward(conversation(QUESTION, answer)) for answer in ANSWERS]
    prompt = [{"role": "user", "content": QUESTION}]
    with running(serve()) as server:
        of_trl = functions("TRL", server.port)["reward"]
        assert of_trl([QUESTION] * 2, ANSWERS, completion_ids=None) == pytest.approx(wanted)
        talks = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
        assert of_trl([prompt] * 2, talks) == pytest.approx(wanted)
        of_verl = functions("verl", server.port)["compute_score"]
        assert of_verl("data", ANSWERS[1], "", {"question": QUESTION}) == pytest.approx(wanted[1])
