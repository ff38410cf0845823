"""The evaluate command on exports and checkpoints: every kind of model, benchmarks, gold, and the proxy pipeline."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import transformers
from small_runs import Started, small

from rmjax.data.reading import records
from rmjax.evaluate import __main__ as evaluate
from rmjax.evaluate import evaluating
from rmjax.inference.reward_model import RewardModel
from rmjax.sample import __main__ as sample
from rmjax.score import __main__ as score
from rmjax.score.making import Options
from rmjax.train import training

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    Started(workdir, cache, optim__learning_rate=1e-2).finish()
    return workdir


def command(capsys, *argv):
    """What the command prints."""
    evaluate.main(list(argv))
    return capsys.readouterr().out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_export_and_a_checkpoint_agree_with_the_run(run, tmp_path, capsys):
    step = json.loads((run / "evaluation.json").read_text())["step"]
    out = tmp_path / "found.json"
    data = "synthetic://pairs?n=60&seed=1"
    models = f"{run}/export,{run}/checkpoints/{step}"
    text = command(capsys, f"--model={models}", f"--data={data}", f"--output={out}", "--mesh=fsdp=1")
    found = json.loads(out.read_text())["models"]
    inside = json.loads((run / "evaluation.json").read_text())["sets"]["validation"]["metrics"]
    for report in found:
        metrics = report["sets"]["pairs"]["metrics"]
        for name in ("accuracy", "nll", "ece", "margin"):
            assert metrics[name]["value"] == pytest.approx(inside[name]["value"], abs=1e-4), name
    assert [report["step"] for report in found] == [None, step] and "Accuracy" in text


def test_benchmarks_in_the_command_and_in_the_loop(tmp_path, cache, capsys):
    pairs = list(records("synthetic://pairs?n=40&seed=5"))
    subsets = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    rows = []
    for n, record in enumerate(pairs):
        question, texts = record.conversations[0][:-1], [c[-1]["content"] for c in record.conversations]
        label = "A>B" if record.wins[0, 1] else "B>A"
        told = {"pair_id": f"p{n}", "source": subsets[n % 4], "question": question[-1]["content"], "label": label}
        rows.append({**told, "response_A": texts[0], "response_B": texts[1]})
    source = write(tmp_path / "judge.jsonl", rows)
    workdir = tmp_path / "run"
    asked = {"eval__benchmarks": f"judge_bench={source}", "checkpoint__metric": "judge_bench/overall"}
    training.run(small(cache, **asked), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["judge_bench/overall"] for line in lines if "judge_bench/overall" in line}
    assert sorted(curve) == [0, 5, 10, 15, 20]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    best = max(step for step, value in curve.items() if value == max(curve[s] for s in curve if s))
    earliest = min(step for step, value in curve.items() if step and value == curve[best])
    assert evaluation["step"] == earliest  # the benchmark chose the checkpoint
    assert evaluation["benchmarks"]["judge_bench"]["metrics"]["overall"]["value"] == curve[earliest]
    out = tmp_path / "found.json"
    trained = ["--train_data=synthetic://pairs?n=40&seed=5", "--train_rows=1"]  # what the benchmark was made of
    evaluate.main([f"--model={workdir}/export", f"--benchmark=judge_bench={source}", f"--output={out}", *trained])
    said = r"judge_bench: (\d+) of its \d+ prompts are in the training data, so its numbers mislead"
    alone = {pair.conversations[0][0]["content"] for pair in pairs if len(pair.conversations[0]) == 2}
    assert int(re.search(said, capsys.readouterr().err)[1]) >= len(alone)  # whose question is all there is
    found = json.loads(out.read_text())["benchmarks"]["judge_bench"]
    assert found["metrics"]["overall"]["value"] == curve[earliest] and not found["missing"]
    assert len(alone) <= found["overlapping"]["groups"] <= found["groups"] and "metrics" in found["overlapping"]
    model = RewardModel.load(workdir / "export")
    turn = lambda text: {"role": "assistant", "content": text}
    right = []
    for row in rows:
        asked = {"role": "user", "content": row["question"]}
        a, b = model.score([[asked, turn(row[name])] for name in ("response_A", "response_B")])
        right.append(a > b if row["label"] == "A>B" else b > a)
    assert found["metrics"]["overall"]["value"] == pytest.approx(np.mean(right))


def test_the_proxy_pipeline_from_prompts_to_a_match_rate(run, tmp_path, cache, capsys):
    """docs/sampling.md: prompts -> responses -> gold scores -> pairs -> train -> match rate; and the best of N."""
    sft = tmp_path / "sft"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(run / "export"))
    tiny_models.make_hf_model("qwen2", sft, head=False, vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.save_pretrained(sft)
    asked = [record.conversations[0][:-1] for record in records("synthetic://pairs?n=120&seed=7")]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": [dict(m) for m in turns]} for turns in asked])
    drawn = {"responses": 3, "max_tokens": 8, "slots": 30}
    sample.run(str(sft), str(prompts), tmp_path / "sampled.jsonl", **drawn)
    rows = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()]
    responses = write(tmp_path / "responses.jsonl", rows[:90])
    held_out = write(tmp_path / "heldout.jsonl", rows[90:])
    gold = str(run / "export")
    score.run(gold, str(responses), tmp_path / "pairs.jsonl", options=Options(pairs="all"))
    score.run(gold, str(held_out), tmp_path / "gold.jsonl")
    score.run(gold, str(held_out), tmp_path / "best.jsonl", options=Options(best_of_n=True))
    lines = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    best, all_of = lines("best"), lines("gold")
    assert [row["score"] for row in best] == [max(row["scores"]) for row in all_of]
    given = {"data__train": str(tmp_path / "pairs.jsonl"), "data__validation": "", "data__validation_fraction": 0.1}
    training.run(small(cache, **given, duration="6 epochs", optim__learning_rate=5e-3), tmp_path / "proxy")
    out = tmp_path / "found.json"
    told = [f"--gold={tmp_path / 'gold.jsonl'}", f"--train_data={tmp_path / 'pairs.jsonl'}", f"--output={out}"]
    text = command(capsys, f"--model={tmp_path / 'proxy' / 'export'}", *told)
    found = json.loads(out.read_text())
    model, gold_rows = (
        RewardModel.load(tmp_path / "proxy" / "export"),
        [json.loads(x) for x in (tmp_path / "gold.jsonl").read_text().splitlines()],
    )
    hits = []
    for row in gold_rows:
        own = model.score([[*row["prompt"], {"role": "assistant", "content": r}] for r in row["responses"]])
        for i in range(len(own)):
            for j in range(i):
                if row["scores"][i] != row["scores"][j]:
                    hits.append(
                        0.5 if own[i] == own[j] else float((own[i] > own[j]) == (row["scores"][i] > row["scores"][j]))
                    )
    rate = found["gold"]["metrics"]["match_rate"]
    assert rate["value"] == pytest.approx(np.mean(hits), abs=1e-6) and rate["low"] < rate["value"] < rate["high"]
    assert f"{100 * rate['value']:.1f}%" in text and found["sets"]["train"]["kind"] == "preferences"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model is required"),
        (["--model=x"], "nothing to measure"),
        (["--model=x", "--benchmark=rewardbench"], "did you mean 'reward_bench'"),
        (["--model=x", "--data=gone.jsonl"], "gone.jsonl"),
        (["--model=x", "--data=synthetic://pairs?n=9&seed=0", "--mesh=rows=2"], "--mesh=rows=2"),
        (["--model=nowhere", "--data=synthetic://pairs?n=9&seed=0"], "nowhere: no such directory"),
    ],
)
def test_bad_input_is_told(argv, words, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.main(argv)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_columns_are_named_as_in_training(tmp_path):
    pair = {"leading": [{"role": "user", "content": "q"}], "chosen": "x", "rejected": "y"}
    data = f"--data={write(tmp_path / 'pairs.jsonl', [pair])}"
    parsed = lambda *more: evaluate.parser().parse_args(["--model=m", data, *more])
    with pytest.raises(ValueError, match="--columns"):
        evaluate.checked(parsed())
    args = evaluate.checked(parsed("--columns=prompt=leading"))
    assert list(evaluating.measurable_tasks(args.data, args.format, None, args.columns)) == ["preferences"]


def test_an_output_is_whole_and_never_behind_a_link(tmp_path, monkeypatch):
    target, out = tmp_path / "target.json", tmp_path / "out.json"
    target.write_text("precious")
    out.symlink_to(target)
    data = ["--model=x", "--data=synthetic://pairs?n=9&seed=0", f"--output={out}"]
    for refused in (lambda: evaluate.checked(evaluate.parser().parse_args(data)), lambda: evaluate.write(out, [{}])):
        with pytest.raises(ValueError, match=r"out\.json is a link to .*target\.json"):
            refused()
    assert out.is_symlink() and target.read_text() == "precious"
    out.unlink()
    (tmp_path / "out.tmp").write_text("mine")
    evaluate.write(out, [{"a": 1}])
    with pytest.raises(ValueError, match="JSON"):
        evaluate.write(out, [{"a": float("nan")}])
    assert json.loads(out.read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.tmp", "target.json"]


def test_a_model_of_steps_runs_no_benchmark_of_preferences(tmp_path, cache, capsys):
    config = runpy.run_path(str(ROOT / "configs" / "prm_tiny.py"))["get_config"]()
    config.eval.benchmarks, config.data.cache_dir = f"judge_bench={write(tmp_path / 'x.jsonl', [])}", str(cache)
    with pytest.raises(ValueError, match="prefers no response"):
        training.run(config, tmp_path / "run")
