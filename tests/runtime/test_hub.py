"""The hub calls the roll, names who is lost or stands still, and heeds no strangers. Threads stand for processes."""

import contextlib
import json
import socket
import threading
import time

import pytest

from rmjax.runtime import exits, hub, sockets


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(hub, "BEAT", 0.05)
    monkeypatch.setattr(hub, "LATE", 0.5)


class Member:
    """A link, and why it ended."""

    def __init__(self, port, number, count, secret="", host="host", version="v"):
        self.ends, self.ended = [], threading.Event()
        hello = hub.Hello(number, count, host, version)
        self.link = hub.Link(sockets.connect_to(f"localhost:{port}", 5), hello, self.end, secret)
        self.link.start()

    def end(self, end):
        self.ends.append(end)
        self.ended.set()

    def why(self):
        assert self.ended.wait(20)
        return self.ends[0]


@contextlib.contextmanager
def roll(count, seconds=20.0, numbers=None, of=None, versions=None, secrets=None, standing=0.0):
    """A hub for `count` processes, and those `numbers` that come; the first of the `secrets` is the hub's."""
    port = free_port()
    secrets = secrets or [""] * (count + 1)
    server = hub.Hub(sockets.listen_on(f"x:{port}"), count, seconds, f"x:{port}", secrets[0], standing)
    server.start()
    numbers = range(count) if numbers is None else numbers
    members = [
        Member(port, number, of or count, secrets[1 + i], f"host-{i}", versions[i] if versions else "v")
        for i, number in enumerate(numbers)
    ]
    try:
        yield members
    finally:
        for member in members:
            member.link.leave()
        server.join(5)
        assert not server.is_alive()


def joined(members):
    assert all(member.link.joined.wait(10) for member in members)


# The roll


def test_all_know_where_the_others_are():
    with roll(3) as members:
        joined(members)
        assert members[2].link.hosts == ["host-0", "host-1", "host-2"]


def test_who_does_not_come_is_named():
    with roll(4, seconds=1.0, numbers=[0, 2]) as members:
        for member in members:
            end = member.why()
            assert end.code == exits.AGAIN
            assert "2 of 4 processes did not come to x:" in end.why and "within 1 s: 1, 3. There" in end.why
            assert "0 on host-0, 2 on host-1" in end.why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": [0, 0]}, "calls itself process 0, as one on host-"),
        ({"of": 3}, "of 3, expected one of 2"),
        ({"versions": ["jax 1", "jax 2"]}, "install the same everywhere"),
    ],
)
def test_who_cannot_belong_is_refused(options, message):
    with roll(2, **options) as members:
        end = members[-1].why()
        assert message in end.why and end.code == exits.BAD_INPUT
        assert "host-" in end.why


def test_another_secret_keeps_out_and_only_that_process_is_told_so():
    with roll(2, seconds=1.5, secrets=["a", "a", "b"]) as members:
        end = members[1].why()
        assert end.code == exits.BAD_INPUT and "process 1 on host-1 has another RMJAX_SECRET" in end.why
        assert not members[0].ends
        end = members[0].why()
        assert end.code == exits.AGAIN and "One from " in end.why and "has another RMJAX_SECRET" in end.why


# Who is lost


def test_a_closed_connection_is_a_lost_process():
    with roll(3) as members:
        joined(members)
        members[1].link._socket.shutdown(socket.SHUT_RDWR)
        for member in (members[0], members[2]):
            end = member.why()
            assert (end.number, end.code) == (1, exits.AGAIN)
            assert end.why.startswith("process 1 on host-1 was lost: its connection closed")


def test_silence_is_a_lost_process(monkeypatch):
    monkeypatch.setattr(hub, "SILENCE", 1.0)
    with roll(2) as members:
        joined(members)
        time.sleep(1.5)  # beats keep them
        assert not members[0].ends
        monkeypatch.setattr(members[1].link, "_send", lambda **_: None)
        assert members[0].why().number == 1 and "was lost: nothing was heard of it" in members[0].why().why
        monkeypatch.undo()


