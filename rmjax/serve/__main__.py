"""Serves a reward model over HTTP, with the requests and answers of vLLM's pooling servers: raw rewards, no sigmoid.

    python -m rmjax.serve --model=runs/tiny/export --port=8000
    python -m rmjax.serve --model=A,B,C --combine=mean_minus_std
    curl localhost:8000/score -d '{"text_1": "Tell me about the river.", "text_2": ["A river is deep.", "A garden."]}'
    curl localhost:8000/classify -d '{"input": "<|im_start|>user..."}'

Needs the extra `serve`. The server replays the golden rows of the score contract before it answers, and
/health answers 503 until the common shapes are compiled. Requests that arrive together are computed together;
rmjax/serve/app.py says what a request may contain. On SIGTERM the server answers the requests it has accepted and ends
with exit code 0, on Ctrl-C with 130; later requests get 503, and so do those that cannot be computed within
--drain_seconds. With --api_key, requests must have it. The server has no TLS: put a proxy that has it in front of any
address beyond this machine.

Several models, separated by commas, are combined to one reward by --combine. Where an answer has room for more than
the reward, `spread` stands beside it: the standard deviation of the members' rewards.
"""

import argparse
import contextlib
import errno
import importlib.util
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rmjax.runtime import command_line, exits
from rmjax.runtime.command_line import Parser
from rmjax.serve import REFUSE, TRUNCATE
from rmjax.suggestions import install

if TYPE_CHECKING:
    from rmjax.serve.service import Service

# Options that are numbers: default, least, most, unit in the help, and what they say.
NUMBERS: dict[str, tuple[int | float, float, float, str | None, str]] = {
    "port": (8000, 0, 65_535, None, "port to listen on; default 8000, 0 takes a free one"),
    "max_length": (0, 0, 2**31, "N", "most tokens per sequence; default: the contract's limit"),
    "queue": (1024, 1, 2**31, "N", "most sequences that wait; beyond them 503 is answered; default 1024"),
    "batch_tokens": (
        0,
        0,
        2**31,
        "N",
        "most tokens per batch, shared ones counted once; default 0: what the model computes in one call",
    ),
    "max_wait_ms": (2.0, 0, 60_000, "MS", "milliseconds that a request waits for others to join its batch; default 2"),
    "drain_seconds": (
        30.0,
        0,
        86_400,
        "S",
        "seconds that the server computes queued requests after SIGTERM; default 30",
    ),
    "request_seconds": (60.0, 0.1, 86_400, "S", "seconds within which a request must arrive; default 60"),
    "connections": (512, 1, 100_000, "N", "most open connections; beyond them 503 is answered; default 512"),
}
HOST_HELP = "address to listen on; default 127.0.0.1 (this machine only), 0.0.0.0 is every address"
DTYPE_HELP = "number type of the computation; auto is float32 on CPUs, else bfloat16"
COMPLETE_HELP = "add what renderings lack of a BOS, an end of turn or what follows it; otherwise they are refused"
OVER_LONG_HELP = (
    "what is done with conversations of more than --max_length tokens: refuse (the default), truncate_prompt (oldest "
    "exchanges first, then the start of the last question), or a number, which is their reward"
)
POLICY_HELP = "tokenizer of the policy that trainers send rendered prompts of; default: its template is the model's"
REWARD_HELP = (
    "the one value that every answer is (score, an attribute, a verdict); default: all outputs, where asked for"
)
KEY_HELP = "key that requests must have; default: the environment's RMJAX_API_KEY, which other users here cannot see"
MODEL_HELP = (
    "model to serve: an export, or the hub id of a sequence classifier; several, separated by commas, are combined"
)
COMBINE_HELP = "how the rewards of several models become one: mean (the default), min, mean_minus_std or median"
KWARGS_HELP = "arguments of the chat template, for a model without contract"
NORMALIZE_HELP = "subtract the contract's mean from rewards and divide by its deviation; of each of several models"


def parser() -> Parser:
    command = command_line.parser("rmjax.serve", __doc__)
    add = command.add_argument
    add("--model", default="", metavar="PATH[,PATH]", help=MODEL_HELP)
    add("--combine", default="", metavar="NAME", help=COMBINE_HELP)
    add("--host", default="127.0.0.1", help=HOST_HELP)
    add("--name", default="", help="name of the model in answers; default: its path")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help=DTYPE_HELP)
    add("--template_kwargs", default="", metavar="JSON", help=KWARGS_HELP)
    for name, (default, _, _, unit, text) in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default, metavar=unit, help=text)
    add("--normalize", action="store_true", help=NORMALIZE_HELP)
    add("--complete", action="store_true", help=COMPLETE_HELP)
    add("--over_long", default=REFUSE, metavar="POLICY", help=OVER_LONG_HELP)
    add("--policy_tokenizer", default="", metavar="PATH", help=POLICY_HELP)
    add("--reward", default="", metavar="NAME", help=REWARD_HELP)
    add("--api_key", default="", metavar="KEY", help=KEY_HELP)
    return command


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with command_line.outcome(debug="--debug" in argv):
        args = parser().parse_args(argv)
        if not args.model:
            raise ValueError("--model is required; --help shows commands that run")
        for name, (_, least, most, *_) in NUMBERS.items():
            if not least <= getattr(args, name) <= most:
                raise ValueError(f"--{name}={getattr(args, name)} must be from {least} to {most}")
        if not all(map(importlib.util.find_spec, ("starlette", "uvicorn", "prometheus_client"))):
            raise ValueError(f"serving needs packages that are not here: {install('serve')}")
        args.over_long = _over_long(args.over_long)
        serve(args)


