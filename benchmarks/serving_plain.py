"""The server that people write by hand: transformers behind FastAPI, with batches of what waits (serving_peers.py).

    python serving_plain.py MODEL PORT

POST /classify {"input": TEXT} answers as vLLM does. Requests that have come by the time the model is free are one
padded batch, of at most 32, in a thread of its own.
"""

import asyncio
import contextlib
import sys
from typing import Any

import fastapi
import torch
import transformers
import uvicorn

MOST = 32


def build(directory: str) -> fastapi.FastAPI:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    model.config.pad_token_id = tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    waiting: asyncio.Queue = asyncio.Queue()

    @torch.inference_mode()
    def rewards(texts: list[str]) -> list[float]:
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        return model(**batch).logits[:, 0].tolist()

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            while not waiting.empty() and len(batch) < MOST:
                batch.append(waiting.get_nowait())
            found = await asyncio.to_thread(rewards, [text for text, _ in batch])
            for (_, answer), reward in zip(batch, found):
                answer.set_result(reward)

    @contextlib.asynccontextmanager
    async def life(_: Any) -> Any:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    app = fastapi.FastAPI(lifespan=life)

    @app.post("/classify")
    async def classify(body: dict[str, Any]) -> dict[str, Any]:
        answer = asyncio.get_running_loop().create_future()
        await waiting.put((body["input"], answer))
        return {"data": [{"index": 0, "probs": [await answer]}]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {}

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
