"""A rank that dies or raises ends the whole job at once, and every other rank says which one it was and why.

Every rank holds one TCP connection to rank 0. The kernel closes it when a process ends, however it ends and whatever its
threads are stuck in, so nothing waits for a heartbeat and nothing is taken for dead because a long call held the
interpreter's lock; a host that vanished is noticed by TCP's keepalive after about 30 s. The process then ends without
its main thread, which may hang in a collective that would give up only after half an hour.

One a process: `start` when the process group stands, `fail` where an error is caught, `leave` (at exit by itself).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from litseek.errors import LitseekError

PARENT = "LITSEEK_PARENT"
"""Environment variable: the process that launched this rank, which rank 0 is."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""The one by which torchrun's ranks know it."""
JOIN_S = 60.0
"""How long rank 0 waits for the connections of the others."""
VERDICT_S = 10.0
"""How long a failed rank waits at most to hear whether another one failed before it."""
SAME_S = 3.0
"""How long a rank that hears of a failure goes on at most: an error of all ranks reaches it meanwhile, and is said once."""
READ_S = 3.0
"""How long rank 0 stays at most until the others have read what failed: its end may destroy what they have not."""
LAST_WORDS_S = 15.0
"""What a failed rank has for closing its loggers; on a GPU that may wait for ranks that are gone."""
DEAD = "died without a word (killed, out of memory, or crashed); the same command goes on from the last checkpoint."

_running: Watchdog | None = None


def start(rank: int, local_rank: int, world: int, share: Callable[[Any], Any]) -> None:
    """Watch from here on, once a process. ``share`` gives every rank what rank 0 put in; all ranks call this together."""
    global _running
    if world > 1 and _running is None:
        _running = Watchdog(rank, local_rank, world, share)
        atexit.register(leave)


def watching() -> bool:
    return _running is not None


def fail(error: str) -> bool:
    """Tell the other ranks that this one failed. True when the sentence has been said; a later failure ends here."""
    return _running is not None and _running.fail(error)


def leave() -> None:
    """The end of this rank is no failure."""
    if _running is not None:
        _running.leave()


def follow_parent() -> None:
    """End with the process that launched this one: until the ranks are connected nothing else would tell, and nothing at
    any time of torchrun's end, after which somebody may start the same run again."""
    if PARENT in os.environ or TORCHRUN in os.environ:
        parent = int(os.environ.get(PARENT, os.getppid()))
        threading.Thread(target=_end_with, args=(parent,), daemon=True, name="litseek-parent").start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    if not watching():
        os._exit(1)
    if PARENT not in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)  # which saves and stops


