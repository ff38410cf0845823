"""Small sets of preference data: the columns, nesting and oddities of public ones, with words made up for these tests.

`PUBLIC` names the public file whose rows those of a set are built like.
"""

import gzip
import json
import random
from pathlib import Path

TOPICS = ("trees", "rivers", "clocks", "bread", "maps", "bees", "kites", "ink", "salt", "bells", "sand", "wool")
THEMEN = ("树", "河", "钟", "面包", "地图", "蜜蜂", "风筝", "墨", "盐", "铃", "沙", "羊毛")
GOOD = (
    "Most {} are old, and people care for them.",
    "1. Look at {}.\n2. Write down what you see.\n\n```python\nprint('done')\n```",
    "“{}” – naïve as it sounds – need time. 🙂",
)
BAD = ("I do not know any {}.", "No.\n\nAsk again, about something other than {}.")


def write(folder: Path) -> Path:
    """All of `SETS`, as files; returns the folder."""
    for name, rows in SETS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        dump = lambda value: json.dumps(value, ensure_ascii=False)
        text = dump(rows) if ".jsonl" not in name else "".join(dump(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode())
    return folder


def judge_bench(path: Path, questions: list[str]) -> Path:
    """A benchmark of these questions, in JudgeBench's columns."""
    subsets = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    rows = [
        {"pair_id": f"p{i}", "source": subsets[i % 4], "question": question, "label": "A>B"}
        | {"response_A": said(GOOD, i), "response_B": said(BAD, i)}
        for i, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(templates, i, topics=TOPICS):
    return templates[i % len(templates)].format(topics[i % len(topics)])


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def pair_of_conversations(i):
    """One turn or several, a third with a system message; every sixth prompt repeats the one before."""
    n = i - (i % 6 == 5)
    topic = TOPICS[n % len(TOPICS)]
    turns = [human(f"{n}. Tell me about {topic}."), gpt(f"What about {topic}?\n"), human(f"Why are there {topic}?")]
    start = [{"from": "system", "value": f"You know {topic}.\n\nBe brief."}] if n % 3 == 1 else []
    turns = turns if n % 6 == 2 else turns[:1]
    return {"conversations": [*start, *turns], "chosen": gpt(said(GOOD, i)), "rejected": gpt(said(BAD, i))}


def chinese_pair(i):
    topic = THEMEN[i % len(THEMEN)]
    start = [{"from": "system", "value": "你很友好。"}] if i % 4 == 3 else []
    asked = human(f"请介绍一下{topic}：\n“{topic}”是什么？（第{i // len(THEMEN)}次）")
    return {
        "conversations": [*start, asked],
        "chosen": gpt(f"{topic}很常见，\n1. 也很有用！"),
        "rejected": gpt("不知道。"),
    }


def plain_replies(row):
    return {**row, "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]}


def messages_and_a_label(i):
    turns = [f"Write {i} words about {TOPICS[i % len(TOPICS)]}.", said(GOOD, i + 1), "Shorter, please.", said(BAD, i)]
    turns = turns if i % 4 == 3 else turns[:2]
    messages = [{"content": text, "role": ("user", "assistant")[n % 2]} for n, text in enumerate(turns)]
    return {"messages": messages, "label": i % 4 == 0 or i % 4 == 1}


VOTES = ((1, 1, 1), (2, 2, 2), (1, 1, 2), (0, 0, 0), (2, 0, 2), (1, 1, 0), (0, 2, 0))  # three people; 0 is a tie


def annotated_pair(i):
    """Five rows a prompt; the better response is mostly longer. One in 30 rows has JSON `true`, one in 20 no text."""
    responses = {"response1": f"First of {said(GOOD, i)}", "response2": f"Second of {said(BAD, i)}"}
    votes = VOTES[i % len(VOTES)]
    better = "response1" if (votes.count(1) > votes.count(2)) != (i % 8 == 0) else "response2"
    responses[better] += "\n\nThere is more to say about it, and more still."
    side = "response1" if i % 4 < 2 else "response2"
    if i % 30 == 4:
        responses[side] = True
    if i % 20 == 9:
        responses[side] = ""
    prompt = i // 5
    given = "" if prompt % 5 == 4 else f"They are told of in\n{said(GOOD, prompt)}"
    return {
        **{"idx": i, "motivation_app": "Made up", "cmp_key": "one_other", "input": given},
        **{"instruction": f"Explain {TOPICS[prompt % 12]}, part {prompt // 12}.", **responses},
        **dict(zip(("annotator1", "annotator2", "annotator3"), votes)),
    }


def message(text, *replies, role="assistant", rank=None, **more):
    """A node of a tree; its key for the rank is left out where there is none, as in the public rows."""
    ranked = {} if rank is None else {"rank": rank}
    common = {"message_id": f"id of {text}", "text": text, "role": role, "lang": "en"}
    common |= {"review_count": 3, "review_result": True, "deleted": False, **ranked, "synthetic": False, **more}
    return {**common, "emojis": {"+1": 1, "_skip_reply": 0}, "replies": list(replies)}


def tree(i):
    """Ranks stand in the order 1, 0, 2. The first reply is asked further; every fifth tree has one without a rank."""
    topic, last = TOPICS[i % len(TOPICS)], None if i % 5 == 4 else 2
    ends = [
        message(f"Because {topic} {verb}.", rank=n) for n, verb in ((1, "last"), (0, "grow\n\nslowly"), (last, "are"))
    ]
    further = message(f"Why {topic}?", *ends, role="prompter")
    replies = [message(said(GOOD, i), further, rank=1), message(said(BAD, i), rank=0, parent_id="id")]
    prompt = message(f"What are {topic} ({i})?", *replies, role="prompter")
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt}


def compared_four(i):
    """Of neighbours in quality none is better, so a tie with two responses is not always a tie of these two."""
    topic, quality = TOPICS[i % len(TOPICS)], random.Random(i).choices(range(6), k=4)
    pairs = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    verdict = lambda difference: 0 if abs(difference) < 2 else 1 if difference > 0 else 2
    passages = [[topic.title(), f"{topic.title()}\n\nAll about {topic}.", "Long ago."], [f"More {topic}", "And on."]]
    return {
        **{"question": f"when were {topic} first seen?", "passages": passages[: 1 + i % 2], "gold": "Long ago."},
        **{f"prediction {n + 1}": f"{n} {said(GOOD, i + n)}" for n in range(4)},
        "feedback": {"errors": [], "missing-info": [], "corrected-prediction": "Long ago."},
        "preference": [verdict(quality[a] - quality[b]) for a, b in pairs],
    }


AXES = ("understandability", "naturalness", "coherence", "engagingness", "groundedness", "overall")


def talked_about(i):
    topic = TOPICS[i % len(TOPICS)]
    scores = zip(AXES, (i % 3 / 2, 1 + i % 7 / 3, 3 - i % 5 / 2, 1 + i % 4 / 1.5, i % 4 / 3, 1 + i % 9 / 2.25))
    return {
        **{"source": f"do you like {topic} ?\ni do , {topic} are fine .\n\n", "system_id": f"system {i % 6}"},
        **{"system_output": said(GOOD, i).lower(), "context": f"{topic} : a fact .\n"},
        "scores": {axis: round(score, 10) for axis, score in scores},
    }


def said_of_a_place(i):
    """The source repeats, as several systems answered it; there is no context."""
    scores = {"informativeness": 1 + i % 11 / 2, "naturalness": 6 - i % 9 / 2, "overall": 1 + i % 6 * 1.0}
    source = f"confirm(area='{TOPICS[i // 2 % 12]}')"
    return {
        "doc_id": i,
        "source": source,
        "reference": "Is that so ?",
        "system_output": said(GOOD, i),
        "scores": scores,
    }


def judge_task(i):
    instruction = (
        "###Task Description:\nAn instruction, a response and a rubric are given.\n1. Write feedback.\n"
        '2. The format is: "Feedback: (feedback) [RESULT] (an integer number between 1 and 5)"\n\n'
        f"###The instruction to evaluate:\nExplain {TOPICS[i % 12]}.\nUser: and be kind\n\n"
        f"###Response to evaluate:\n{said(GOOD, i)}\n\n###Reference Answer (Score 5):\nAll of it.\n\nAt length.\n\n"
        "###Score Rubrics:\n[Is it kind?]\n" + "".join(f"Score {n}: {n} of five.\n" for n in range(1, 6))
    )
    scores = (1 + i % 5, 1 + i * 2 % 5, 5 if i % 4 else 1 + i % 5)
    feedback = [f"It is {'kind' if score > 3 else 'not kind'}.\n\nJudge {n}." for n, score in enumerate(scores)]
    if i % 4 == 0:  # the first and the last judge say the same
        feedback[2] = feedback[0]
    return {
        **{
            "idx": i,
            "response_source": "made_up",
            "category": "generic",
            "instruction": f"{instruction}\n###Feedback: ",
        },
        **{"gpt4_score": list(scores), "gpt4_feedback": feedback},
    }


def rated_text(i):
    topic, rated = TOPICS[i % 12], [4 - i % 5, i % 4 + 1, 4, i % 2, 2]
    return {
        "text": f"<extra_id_0>System\nA chat between a user and an assistant.\n<extra_id_1>User\nWhat are {topic}?\n"
        f"<extra_id_1>Assistant\n{said(GOOD, i)}\n<extra_id_2>",
        "label": [-100.0] * 4 + [float(x) for x in rated],
    }


def rows_of(make, count):
    return [make(i) for i in range(count)]


SETS = {
    "comparisons.json.gz": rows_of(compared_four, 24),
    "trees.jsonl": rows_of(tree, 10),
    "pairs.json": rows_of(pair_of_conversations, 36),
    "chinese_pairs.json": rows_of(chinese_pair, 24),
    "booleans.json": rows_of(messages_and_a_label, 24),
    "pairs_of_texts.jsonl": [plain_replies(chinese_pair(i)) for i in range(24)],
    "votes.json": rows_of(annotated_pair, 120),
    "talk_axes.json": rows_of(talked_about, 24),
    "axes.json": rows_of(said_of_a_place, 24),
    "judges.json.gz": rows_of(judge_task, 24),
    "attributes.jsonl": rows_of(rated_text, 8),
}
PUBLIC = {
    "comparisons.json.gz": "finegrained-rlhf/dev_feedback.json.gz",
    "trees.jsonl": "open-assistant/en_100_tree.jsonl",
    "pairs.json": "llama-factory/dpo_en_demo.json",
    "chinese_pairs.json": "llama-factory/dpo_zh_demo.json",
    "pairs_of_texts.jsonl": "medicalgpt/dpo_zh_500.jsonl",
    "booleans.json": "llama-factory/kto_en_demo.json",
    "votes.json": "pandalm/testset-v1.json",
    "talk_axes.json": "unieval/topical_chat.json",
    "axes.json": "unieval/sfres.json",
    "judges.json.gz": "prometheus/mt_bench_eval.json.gz",
    "attributes.jsonl": "nemo-aligner/test-rm.jsonl",
}
