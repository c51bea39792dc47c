"""A MongoDB collection as a file of JSON lines, exported once: read-only, ordered by `_id`.

Training reads the file, so ranks, shuffling by seed, resumed runs and fingerprints do not depend
on what happens to the collection meanwhile. An export that was killed goes on behind the last
document that reached the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from verl_sft.config.secrets import check_address, hidden, reveal
from verl_sft.config.sources import MongoConfig
from verl_sft.errors import InputError, MissingExtraError, UsageError, VerlSftError
from verl_sft.records.mix import Source
from verl_sft.records.mongo_filter import checked_filter
from verl_sft.records.mongo_values import plain_value
from verl_sft.safe_io import (
    AppendLog,
    content_hash,
    file_sha256,
    make_output_dir,
    publishing,
    read_log,
    storage_error,
)
from verl_sft.types import JSON

_POLL_SECONDS = 0.1
_TIMEOUTS = ("serverSelectionTimeoutMS", "connectTimeoutMS", "socketTimeoutMS")
_LINKS = ("task", "traj")  # fields whose links are replaced by what they point to
# BSON types in the order in which `_id`s sort; $gt compares within one of them only.
_ORDER = ("null", "number", "string", "object", "binData", "objectId", "bool", "date")


def mongo_sources(
    config: MongoConfig, split: str, *, folder: Path, say: Callable[[str], None] = print
) -> list[Source]:
    """The documents of one split as a source; nothing where the config asks for none.

    Args:
        config: which documents; `val_filter` is the filter of the split "val".
        split: "train" or "val".
        folder: where exports are kept, beside the token cache.
        say: told what was exported or found.

    Raises:
        UsageError: a key is missing or wrong.
        InputError: the server cannot be read, or no document fits.
        StorageError: the export cannot be written.
    """
    if not config.uri or (split == "val" and config.val_filter is None):
        return []
    query = checked_filter(config.filter if split == "train" else config.val_filter)
    return [Source((export(config, query=query, folder=folder, say=say),))]


def database_reader(
    config: MongoConfig, split: str, *, folder: Path, say: Callable[[str], None] = print
) -> Callable[..., Path]:
    """What opens addresses in `data.train_files`: as if `data.mongo` named them.

    Args:
        config: filter, limit and time-outs; database and collection of addresses without them.
        split: as `mongo_sources`.
        folder: as `mongo_sources`.
        say: as `mongo_sources`.

    Returns:
        A function of an address and, as `query`, its own filter; it raises as `mongo_sources`.
    """
    default = config.filter if split == "train" else config.val_filter

    def read(address: str, *, query: Any = default) -> Path:
        asked = at_address(config, address)
        return export(asked, query=checked_filter(query), folder=folder, say=say)

    return read


def at_address(config: MongoConfig, address: str) -> MongoConfig:
    """The config with server, database and collection of mongodb://HOST/DATABASE.COLLECTION."""
    front, _, options = reveal(address).partition("?")
    scheme, _, rest = front.partition("://")
    host, _, path = rest.partition("/")
    database, _, collection = (unquote(part) for part in path.partition("."))
    uri = f"{scheme}://{host}/{quote(database, safe='')}" + (f"?{options}" if options else "")
    return replace(
        config,
        uri=uri,
        database=database or config.database,
        collection=collection or config.collection,
    )


def export(
    config: MongoConfig, *, query: JSON, folder: Path, say: Callable[[str], None] = print
) -> Path:
    """The file with the documents of a query; made once per folder, by one process of many.

    Raises:
        UsageError, InputError, StorageError: as `mongo_sources`.
    """
    shown = ", ".join(filter(None, (config.uri, config.database, config.collection)))
    wanted = [config.uri, config.database, config.collection, repr(query), config.limit]
    name = f"mongo-{content_hash(wanted)}"
    make_output_dir(folder)
    with _alone(folder / f".{name}.lock"):
        if found := sorted(folder.glob(f"{name}-*.jsonl")):
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(found[-1].stat().st_mtime))
            say(f"{shown}: as exported at {made}; delete {found[-1]} to export anew")
            return found[-1]
        part = folder / f".{name}.part"
        with connected(config) as database:
            count = _fetch(database, config, query=query, part=part)
            if not count:
                raise _empty(database, config, query)
        path = folder / f"{name}-{file_sha256(part)[:16]}.jsonl"
        with publishing(path) as temporary:
            os.replace(part, temporary)
        _journal(part).unlink()
        say(f"{shown}: {count:,} documents exported to {path}")
        return path