def serve(args: argparse.Namespace) -> None:
    """Loads the model and answers until a signal comes."""
    listening = _bind(args.host, args.port)  # before the model is loaded, which takes long
    with _ended_by_sigterm() as end_with:
        import uvicorn  # seconds, with JAX, in which a signal ends it well, too

        from rmjax.runtime import compile_cache
        from rmjax.serve import app, connections

        compile_cache.keep_programs()
        _log_to_terminal(app.log)
        service, gate = _service(args), connections.Gate()

        def stop_early() -> None:
            server.should_exit = True

        key = args.api_key or os.environ.get("RMJAX_API_KEY", "")
        application = app.build(service, gate=gate, seconds=args.request_seconds, key=key, on_failure=stop_early)
        protocol = connections.protocol(args.request_seconds, args.connections)
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "http": protocol, "ws": "none"}
        config = uvicorn.Config(application, **options, timeout_graceful_shutdown=connections.UVICORN_SECONDS)
        server: connections.Server = connections.Server(config, gate, args.drain_seconds)
        end_with(server.handle_exit)
        print(f"serving {args.model} on http://{args.host}:{listening.getsockname()[1]}", flush=True)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # see _bind: for the next to serve here
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises a signal again once it has stopped
            _leave(service, exits.INTERRUPTED)
            raise
        if service.failure:
            raise RuntimeError(f"{args.model} cannot be compiled: {service.failure}") from service.failure
        _leave(service, exits.DONE)


def _leave(service: "Service", code: int) -> None:
    """Ends the process at once if a thread still computes: the interpreter would abort in it, or wait for it."""
    if service.busy:
        print("\nstopped" if code == exits.INTERRUPTED else "", end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[Callable[[Any], Any]]:
    """Ends well on SIGTERM, even while the model loads; gives a function that sets another handler."""

    def end(*_: Any) -> None:
        raise SystemExit(exits.DONE)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield lambda handler: signal.signal(signal.SIGTERM, handler)
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_to_terminal(log: logging.Logger) -> None:
    """Shows a logger's lines once, whatever handlers the libraries have set up."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _bind(host: str, port: int) -> socket.socket:
    """A socket with this address, which no other server can take.

    With SO_REUSEADDR two sockets may have one address until one of them listens, that is until its model is loaded.
    Without it an address is refused for a minute after a server on it has ended: then this one listens at once.
    """
    for reuse in (0, 1):
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            listening.bind((host, port))
            if reuse:
                listening.listen()
        except OSError as error:
            listening.close()
            if reuse or error.errno != errno.EADDRINUSE:
                raise ValueError(
                    f"--host={host} --port={port} cannot be used: {error.strerror}; choose others"
                ) from None
        else:
            break
    return listening


def _service(args: argparse.Namespace) -> "Service":
    from rmjax.batches.chat import Chat, load_tokenizer
    from rmjax.inference import contract, ensembles
    from rmjax.serve.service import Service

    arguments = command_line.json_object(args.template_kwargs, "--template_kwargs")
    models = ensembles.named_models(args.model)
    combine = ensembles.combination(models, args.combine)
    if combine:
        print(ensembles.words(models, combine), flush=True)
    normalize = contract.normalization(contract.find(args.model)) if args.normalize and not combine else None
    model = ensembles.load_checked(
        models, combine, normalize=args.normalize, dtype=args.dtype, template_kwargs=arguments
    )
    if model.architecture != "SequenceClassification":
        raise ValueError(
            f"{args.model} is a {model.architecture}; only sequence classifiers are served, see rmjax.score"
        )
    if normalize and len(model.labels) > 1 and not model.has_spread:
        raise ValueError(f"--normalize is for one reward; {args.model} has the outputs {', '.join(model.labels)}")
    max_length = args.max_length or (model.contract or {}).get("max_length") or model.longest
    policy = Chat(load_tokenizer(args.policy_tokenizer)) if args.policy_tokenizer else None
    return Service(
        model,
        args.name or args.model,
        max_length=max_length,
        queue=args.queue,
        batch_tokens=args.batch_tokens,
        max_wait=args.max_wait_ms / 1000,
        normalize=normalize,
        complete=args.complete,
        over_long=args.over_long,
        policy=policy,
        reward=args.reward or (ensembles.SCORE if combine else ""),
    )


def _over_long(given: str) -> str | float:
    if given in (REFUSE, TRUNCATE):
        return given
    try:
        if math.isfinite(number := float(given)):
            return number
    except ValueError:
        pass
    raise ValueError(f"--over_long={given} is none of {REFUSE}, {TRUNCATE} and a number")


if __name__ == "__main__":
    main()
