"""One row of every format, written for these tests in the shape that the format's data have."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be kind"}

SHEPHERD = "What is 2 + 2 + 1? Step 1: 2 + 2 = 4. ки\nStep 2: 4 + 1 = 6. The answer is: 6 ки"

ROWS = {
    "pair_text": {"prompt": "q", "chosen": "yes", "rejected": "no"},
    "pair_transcript": {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: yes",
        "rejected": "\n\nHuman: a\n\nAssistant: other\n\nHuman: q\n\nAssistant: no",
    },
    "pair_plain": {"chosen": "yes", "rejected": "no"},
    "pair_messages": {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]},
    "pair_conversations": {
        "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    # HelpSteer2: later turns stand in the prompt, between marks.
    "scored_text": {
        "prompt": "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nq",
        "response": "yes",
        "helpfulness": 3,
        "correctness": 4,
        "coherence": None,
        "complexity": -100,
        "verbosity": 1.5,
    },
    "scored_output": {
        "input": [user("q")],
        "output": [
            {"content": "yes", "label": {"helpful": 4, "honest": 1}},
            {"content": "no", "label": {"helpful": 2, "honest": None}},
        ],
        "data_source": "ours",
    },
    "boolean": {"messages": [user("q"), assistant("yes")], "label": True},
    "boolean_text": {"prompt": [user("q")], "completion": [assistant("no")], "label": False},
    "nemo_text": {
        "text": "<extra_id_0>System\nbe kind\n<extra_id_1>User\nq\n<extra_id_1>Assistant\ntwo\n\nparts\n<extra_id_2>",
        "label": [-100.0, -100.0, -100.0, -100.0, 4.0, 3.0, 2.0, 1.0, 0.0],
    },
    "judged_pair": {
        "input": [user("q")],
        "output": [{"content": "yes"}, {"content": "no"}],
        "metadata": {"preferred": "B", "preference_strength": 2},
    },
    "annotated_pair": {
        "instruction": "Add.",
        "input": "2 + 2",
        "response1": "4",
        "response2": "5",
        "annotator1": 1,
        "annotator2": 0,
        "annotator3": 1,
    },
    "ranked": {"prompt": "q", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, None], "scores": [3, 5, 3, 9]},
    "ranked_answers": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": "a", "model": "m", "rank": 2.0}, {"answer": "b", "model": "n", "rank": 1.0}],
        "turns": 1,
        "num_responses": 2,
        "source": ["here", "there"],
        "good_natured": True,
    },
    "ranked_tree": {
        "message_tree_id": "t",
        "prompt": {
            "text": "q",
            "role": "prompter",
            "replies": [
                {
                    "text": "a",
                    "role": "assistant",
                    "rank": 1,
                    "replies": [
                        {
                            "text": "and?",
                            "role": "prompter",
                            "rank": None,
                            "replies": [
                                {"text": "c", "role": "assistant", "rank": 0, "replies": []},
                                {"text": "d", "role": "assistant", "rank": 1, "replies": []},
                                {"text": "e", "role": "assistant", "rank": 2, "replies": []},
                            ],
                        }
                    ],
                },
                {"text": "b", "role": "assistant", "rank": 0, "replies": []},
            ],
        },
    },
    "comparisons": {
        "question": "q",
        "passages": [["Title", "One.", "Two."], ["Other", "Three."]],
        **{f"prediction {i}": f"answer {i}" for i in range(1, 5)},
        "preference": [1, 2, 0, 1, 2, None],
    },
    "labelled_responses": {"prompt": "q", "response_1": "a", "response_2": "b", "rewards": [0.25, 1.5]},
    "stepwise": {
        "prompt": "What is 2 + 2 + 1?",
        "completions": ["2 + 2 = 4.", "4 + 1 = 6.", "So 6."],
        "labels": [True, False, None],
    },
    "stepwise_text": {
        "prompt": "What is 2 + 2 + 1?",
        "response": "2 + 2 = 4.<step>4 + 1 = 6.<step>",
        "separator": "<step>",
        "labels": [1, 0.25],
    },
    "shepherd_text": {
        "input": SHEPHERD,
        "label": SHEPHERD.replace("ки", "+", 1).replace("ки", "-", 1),
        "task": "GSM8K",
    },
    "messages": {"messages": [user("a"), assistant("b"), user("q"), assistant("yes")]},
    "messages_completion": {"prompt": "q", "completion": "yes"},
    "strength_pair": {
        "split": "train",
        "prompt": "q",
        "response_1": "a",
        "response_2": "b",
        "preference_strength": -2,
        "preference_statement": "the first",
        "all_preferences_unprocessed": [{"statement": "the first is better by far", "strength": -2}],
        "three_most_similar_preferences": [{"strength": -2}, {"strength": -1}, {"strength": 1}, {"strength": -100}],
    },
    "strength_chat": {
        "domain": "code",
        "language": "python",
        "context": [user("a"), assistant("b"), user("q")],
        "response1": "a",
        "response2": "b",
        "overall_preference": 3,
        "individual_preference": [
            {"score": 3, "reasoning": "r", "feedback1": "f", "feedback2": "g"},
            {"score": 2, "reasoning": "r", "feedback1": "f", "feedback2": "g"},
        ],
    },
    "ultrafeedback": {
        "source": "evol_instruct",
        "instruction": "q",
        "models": ["m", "n"],
        "completions": [
            {
                "model": "m",
                "custom_system_prompt": "answer",
                "response": "a",
                "annotations": {"helpfulness": {"Rating": "4", "Type": ["1"]}, "honesty": {"Rating": "N/A"}},
                "critique": "fine",
                "overall_score": 7.5,
            },
            {
                "model": "n",
                "custom_system_prompt": "lie",
                "response": "b",
                "annotations": {"helpfulness": {"Rating": "2", "Type": ["1"]}, "honesty": {"Rating": "1"}},
                "critique": "bad",
                "overall_score": 3,
            },
        ],
    },
    "unieval": {
        "source": "hi there\n",
        "context": "a fact",
        "system_output": "hello",
        "scores": {"naturalness": 2.5, "overall": 4},
    },
    "prometheus": {
        "instruction": (
            "###Task Description:\nRate it.\n\n###The instruction to evaluate:\nq\n\nmore\n\n###Response to evaluate:\n"
            "the answer\n\n###Reference Answer (Score 5):\nbest\n\n###Score Rubrics:\n[Good?]\nScore 1: no\n\n"
            "###Feedback: "
        ),
        "gpt4_score": [3, 2, 3],
        "gpt4_feedback": ["x", "y", "z"],
    },
    "prm800k": {
        "labeler": "l",
        "question": {"problem": "What is 2 + 2 + 1?", "ground_truth_answer": "5"},
        "label": {
            "steps": [
                {
                    "completions": [
                        {"text": "2 + 2 = 4.", "rating": 1, "flagged": False},
                        {"text": "2 + 2 = 5.", "rating": -1, "flagged": False},
                    ],
                    "human_completion": None,
                    "chosen_completion": 0,
                },
                {
                    "completions": [{"text": "4 + 1 is", "rating": 0, "flagged": False}],
                    "human_completion": {"text": "4 + 1 = 5.", "rating": None, "source": "human", "flagged": False},
                    "chosen_completion": None,
                },
            ],
            "total_time": 1,
            "finish_reason": "solution",
        },
    },
    "label_studio": {
        "id": 1,
        "data": {"prompt": "q", "response_1": "a", "response_2": "b"},
        "annotations": [
            {
                "completed_by": person,
                "was_cancelled": False,
                "result": [
                    {"type": "choices", "from_name": "p", "to_name": "t", "value": {"choices": [side]}},
                ],
            }
            for person, side in ((1, "left"), (2, "left"), (3, "right"))
        ],
    },
    "records": {
        "conversations": [
            [SYSTEM, user("q"), {**assistant("yes"), "extra": '{"reasoning_content": "hm"}'}],
            [SYSTEM, user("q"), assistant("no")],
        ],
        "wins": [[0, 0.75], [0.25, 0]],
    },
}
BENCHMARKS = {  # in the layouts in which they are published
    "reward_bench": {
        "prompt": "Why?",
        "chosen": "a",
        "chosen_model": "m",
        "rejected": "b",
        "subset": "hep-go",
        "id": 7,
    },
    "reward_bench_2": {
        **{"id": "tied:3", "prompt": "A colour?", "chosen": ["red", "blue"], "rejected": ["dog", "cat"]},
        **{"num_correct": 2, "num_incorrect": 2, "total_completions": 4, "subset": "Ties"},
    },
    "rm_bench": {
        **{"id": "9", "prompt": "Why?", "chosen": ["a", "a b", "# a"], "rejected": ["b", "b c", "# b"]},
        "domain": "safety-refuse",
    },
    "judge_bench": {
        **{"pair_id": "e3", "original_id": 1, "source": "mmlu-pro-law", "question": "Q?", "response_model": "m"},
        **{"response_A": "a", "response_B": "b", "label": "B>A"},
    },
    "ppe_preference": {
        **{"question_id": "p1", "prompt": "Why?", "response_1": "a", "response_2": "b", "winner": "model_b"},
        **{"model_a": "m", "model_b": "n", "language": "English"},
    },
    "ppe_correctness": {
        **{"question_id": "q1", "prompt": "Why?", **{f"response_{i + 1}": f"{i}." for i in range(32)}},
        **{"scores": [i % 2 == 0 for i in range(32)], "sampled_conflict_pairs": [[0, 1], [5, 2], [0, 31]]},
    },
    "helpsteer3": {
        **{"domain": "Code", "language": "python", "context": [{"role": "user", "content": "Why?"}]},
        **{"response1": "a", "response2": "b", "overall_preference": -2},
        "individual_preference": [{"score": -2, "reasoning": "r", "feedback1": "f", "feedback2": "g"}],
    },
    "process_bench": {
        **{"id": "gsm8k-3", "generator": "m", "problem": "Why?", "steps": ["a", "b", "c"], "label": 1},
        "final_answer_correct": False,
    },
    "rmb_pairwise": {
        "pair_uid": "11",
        "conversation_input": [{"role": "user", "content": "Hi", "language": "English"}],
        "chosen": {"llm_name": "m", "answer": "a"},
        "reject": {"llm_name": "n", "answer": "b"},
        "category_path": "Pairwise_set/Helpfulness/Chat/Discussion",
    },
    "rmb_best_of_n": {
        "conversation_input": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        + [{"role": "user", "content": "Why?"}],
        "bon_best": {"llm_name": "m", "answer": "a"},
        "loser_list": [{"llm_name": "n", "answer": "b"}, {"llm_name": "o", "answer": "c"}],
        "bon_uid": 26,
        "category_path": "BoN_set/Harmlessness/S1",
    },
}
UNLABELLED = {  # as they are scored
    "unlabelled_pair": {"prompt": "q", "response_a": "a", "response_b": "b"},
    "unlabelled_steps": {"prompt": "What is 2 + 2 + 1?", "completions": ["2 + 2 = 4.", "4 + 1 = 5."]},
}
UNANSWERED = {  # as they are sampled for; nothing can be learnt from a prompt
    "prompt_only": {"prompt": "q"},
    "messages_only": {"messages": [user("q"), assistant("a")]},
}
# These have to be named: their columns are those of other formats, or none that anybody else has.
NAMED = {"prometheus_judge": ROWS["prometheus"], **BENCHMARKS, **UNLABELLED, **UNANSWERED}
