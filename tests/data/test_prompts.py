"""What records are of one prompt: system messages, case and spacing, several histories, chains of them."""

import numpy as np
from format_rows import assistant, user

from rmjax.data import prompts
from rmjax.data.records import group


def record(*histories):
    return group([[*history, assistant(f"answer {i}")] for i, history in enumerate(histories)])


def asked(words, system=""):
    return [*[{"role": "system", "content": system}] * bool(system), user(words)]


def partition(*records):
    """Which records are of one prompt, as numbers in the order in which they appear."""
    found = prompts.ids(*prompts.flat(map(prompts.histories, records)))
    assert found.dtype == np.uint64
    return [list(dict.fromkeys(found.tolist())).index(x) for x in found.tolist()]


def test_case_spacing_and_usual_system_messages_make_no_other_prompt():
    usual = [
        record(asked(q, s)) for q in ("What\n IS it? ", "Why?", "How?", "Who?") for s in ("Be kind.", "Be short.", "")
    ]
    assert partition(*usual, record(asked("what is it?"))) == [*np.repeat(range(4), 3), 0]
    assert partition(*usual, record(asked("Why?", "You are a pirate.")))[-1] == 1


def test_tasks_in_system_messages_are_prompts_of_their_own():
    tasks = [record(asked("Go on.", f"Task {i % 5}")) for i in range(10)]
    assert partition(*tasks) == [*range(5)] * 2
    both = [record(asked(words, f"Task {i}")) for words in ("Go on.", "Begin.") for i in range(5)]
    assert partition(*both) == [*range(5)] * 2
    alone = [record([{"role": "system", "content": f"Task {i % 5}"}]) for i in range(10)]
    assert partition(*alone) == [*range(5)] * 2


def test_records_with_a_history_in_common_are_one_prompt_also_through_others():
    one, two, three = (asked(f"question {i}") for i in range(3))
    assert partition(record(one, two), record(two, one), record(three)) == [0, 0, 1]
    chain = [record(one), record(three), record(two, three), record(two, one), record(asked("x"))]
    assert partition(*chain) == [0, 0, 0, 0, 1]
    assert partition(record(one, []), record([], one)) == [0, 0]


def test_conversations_without_a_prompt_stand_for_themselves():
    same = record([])
    assert partition(same, same, group([[assistant("other")]])) == [0, 0, 1]


def test_two_sets_are_compared_by_the_histories_of_both():
    first = [record(asked(q, "Be kind.")) for q in ("a", "b")]
    second = [record(asked("b")), record(asked("c")), record(asked("c"), asked("A"))]
    some, others = prompts.ids_of_both(*(prompts.flat(map(prompts.histories, x)) for x in (first, second)))
    assert len(set(some)) == 2 and others[0] == some[1] and others[1] == others[2] == some[0]


def test_many_records_take_little_time():
    rng = np.random.default_rng(0)
    found = rng.integers(1, 2**60, (300_000, 2)).astype(np.uint64)
    assert len(np.unique(prompts.ids(found, np.arange(0, 300_001, 2)))) == 150_000
