"""A MongoDB server of one process, as far as an export needs one: OP_MSG over loopback, read-only.

It keeps every command that it is sent, answers `find` in batches, and can drop the connection,
refuse, or fall silent.
"""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bson

_OP_MSG = 2013
_FIRST_BATCH = 2  # documents, so that a page of an export takes several batches
HANDSHAKE = {"hello", "isMaster", "ismaster", "endSessions"}

Answer = Callable[[str, dict[str, Any]], dict[str, Any] | None]


class DroppedError(Exception):
    """Raised by an answer: the connection ends without one."""


class Server(socketserver.ThreadingTCPServer):
    """Documents in the order of `_id`, and the commands that asked for them."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.documents = documents
        self.commands: list[dict[str, Any]] = []
        self.meddle: Answer = lambda name, command: None
        self.silence = threading.Event()  # set: silent answers end
        self._open: dict[int, list[dict[str, Any]]] = {}

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"mongodb://127.0.0.1:{self.server_address[1]}"

    def names(self) -> list[str]:
        """The commands so far, without handshakes."""
        return [n for n in (next(iter(c)) for c in self.commands) if n not in HANDSHAKE]

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """The reply to one command."""
        self.commands.append(command)
        name = next(iter(command))
        if (special := self.meddle(name, command)) is not None:
            return special
        if name in HANDSHAKE:
            return {"ok": 1.0, "ismaster": True, "isWritablePrimary": True, "maxWireVersion": 21,
                    "minWireVersion": 0, "maxBsonObjectSize": 16 << 20,
                    "maxMessageSizeBytes": 48_000_000, "maxWriteBatchSize": 100_000}  # fmt: skip
        if name == "find":
            found = _behind(self.documents, command["filter"])[: command.get("limit") or None]
            return self._batch(command, found, "firstBatch")
        if name == "getMore":
            return self._batch(command, self._open.pop(command["getMore"]), "nextBatch")
        return {"ok": 0.0, "code": 59, "errmsg": f"no such command: '{name}'"}

    def _batch(self, command: dict[str, Any], left: list[Any], key: str) -> dict[str, Any]:
        batch, left = left[:_FIRST_BATCH], left[_FIRST_BATCH:]
        number = len(self.commands) if left else 0
        if left:
            self._open[number] = left
        namespace = f"{command['$db']}.{command.get('find') or command['collection']}"
        return {"ok": 1.0, "cursor": {"id": bson.Int64(number), "ns": namespace, key: batch}}


def _behind(documents: list[dict[str, Any]], query: dict[str, Any]) -> list[dict[str, Any]]:
    """What an export asks for: everything, or what lies behind an `_id`."""
    last = query["$and"][1]["$or"][0]["_id"]["$gt"] if "$and" in query else None
    return [d for d in documents if last is None or d["_id"] > last]


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Server)
        while header := self._read(16):
            size, number, _, code = struct.unpack("<iiii", header)
            body = self._read(size - 16)
            assert code in (_OP_MSG, 2004), code
            if code == 2004:  # OP_QUERY: the first handshake of old and new drivers
                start = body.index(b"\0", 4) + 9
                reply = bson.encode(self.server.answer(bson.decode(body[start:])))
                front = struct.pack("<iqii", 8, 0, 0, 1)
                code, payload = 1, front + reply
            else:
                try:
                    reply = bson.encode(self.server.answer(bson.decode(body[5:])))
                except DroppedError:
                    return
                payload = struct.pack("<iB", 0, 0) + reply
            head = struct.pack("<iiii", 16 + len(payload), 0, number, code)
            self.request.sendall(head + payload)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.request.recv(size - len(data))
            if not part:
                return b""
            data += part
        return data


@contextmanager
def serving(documents: list[dict[str, Any]]) -> Iterator[Server]:
    """A server in a thread while the block runs."""
    server = Server(documents)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.silence.set()
        server.shutdown()
        server.server_close()
        thread.join()
