"""Requests as trainers send them, reranking, one value of several, over-long rollouts, tools and the API key."""

import json
import logging

import numpy as np
import pytest
import small_tokenizers
import transformers
from test_serve import ask, conversation, known, measured, model, serve, stand_in  # noqa: F401

from rmjax import objectives
from rmjax.batches.chat import Chat
from rmjax.serve import app

QUESTION, ANSWER = "What is a tree?", "A plant."
TALK = conversation(QUESTION, ANSWER)


def rendered(tokenizer, talk, **options):
    return tokenizer.apply_chat_template(talk, tokenize=False, **options)


@pytest.fixture
def reward(stand_in):  # noqa: F811
    """The reward of a conversation, rendered and tokenized by transformers alone."""
    tokenizer = stand_in.chat.tokenizer

    def of(talk):
        return known(tokenizer(rendered(tokenizer, talk), add_special_tokens=False)["input_ids"])

    return of


@pytest.fixture
def begins_with_bos(stand_in):  # noqa: F811
    """The template begins with a BOS, as Llama's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(stand_in.chat.tokenizer.name_or_path)
    tokenizer.bos_token, tokenizer.chat_template = "<s>", "{{ bos_token }}" + tokenizer.chat_template
    stand_in.chat = Chat(tokenizer)
    return stand_in


def one(service, path, body):
    (answer,) = ask(service, (path, body))
    return answer


# Renderings that are not whole


def test_what_is_no_whole_rendering_is_refused_or_completed(serve, stand_in, reward):  # noqa: F811
    tokenizer = stand_in.chat.tokenizer
    text = rendered(tokenizer, TALK)
    for part, lacks in ((text[:-1], "'\\n'"), (text[: -len("<|im_end|>\n")], "'<|im_end|>\\n'")):
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        for path, body, value in (
            ("/classify", {"input": part}, lambda a: a["data"][0]["probs"]),
            ("/pooling", {"input": ids}, lambda a: a["data"][0]["data"]),
            ("/classify", {"text": part}, lambda a: a["embedding"]),
            ("/classify", {"input_ids": ids}, lambda a: a["embedding"]),
        ):
            refused = one(serve(), path, body)
            message = refused.json()["error"]["message"]
            assert refused.status_code == 400 and f"lacks {lacks}" in message and "`complete` adds it" in message
            service = serve()
            asked = one(service, path, {**body, "complete": True})
            assert value(asked.json()) == pytest.approx([reward(TALK)])
            told = one(serve(complete=True), path, body)
            assert value(told.json()) == pytest.approx([reward(TALK)])
            assert sum(v for (name, *_), v in measured(service).items() if name == "rmjax_completed_total") == 1
            assert one(serve(complete=True), path, {**body, "complete": False}).status_code == 400
    assert one(serve(complete=True), "/classify", {"input": QUESTION}).status_code == 400  # no rendering at all


# Trainers


def test_openrlhf(serve, stand_in, reward):  # noqa: F811
    """openrlhf/utils/agent.py: the query is decoded with its special tokens, and ends where the sampling did."""
    tokenizer, talk = stand_in.chat.tokenizer, [*TALK, {"role": "user", "content": "And\nwhy?"}]
    prompt = rendered(tokenizer, talk, add_generation_prompt=True)
    queries = [prompt + "It grows.<|im_end|>", prompt + "It gr", prompt[25:] + "It grows.<|endoftext|><|endoftext|>"]
    body = {"query": queries, "prompts": [prompt] * 3, "labels": [None, "x", ""]}
    answer = one(serve(), "/get_reward", body).json()
    texts = ("It grows.", "It gr", "It grows.")
    wanted = [reward([*talk, {"role": "assistant", "content": text}]) for text in texts]
    assert answer["rewards"] == answer["scores"] == pytest.approx(wanted) and answer["extra_logs"] == {}
    alone = one(serve(), "/get_reward", {"query": queries[:2]}).json()  # of earlier versions
    assert alone["rewards"] == pytest.approx(wanted[:2])
    plain = one(serve(), "/get_reward", {"query": [QUESTION + ANSWER], "prompts": [QUESTION]}).json()
    assert plain["rewards"] == pytest.approx([reward(TALK)])
    lost = one(serve(), "/get_reward", {"query": ["something else"], "prompts": [prompt]})
    assert lost.status_code == 400 and "query 0 does not begin with its prompt" in lost.text


def test_a_bos_of_the_query_alone_is_none_of_the_response(serve, begins_with_bos):  # noqa: F811
    tokenizer = begins_with_bos.chat.tokenizer
    prompt = rendered(tokenizer, TALK[:1], add_generation_prompt=True)
    wanted = known(tokenizer(rendered(tokenizer, TALK), add_special_tokens=False)["input_ids"])
    for asked in (QUESTION, prompt, prompt.removeprefix("<s>")):
        for query in (asked, "<s>" + asked):
            body = {"query": [f"{query}{ANSWER}<|im_end|>"], "prompts": [asked]}
            assert one(serve(begins_with_bos), "/get_reward", body).json()["rewards"] == pytest.approx([wanted])


def test_openrlhf_with_a_policy_of_another_template(serve, reward, tmp_path):  # noqa: F811
    template = "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    policy = transformers.AutoTokenizer.from_pretrained(str(small_tokenizers.save(tmp_path, template)))
    policy.bos_token = "<s>"
    system = {"role": "system", "content": "Be brief."}
    prompt = rendered(policy, [system, TALK[0]], add_generation_prompt=True)
    body = {"query": [prompt + ANSWER + policy.eos_token], "prompts": [prompt]}
    answer = one(serve(policy=Chat(policy)), "/get_reward", body).json()
    assert answer["rewards"] == pytest.approx([reward([system, *TALK])])
    untold = one(serve(), "/get_reward", body)
    assert untold.status_code == 400 and "--policy_tokenizer" in untold.text


@pytest.mark.parametrize("as_messages", [False, True])
def test_slime(as_messages, serve, stand_in, reward):  # noqa: F811
    """slime/rollout/rm_hub: the answer itself is the reward; the response keeps its end of turn."""
    prompt = TALK[:1] if as_messages else rendered(stand_in.chat.tokenizer, TALK[:1], add_generation_prompt=True)
    answer = one(serve(), "/", {"prompt": prompt, "response": ANSWER + "<|im_end|>", "label": None})
    assert answer.json() == pytest.approx(reward(TALK))
    empty = one(serve(), "/", {"prompt": prompt, "response": "<|im_end|>", "label": None})
    assert empty.json() == pytest.approx(reward(conversation(QUESTION, "")))  # the policy said nothing


@pytest.mark.parametrize("name", ["activation", "use_activation"])
def test_verl(serve, begins_with_bos, reward, name):  # noqa: F811
    """verl/experimental/reward_loop: the reward model's rendering without its BOS; the last number is the reward."""
    tokenizer = begins_with_bos.chat.tokenizer
    text = rendered(tokenizer, TALK).removeprefix("<s>")
    vllm = one(serve(begins_with_bos), "/classify", {"model": "tiny", "input": text, name: False}).json()
    sglang = one(serve(begins_with_bos), "/v1/embeddings", {"model": "tiny", "input": text}).json()
    wanted = known(tokenizer("<s>" + text, add_special_tokens=False)["input_ids"])
    assert vllm["data"][-1]["probs"][-1] == pytest.approx(wanted)
    assert sglang["data"][-1]["embedding"][-1] == pytest.approx(wanted)
    assert sglang["object"] == "list" and sglang["data"][0]["object"] == "embedding"
    padded = text.removesuffix("<|im_end|>\n") + "<|endoftext|>"
    padded = one(serve(begins_with_bos), "/v1/embeddings", {"model": "tiny", "input": padded}).json()
    assert padded["data"][0]["embedding"] == pytest.approx([wanted])
    refused = one(serve(begins_with_bos), "/classify", {"input": text})
    assert refused.status_code == 400 and "lacks the BOS '<s>'" in refused.text


