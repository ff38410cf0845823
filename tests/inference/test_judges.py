"""Judges that are asked by sampling: what they take from the files that they are loaded from."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_sets
import tiny_models
import transformers

from rmjax import objectives
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.config import defaults
from rmjax.data import synthetic
from rmjax.evaluate import __main__ as evaluate
from rmjax.export import write as export
from rmjax.inference import runs
from rmjax.inference.generation import GenerativeModel, open_model
from rmjax.inference.judgements import Judge
from rmjax.inference.reward_model import BadConversation, load_checked
from rmjax.inference.sampler import Drawing
from rmjax.models import heads, hf
from rmjax.models.config import from_hf
from rmjax.score import __main__ as score
from rmjax.score.judgements import Sampling
from rmjax.train import training

ROOT = Path(__file__).parents[2]
LONGEST, STOPS = 256, [5, 9]
ROWS = [{"prompt": prompt, "response": "A plant.", "score": 3} for prompt in ("What?", "what is a tree " * 120, "Why?")]
ALONE = {"template": "{{ prompt }}\n{{ response }}", "target": "score"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir):
    """A language model whose generation_config.json names two stops."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": LONGEST}
    tiny_models.make_hf_model("qwen2", directory, head=False, **sizes)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    return directory


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """The export of a judge with these weights and stops."""
    directory = tmp_path_factory.mktemp("judge") / "export"
    config, chat, values = defaults("sft"), Chat(load_tokenizer(base)), hf.read_config(base)
    config.objective.update(ALONE)
    model = from_hf(values)
    _, shapes = heads.abstract(model, 0, "float32", "float32", architecture="CausalLM")
    talk = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "No."}]
    export.write_export(
        directory,
        hf.load(base, shapes, model, seed=0)[0],
        objective=objectives.make(config.objective),
        config=config,
        values=values,
        model=model,
        chat=chat,
        metrics={},
        data="0",
        golden=[(ids, [len(ids) - 1]) for ids in chat.encode([chat.render(talk)])],
        stops=STOPS,
    )
    return directory


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_every_way_to_load_it_knows_its_stops_and_its_context(base, exported):
    for model in (
        GenerativeModel.load(base),
        open_model(str(exported)),
        GenerativeModel.of(load_checked(exported)),
        GenerativeModel.of(load_checked(exported, dtype="bfloat16")),
    ):
        assert set(STOPS) < set(model.stops) and model.longest == LONGEST


