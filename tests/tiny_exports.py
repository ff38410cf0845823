"""Exports of tiny random models, with their contracts."""

import jax
import numpy as np
import tiny_models

from rmjax import objectives, sharding
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.config import defaults, filled
from rmjax.export import write as export
from rmjax.inference import parameters
from rmjax.models import config as model_config
from rmjax.models import heads, hf

TALK = [{"role": "user", "content": "Tell me of trees."}, {"role": "assistant", "content": "They grow."}]


def write(
    directory, tokenizer, seed, *, kind="bradley_terry", template="", unit_std=False, objective=(), scale=(1.0, 2.0),
    **sizes,
):  # fmt: skip
    """Exports a random model of one layer; returns its directory.

    Args:
        kind, objective: the name of its objective, and keys of it.
        template: is added to the chat template.
        scale: mean and deviation of its rewards, by its contract.
        sizes: values of config.json.
    """
    chat, config = Chat(load_tokenizer(tokenizer)), defaults(kind)
    chat.tokenizer.chat_template += template
    values = {**tiny_models.SIZES, "model_type": "qwen2", "num_hidden_layers": 1, **sizes}
    values["vocab_size"] = len(chat.tokenizer)
    config.objective.update(dict(objective))
    made, model = objectives.make(config.objective), model_config.from_hf(values)
    _, shapes = heads.abstract(model, len(made.labels), "float32", "float32", architecture=made.architecture)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    ids = chat.encode([chat.render(TALK)])[0]
    export.write_export(
        directory,
        {**params, "objective": {name: np.float32(seed) for name in made.params()}},
        objective=made,
        config=config,
        values=values,
        model=model,
        chat=chat,
        metrics={"validation/reward_mean": scale[0], "validation/reward_std": scale[1]},
        data=f"of {seed}",
        golden=[(ids, [len(ids) - 1])],
        unit_std=unit_std,
    )
    return directory


def adapt(directory, base, seed, *, kind="bradley_terry", merged=False):
    """Exports a random adapter of an export, as a PEFT directory or merged into it; returns its directory."""
    chat, config = Chat(load_tokenizer(base)), defaults(kind)
    config.model.init_from, config.lora.rank, config.export.adapter = str(base), 4, not merged
    config, made = filled(config), objectives.make(config.objective)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model = parameters.abstract_model(config, made, mesh, hf.read_config(base))
    params, _ = parameters.init_params(config, model)
    rng = np.random.default_rng(seed)

    def drawn(path, x):
        name = sharding.path_name(path)
        if name.endswith("/lora_b") or name.startswith("score/"):  # the head is not the base's
            return (0.2 * rng.standard_normal(x.shape)).astype(np.float32)
        return x

    params = jax.tree_util.tree_map_with_path(drawn, params)
    model, params = (model.plain, model.merged(params, "float32")) if merged else (model, params)
    ids = chat.encode([chat.render(TALK)])[0]
    export.write_export(
        directory,
        params,
        objective=made,
        config=config,
        values=model.values,
        model=model.config,
        chat=chat,
        metrics={"validation/reward_mean": 1.0, "validation/reward_std": 2.0},
        data=f"of {seed}",
        golden=[(ids, [len(ids) - 1])],
        adapters=model.adapters,
    )
    return directory
