"""What of a benchmark is in training data: against a plain search for the longest runs of equal tokens."""

import json

import numpy as np
import pytest

from rmjax.batches import overlap, token_cache
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.batches.tasks import Preferences
from rmjax.data.synthetic import FILLER, TOPICS

WORDS = [*FILLER, *TOPICS]
RUN = 40  # tokens of this tokenizer are a letter or two, so that 13 are no more than a few words
SYSTEM = "You are a careful assistant that answers every question briefly and in plain words of the house."


def text(rng, words):
    return " ".join(rng.choice(WORDS, words))


def row(prompt, chosen, rejected):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    said = lambda content: [*messages, {"role": "assistant", "content": content}]
    return {"chosen": said(chosen), "rejected": said(rejected)}


@pytest.fixture(scope="module")
def rows():
    """Thirty rows of a benchmark, and training data which have some of them in other clothes."""
    rng = np.random.default_rng(0)
    made = lambda: (text(rng, 30), text(rng, 20), text(rng, 20))
    bench, train = [made() for _ in range(30)], [made() for _ in range(300)]
    prompt, chosen, rejected = bench[3]
    train[17] = (f"{text(rng, 5)} {prompt} {text(rng, 3)}", chosen, rejected)  # nearly all of it
    train[40] = (bench[5][0], text(rng, 20), text(rng, 20))  # the prompt alone
    train[99] = (text(rng, 30), bench[8][1], text(rng, 20))  # one response: a part of the row
    return train, bench


@pytest.fixture(scope="module")
def sets(rows, tokenizer_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("overlap")
    chat, found = Chat(load_tokenizer(tokenizer_dir)), []
    for name, texts in zip(("train", "bench"), rows):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row(*x)) + "\n" for x in texts))
        found.append(token_cache.build(str(path), chat, Preferences(), workers=0, cache_dir=directory / "cache"))
    return found


def searched(train, measured, run):
    """The shares by definition: every token of every group, in sets of tuples."""
    of = lambda groups: [groups.group(i).tree.tokens.tolist() for i in range(len(groups))]
    cut = lambda tokens: [tuple(tokens[i : i + run]) for i in range(len(tokens) - run + 1)]
    known = {piece for tokens in of(train) for piece in cut(tokens)}
    theirs = of(measured)
    count = {}
    for tokens in theirs:  # here every group has a prompt of its own
        for piece in set(cut(tokens)):
            count[piece] = count.get(piece, 0) + 1
    shares = []
    for tokens in theirs:
        covered, template = np.zeros(len(tokens), bool), np.zeros(len(tokens), bool)
        for i, piece in enumerate(cut(tokens)):
            common = count[piece] > overlap.COMMON_PROMPTS
            template[i : i + run] |= common
            covered[i : i + run] |= piece in known and not common
        shares.append((covered & ~template).sum() / max((~template).sum(), 1))
    return shares


@pytest.mark.parametrize("run", [5, overlap.RUN, RUN])
def test_shares_are_those_of_a_plain_search(sets, run):
    train, bench = sets
    found = overlap.find(train, bench, run)
    np.testing.assert_allclose(found.shares, searched(train, bench, run), atol=1e-6)
    assert found.shares[3] > 0.9 and (found.shares > 0).sum() >= 3


def test_groups_overlap_by_prompt_or_by_half_of_their_tokens(sets):
    train, bench = sets
    found = overlap.find(train, bench, RUN)
    assert np.flatnonzero(found.groups).tolist() == [3, 5] and np.flatnonzero(found.prompts).tolist() == [5]
    assert 0 < found.shares[8] < overlap.LEAST and found.examples == [(train.id(17), bench.id(3))]
    assert found.line("bench").startswith(
        "bench: 1 of its 30 prompts are in the training data, so its numbers mislead; 1 "
    )
    assert "(for example train.jsonl:17 and bench.jsonl:3)" in found.line("bench")
    alone = overlap.find(train, bench.select([3, 4]), RUN)
    assert "1 of its 2 groups have half" in alone.line("bench") and "its numbers mislead" in alone.line("bench")
    assert overlap.find(train, bench.select([0, 1]), RUN).line("bench") == ""


def test_a_selection_of_the_training_groups_is_what_counts(sets):
    train, bench = sets
    rest = train.select([i for i in range(len(train)) if i != 17][::-1])
    assert np.flatnonzero(overlap.find(rest, bench, RUN).groups).tolist() == [5]


def test_every_token_counts_once_in_parts_of_the_file(sets):
    train, _ = sets
    for groups in (train, train.select([250, 3, 7])):
        seen = np.concatenate([numbers for _, _, numbers in groups.token_batches()])
        assert sorted(seen.tolist()) == list(range(len(groups)))
        for tokens, begin, numbers in groups.token_batches():
            for place, number in enumerate(numbers):
                assert tokens[begin[place] : begin[place + 1]].tolist() == groups.group(number).tree.tokens.tolist()


def test_groups_shorter_than_a_run_are_clean(sets):
    train, bench = sets
    found = overlap.find(train, bench, run=10**4)
    assert not found.shares.any() and found.prompts[5]
