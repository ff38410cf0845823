"""Serves a reward model over HTTP, in the shapes of vLLM's pooling servers: raw rewards, no sigmoid.

    python -m rmjax.serve --model=runs/tiny/export --port=8000
    curl localhost:8000/score -d '{"text_1": "Tell me about the river.", "text_2": ["A river is deep.", "A garden."]}'
    curl localhost:8000/classify -d '{"input": "<|im_start|>user..."}'

Needs `pip install 'rmjax[serve]'`. The golden rows of the score contract are replayed before it answers, and /health is
503 until the common shapes are compiled. Requests that come together are computed together. SIGTERM finishes what is
queued.
"""

import argparse
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rmjax import command_line
from rmjax.command_line import Parser


def parser() -> Parser:
    """The command's arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    made = Parser(prog="python -m rmjax.serve", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = made.add_argument
    add("--model", default="", metavar="PATH", help="an export, or a hub id of a sequence classifier")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, 0.0.0.0 is all")
    add("--port", type=int, default=8000, help="default 8000")
    add("--name", default="", help="of the model in answers; default: its path")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the computation")
    add("--template_kwargs", default="", metavar="JSON", help="of a foreign model's chat template")
    add("--max_length", type=int, default=0, metavar="N", help="tokens of a sequence; default: the contract's")
    add("--queue", type=int, default=1024, metavar="N", help="sequences that may wait; more are answered with 503")
    add("--batch_tokens", type=int, default=16_384, metavar="N", help="tokens of a batch; default 16,384")
    add("--max_wait_ms", type=float, default=2.0, metavar="MS", help="that a request waits for others; default 2")
    add("--drain_seconds", type=float, default=30.0, metavar="S", help="for queued requests when it stops; default 30")
    add("--normalize", action="store_true", help="rewards minus the contract's mean, divided by its deviation")
    add("--debug", action="store_true", help="shows the traceback of an error, too")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; see command_line.py for what becomes of errors."""
    argv = sys.argv[1:] if argv is None else argv
    with command_line.outcome(debug="--debug" in argv):
        args = parser().parse_args(argv)
        if not args.model:
            raise ValueError("--model is required; --help shows commands that run")
        for name, least in (("queue", 1), ("batch_tokens", 1), ("max_length", 0), ("max_wait_ms", 0)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")
        if not all(map(importlib.util.find_spec, ("starlette", "uvicorn", "prometheus_client"))):
            raise ValueError("serving needs packages that are not here: pip install 'rmjax[serve]'")
        serve(args)


def serve(args: argparse.Namespace) -> None:
    """Loads the model and answers until a signal comes.

    Raises:
        ValueError: a model that cannot be served.
    """
    import uvicorn

    from rmjax import contract, startup
    from rmjax.reward_model import load_checked
    from rmjax.serving import app

    startup.keep_programs()
    arguments = command_line.json_object(args.template_kwargs, "--template_kwargs")
    normalize = contract.normalization(contract.find(args.model)) if args.normalize else None
    model = load_checked(args.model, dtype=args.dtype, template_kwargs=arguments)
    if model.architecture != "SequenceClassification":
        raise ValueError(
            f"{args.model} is a {model.architecture}; only sequence classifiers are served, see rmjax.score"
        )
    if normalize and len(model.labels) > 1:
        raise ValueError(f"--normalize is for one reward; {args.model} has the outputs {', '.join(model.labels)}")
    service = app.Service(
        model,
        args.name or str(Path(args.model)),
        max_length=args.max_length or (model.contract or {}).get("max_length", 0),
        queue=args.queue,
        batch_tokens=args.batch_tokens,
        max_wait=args.max_wait_ms / 1000,
        normalize=normalize,
    )
    built = app.build(service, drain=args.drain_seconds)
    config = uvicorn.Config(
        built, args.host, args.port, log_level="warning", timeout_graceful_shutdown=max(1, round(args.drain_seconds))
    )
    print(f"serving {args.model} on http://{args.host}:{args.port}", flush=True)
    # uvicorn raises a signal again once it has stopped: SIGTERM is how a server ends well, Ctrl-C stays what it is.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
