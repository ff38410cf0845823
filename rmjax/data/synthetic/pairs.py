"""Preference pairs with a planted rule: the preferred reply has the word that the prompt names.

Yields `pair_messages` rows; of two replies, the chosen one has the word that the last user turn names.

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

import random
from typing import Any

from rmjax.data.synthetic.words import SYSTEM, TOPICS, Rows, dealt, question, reply, shuffled

# The kinds of rows in every block of 200; see `pairs`.
SPECIAL = ("tie_both", "tie_both", "tie_neither", "tie_neither", "empty", "identical", "non_text")
BLOCK = (*SPECIAL, *["ordinary"] * (200 - len(SPECIAL)))


def pairs(rng: random.Random) -> Rows:
    copies = 0
    for kind in dealt(lambda: shuffled(rng, BLOCK)):
        if not copies:
            topic, other = rng.sample(TOPICS, 2)
            prompt = _prompt(rng, topic, decoy=other)
            copies = rng.choice((1, 1, 1, 1, 2, 3))
        copies -= 1
        if len(prompt) < 3:  # no earlier exchange to be about
            other = rng.choice([word for word in TOPICS if word != topic])
        yield {"prompt": [dict(message) for message in prompt], **_replies(rng, kind, topic, other)}


def _prompt(rng: random.Random, topic: str, decoy: str) -> list[dict[str, str]]:
    """Messages that end with a user turn about `topic`; one time in five after an exchange about `decoy`."""
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": question(rng, decoy)})
        messages.append({"role": "assistant", "content": reply(rng, 8, 16, decoy)})
    messages.append({"role": "user", "content": question(rng, topic)})
    return messages


def _replies(rng: random.Random, kind: str, topic: str, other: str) -> dict[str, Any]:
    chosen: Any = reply(rng, 8, 16, other if kind == "tie_neither" else topic)
    rejected: Any = reply(rng, 8, 16, topic if kind == "tie_both" else other)
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