# One value of several


def judge_of(stand_in, raw):  # noqa: F811
    judge = objectives.make({"name": "pairwise"})
    stand_in.labels, stand_in.objective = judge.labels, judge
    stand_in.outputs = lambda sequences: np.array([raw[: len(judge.labels)]] * len(sequences), np.float32)
    stand_in.decode = lambda outputs: judge.decode(outputs, {})
    return judge


def test_one_value_of_a_judge(serve, stand_in):  # noqa: F811
    raw = [2.0, -1.0, 0.5]
    judge = judge_of(stand_in, raw)
    logits = np.array(raw[: len(judge.labels)])
    first = np.exp(logits[0]) / np.exp(logits).sum()
    text = rendered(stand_in.chat.tokenizer, TALK)
    service = serve(reward="A")
    classified, scored, embedded, ranked, rollout = ask(
        service,
        ("/classify", {"input": text, "activation": False}),
        ("/score", {"text_1": QUESTION, "text_2": ANSWER}),
        ("/v1/embeddings", {"input": text}),
        ("/rerank", {"query": QUESTION, "documents": [ANSWER]}),
        ("/", {"prompt": QUESTION, "response": ANSWER}),
    )
    assert classified.json()["data"][0]["probs"] == pytest.approx([first])
    assert classified.json()["data"][0]["label"] == "A" and classified.json()["data"][0]["num_classes"] == 1
    assert scored.json()["data"][0]["score"] == embedded.json()["data"][0]["embedding"][0] == pytest.approx(first)
    assert ranked.json()["results"][0]["relevance_score"] == rollout.json() == pytest.approx(first)
    refused = one(serve(), "/classify", {"input": text, "activation": False})
    assert refused.status_code == 400 and "--reward=NAME" in refused.text
    assert "--reward=NAME" in one(serve(), "/v1/embeddings", {"input": text}).text
    with pytest.raises(ValueError, match="--reward=score is none of what this model gives: A, B"):
        serve(reward="score")
    with pytest.raises(ValueError, match="choose one by --reward"):
        serve(over_long=-1.0)