def test_a_failure_is_told_to_all_with_its_code():
    with roll(3) as members:
        joined(members)
        members[2].link.fail("no space left", 1)
        members[1].link.fail("what followed", 1)
        for member in members:
            assert member.why() == hub.End(2, "process 2 on host-2 failed: no space left", 1)


def test_an_endless_error_is_told_too():
    with roll(2) as members:
        joined(members)
        members[1].link.fail("\N{GRINNING FACE}" * 10**6, 1)
        assert members[0].why().why.startswith("process 1 on host-1 failed: \N{GRINNING FACE}")


def test_who_stands_still_while_others_wait_is_told_of_and_then_given_up(caplog):
    with roll(3, standing=0.4) as members, caplog.at_level("WARNING"):
        joined(members)
        for member in members:
            member.link.at = 7, 3
        time.sleep(0.8)  # all alike, as while they evaluate
        assert not caplog.records
        members[0].link.at = members[2].link.at = 8, 4
        end = members[0].why()
        assert (end.number, end.code) == (1, exits.AGAIN) and end.why.startswith("process 1 on host-1 was lost: its")
        assert "its main thread stands still at step 3, and the others have waited for it for" in end.why
        assert members[1].why() == end  # it is told as well
        (record,) = caplog.records
        assert "process 1 on host-1: its main thread stands still at step 3" in record.getMessage()


def test_who_is_late_but_moves_is_not_told_of(caplog):
    with roll(2, standing=0.5) as members, caplog.at_level("WARNING"):
        joined(members)
        for position in range(10):
            members[0].link.at = position + 1, position
            members[1].link.at = position, position
            time.sleep(0.2)
        assert not caplog.records and not members[0].ends


@pytest.mark.parametrize("broken", ["_handle", "_look_who_stands"])
def test_a_mistake_in_the_hub_is_called_that(monkeypatch, broken):
    def fails(*_):
        raise KeyError("a bug of ours")

    with roll(2) as members:
        joined(members)
        monkeypatch.setattr(hub.Hub, broken, fails)
        for member in members:
            end = member.why()
            assert (end.number, end.code) == (-1, exits.FAILED)
            assert end.why == "the thread of process 0 by which all keep in touch met KeyError: 'a bug of ours'"
        monkeypatch.undo()


def test_a_hub_that_is_none_is_called_that():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for said in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"end": 3}\n', b"[" * 10**5 + b"\n", b""):
            member = Member(server.getsockname()[1], 1, 2)
            with server.accept()[0] as other:
                other.sendall(said)
            assert "process 0 on its host was lost" in member.why().why and member.why().code == exits.AGAIN
            assert "no hub" in member.why().why or "no run of rmjax" in member.why().why


# Strangers

