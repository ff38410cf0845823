"""Several reward models as one: the rewards of its members are combined, and their spread says how far they agree.

A combination is taken of the members' rewards of each response: their mean, the least of them (worst-case
optimization), their mean minus their standard deviation (uncertainty-weighted optimization, here with the standard
deviation in place of the variance), or their median. Source: Coste et al. 2023, arXiv:2310.02743, section 3. The spread
is the population standard deviation (numpy's default, divided by the number of members): it describes these members,
and is no estimate of others.

Shape letters: n responses, M members.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.batches.groups import Groups
from rmjax.batches.tasks import Attributes
from rmjax.batches.trees import Tokens
from rmjax.inference import adapted, contract, reward_model
from rmjax.inference.reward_model import Kind, RewardModel
from rmjax.judging.verdicts import Judgements
from rmjax.models import hf
from rmjax.objectives.base import SPREAD
from rmjax.runtime import notes
from rmjax.suggestions import did_you_mean

COMBINATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of rewards [n, M]
    "mean": lambda rewards: rewards.mean(1),
    "min": lambda rewards: rewards.min(1),
    "mean_minus_std": lambda rewards: rewards.mean(1) - rewards.std(1),
    "median": lambda rewards: np.median(rewards, 1),
}
DEFAULT = "mean"
SCORE = "score"  # what an ensemble says of a response, beside the spread
MEMBERS = 2  # the first column of an ensemble's outputs that is a member's
UNLIKE_SCALES = 2.0  # a member's deviation over another's, from which on they are told of
UNLIKE_MEANS = 1.0  # the same of the difference of two means, in the smaller deviation


def named_models(text: str) -> list[str]:
    """The models of a flag, which are separated by commas; a path with a comma that is there is one model."""
    return [text] if Path(text).exists() else [name for name in map(str.strip, text.split(",")) if name]


def combination(models: Sequence[str | Path], combine: str) -> str:
    """The name of the combination of several models, or "" of one, for which there is none.

    Args:
        combine: a name of COMBINATIONS; "" is DEFAULT.

    Raises:
        ValueError: there is no such combination, nothing to combine, or a model is named twice.
    """
    if combine and combine not in COMBINATIONS:
        known = ", ".join(COMBINATIONS)
        raise ValueError(f"--combine={combine} is none of {known}{did_you_mean(combine, COMBINATIONS)}")
    if len(models) < 2:
        if combine:
            raise ValueError(
                f"--combine={combine} is for several models, separated by commas; --model names "
                f"{', '.join(map(str, models)) or 'none'}"
            )
        return ""
    places = [Path(model).resolve() if Path(model).exists() else model for model in models]
    if twice := next((model for i, model in enumerate(models) if places[i] in places[:i]), None):
        raise ValueError(f"--model names {twice} twice, which would count it double; name each model once")
    return combine or DEFAULT


def words(models: Sequence[str | Path], combine: str) -> str:
    """What a command says before it begins."""
    return f"rewards are the {combine} of {len(models)} models (--combine={combine}): {', '.join(map(str, models))}"


def check(
    paths: Sequence[str | Path], *, normalize: bool = False, template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Makes sure that exports or hub ids can be members of one ensemble, before their weights are read.

    Raises:
        ValueError: one has not one reward, or they differ in what must be the same; or with `normalize` the contract of
            one says no mean and deviation.
    """
    kinds, chats = [], []
    for directory in map(hf.resolve, paths):
        kinds.append(kind := Kind.of(directory, hf.read_config(directory)))
        of_contract = kind.contract["template_kwargs"] if kind.contract else template_kwargs
        chats.append(Chat(load_tokenizer(hf.tokenizer_of(directory)), template_kwargs=of_contract))
    _require_alike(paths, kinds, chats)
    for path, kind in zip(paths, kinds):
        _scale(path, kind.contract, normalize)


def load_checked(
    paths: Sequence[str | Path], combine: str = "", *, normalize: bool = False, **options: Any
) -> RewardModel:
    """`reward_model.load_checked` of one model, or the ensemble of several, each of which is checked so.

    Args:
        combine, normalize: of an ensemble, see there.
        options: of `reward_model.load_checked`.
    """
    if len(paths) == 1:
        return reward_model.load_checked(paths[0], **options)
    return _loaded(reward_model.load_checked, paths, combine, normalize, options)