@pytest.mark.parametrize("name", ["activation", "use_activation", "softmax"])
def test_activation_means_what_it_says(name, serve, stand_in):  # noqa: F811
    text = rendered(stand_in.chat.tokenizer, TALK)
    for path in ("/classify", "/pooling", "/v1/embeddings"):
        refused = one(serve(), path, {"input": text, name: True})
        assert refused.status_code == 400 and f"`{name}` is true" in refused.text
    assert one(serve(), "/classify", {"input": text, name: False}).status_code == 200
    both = {"activation": False, "use_activation": True}
    raw = [2.0, -1.0, 0.5]
    judge = judge_of(stand_in, raw)
    logits = np.array(raw[: len(judge.labels)])
    answer = one(serve(), "/classify", {"input": text, name: True}).json()
    assert answer["data"][0]["probs"] == pytest.approx((np.exp(logits) / np.exp(logits).sum()).tolist())
    assert "contradict" in one(serve(), "/classify", {"input": text, **both}).text


def test_rerank(serve, reward):  # noqa: F811
    answers = ["A plant.", "0 1 2", "A graph without cycles.", "3"]
    rewards = [reward(conversation(QUESTION, answer)) for answer in answers]
    order = sorted(range(4), key=lambda i: -rewards[i])
    objects = [{"text": answer} for answer in answers]
    for path, documents in (("/rerank", answers), ("/v1/rerank", answers), ("/v2/rerank", objects)):
        answer = one(serve(), path, {"query": QUESTION, "documents": documents, "top_n": 3}).json()
        assert [x["index"] for x in answer["results"]] == order[:3]
        assert [x["relevance_score"] for x in answer["results"]] == pytest.approx([rewards[i] for i in order[:3]])
        assert [x["document"]["text"] for x in answer["results"]] == [answers[i] for i in order[:3]]
    assert "`documents` is missing" in one(serve(), "/rerank", {"query": QUESTION}).text
    assert "`top_n`" in one(serve(), "/rerank", {"query": QUESTION, "documents": answers, "top_n": -1}).text


# What is too long


