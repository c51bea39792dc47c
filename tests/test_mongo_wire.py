"""What an export says and bears on the wire: batches, lost connections, refusals, silence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mongo_server import DroppedError, Server, serving
from verl_sft.config.sources import MongoConfig
from verl_sft.errors import InputError
from verl_sft.records.mongo import export

ROWS = [
    {"_id": n, "messages": [{"role": "user", "content": f"{n}?"}], "text": "x" * n}
    for n in range(11)
]
READS = {"find", "getMore", "killCursors", "listCollections"}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(ROWS) as found:
        yield found


def asked(server: Server, **more: Any) -> MongoConfig:
    return MongoConfig(uri=f"{server.address}/own", batch_size=5, timeout_s=0.5, **more)


def exported(server: Server, folder: Path, **more: Any) -> list[Any]:
    path = export(asked(server, **more), query={}, folder=folder, say=lambda line: None)
    return [json.loads(line) for line in path.read_text().splitlines()]


def on_find(number: int, what: Callable[[], dict[str, Any] | None]) -> Any:
    """Meddle with the find of that number (from 1), and those behind it."""
    seen = [0]

    def meddle(name: str, command: dict[str, Any]) -> dict[str, Any] | None:
        seen[0] += name == "find"
        return what() if name == "find" and seen[0] >= number else None

    return meddle


def drop() -> dict[str, Any] | None:
    raise DroppedError


def test_pages_and_batches_are_read_in_order(server: Server, tmp_path: Path) -> None:
    """Cursors are read to their end, pages go on behind the last `_id`, and nothing is written."""
    assert [row["_id"] for row in exported(server, tmp_path)] == list(range(11))
    names = server.names()
    assert names.count("find") == 4 and names.count("getMore") >= 4 and set(names) <= READS
    limits = [c["limit"] for c in server.commands if "find" in c]
    assert limits == [5, 5, 5, 5]


def test_a_dropped_connection_is_made_anew(server: Server, tmp_path: Path) -> None:
    """One lost answer is asked for again by the driver; the rows are those of a quiet run."""
    lost = [drop]
    server.meddle = on_find(2, lambda: lost.pop()() if lost else None)
    assert exported(server, tmp_path) == ROWS
    assert server.names().count("find") == 5


def test_a_server_that_goes_away_is_resumed_by_id(server: Server, tmp_path: Path) -> None:
    """What was read stays; the next run asks for nothing that it has."""
    server.meddle = on_find(3, drop)
    with pytest.raises(InputError, match="goes on where it stopped"):
        exported(server, tmp_path)
    server.meddle = lambda name, command: None
    before = len(server.commands)
    assert exported(server, tmp_path) == ROWS
    filters = [c["filter"] for c in server.commands[before:] if "find" in c]
    assert filters[0]["$and"][1]["$or"][0] == {"_id": {"$gt": 9}}


def test_a_lost_cursor_is_resumed_by_id(server: Server, tmp_path: Path) -> None:
    """A cursor that the server forgot ends this run; the next begins with the page's start."""
    gone = {"ok": 0.0, "code": 43, "errmsg": "cursor id 1 not found"}
    server.meddle = lambda name, command: gone if name == "getMore" else None
    with pytest.raises(InputError, match="cursor id"):
        exported(server, tmp_path)
    server.meddle = lambda name, command: None
    assert exported(server, tmp_path) == ROWS


@pytest.mark.parametrize(
    ("code", "said"), [(18, "Authentication failed"), (13, "not authorized on own")]
)
def test_refusals_are_told(server: Server, tmp_path: Path, code: int, said: str) -> None:
    """The server's reason stands in the error, and is not asked for again and again."""
    server.meddle = on_find(1, lambda: {"ok": 0.0, "code": code, "errmsg": said})
    with pytest.raises(InputError, match=said):
        exported(server, tmp_path)
    assert server.names().count("find") == 1


def test_wrong_passwords_stay_hidden(server: Server, tmp_path: Path) -> None:
    """The handshake of a login is refused; neither address nor error shows the password."""
    failed = {"ok": 0.0, "code": 18, "errmsg": "Authentication failed."}
    server.meddle = lambda name, command: failed if name.startswith("sasl") else None
    uri = server.address.replace("//", "//ann:s3cret@") + "/own?authMechanism=PLAIN&tls=false"
    config = MongoConfig(uri=uri, timeout_s=0.5)
    with pytest.raises(InputError, match="Authentication failed") as refused:
        export(config, query={}, folder=tmp_path)
    assert "s3cret" not in str(refused.value) and "find" not in server.names()


def test_a_silent_server_is_not_waited_for_without_end(server: Server, tmp_path: Path) -> None:
    """`data.mongo.timeout_s` holds for answers too, not only for finding the server."""

    def silent() -> dict[str, Any] | None:
        server.silence.wait(20)
        raise DroppedError

    server.meddle = on_find(2, silent)
    start = time.monotonic()
    with pytest.raises(InputError, match="timed out"):
        exported(server, tmp_path)
    assert time.monotonic() - start < 15, "it would have waited for the server's whole silence"


def test_nobody_is_there(tmp_path: Path) -> None:
    """The address is named, and nothing is left behind that looks like an export."""
    with serving([]) as gone:
        address = gone.address
    with pytest.raises(InputError, match=address):
        export(MongoConfig(uri=f"{address}/own", timeout_s=0.1), query={}, folder=tmp_path)
    assert not list(tmp_path.glob("mongo-*"))