class Watchdog:
    """This rank's end of the connections. Rank 0 hears of every failure first and passes the first one on.

    Messages are JSON lines: {"token", "rank"} to join, {"error"} of a rank that failed, {"bye"} of one that is done, and
    from rank 0 {"joined"} when all have, {"failed", "error"} about the first failure (error null: it died without a word).
    """

    def __init__(self, rank: int, local_rank: int, world: int, share: Callable[[Any], Any]) -> None:
        self.rank, self.local_rank, self.world = rank, local_rank, world
        self._lock = threading.Lock()
        self._failure: str | None = None
        """What this rank said of its own failure."""
        self._first: int | None = None
        """The rank that failed first."""
        self._judged, self._joined, self._failed = threading.Event(), threading.Event(), threading.Event()
        self._left = self._said = False
        self._peers: dict[int, socket.socket] = {}
        run = self._hub if rank == 0 else self._follow
        if rank == 0:
            self._listener = _listen()
        address = share((self._listener.getsockname()[1], secrets.token_hex(16)) if rank == 0 else None)
        port, self._token = address
        if rank > 0:
            self._peers[0] = self._connect(os.environ.get("MASTER_ADDR", "127.0.0.1"), port)
        os.register_at_fork(after_in_child=self._close)  # a forked child must not keep a dead rank's connection open
        threading.Thread(target=run, daemon=True, name="litseek-watchdog").start()
        # nobody goes on, and perhaps ends or fails, before all are connected
        if not self._joined.wait(JOIN_S if rank == 0 else 2 * JOIN_S):
            missing = sorted(set(range(1, world)) - set(self._peers)) if rank == 0 else [0]
            error = f"rank {missing[0]} did not connect within {JOIN_S:.0f} s, {len(missing)} in all."
            if rank == 0:
                self._judge(0, error)
            raise LitseekError(error)

    def fail(self, error: str) -> bool:
        if self._left or self._failure is not None:
            return self._said
        if _consequence(error):  # of a rank that is gone: the connection to it tells which one
            time.sleep(VERDICT_S)
        self._failure = error
        self._failed.set()
        if self.rank == 0:
            self._judge(0, error)
        else:
            self._send(0, {"error": error})
        self._judged.wait(VERDICT_S)
        if self._first in (self.rank, None):
            _say(error if self.rank == 0 else f"rank {self.rank}: {error}")
            self._said = True
            timer = threading.Timer(LAST_WORDS_S, os._exit, (1,))
            timer.daemon = True
            timer.start()
        else:
            time.sleep(VERDICT_S)  # the other thread ends the process
        return True

    def leave(self) -> None:
        self._left = True
        for rank in list(self._peers):
            self._send(rank, {"bye": True})
        if self.rank == 0 and self._failure is not None:
            self._stay()

    def _judge(self, rank: int, error: str | None) -> None:
        """On rank 0: the first failure, passed on to every rank."""
        with self._lock:
            if self._first is not None or self._left:
                return
            self._first = rank
        for peer in list(self._peers):
            self._send(peer, {"failed": rank, "error": error})
        if rank == self.rank:
            self._end(rank, error)
        else:  # this thread is to see the others end
            threading.Thread(target=self._end, args=(rank, error), daemon=True, name="litseek-end").start()

    def _end(self, rank: int, error: str | None) -> None:
        """What this rank does about the first failure: its own is for the main thread, any other ends the process."""
        self._first = rank
        self._judged.set()
        if rank == self.rank or self._left:
            return
        if error is not None:
            self._failed.wait(SAME_S)
        # one line a node, and none where this rank failed in the same words
        speaker = self.local_rank == 0 or (self.local_rank == 1 and rank == self.rank - 1)
        if speaker and (error is None or error != self._failure):
            _say(f"rank {rank} {DEAD}" if error is None else f"rank {rank} failed: {error}")
        if self.rank == 0:
            self._stay()
        sys.stdout.flush()
        os._exit(1)

    def _stay(self) -> None:
        """On rank 0: until every other rank has closed its connection."""
        until = time.monotonic() + READ_S
        while self._peers and time.monotonic() < until:
            time.sleep(0.05)

    # -- connections --------------------------------------------------------------------------------------------

    def _hub(self) -> None:
        """Rank 0: accept the others, then wait for what they say, or for the end of a connection."""
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        texts: dict[socket.socket, str] = {}
        ranks: dict[socket.socket, int] = {}
        while True:
            for key, _ in selector.select():
                peer: Any = key.fileobj
                if peer is self._listener:
                    peer, _ = peer.accept()
                    _keep_alive(peer)
                    selector.register(peer, selectors.EVENT_READ)
                    texts[peer] = ""
                    continue
                data = _receive(peer)
                *lines, texts[peer] = (texts[peer] + data).split("\n")
                for line in lines:
                    if peer in ranks:
                        self._heard(ranks, peer, json.loads(line))
                    elif (rank := self._admitted(line)) is not None:
                        ranks[peer] = rank
                        self._peers[rank] = peer
                        if len(self._peers) == self.world - 1:
                            for other in self._peers:
                                self._send(other, {"joined": True})
                            self._joined.set()
                if not data:
                    selector.unregister(peer)
                    if peer in ranks and self._peers.pop(ranks[peer], None) is not None:
                        self._judge(ranks[peer], None)
                    peer.close()

    def _heard(self, ranks: dict[socket.socket, int], peer: socket.socket, message: dict[str, Any]) -> None:
        if "bye" in message:
            self._peers.pop(ranks[peer], None)
        else:
            self._judge(ranks[peer], str(message["error"]))

    def _admitted(self, line: str) -> int | None:
        """The rank that joins by this line; None for a stranger."""
        try:
            message = json.loads(line)
            return int(message["rank"]) if secrets.compare_digest(message["token"], self._token) else None
        except (ValueError, KeyError, TypeError):
            return None

    def _follow(self) -> None:
        """Any other rank: wait for what rank 0 says."""
        text = ""
        while data := _receive(self._peers[0]):
            *lines, text = (text + data).split("\n")
            for line in lines:
                message = json.loads(line)
                if "bye" in message:
                    return
                if "joined" in message:
                    self._joined.set()
                    continue
                self._end(message["failed"], message["error"])
                self._peers[0].close()
                return
        if self._first is None:
            self._end(0, None)

    def _connect(self, host: str, port: int) -> socket.socket:
        try:
            peer = socket.create_connection((host, port), timeout=JOIN_S)
        except OSError as error:
            raise LitseekError(f"rank {self.rank} cannot reach rank 0 at {host}, port {port} ({error}).") from error
        peer.settimeout(None)
        _keep_alive(peer)
        peer.sendall((json.dumps({"token": self._token, "rank": self.rank}) + "\n").encode())
        return peer

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, KeyError):  # it is gone, which its own connection says
            self._peers[rank].sendall((json.dumps(message) + "\n").encode())

    def _close(self) -> None:
        for peer in [*self._peers.values(), *([self._listener] if self.rank == 0 else [])]:
            peer.close()
        self._peers, self._left = {}, True


def _consequence(error: str) -> bool:
    """Whether an error may come from another rank's end, as collectives see it."""
    return any(
        word in error for word in ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore")
    )


def _say(sentence: str) -> None:
    print(f"litseek: {sentence}", file=sys.stderr, flush=True)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(peer: socket.socket) -> None:
    """A host that is switched off says nothing: the kernel asks after 10 s of silence, every 5 s, and gives up after 4."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _receive(peer: socket.socket) -> str:
    """What has arrived; nothing when the connection has ended."""
    try:
        return peer.recv(65536).decode(errors="replace")
    except OSError:
        return ""