@contextlib.contextmanager
def connected(config: MongoConfig) -> Iterator[Any]:
    """The database of a config while the block runs; what pymongo reports becomes `InputError`.

    Raises:
        UsageError: no database is named.
        MissingExtraError: pymongo is not installed.
        InputError: the server does not answer, refuses, or the connection is lost.
    """
    try:
        import pymongo
        from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
    except ImportError as error:
        raise MissingExtraError("pymongo", "mongo", why="data.mongo needs it") from error
    shown = str(config.uri)
    check_address(reveal(shown))
    try:
        client: Any = pymongo.MongoClient(
            reveal(shown),
            appname="verl-sft",
            tz_aware=False,
            **dict.fromkeys(_TIMEOUTS, int(config.timeout_s * 1000)),
        )
    except (ConfigurationError, InvalidURI, ValueError) as error:
        raise UsageError(
            f"the address is not one of MongoDB: {hidden(str(error))}",
            where=f"data.mongo.uri={shown}",
            fix="Write mongodb://USER:PASSWORD@HOST:27017/DATABASE, special characters as %xx",
        ) from error
    try:
        yield _database(client, config)
    except PyMongoError as error:
        raise InputError(
            f"the server reports: {hidden(str(error)).splitlines()[0]:.200}",
            where=shown,
            why=type(error).__name__,
            fix="Check address, password and network, then run again: it goes on where it stopped",
        ) from error
    finally:
        client.close()


def _database(client: Any, config: MongoConfig) -> Any:
    if config.database:
        return client[config.database]
    from pymongo.errors import ConfigurationError

    with contextlib.suppress(ConfigurationError):
        return client.get_default_database()
    raise UsageError(
        "no database is named",
        where=f"data.mongo.uri={config.uri}",
        fix="Set data.mongo.database, or put its name behind the host",
    )


def _fetch(database: Any, config: MongoConfig, *, query: JSON, part: Path) -> int:
    """Write documents behind those that `part` holds already; returns how many it holds."""
    from bson import json_util

    collection, journal = database[config.collection], _journal(part)
    last: Any = None
    size = count = 0
    for state, _ in read_log(journal) if journal.exists() and part.exists() else ():
        last, size, count = json_util.loads(state["last"])["_id"], state["bytes"], state["count"]
    if size > (part.stat().st_size if part.exists() else 0):
        last, size, count = None, 0, 0
    if not count:
        journal.unlink(missing_ok=True)
    log = AppendLog(journal)
    try:
        with part.open("ab") as stream:
            stream.truncate(size)
            while config.limit < 0 or count < config.limit:
                left = config.batch_size if config.limit < 0 else config.limit - count
                page = query if not count else {"$and": [query, _behind(last)]}
                cursor = collection.find(page).sort("_id", 1).limit(min(left, config.batch_size))
                documents = list(cursor)
                if not documents:
                    break
                last, count = documents[-1]["_id"], count + len(documents)
                for document in with_links(database, documents):
                    line = json.dumps(plain_value(document), allow_nan=False).encode() + b"\n"
                    size += stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
                state = {"last": json_util.dumps({"_id": last}), "bytes": size, "count": count}
                log.append(state)
    except OSError as error:
        if isinstance(error, VerlSftError):
            raise
        raise storage_error(error, part) from error
    finally:
        log.close()
    return count


def _behind(last: Any) -> JSON:
    """The filter of all documents that sort behind an `_id`, of whatever types they are."""
    kind = _kind(last)
    later = _ORDER[_ORDER.index(kind) + 1 :] if kind in _ORDER else ()
    return {"$or": [{"_id": {"$gt": last}}, *({"_id": {"$type": t}} for t in later)]}


def _kind(value: Any) -> str:
    from bson import Decimal128, ObjectId

    kinds = (
        (type(None), "null"),
        (bool, "bool"),
        (int | float | Decimal128, "number"),
        (str, "string"),
        (dict, "object"),
        (bytes, "binData"),
        (ObjectId, "objectId"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "date")


def with_links(database: Any, documents: Sequence[JSON]) -> Iterator[JSON]:
    """Documents with the tasks and calls that they link to inside; dangling links stay links."""
    from bson import DBRef

    wanted: dict[str, set[Any]] = {}
    for document in documents:
        for link in _links(document):
            if isinstance(link, DBRef) and link.database in (None, database.name):
                wanted.setdefault(link.collection, set()).add(link.id)
    found = {
        (name, target["_id"]): target
        for name, ids in wanted.items()
        for target in database[name].find({"_id": {"$in": sorted(ids, key=repr)}})
    }

    def follow(link: Any) -> Any:
        is_link = isinstance(link, DBRef)
        return found.get((link.collection, link.id), link) if is_link else link

    for document in documents:
        changed = {
            name: [follow(v) for v in value] if isinstance(value, list) else follow(value)
            for name in _LINKS
            if (value := document.get(name)) is not None
        }
        yield {**document, **changed}


def _links(document: JSON) -> Iterator[Any]:
    for name in _LINKS:
        value = document.get(name)
        yield from value if isinstance(value, list) else [value]


def _empty(database: Any, config: MongoConfig, query: JSON) -> InputError:
    there = ", ".join(sorted(database.list_collection_names())[:10]) or "none"
    what = f"no document of '{config.collection}'" + (" fits the filter" if query else "")
    return InputError(
        what if query else f"{what} is there",
        where=f"{config.uri}, {database.name}",
        why=f"The collections there: {there}",
        fix="Correct data.mongo.collection, .database or .filter",
    )


def _journal(part: Path) -> Path:
    return part.with_name(f"{part.name}.log")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that dies with the process; others wait here."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
