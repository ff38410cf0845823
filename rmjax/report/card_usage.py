"""How to load an export and score with it, for its model card."""

import json
from collections.abc import Mapping, Sequence

from rmjax.report.section import Code, Markdown, Part

TEXTS = """texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)"""
CONVERSATIONS = """question = {"role": "user", "content": "Why is the sky blue?"}
conversations = [
    [question, {"role": "assistant", "content": "Air scatters blue light more than red."}],
    [question, {"role": "assistant", "content": "Because of the sea."}],
]"""
RMJAX = {  # what follows `model = rmjax.RewardModel.load(NAME)`
    "bradley_terry": f"{CONVERSATIONS}\nmodel.score(conversations)  # a reward each; higher is better",
    "pointwise": f"{CONVERSATIONS}\nmodel.values(conversations)  # the reward, as `score`, and each attribute",
    "pairwise": f"{CONVERSATIONS}\nmodel.judge(conversations[:1], conversations[1:])  # probabilities, of both orders",
    "prm": (
        'prompt = [{"role": "user", "content": "What is 2 + 3 * 4?"}]\n'
        'model.steps([prompt], [["3 * 4 is 12.", "2 + 12 is 14."]])  # a score for each step'
    ),
}


def parts(
    objective: str,
    name: str,
    base: str = "",
    labels: int = 1,
    rank: int = 0,
    overrides: Mapping[str, Sequence[str]] | None = None,
) -> list[Part]:
    """Code for rmjax, transformers and, where it pools the scored token, vLLM, with what that must be told of it.

    Of an adapter of this `rank` of a `base` it is for PEFT.
    """
    if objective == "sft":
        adapter = f"--enable-lora --max-lora-rank {rank} --lora-modules judge={name}"
        served = f"vllm serve {base} {adapter}" if base else f"vllm serve {name}"
        return [_transformers("AutoModelForCausalLM", name, GENERATE, base), VERDICT, Code("bash", served)]
    ours: Part = Code("python", f'import rmjax\n\nmodel = rmjax.RewardModel.load("{name}")\n{RMJAX[objective]}')
    if objective == "prm":
        return [ours, STEP_OUTPUTS, _transformers("AutoModelForTokenClassification", name, STEPS, base, labels)]
    if objective == "pairwise":
        return [ours, JUDGE]
    found: list[Part] = [
        ours,
        "With transformers and PEFT:" if base else "With transformers:",
        _transformers("AutoModelForSequenceClassification", name, f"{CONVERSATIONS}\n{SCORES}", base, labels),
    ]
    if base:
        return found
    several = objective == "bradley_terry" and labels > 1
    raw = "The outputs are the heads', whose mean is the reward" if several else RAW[objective]
    return [
        *found,
        f"With vLLM, from whole renderings of the chat template, without adding special tokens. {raw}: no "
        "sigmoid, no softmax.",
        Code("bash", VLLM.format(name=name, more=f" \\\n  --hf-overrides '{json.dumps(overrides)}'" * bool(overrides))),
    ]


STEP_OUTPUTS = (
    "With transformers, the outputs at the last token of each step are logits; a sigmoid makes them probabilities:"
)
RAW = {
    "bradley_terry": "The outputs are raw rewards",
    "pointwise": "The outputs are the head's, which are decoded as said under Architecture",
}
SCORES = f"{TEXTS}\nwith torch.no_grad():\n    outputs = model(**batch).logits  # [conversations, labels]"
STEPS = """text = tokenizer.apply_chat_template(conversation, tokenize=False)
batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    logits = model(**batch).logits[0, :, 0]  # read it at the token with the last character of each step"""
GENERATE = """text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
answer = tokenizer.decode(model.generate(**batch, max_new_tokens=512)[0, batch["input_ids"].shape[1] :])"""
VERDICT = Markdown("`rmjax.judging.verdicts.parse_verdict` reads the verdict from the answer.")
JUDGE = Markdown(
    "The judging question is rendered by the template that `reward_contract.json` holds under `objective`; rmjax asks "
    "it in both orders."
)
VLLM = """vllm serve {name} --runner pooling --pooler-config '{{"pooling_type": "LAST", "use_activation": false}}'{more}
curl localhost:8000/classify -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "input": "TEXT OF THE RENDERING", "add_special_tokens": false}}'"""


def _transformers(auto: str, name: str, code: str, base: str = "", labels: int = 0) -> Code:
    peft, model = "", f'model = {auto}.from_pretrained("{name}")'
    if base:
        head = f", num_labels={labels}" * bool(labels)
        peft = "from peft import PeftModel\n"
        model = f'base = {auto}.from_pretrained("{base}"{head})\nmodel = PeftModel.from_pretrained(base, "{name}")'
        model += "\nmodel.config.pad_token_id = tokenizer.pad_token_id"
    return Code(
        "python",
        f"import torch\n{peft}from transformers import {auto}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n{model}\n{code}',
    )