HELLO = {"number": 1, "count": 2, "host": "h", "version": "v", "proof": "0" * 64}
hello = lambda **values: json.dumps({**HELLO, **values}).encode() + b"\n"
SENT = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + bytes(range(256)),
    "binary": bytes(range(256)) * 8,
    "bad utf-8": b"\xff\xfe\n",
    "empty lines": b"\n\n\n",
    "number": b"1\n",
    "list": b"[1]\n",
    "null": b"null\n",
    "text": b'"hello"\n',
    "nan": b"NaN\n",
    "half a message": b'{"number": 1, "count"',
    "deep lists": b"[" * 50_000 + b"]" * 50_000 + b"\n",
    "deep objects": b'{"number": ' * 10_000 + b"1" + b"}" * 10_000 + b"\n",
    "a line without end": b"x" * 2**20,
    "a number without end": b'{"number": ' + b"9" * 10_000 + b"}\n",
    "a number and no more": b'{"number": 1}\n',
    "true": b'{"number": true}\n',
    "true for a number": hello(number=True),
    "text for a number": hello(number="1"),
    "a fraction": hello(number=0.5),
    "nan for a number": hello(number=float("nan")),
    "infinity for a count": hello(count=float("inf")),
    "null for a number": hello(number=None),
    "a list for a number": hello(number=[1]),
    "an object for a host": hello(host={"a": 1}),
    "a number for a version": hello(version=3),
    "a number for a proof": hello(proof=0),
    "a surrogate for a proof": hello(proof="\ud800"),
    "an empty proof": hello(proof=""),
    "all but the proof": json.dumps({k: v for k, v in HELLO.items() if k != "proof"}).encode() + b"\n",
    "an unknown key": hello(more=1),
    "a greeting in another form": b'{"hello": [1, 2, "h", "v"]}\n',
    "no proof of a wrong count": hello(count=3),
    "no proof of a taken number": hello(number=0),
    "no proof of a negative number": hello(number=-1),
    "no proof of a huge number": hello(number=10**18),
    "no proof of another version": hello(version="w"),
    "a beat": b'{"position": 5, "step": 5}\n',
    "a failure": b'{"failed": "ha", "code": 2}\n',
    "a good-bye": b'{"bye": 1}\n',
    "an end": b'{"end": [0, "ha", 2]}\n',
    "much at once": b'{"number": 1}\n{"failed": "ha", "code": 2}\n' * 1000,
}


@contextlib.contextmanager
def gathering(secret):
    """A hub that waits for process 1 of 2; process 0 is there."""
    port = free_port()
    server = hub.Hub(sockets.listen_on(f"x:{port}"), 2, 20, "x", secret)
    server.start()
    first = Member(port, 0, 2, secret)
    yield server, port, first
    second = Member(port, 1, 2, secret)
    joined([first, second])
    assert not first.ends and not second.ends
    first.link.leave()
    second.link.leave()
    server.join(5)
    assert not server.is_alive()


@pytest.mark.parametrize("secret", ["", "s3cret"])
@pytest.mark.parametrize("sent", SENT)
def test_what_a_stranger_sends_drops_its_connection_and_nothing_else(sent, secret):
    with gathering(secret) as (server, port, _), sockets.connect_to(f"localhost:{port}", 5) as stranger:
        with contextlib.suppress(OSError):  # it may be dropped by then
            stranger.sendall(SENT[sent])
            stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):  # dropped, with what it sent unread
            while stranger.recv(2**16):
                pass
        assert server._there.keys() <= {0} and server._why is None


def test_a_greeting_that_was_overheard_serves_nobody_else():
    with gathering("s3cret") as (server, port, _):
        said = hub.Hello(1, 2, "h", "v").proof("s3cret", "another nonce").decode()
        with sockets.connect_to(f"localhost:{port}", 5) as stranger:
            stranger.sendall(hello(proof=said))
            while stranger.recv(2**16):
                pass
        assert server._there.keys() <= {0}


def test_many_connections_that_say_nothing_keep_nobody_out():
    with gathering("") as (server, port, _), contextlib.ExitStack() as stack:
        for _ in range(3 * hub.STRANGERS):
            stack.enter_context(sockets.connect_to(f"localhost:{port}", 5))
        time.sleep(0.3)
        assert len(server._strangers) <= hub.STRANGERS + 2


def test_who_says_nothing_is_dropped_in_time(monkeypatch):
    monkeypatch.setattr(hub, "SILENCE", 0.3)
    with gathering("") as (_, port, _), sockets.connect_to(f"localhost:{port}", 5) as stranger:
        while stranger.recv(2**16):
            pass


def test_nobody_is_let_in_when_all_are_there():
    port = free_port()
    server = hub.Hub(sockets.listen_on(f"x:{port}"), 1, 20, "x")
    server.start()
    with sockets.connect_to(f"localhost:{port}", 5) as stranger:
        member = Member(port, 0, 1)
        joined([member])
        while stranger.recv(2**16):
            pass
        with pytest.raises(OSError):
            socket.create_connection(("localhost", port), timeout=1)
    member.link.leave()
    server.join(5)
    assert not server.is_alive()
