"""What processes agree on, by JAX's own key-value store. Threads stand for processes."""

import contextlib
import socket
import threading
import time

import pytest
from jaxlib import _jax

from rmjax.runtime import agreement


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def at_once(*calls):
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@contextlib.contextmanager
def meetings(count):
    """Clients of one store, as many processes would have."""
    address = f"127.0.0.1:{free_port()}"
    service = _jax.get_distributed_runtime_service(address, count)
    clients = [_jax.get_distributed_runtime_client(address, n, init_timeout=20) for n in range(count)]
    at_once(*(client.connect for client in clients))
    yield [agreement.Meeting(client, n, count) for n, client in enumerate(clients)]
    at_once(*(client.shutdown for client in clients))
    service.shutdown()


def test_all_gather_what_each_has():
    with meetings(3) as met:
        for turn in range(3):
            calls = [lambda m=m, n=n, t=turn: m.gather("a name", [t, n]) for n, m in enumerate(met)]
            assert at_once(*calls) == [[[turn, 0], [turn, 1], [turn, 2]]] * 3
        left = dict(met[0].client.key_value_dir_get("rmjax"))
        assert len(left) == 3 and all("/3/" in key for key in left)  # the store does not grow


def test_threads_gather_under_names_of_their_own():
    with meetings(2) as met:
        turns = lambda m, name: [m.gather(name, name) for _ in range(20)]
        both = at_once(*(lambda m=m, name=name: turns(m, name) for name in ("a", "b") for m in met))
        assert both == [[["a", "a"]] * 20] * 2 + [[["b", "b"]] * 20] * 2


@pytest.mark.parametrize("asked", [(10**6, 20, 25), (20, 20, 20), (1, 10**6, 10**6)])
def test_all_stop_at_the_same_step(asked):
    with meetings(3) as met:

        def steps(meeting, requested, pause):
            for step in range(1, 1000):
                if meeting.stop_agreed(step >= requested, step):
                    return step
                time.sleep(pause)
            return None

        for _ in range(2):  # another run is not stopped by what the first was told
            stops = at_once(
                lambda: steps(met[0], asked[0], 0.001),
                lambda: steps(met[1], asked[1], 0.003),
                lambda: steps(met[2], asked[2], 0.002),
            )
            assert len(set(stops)) == 1 and stops[0] > min(asked)


def test_nobody_stops_where_nobody_is_asked():
    with meetings(2) as met:
        assert not any(at_once(*(lambda m=m: any(m.stop_agreed(False, n) for n in range(1, 50)) for m in met)))
        met[0].close()  # one is enough
        for meeting in met:
            meeting._stopping.join(5)
            assert not meeting._stopping.is_alive() and not meeting.stop_agreed(False, 50)
        met[1].close()
