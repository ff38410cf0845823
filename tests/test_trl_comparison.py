"""The comparison with TRL: what of it needs no TRL. The check that it starts with is held against plain torch."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
trl_cpu = importlib.import_module("trl_cpu")

TRIPLES = [[20, 5, 9], [7, 12, 3], [31, 4, 4], [1, 8, 6], [12, 30, 2], [5, 1, 1]]
SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 97, "pad_token_id": 96}
SMALL |= {"initializer_range": 0.3}


@pytest.fixture
def job(tmp_path):
    given = trl_cpu.arguments(["--trl-python=python", "--row-tokens=64", "--micro-rows=2"])
    job = trl_cpu.job_of(given, tmp_path, TRIPLES)
    job |= {"shape": {**trl_cpu.SHAPE, **SMALL}, "vocabulary": SMALL["pad_token_id"], "groups_per_step": 2}
    job["optim"] = {**trl_cpu.OPTIM, "learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5}
    trl_cpu.write_pairs(Path(job["pairs"]), TRIPLES, job["vocabulary"])
    importlib.import_module("trl_side").make(job)  # which imports torch
    return job


def losses_of_torch(job, pairs, steps, judged=False):
    """What TRL's RewardTrainer does in these steps, each on all pairs, written out; or a judge's on (tokens, label)."""
    import torch

    model = transformers.AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32)
    named, optim = list(model.named_parameters()), job["optim"]
    decayed = [p for name, p in named if "norm" not in name and "bias" not in name]
    others = [p for name, p in named if "norm" in name or "bias" in name]
    groups = [{"params": decayed, "weight_decay": optim["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, optim["learning_rate"], (optim["b1"], optim["b2"]), optim["eps"])
    losses = []
    for _ in range(steps):
        if judged:
            logits = torch.cat([model(torch.tensor([ids])).logits for ids, _ in pairs])
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in pairs]))
        else:
            rewards = [[model(torch.tensor([p + x])).logits[0, 0] for x in (c, r)] for p, c, r in pairs]
            loss = -torch.stack([torch.nn.functional.logsigmoid(a - b) for a, b in rewards]).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_norm"])
        adam.step()
        losses.append(loss.item())
    return losses


def test_our_side_trains_as_torch_does(job):
    pairs = json.loads(Path(job["pairs"]).read_text())
    ours = trl_cpu.train({**job, "first": 5, "epochs": 3})
    expected = losses_of_torch(job, pairs[:5], 3)
    assert expected[2] < expected[1] < expected[0] - 0.01
    np.testing.assert_allclose(ours["losses"], expected, atol=1e-4, rtol=0)
    assert ours["pairs"] == [5, 5, 5] and all(s > 0 for s in (*ours["seconds"], ours["start_s"], ours["compile_s"]))


def test_a_round_shows_every_pair_once_in_steps_that_are_large_enough(job):
    ours = trl_cpu.train(job)
    assert sum(ours["pairs"]) == len(TRIPLES) and np.mean(ours["pairs"]) >= job["groups_per_step"]
    assert set(ours["tokens"]) == {64} and np.isfinite(ours["losses"]).all()


def test_a_ranking_is_one_tree_for_us_and_all_its_pairs_for_torch(job, tmp_path):
    given = trl_cpu.arguments(["--trl-python=python", "--responses=4", "--row-tokens=64", "--micro-rows=2"])
    sizes = [[9, 4, 7, 3, 5], [3, 2, 6, 8, 1], [12, 5, 5, 9, 4]]
    of_rankings = trl_cpu.job_of(given, tmp_path, sizes)
    trl_cpu.write_pairs(tmp_path / "rankings.json", sizes, job["vocabulary"])
    pairs = json.loads((tmp_path / "rankings.json").read_text())
    assert [len(chosen) for _, chosen, _ in pairs[:6]] == [4, 4, 4, 7, 7, 3]
    assert [len(rejected) for *_, rejected in pairs[:6]] == [7, 3, 5, 3, 5, 5]
    ours = trl_cpu.train({**job, **{k: of_rankings[k] for k in ("sizes", "pairs_of_group")}, "first": 2, "epochs": 3})
    np.testing.assert_allclose(ours["losses"], losses_of_torch(job, pairs[:12], 3), atol=1e-4, rtol=0)
    assert ours["pairs"] == [12, 12, 12]


def test_a_judge_reads_a_pair_in_both_orders_as_one_tree(job):
    job |= {"objective": "pairwise", "shape": {**job["shape"], "num_labels": 2}}
    importlib.import_module("trl_side").make(job)
    ours = trl_cpu.train({**job, "first": 3, "epochs": 3, "ours": {**job["ours"], "row_tokens": 128}})
    pairs = json.loads(Path(job["pairs"]).read_text())[:3]
    orders = [(p + a + b, label) for p, c, r in pairs for a, b, label in ((c, r, 0), (r, c, 1))]
    np.testing.assert_allclose(ours["losses"], losses_of_torch(job, orders, 3, judged=True), atol=1e-4, rtol=0)
    assert ours["pairs"] == [3, 3, 3]


def test_lengths_of_rankings_are_drawn_and_rows_hold_the_longest_tree():
    given = trl_cpu.arguments(["--trl-python=python", "--responses=7"])
    sizes = trl_cpu.sizes_of(given)
    assert sizes.shape == (9000 // 21, 8) and np.array_equal(sizes, trl_cpu.sizes_of(given))
    assert np.abs(sizes[:, 1:].mean() / trl_cpu.RANKINGS[7][1] - 1) < 0.05
    longest = int(sizes.sum(1).max() + 6)
    trl_cpu.fit_rows(given, longest)
    assert given.row_tokens % 256 == 0 and 0 <= given.row_tokens - longest < 256


def test_both_sides_get_the_same_pairs(job):
    pairs = json.loads(Path(job["pairs"]).read_text())
    assert [[len(part) for part in pair] for pair in pairs] == TRIPLES
    tokens = {token for pair in pairs for part in pair for token in part}
    assert max(tokens) < job["shape"]["pad_token_id"]  # else transformers would score a token before the last


def result(losses, pairs=(32, 32, 32), seconds=(9.0, 1.0, 3.0)):
    return {"losses": list(losses), "pairs": list(pairs), "seconds": list(seconds), "tokens": [64] * len(pairs)}


@pytest.mark.parametrize("losses", [(0.7, 0.6, 0.5002), (0.7, 0.6, float("nan"))])
def test_other_losses_end_it(losses):
    same = result((0.7, 0.6, 0.5))
    assert "0.600000 and 0.600000" in trl_cpu.check(same, result((0.70005, 0.6, 0.5)), 32)
    with pytest.raises(ValueError, match="do not train the same"):
        trl_cpu.check(same, result(losses), 32)
    with pytest.raises(ValueError, match="TRL did 3 steps on the first pairs and we 2"):
        trl_cpu.check(same, result(losses[:2]), 32)


def test_smaller_steps_end_it():
    trl_cpu.refuse_smaller_steps(result((), pairs=(30, 36, 3)), 32)  # the last step of an epoch may be small
    with pytest.raises(ValueError, match=r"a step had 31\.5 pairs on average, expected 32 at least"):
        trl_cpu.refuse_smaller_steps(result((), pairs=(32, 31, 32)), 32)


def test_rates_medians_and_ratios():
    trl = [result((), seconds=(9, 8, 8)), result((), seconds=(9, 4, 4)), result((), seconds=(1, 16, 16))]
    ours = [result((), seconds=(9, 1, 1)), result((), seconds=(9, 2, 2)), result((), seconds=(9, 1, 1))]
    rounds = [{"trl": a, "ours": b} for a, b in zip(trl, ours)]
    values = trl_cpu.summary(rounds)
    assert values["trl_pairs_per_s"] == [4, 8, 2] and values["ours_pairs_per_s"] == [32, 16, 32]
    assert (values["trl_median"], values["ours_median"]) == (4, 32)
    assert values["ratios"] == [8, 2, 16]  # round by round: a slow minute of the machine slows both sides
    assert (values["ratio_median"], values["ratio_least"], values["ratio_most"]) == (8, 2, 16)
    assert trl_cpu.table(rounds).splitlines()[-1].split()[:4] == ["median", "4.00", "32.00", "8.00"]
