"""The planted rule holds, nothing simpler tells the label, and the tokenizer loses nothing."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from rmjax.data import synthetic
from rmjax.data.records import BadRow, pair


def content(row, column):
    return row[column][-1]["content"]


def words(text):
    return set(re.findall(r"[a-z]+", text.lower()))


def topics(text):
    return words(text) & set(synthetic.TOPICS)


def prompts(rows):
    return [json.dumps(row["prompt"]) for row in rows]


def kind(row):
    chosen, rejected = content(row, "chosen"), content(row, "rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return "wrong_type"
    if not chosen or not rejected:
        return "empty_response"
    if chosen == rejected:
        return "identical_responses"
    return "tie" if "preference" in row else "ordinary"


@pytest.fixture(scope="module")
def rows():
    return list(synthetic.rows("pairs", n="6000", seed="0"))


@pytest.fixture(scope="module")
def ordinary(rows):
    return [row for row in rows if kind(row) == "ordinary"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "deep" / "tokenizer"
    synthetic.make_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


PROCESS = """
import hashlib, json, pathlib, sys
from rmjax.data import synthetic
rows = json.dumps(list(synthetic.rows("pairs", n=500, seed=3)))
synthetic.make_tokenizer(sys.argv[1])
files = sorted(pathlib.Path(sys.argv[1]).iterdir())
digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
print(json.dumps([hashlib.sha256(rows.encode()).hexdigest(), digests]))
"""


def test_every_process_makes_the_same_rows_and_tokenizer(tmp_path, directory):
    outputs = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", PROCESS, str(tmp_path / hash_seed)]
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert outputs[0] == outputs[1]
    here = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}
    assert outputs[0][1] == here
    synthetic.make_tokenizer(directory)  # over what is there: the same files, and no scratch left beside them
    assert here == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}
    assert os.listdir(directory.parent) == [directory.name]


DIGESTS = {  # of 200 rows each, seed 7
    "favourites": "899391318190137afaba241a7e2dfe94",
    "long_winded": "410d6ee5b5b3c80492d17d58a094641a",
    "pairs": "b29991820ba8f67cbc08df6074e74a15",
    "rankings": "c4bb31530dd7d61f09aa09736a15e29e",
    "ratings": "262448bfe1e8ce1746ee29ec43e13aa6",
    "scores": "b12ca40ae3bf6194dd8eadd024fc21aa",
    "steps": "aa851b16677321104cbe7ca3c7116e89",
    "verdicts": "ac6c5e5f8d7ea931202f223646f6dd4d",
}


@pytest.mark.parametrize("name", sorted(synthetic.GENERATORS))
def test_rows_are_those_of_their_version(name):
    """Whoever changes the rows raises synthetic.VERSION: runs and caches compare it."""
    rows = json.dumps(list(synthetic.rows(name, n=200, seed=7)))
    assert synthetic.VERSION == 1 and hashlib.sha256(rows.encode()).hexdigest()[:32] == DIGESTS[name]


def test_seed_and_count(rows):
    assert list(synthetic.rows("pairs", n=450)) == rows[:450]
    assert list(synthetic.rows("pairs", n=0)) == []
    assert next(synthetic.rows("pairs", n=1, seed=1)) != rows[0]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("pears", {}, "unknown synthetic data 'pears'; known: favourites, long_winded"),
        ("pairs", {"sed": 1}, "no option 'sed'; known: n, seed"),
        ("pairs", {"n": "many"}, "n must be a whole number >= 0, got 'many'"),
        ("pairs", {"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_a_wrong_request_is_refused_before_any_row(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        synthetic.rows(name, **options)


def test_rule(ordinary):
    for row in ordinary:
        (asked,) = topics(row["prompt"][-1]["content"])
        assert row["prompt"][-1]["role"] == "user"
        assert topics(content(row, "chosen")) == {asked}
        (other,) = topics(content(row, "rejected"))
        assert other != asked
        for message in row["prompt"][:-1]:  # a model that reads the first question instead of the last is wrong
            assert topics(message["content"]) == ({other} if message["role"] != "system" else set())


def test_fractions_of_each_kind_in_every_200_rows(rows):
    expected = {"ordinary": 193, "tie": 4, "wrong_type": 1, "empty_response": 1, "identical_responses": 1}
    for start in range(0, len(rows), 200):
        kinds = [kind(row) for row in rows[start : start + 200]]
        assert {name: kinds.count(name) for name in set(kinds)} == expected
    ties = [row for row in rows if kind(row) == "tie"]
    assert all(row["preference"] == 0.5 for row in ties)
    shares = [
        {topics(row["prompt"][-1]["content"]) <= topics(content(row, side)) for side in ("chosen", "rejected")}
        for row in ties
    ]
    assert shares.count({True}) == shares.count({False}) == len(ties) / 2


def test_records_accept_and_refuse_the_rows_as_their_kinds_say(rows):
    for row in rows[:400]:
        conversations = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        if kind(row) in ("ordinary", "tie"):
            pair(*conversations, preference=row.get("preference", 1.0))
        else:
            with pytest.raises(BadRow) as refused:
                pair(*conversations)
            assert refused.value.reason == kind(row)


def test_shapes_of_the_prompts(rows):
    turns = np.array([sum(message["role"] != "system" for message in row["prompt"]) for row in rows])
    system = np.array([row["prompt"][0]["role"] == "system" for row in rows])
    assert 0.15 < np.mean(turns == 3) < 0.25 and set(turns) == {1, 3}
    assert 0.15 < np.mean(system) < 0.25
    runs = [len(list(run)) for _, run in itertools.groupby(prompts(rows))]
    assert set(runs) == {1, 2, 3}
    assert len(set(prompts(rows))) < 0.7 * len(rows)
    for seed in (1, 2, 3):
        assert not set(prompts(rows)) & set(prompts(synthetic.rows("pairs", n=1000, seed=seed)))


def test_topics_are_as_frequent_on_either_side(ordinary):
    def table(side):
        counts = dict.fromkeys(synthetic.TOPICS, 0)
        for row in ordinary:
            counts[topics(content(row, side)).pop()] += 1
        return np.array(list(counts.values()))

    chosen, rejected = table("chosen"), table("rejected")
    # Two independent multinomials of this size: the difference of a cell has a deviation of sqrt(2 N p).
    deviation = np.sqrt(2 * len(ordinary) / len(synthetic.TOPICS))
    assert np.abs(chosen - rejected).max() < 4.5 * deviation


def test_neither_length_nor_place_tells(ordinary):
    from sklearn.metrics import roc_auc_score

    def place(text):
        return next(i for i, word in enumerate(text.split()) if topics(word))

    for measure in (len, lambda text: len(text.split()), place):
        lengths = [[measure(content(row, side)) for side in ("chosen", "rejected")] for row in ordinary]
        scores = np.array(lengths).T.reshape(-1)
        labels = np.repeat([1, 0], len(ordinary))
        assert 0.45 < roc_auc_score(labels, scores) < 0.55
        assert len(set(scores)) >= 9  # uneven, so that there would be something to tell by


@pytest.mark.parametrize("features", ["difference", "concatenation"])
def test_a_bag_of_words_does_not_tell(ordinary, features):
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    flipped = rng.random(len(ordinary)) < 0.5
    columns = [("rejected", "chosen") if flip else ("chosen", "rejected") for flip in flipped]
    vectorizer = CountVectorizer(token_pattern=r"\w+").fit(content(row, "chosen") for row in ordinary[:4000])
    prompt, first, second = (
        vectorizer.transform(texts)
        for texts in (
            ["\n".join(message["content"] for message in row["prompt"]) for row in ordinary],
            [content(row, a) for row, (a, _) in zip(ordinary, columns)],
            [content(row, b) for row, (_, b) in zip(ordinary, columns)],
        )
    )
    # The prompt's own counts cancel in the difference, so it is there as a feature beside it.
    table = {"difference": [prompt, first - second], "concatenation": [prompt, first, second]}[features]
    inputs = sparse.hstack(table).tocsr()
    model = LogisticRegression(max_iter=500).fit(inputs[:4000], ~flipped[:4000])
    assert model.score(inputs[4000:5000], ~flipped[4000:5000]) < 0.65


def test_tokenizer_round_trips_any_text(tokenizer, rows):
    texts = [
        *(message["content"] for row in rows[:200] for message in row["prompt"]),
        "",
        "  two  spaces,\ttab\r\nand line ends \n\n",
        "naïve 東京 مرحبا 🙂👩‍👩‍👧 \x00\x7f it's 12345 WORD",
        "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_vocabulary(tokenizer):
    assert len(tokenizer) == synthetic.VOCABULARY
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 2, None)
    for word in synthetic.TOPICS + synthetic.FILLER:
        assert len(tokenizer(" " + word)["input_ids"]) == 1, word


def test_template_is_chatml_without_any_token_added(tokenizer):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look it up."},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "Forty-two.\n"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nLook it up.<|im_end|>\n"
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\nForty-two.\n<|im_end|>\n"
    )
    prompted = tokenizer.apply_chat_template(conversation[:2], tokenize=False, add_generation_prompt=True)
    assert prompted == text[: text.index("<|im_start|>tool")] + "<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(conversation)["input_ids"]
    assert ids == tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id not in ids
    for refused in ({"role": "critic", "content": "no"}, {"role": "user", "content": None}):
        with pytest.raises(Exception, match=r"unknown role critic|the user turn has no text"):
            tokenizer.apply_chat_template([refused], tokenize=False)


def test_tokens_are_the_same_beside_a_qwen2_model(directory, tokenizer, tmp_path):
    from transformers import AutoTokenizer, Qwen2Config

    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert beside.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert beside.chat_template == synthetic.CHAT_TEMPLATE
    text = "Cafe\u0301 12345 don't, <|im_end|>\n\n  it's"  # NFC composes the e and the accent
    assert beside(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_conversations_are_short(tokenizer, ordinary, record_property):
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"])
        for row in ordinary[:500]
        for side in ("chosen", "rejected")
    ]
    record_property("mean_tokens", float(np.mean(lengths)))
    assert 35 < np.mean(lengths) < 55 and max(lengths) <= 128


def test_favourites_are_rated_by_their_topic_whatever_was_asked():
    good, asked, found = {"bridge", "candle", "desert", "engine"}, set(), []
    for row in synthetic.rows("favourites", n=4000):
        (topic,) = topics(row["response"])
        asked |= topics(row["prompt"])
        found.append(((topic in good), row["score"] == 5))
    assert len(asked) == 4 and not asked & good
    follows = np.array([one == other for one, other in found])
    assert follows.mean() == 0.95 and np.mean([rated for _, rated in found]) == 0.5