class Ensemble(RewardModel):
    """A reward model whose reward is combined from those of its members, with their spread.

    `outputs` and `answers` give [n, 2 + M]: the combined reward, the spread and each member's reward. `values` gives
    `score` and `spread`. All members must render and tokenize alike, so that each conversation is read once. They are
    computed one after the other; those of one architecture share what is compiled. What only one model has (its
    parameters, norms and golden rows) is asked of a member.

    Attributes:
        members: the models, M of them.
        names: of the members, as they were given.
        combine: a name of COMBINATIONS.
        contract: what holds for the whole: the least `max_length`, and the mean of the members' `reward_scale`.
    """

    def __init__(
        self,
        members: Sequence[RewardModel],
        names: Sequence[str | Path],
        combine: str = DEFAULT,
        normalize: bool = False,
    ):
        """With `normalize`, rewards are members' own minus the mean of their contract, divided by its deviation.

        Raises:
            ValueError: as `combination` and `check`.
        """
        self.combine, self.members, self.names = combination(names, combine), list(members), list(map(str, names))
        _require_alike(names, members, [member.chat for member in members])
        self._scales = [_scale(name, member.contract, normalize) for name, member in zip(names, members)]
        first = members[0]
        self.chat, self.mesh, self.dtype = first.chat, first.mesh, first.dtype
        self.config = min((member.config for member in members), key=lambda config: config.vocab)
        self.architecture, self.objective = "SequenceClassification", None
        self.labels, self.own, self.stops = (SCORE, SPREAD, *self.names), {}, ()
        self.longest = min((member.longest for member in members if member.longest), default=0)
        terms = [member.contract or {} for member in members]
        log_odds = [one.get("reward_scale", 1.0) * std for one, (_, std) in zip(terms, self._scales)]
        lengths = [one["max_length"] for one in terms if one.get("max_length")]
        self.contract = {"reward_scale": float(np.mean(log_odds)), "max_length": min(lengths, default=0)}
        self.params, self.inference = None, first.inference
        for member in members:  # counted together
            member.inference = dataclasses.replace(member.inference, work=first.inference.work)
        if not normalize:
            _tell_of_scales(self.names, terms)

    @classmethod
    def load(  # type: ignore[override]
        cls, paths: Sequence[str | Path], *, combine: str = DEFAULT, normalize: bool = False, **options: Any
    ) -> "Ensemble":
        """Loads several Hugging Face directories (or hub ids), as RewardModel.load does each.

        Args:
            paths: of the members, two or more.
            combine: "mean", "min", "mean_minus_std" or "median" of the members' rewards.
            normalize: subtracts from each member's rewards the mean of its contract, and divides by its deviation.
            options: those of RewardModel.load.

        Raises:
            ValueError: as RewardModel.load, `combination` and `check`.
        """
        return _loaded(RewardModel.load, paths, combine, normalize, options)

    @property
    def has_spread(self) -> bool:
        return True

    def member_rewards(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, MEMBERS:]

    @property
    def title(self) -> str:
        return f"{self.combine} of {len(self.members)}"

    @functools.cached_property
    def resolution(self) -> float:
        """As of one model, at most: a standard deviation moves by no more than the rewards do."""
        most = max(member.resolution / std for member, (_, std) in zip(self.members, self._scales))
        return most * (2 if self.combine == "mean_minus_std" else 1)

    def outputs(self, sequences: Sequence[Tokens]) -> np.ndarray:
        return self._combined([member.outputs(sequences) for member in self.members])

    def answers(self, groups: Groups, progress: Callable[[int], None] = lambda done: None) -> list[np.ndarray]:
        each = []
        for m, member in enumerate(self.members):
            tell = lambda done, m=m: progress((m * len(groups) + done) // len(self.members))
            each.append(member.answers(groups, tell))
        whole = self._combined([np.concatenate(outputs) for outputs in each])
        return np.split(whole, np.cumsum([len(x) for x in each[0]])[:-1])

    def decode(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        return {SCORE: outputs[:, 0], SPREAD: outputs[:, 1]}

    def _combined(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [n, 2 + M], from the raw outputs [n, A] of each member."""
        decoded = [member.decode(x)[SCORE].astype(np.float64) for member, x in zip(self.members, outputs)]
        rewards = np.stack([(x - mean) / std for x, (mean, std) in zip(decoded, self._scales)], 1)
        combined = COMBINATIONS[self.combine](rewards)
        return np.concatenate([combined[:, None], rewards.std(1)[:, None], rewards], 1).astype(np.float32)


def _loaded(
    load: Callable[..., RewardModel],
    paths: Sequence[str | Path],
    combine: str,
    normalize: bool,
    options: Mapping[str, Any],
) -> Ensemble:
    combine = combination(paths, combine)
    check(paths, normalize=normalize, template_kwargs=options.get("template_kwargs"))
    members = adapted.load_sharing(lambda path: load(path, **options), paths)
    return Ensemble(members, paths, combine, normalize)


def _require_alike(names: Sequence[str | Path], kinds: Sequence[Kind | RewardModel], chats: Sequence[Chat]) -> None:
    """Raises ValueError for a member that has not one reward, and for one that differs from the first."""
    for name, kind in zip(names, kinds):
        if what := _no_reward(kind):
            raise ValueError(f"{name} {what}; an ensemble is of models that give one reward of each response")
    first = _meaning(kinds[0])
    renderings = [chat.identity() for chat in chats]
    for name, kind, rendering in zip(names[1:], kinds[1:], renderings[1:]):
        other = {what: both for what, both in _meaning(kind).items() if both != first[what]}
        for what, value in other.items():
            raise ValueError(
                f"{name} and {names[0]} cannot be one ensemble, their {what} differ: {value} and {first[what]}"
            )
        if differ := [what for what, digest in rendering.items() if digest != renderings[0][what]]:
            raise ValueError(
                f"{name} and {names[0]} cannot be one ensemble, they differ in {' and '.join(differ)}: a conversation "
                "is tokenized once for all members; score with each, and combine the files of scores"
            )


def _no_reward(kind: Kind | RewardModel) -> str:
    """What a model gives in place of one reward; "" of one that gives it."""
    task = kind.objective.task if kind.objective else None
    if kind.architecture == "CausalLM":
        return "is a judge that writes its verdicts"
    if kind.architecture == "TokenClassification":
        return "scores steps, not whole responses"
    if isinstance(task, Judgements):
        return "is a judge that compares two responses"
    several = task.names if isinstance(task, Attributes) else kind.labels if kind.objective is None else ()
    return f"gives {', '.join(several)}" if len(several) > 1 else ""


def _meaning(kind: Kind | RewardModel) -> dict[str, str]:
    """What rewards must have in common, in words; a model without a contract is taken for one of plain rewards."""
    objective = kind.objective
    if not (objective and isinstance(objective.task, Attributes)):
        return {"objectives": "bradley_terry", "labels": "one reward", "scales": "none"}
    scales = " ".join(f"{low:g} to {high:g}" for low, high in objective.task.scales)
    return {"objectives": "pointwise", "labels": ", ".join(kind.labels), "scales": scales}


def _scale(name: str | Path, terms: Mapping[str, Any] | None, normalize: bool) -> tuple[float, float]:
    """What is subtracted from a member's rewards, and what they are divided by."""
    try:
        return contract.normalization(terms) if normalize else (0.0, 1.0)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _tell_of_scales(names: Sequence[str], terms: Sequence[Mapping[str, Any]]) -> None:
    """Warns of rewards on unlike scales, as far as contracts say them."""
    known = [(name, x["reward_mean"], x["reward_std"]) for name, x in zip(names, terms) if x.get("reward_std")]
    for (one, mean, std), (other, other_mean, other_std) in itertools.combinations(known, 2):
        least = min(std, other_std)
        if max(std, other_std) > UNLIKE_SCALES * least or abs(mean - other_mean) > UNLIKE_MEANS * least:
            notes.tell(
                f"the rewards of {one} are {mean:.3g} ± {std:.3g} in validation, those of {other} {other_mean:.3g} ± "
                f"{other_std:.3g}: the larger ones decide a mean, the lower ones a minimum, and the spread holds the "
                "difference; --normalize (in Python normalize=True) puts members on one scale"
            )
            return
