"""A reward model as a grader of OpenJudge (the package py-openjudge), for its runners and for itself.

    from rmjax import RewardModel
    from rmjax.inference.openjudge import RewardGrader

    grader = RewardGrader(RewardModel.load("runs/tiny/export"))
    (await grader.aevaluate(query="Tell me about the river.", response="It is deep.")).score
    await GradingRunner({"reward": grader}).arun([{"query": ..., "response": ...}, ...])

Calls that wait at the same time are computed together. `RewardGrader("http://localhost:8000")` asks a server of
`rmjax.serve` instead. Written for py-openjudge 0.2 (openjudge/graders/base_grader.py).
"""

import asyncio
import json
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from openjudge.graders.base_grader import BaseGrader
from openjudge.graders.schema import GraderError, GraderMode, GraderRank, GraderScore

from rmjax.inference.reward_model import RewardModel

Turns = list[dict[str, Any]]
TIMEOUT = 600.0  # seconds that a server may take to answer
ONE_VALUE = "the reward of the response"


class RewardGrader(BaseGrader):
    """Rewards of responses (`mode="pointwise"`), or the order of several (`mode="listwise"`, the best has rank 1)."""

    def __init__(
        self,
        model: RewardModel | str,
        name: str = "reward",
        mode: GraderMode | str = GraderMode.POINTWISE,
        description: str = ONE_VALUE,
        **kwargs: Any,
    ):
        """`model` is a loaded model, or the URL of a server."""
        super().__init__(name=name, mode=GraderMode(mode), description=description, **kwargs)
        rewards = _asking(model) if isinstance(model, str) else lambda talks: list(map(float, model.score(talks)))
        self._together = _Together(rewards)

    async def _aevaluate(
        self, query: str | Turns = "", response: str | Sequence[str] = "", **_: Any
    ) -> GraderScore | GraderRank | GraderError:
        """Grades a response to a query, which is text or messages; listwise, a list of responses."""
        several = self.mode == GraderMode.LISTWISE
        responses = list(response) if several and not isinstance(response, str) else [response]
        prompt = query if isinstance(query, list) else [{"role": "user", "content": query}]
        talks: list[Turns] = [[*prompt, {"role": "assistant", "content": text}] for text in responses]
        try:
            rewards = await self._together.ask(talks)
        except Exception as error:
            return GraderError(name=self.name, error=f"{type(error).__name__}: {error}", reason="it cannot be scored")
        shown = ", ".join(f"{reward:.4g}" for reward in rewards)
        if not several:
            return GraderScore(name=self.name, score=rewards[0], reason=f"reward {shown}")
        ranks = np.argsort(np.argsort(-np.array(rewards), kind="stable")) + 1
        return GraderRank(name=self.name, rank=ranks.tolist(), reason=f"rewards {shown}", metadata={"scores": rewards})

    @staticmethod
    def get_metadata() -> dict[str, Any]:
        return {"mechanism": "a reward model reads the conversation", "score": f"{ONE_VALUE}, a log-odds of any size"}


class _Together:
    """Computes in one call what several coroutines ask for at the same time; a copy is itself, as OpenJudge copies
    graders."""

    def __init__(self, rewards: Callable[[Sequence[Turns]], list[float]]):
        self._rewards = rewards
        self._waiting: list[tuple[list[Turns], asyncio.Future]] = []
        self._lock: asyncio.Lock | None = None

    def __deepcopy__(self, memo: Any) -> "_Together":
        return self

    async def ask(self, talks: list[Turns]) -> list[float]:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((talks, answer))
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:  # whoever comes first computes for all who wait by then
            if not answer.done():
                await asyncio.sleep(0)  # so that those who are about to ask do
                asked, self._waiting = self._waiting, []
                try:
                    await self._answer(asked)
                finally:  # where this call is cancelled, the next one answers the others
                    self._waiting = [one for one in asked if not one[1].done()] + self._waiting
        return answer.result()

    async def _answer(self, asked: list[tuple[list[Turns], asyncio.Future]]) -> None:
        """Answers all; where that fails, each by itself, so that one bad conversation spoils no other."""
        try:
            rewards = await asyncio.to_thread(self._rewards, [talk for talks, _ in asked for talk in talks])
        except Exception as error:
            if len(asked) == 1:
                asked[0][1].set_exception(error)
                return
            for one in asked:
                await self._answer([one])
            return
        for talks, answer in asked:
            answer.set_result(rewards[: len(talks)])
            rewards = rewards[len(talks) :]


def _asking(url: str) -> Callable[[Sequence[Turns]], list[float]]:
    def rewards(talks: Sequence[Turns]) -> list[float]:
        body = {"text_1": [talk[:-1] for talk in talks], "text_2": [talk[-1]["content"] for talk in talks]}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url.rstrip('/')}/score", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return [entry["score"] for entry in json.load(answer)["data"]]

    return rewards
