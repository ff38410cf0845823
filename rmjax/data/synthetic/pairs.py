"""Preference pairs with a planted rule: the preferred reply has the word that the prompt names."""

import random
from collections.abc import Iterator
from typing import Any

# fmt: off
TOPICS = (
    "bridge", "candle", "desert", "engine", "forest", "garden",
    "hammer", "island", "jacket", "ladder", "piano", "river",
)
FILLER = (
    "above", "again", "almost", "always", "around", "before", "behind", "below", "beside", "bright",
    "careful", "clean", "clear", "close", "cold", "deep", "early", "easy", "empty", "every",
    "fresh", "full", "gentle", "green", "happy", "large", "late", "light", "never", "often",
    "once", "plain", "quick", "quiet", "round", "slow", "small", "soft", "under", "warm",
)
# fmt: on
ASK = (
    "Tell me about the {}.",
    "What is the {} like?",
    "Describe the {} for me.",
    "I want to know more about the {}.",
    "Could you say something of the {}?",
    "Write a few lines on the {}, please.",
    "Explain what the {} is for.",
    "My question: why does the {} matter?",
)
SYSTEM = ("You are a helpful assistant.", "Answer in one sentence.", "Be brief and stay on the subject.")

# What the rows of every block of 200 are, in random order; the rest are ordinary. See `pairs`.
BLOCK = 200
SPECIAL = ("tie_both", "tie_both", "tie_neither", "tie_neither", "empty", "identical", "non_text")


def pairs(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields `pair_messages` rows; of two replies, the chosen one has the word that the last user turn names.

    The rejected one has another of TOPICS instead. Either has it one to three times, at any place but the
    first, among words of FILLER; 8 to 16 words in all. Every topic is as frequent on one side as on the
    other, so neither the prompt, the replies, their lengths nor a linear model of the words tells which is
    chosen: a model has to look the word up. One prompt in five has an earlier exchange about another topic,
    and then the rejected reply is about that one; one in five has a system message. A prompt serves one to
    three consecutive rows, each with replies of its own. Another seed draws other prompts (two sets of 4,000
    have one in common with a chance of about 1 in 15).

    Of every 200 rows 193 follow the rule. 4 are ties (`preference` 0.5): in two both replies have the word,
    in two neither has it. 3 cannot be used: an empty reply, the same reply twice, a reply whose content is a
    number.

    One row (`preference` is there in ties only):

        {"prompt": [{"role": "user", "content": "Tell me about the river. Green still often."}],
         "chosen": [{"role": "assistant", "content": "Every quiet river soft under small early once."}],
         "rejected": [{"role": "assistant", "content": "Soft garden empty near plain always garden warm."}]}
    """
    rng = random.Random(f"pairs/{seed}")  # seeded by text: hashed with SHA-512, whatever PYTHONHASHSEED is
    kinds: list[str] = []
    copies = 0
    for _ in range(n):
        if not kinds:
            kinds = [*SPECIAL, *["ordinary"] * (BLOCK - len(SPECIAL))]
            rng.shuffle(kinds)
        if not copies:
            topic, other = rng.sample(TOPICS, 2)
            prompt = _prompt(rng, topic, decoy=other)
            copies = rng.choice((1, 1, 1, 1, 2, 3))
        copies -= 1
        if len(prompt) < 3:  # no earlier exchange to be about
            other = rng.choice([word for word in TOPICS if word != topic])
        yield {"prompt": [dict(message) for message in prompt], **_replies(rng, kinds.pop(), topic, other)}


def _prompt(rng: random.Random, topic: str, decoy: str) -> list[dict[str, str]]:
    """Messages that end with a user turn about `topic`; one time in five after an exchange about `decoy`."""
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": _question(rng, decoy)})
        messages.append({"role": "assistant", "content": _reply(rng, decoy)})
    messages.append({"role": "user", "content": _question(rng, topic)})
    return messages


def _question(rng: random.Random, topic: str) -> str:
    """A question about `topic` and, before or after it, 3 to 5 words that make the prompt its own."""
    sentences = [rng.choice(ASK).format(topic), _sentence(rng.sample(FILLER, rng.randint(3, 5)))]
    rng.shuffle(sentences)
    return " ".join(sentences)


def _reply(rng: random.Random, topic: str) -> str:
    """8 to 16 words, 1 to 3 of them `topic`, which never comes first: there it would be another token."""
    words = rng.sample(FILLER, rng.randint(8, 16))
    for place in rng.sample(range(1, len(words)), rng.randint(1, 3)):
        words[place] = topic
    return _sentence(words)


def _sentence(words: list[str]) -> str:
    return " ".join(words).capitalize() + "."


def _replies(rng: random.Random, kind: str, topic: str, other: str) -> dict[str, Any]:
    """The columns beside `prompt` of a row of this kind (see SPECIAL)."""
    chosen: Any = _reply(rng, other if kind == "tie_neither" else topic)
    rejected: Any = _reply(rng, topic if kind == "tie_both" else other)
    if kind == "empty":
        chosen = ""
    elif kind == "identical":
        rejected = chosen
    elif kind == "non_text":
        rejected = len(rejected)
    columns: dict[str, Any] = {
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return columns | ({"preference": 0.5} if kind.startswith("tie") else {})