def test_over_long_rollouts_by_a_policy(serve, stand_in, reward):  # noqa: F811
    old, long = conversation("first question " * 20, "first answer"), [*conversation("0 1 " * 80, ANSWER)]
    cases = {"old": [*old, *TALK], "long": long, "far": conversation("x" * 100_000, ANSWER)}
    bodies = lambda talk: [
        ("/classify", {"messages": talk}),
        ("/classify", {"input": rendered(stand_in.chat.tokenizer, talk)}),
        ("/score", {"text_1": talk[-2]["content"], "text_2": ANSWER}),
    ]
    tokenizer = stand_in.chat.tokenizer
    value = lambda answer: answer.json()["data"][0].get("score", answer.json()["data"][0].get("probs"))
    for name, talk in cases.items():
        refuse, fixed, truncate = (serve(max_length=60, over_long=how) for how in ("refuse", -3.5, "truncate_prompt"))
        sent = bodies(talk)[: 2 if name == "old" else 3]
        assert {a.status_code for a in ask(refuse, *sent)} == {400}
        assert measured(refuse)["rmjax_over_long_total", "refused"] == len(sent)
        assert [np.ravel(value(a)).tolist() for a in ask(fixed, *sent)] == [[-3.5]] * len(sent)
        assert measured(fixed)["rmjax_over_long_total", "fixed"] == len(sent)
        answers = ask(truncate, *sent)
        if name == "old":
            assert [value(a)[0] for a in answers] == pytest.approx([reward(TALK)] * 2)
        else:  # the longest end of the question with which it fits
            question = talk[0]["content"]
            length = lambda text: len(tokenizer(rendered(tokenizer, conversation(text, ANSWER)))["input_ids"])
            assert {a.json()["usage"]["prompt_tokens"] for a in answers} <= {59, 60}
            fits = [question[start:] for start in range(max(0, len(question) - 200), len(question))]
            close = [reward(conversation(text, ANSWER)) for text in fits if length(text) in (59, 60)]
            assert all(any(np.isclose(np.ravel(value(a))[0], x) for x in close) for a in answers)
        assert measured(truncate)["rmjax_over_long_total", "truncated"] == len(sent)
    long = {"messages": conversation("x", "0 1 " * 60)}
    response = one(serve(max_length=30, over_long="truncate_prompt"), "/classify", long)
    assert response.status_code == 400 and "even without its prompt" in response.text


def test_one_that_is_too_long_leaves_the_others(serve, reward):  # noqa: F811
    service = serve(max_length=60, over_long=-3.5)
    answer = one(service, "/score", {"text_1": QUESTION, "text_2": [ANSWER, "0 1 " * 80, "0 1"]}).json()
    wanted = [reward(TALK), -3.5, reward(conversation(QUESTION, "0 1"))]
    assert [x["score"] for x in answer["data"]] == pytest.approx(wanted)


# Tools, fields and the key

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def test_tools_are_rendered_or_refused(serve, stand_in):  # noqa: F811
    body = {"messages": TALK, "tools": [TOOL]}
    refused = one(serve(), "/classify", body)
    assert refused.status_code == 400 and "does not show `tools`" in refused.text
    whole = one(serve(), "/classify", {"input": rendered(stand_in.chat.tokenizer, TALK), "tools": [TOOL]})
    assert whole.status_code == 400 and "`tools`" in whole.text
    assert "expected a list, or JSON of one" in one(serve(), "/classify", {**body, "tools": {"a": 1}}).text
    assert one(serve(), "/classify", {**body, "tools": []}).status_code == 200
    tokenizer = transformers.AutoTokenizer.from_pretrained(stand_in.chat.tokenizer.name_or_path)
    shown = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    tokenizer.chat_template = shown + tokenizer.chat_template
    stand_in.chat = Chat(tokenizer)
    wanted = known(tokenizer(rendered(tokenizer, TALK, tools=[TOOL]), add_special_tokens=False)["input_ids"])
    assert one(serve(stand_in), "/classify", body).json()["data"][0]["probs"] == pytest.approx([wanted])
    pair = {"text_1": QUESTION, "text_2": ANSWER, "tools": [TOOL]}
    assert one(serve(stand_in), "/score", pair).json()["data"][0]["score"] == pytest.approx(wanted)


def test_a_field_that_is_not_read_is_told_once(serve, caplog):  # noqa: F811
    service = serve()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert one(service, "/classify", {"messages": TALK, "wieght": 2, "user": "x"}).status_code == 200
    assert [record.getMessage() for record in caplog.records].count(
        "requests have a field that is not read: str 'wieght'"
    ) == 1


def test_a_key_is_asked_for(serve):  # noqa: F811
    import asyncio

    import httpx

    async def codes(headers):
        transport = httpx.ASGITransport(app.build(serve(), key="s3cret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            asked = [client.post("/classify", content=json.dumps({"messages": TALK}))]
            asked += [client.get(path) for path in ("/metrics", "/v1/models", "/health")]
            return [(await one).status_code for one in asked]

    assert asyncio.run(codes({})) == [401, 401, 401, 200]
    assert asyncio.run(codes({"Authorization": "Bearer wrong"})) == [401, 401, 401, 200]
    assert asyncio.run(codes({"Authorization": "Bearer s3cret"})) == [200] * 4