@pytest.mark.slow
def test_a_run_knows_those_of_what_it_began_from(base, tmp_path, caplog):
    """And judges by sampling the questions that are split off its data; and warns of a benchmark that it trains on."""
    config = runpy.run_path(str(ROOT / "configs" / "sft_tiny.py"))["get_config"]()
    config.duration, config.eval.every, config.data.workers = "1 steps", "1 steps", 0
    config.log.to, config.log.report, config.eval.train_groups = "", False, 0
    config.data.train, config.data.validation, config.data.validation_fraction = "synthetic://ratings?n=50", "", 0.2
    config.data.cache_dir = str(tmp_path / "cache")
    config.model.init_from, config.model.tokenizer = str(base), ""
    config.eval.samples, config.eval.max_tokens = 2, 8
    questions = [row["prompt"] for row in synthetic.rows("ratings", n=10)] + ["Why not?", "And then?"]
    config.eval.benchmarks = f"judge_bench={small_sets.judge_bench(tmp_path / 'bench.jsonl', questions)}"
    training.run(config, tmp_path / "run")
    said = r"judge_bench: (\d+) of its 12 prompts are in the training data, so its numbers mislead"
    assert 5 <= int(re.search(said, caplog.text)[1]) <= 10  # the others are split off
    model = open_model(str(tmp_path / "run"))
    assert set(STOPS) < set(model.stops) and model.longest == LONGEST
    assert open_model(str(tmp_path / "run" / "export")).stops == model.stops
    sets = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]
    assert sets["validation"]["kind"] == "tokens" and sets["sampled"]["groups"] == sets["validation"]["groups"] == 10
    assert {"accuracy", "accuracy_greedy", "unreadable", "cut_off"} <= set(sets["sampled"]["metrics"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "sampled/unreadable" in line] == [0, 1]
    checks = json.loads((tmp_path / "run" / "quality.json").read_text())["checks"]
    assert {"unreadable", "cut_off"} <= {check["name"] for check in checks}
    opened = runs.open_checkpoint(runs.find(tmp_path / "run"))
    judge = runs.reward_model(opened.model, opened.chat, opened.params)
    assert (judge.stops, judge.longest) == (tuple(STOPS), LONGEST)


def test_an_export_tells_servers_where_to_stop(exported):
    said = transformers.GenerationConfig.from_pretrained(exported)
    assert said.eos_token_id == GenerativeModel.load(exported).stops and set(STOPS) < set(said.eos_token_id)
    # As training drew: transformers' and vLLM's own defaults, not those that the model was shipped with.
    assert (said.temperature, said.top_p, said.top_k) == (None, None, None)


@pytest.mark.slow
def test_two_processes_ask_as_one_does(exported, source, tmp_path):
    """By launch/local.sh; each writes its share of the judgements, and both measure all of them."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), PYTHON=sys.executable, RESTARTS="0")
    found = []
    for count in ("1", "2"):
        out = tmp_path / f"{count}.json"
        flags = [f"--model={exported}", f"--data={source}", "--samples=2", "--max_tokens=8", f"--output={out}"]
        command = [str(ROOT / "launch/local.sh"), count, "rmjax.evaluate", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text())["sets"])
    assert found[0] == found[1] and any(x["kind"] == "judgements" for x in found[0].values())


def test_a_stop_of_generation_config_ends_a_judgement(exported):
    model = GenerativeModel.of(load_checked(exported))
    written = [
        one
        for of_one in model.generate([[{"role": "user", "content": "q"}]] * 8, responses=8, max_tokens=40)
        for one in of_one
    ]
    ended = [one for one in written if one.tokens[-1] in STOPS]
    assert ended and all(one.finish == "stop" for one in ended)
    assert not any(set(one.tokens[:-1].tolist()) & set(STOPS) for one in written)


def test_a_wrong_generation_config_is_named(exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "export")
    for text, words in (("{", "cannot be read as JSON"), ('{"eos_token_id": "x"}', "expected a token id")):
        (directory / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_checked(directory)


def test_questions_without_room_are_counted_not_asked(exported, source, tmp_path, capsys):
    out = tmp_path / "found.json"
    evaluate.main([f"--model={exported}", f"--data={source}", "--samples=2", "--max_tokens=8", f"--output={out}"])
    (found,) = [x for x in json.loads(out.read_text())["sets"].values() if x["kind"] == "judgements"]
    assert (found["groups"], found["question_too_long"]) == (2, 1)
    assert re.search(r"question_too_long 1: .* in.jsonl:1: its [\d,]+ tokens .* model's 256", capsys.readouterr().err)
    unlabelled, made = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    unlabelled.write_text(Path(source).read_text().replace(', "score": 3', ""))
    counts = score.run(str(exported), str(unlabelled), made, sampling=Sampling(2, 8))[1]
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    assert counts["without a score: question_too_long"] == 1
    assert [row["unreadable"] is None for row in rows] == [False, True, False]
    model = GenerativeModel.of(judge := load_checked(exported))
    asked = [{"role": "user", "content": row["prompt"]} for row in ROWS]
    with pytest.raises(BadConversation, match="conversation 1: its"):
        Judge(model, judge.objective.task, Drawing(max_tokens=8)).judgements(asked, range(3))


def test_a_judge_holds_its_parameters_once(exported):
    model = load_checked(exported)
    at = lambda x: x.unsafe_buffer_pointer()
    embedding = at(model.params["decoder"]["embed"]["embedding"])
    writer = GenerativeModel.of(model)
    judge = Judge(writer, model.objective.task, Drawing(responses=2, max_tokens=8))
    model.drop_params()
    assert model.params is None and model.inference.params is None
    jax.tree.map(lambda x, y: np.testing.assert_equal(at(x), at(y)), writer.params, judge._sampler.params)
    assert at(writer.params["decoder"]["embed"]["embedding"]) == embedding
