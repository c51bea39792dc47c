"""MongoDB: exports that resume, values as JSON, filters that only compare, uploads.

mongomock stands in for a server; with `VERL_SFT_TEST_MONGODB_URI` the same tests also run there,
in a database of their own that is dropped afterwards.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import bson
import mongomock
import pymongo
import pytest
from hypothesis import HealthCheck, given, settings

from tests.chat_records import records
from tests.chat_templates import template_for
from verl_sft.audit.inspect import inspect
from verl_sft.cli import main
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.secrets import hidden, hide, reveal
from verl_sft.config.sources import MongoConfig
from verl_sft.config.train import DataConfig, MultiturnConfig
from verl_sft.data.sources import open_sources
from verl_sft.data.tokenizer import chatml
from verl_sft.errors import InputError, UsageError
from verl_sft.records import mongo
from verl_sft.records.convert import named
from verl_sft.records.mix import read_mix
from verl_sft.records.mongo import export, mongo_sources
from verl_sft.records.mongo_filter import checked_filter
from verl_sft.records.mongo_upload import UploadReport, upload
from verl_sft.records.mongo_values import plain_value
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.read import read_records
from verl_sft.records.schema import SFTRecord
from verl_sft.types import Message

SERVER = os.environ.get("VERL_SFT_TEST_MONGODB_URI", "")
DATABASES: dict[str, Any] = {}
MOCK = "mongodb://ann:s3cret@mock.example:27017/own"


@pytest.fixture(params=["mongomock", "server"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A config for an empty database."""
    name = f"verl_sft_test_{uuid.uuid4().hex[:8]}"
    if request.param == "mongomock":
        client: Any = mongomock.MongoClient(MOCK)
        monkeypatch.setattr(client, "close", lambda: None)
        monkeypatch.setattr(pymongo, "MongoClient", lambda *args, **options: client)
        monkeypatch.setitem(DATABASES, name, client[name])
        yield MongoConfig(uri=MOCK, database=name, batch_size=3)
        return
    if not SERVER:
        pytest.skip("VERL_SFT_TEST_MONGODB_URI names no server")
    with pymongo.MongoClient(SERVER) as client:
        monkeypatch.setitem(DATABASES, name, client[name])
        yield MongoConfig(uri=SERVER, database=name, batch_size=3)
        client.drop_database(name)


def collection(config: MongoConfig, name: str = "DBRecordData") -> Any:
    return DATABASES[str(config.database)][name]


def document(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": "4"},
        ],
        "advantages": {"1": 0.5},
        "scores": {"1": 1.0},
        "created_at_step": {"1": bson.Int64(0)},
        "reward": 1.0,
        "split": "train" if number % 2 else "valid",
        "n": number,
        **changes,
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_documents_become_records(config: MongoConfig, tmp_path: Path) -> None:
    """Train and validation documents by their filters, as records, in the order of `_id`."""
    collection(config).insert_many([document(n) for n in range(10)])
    config = replace(config, filter={"split": "train"}, val_filter='{"split": {"$in": ["valid"]}}')
    said: list[str] = []
    (train,) = mongo_sources(config, "train", folder=tmp_path, say=said.append)
    (val,) = mongo_sources(config, "val", folder=tmp_path, say=said.append)
    contents = [[r.messages[0].content for r in read_records(s.files)] for s in (train, val)]
    assert contents == [["1?", "3?", "5?", "7?", "9?"], ["0?", "2?", "4?", "6?", "8?"]]
    assert all(r.supervise == (1,) for r in read_records(train.files))
    assert "5 documents" in said[0] and "s3cret" not in "".join(said)
    assert mongo_sources(replace(config, val_filter=None), "val", folder=tmp_path) == []
    assert mongo_sources(MongoConfig(), "train", folder=tmp_path) == []


def test_an_export_is_made_once(config: MongoConfig, tmp_path: Path) -> None:
    """Later changes of the collection do not reach a run that has its file; others make theirs."""
    collection(config).insert_many([document(n) for n in range(4)])
    first = export(config, query={}, folder=tmp_path, say=lambda line: None)
    collection(config).delete_many({})
    said: list[str] = []
    assert export(config, query={}, folder=tmp_path, say=said.append) == first
    assert "delete" in said[0] and len(lines(first)) == 4
    with pytest.raises(InputError, match="no document"):
        export(replace(config, limit=2), query={}, folder=tmp_path)


def test_a_killed_export_goes_on(
    config: MongoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever page it dies on, the file is that of an export in one go; ids of all kinds."""
    ids: list[Any] = [bson.ObjectId() for _ in range(5)]
    ids += ["a", "b", 3, 1.5, {"k": 1}, True, datetime(2026, 1, 2), bson.Binary(b"x", 4)]
    collection(config).insert_many([document(n, _id=i) for n, i in enumerate(ids)])
    whole = export(config, query={}, folder=tmp_path / "whole", say=lambda line: None)
    assert len(lines(whole)) == len(ids)
    original = mongo.with_links
    for page in range(1, 5):
        left = page

        def dies(database: Any, documents: Any) -> Any:
            nonlocal left
            left -= 1
            for number, found in enumerate(original(database, documents)):
                if not left and number == 1:
                    raise KeyboardInterrupt
                yield found

        folder = tmp_path / str(page)
        monkeypatch.setattr(mongo, "with_links", dies)
        with pytest.raises(KeyboardInterrupt):
            export(config, query={}, folder=folder, say=lambda line: None)
        assert not list(folder.glob("mongo-*"))
        pages = [0]

        def counts(database: Any, documents: Any, pages: list[int] = pages) -> Any:
            pages[0] += 1
            return original(database, documents)

        monkeypatch.setattr(mongo, "with_links", counts)
        again = export(config, query={}, folder=folder, say=lambda line: None)
        assert again.read_bytes() == whole.read_bytes() and again.name == whole.name
        assert not list(folder.glob(".*.part*")) and pages[0] == 6 - page, "it began anew"


def test_one_of_many_processes_exports(config: MongoConfig, tmp_path: Path) -> None:
    """Ranks that start together share one file, made by one of them."""
    collection(config).insert_many([document(n) for n in range(20)])
    said: list[str] = []
    with ThreadPoolExecutor(4) as pool:  # the lock is one of open files, not of processes
        calls = [
            pool.submit(export, config, query={}, folder=tmp_path, say=said.append)
            for _ in range(4)
        ]
        paths = {call.result() for call in calls}
    assert len(paths) == 1 and sum("documents exported" in line for line in said) == 1


def test_training_data_comes_from_a_collection(config: MongoConfig, tmp_path: Path) -> None:
    """A run reads documents like any file; its directory holds no password."""
    collection(config).insert_many([document(n) for n in range(6)])
    data = DataConfig(mongo=config, multiturn=MultiturnConfig(enable=True))
    words = InspectConfig(data=data, out=str(tmp_path / "out"))
    store, _ = inspect(words, tokenizer=template_for(chatml(), name="chatml").spec)
    assert len(store) == 6 and store.source(0).startswith("mongo-")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(b"s3cret" in path.read_bytes() for path in files)


def test_limit_and_pages(config: MongoConfig, tmp_path: Path) -> None:
    """A limit takes the first by `_id`, whatever the size of a page."""
    collection(config).insert_many([document(n, _id=n) for n in (5, 3, 1, 4, 2)])
    found = {}
    for size in (1, 2, 4, 100):
        asked = replace(config, limit=4, batch_size=size)
        path = export(asked, query={}, folder=tmp_path / str(size), say=lambda line: None)
        found[size] = [row["_id"] for row in lines(path)]
    assert set(map(tuple, found.values())) == {(1, 2, 3, 4)}


def test_links_are_followed(config: MongoConfig, tmp_path: Path) -> None:
    """A trajectory is exported with the calls and the task that it links to."""
    calls = [
        {
            "_id": n,
            "status": "completed",
            "request": {"messages": [{"role": "user", "content": "u"}]},
            "response": {"choices": [{"message": {"role": "assistant", "content": f"a{n}"}}]},
        }
        for n in range(2)
    ]
    collection(config, "DispatchedSamplingTask").insert_many(calls)
    collection(config, "Task").insert_one({"_id": "t", "tid": "task-1", "scores": [0.0, 1.0]})
    links = [bson.DBRef("DispatchedSamplingTask", n) for n in range(2)]
    record = {"task": bson.DBRef("Task", "t"), "traj": links, "score": 1.0, "status": "scored"}
    collection(config, "Record").insert_one(record)
    asked = replace(config, collection="Record")
    path = export(asked, query={}, folder=tmp_path, say=lambda line: None)
    found = list(read_records(path))
    assert [r.messages[-1].content for r in found] == ["a0", "a1"]
    assert {r.task_id for r in found} == {"task-1"} and found[0].meta["agentrl"]["advantages"]


def test_values_as_json() -> None:
    """Each BSON type is JSON that says the same; what JSON cannot say is text."""
    oid, day = bson.ObjectId(), datetime(2026, 1, 2, 3, 4, 5)
    cases: list[tuple[Any, Any]] = [
        (oid, str(oid)),
        (day, "2026-01-02T03:04:05Z"),
        (bson.Decimal128("1.5"), 1.5),
        (bson.Decimal128("0.1234567890123456789"), "0.1234567890123456789"),
        (bson.Decimal128("NaN"), "NaN"),
        (bson.Int64(2**40), 2**40),
        (bson.Binary(b"\x00\xff"), "AP8="),
        (float("nan"), "nan"),
        (bson.DBRef("c", 1), {"$ref": "c", "$id": 1}),
        (bson.Timestamp(0, 1), "1970-01-01T00:00:00Z"),
        ({"a": [oid, None, True]}, {"a": [str(oid), None, True]}),
    ]
    for value, wanted in cases:
        assert plain_value(value) == wanted
        assert json.loads(json.dumps(plain_value(value), allow_nan=False)) == wanted


def test_schemas_with_references_survive_the_wire() -> None:
    """`$ref` of a tool's JSON schema is no link, though pymongo decodes it as one."""
    schema = {"a": {"$ref": "#/$defs/x"}, "b": {"$ref": "#/y", "description": "d"}, "$id": "s"}
    assert plain_value(bson.decode(bson.encode({"tools": [schema]}))) == {"tools": [schema]}


INJECTIONS: list[tuple[Any, str]] = [
    ({"$where": "sleep(1e9)"}, "$where"),
    ('{"$where": "this.a"}', "$where"),
    ({"a": {"$where": "1"}}, "$where"),
    ({"$expr": {"$function": {"body": "f", "args": [], "lang": "js"}}}, "$expr"),
    ({"a": {"$function": {"body": "f"}}}, "$function"),
    ({"a": {"$accumulator": {}}}, "$accumulator"),
    ({"$or": [{"a": 1}, {"$where": "1"}]}, "$where"),
    ({"$and": [{"$nor": [{"a": {"$not": {"$where": "1"}}}]}]}, "$where"),
    ({"a": {"$elemMatch": {"b": {"$where": "1"}}}}, "$where"),
    ({"a": {"$elemMatch": {"$where": "1"}}}, "$where"),
    ({"a": {"$in": [{"$where": "1"}]}}, "$where"),
    ({"a": {"$gt": "", "$where": "1"}}, "$where"),
    ({"a": {"$eq": {"b": {"$function": {}}}}}, "$function"),
    ({"$out": "users"}, "$out"),
    ({"$merge": {"into": "users"}}, "$merge"),
    ([{"$match": {}}, {"$out": "users"}], "pipeline"),
    ('[{"$out": "users"}]', "pipeline"),
    ({"$lookup": {"from": "users"}}, "$lookup"),
    ({"$sample": {"size": 1}}, "$sample"),
    ({"a": {"$regex": "(a+)+$"}}, "$regex"),
    ({"$text": {"$search": "x"}}, "$text"),
    ({"$jsonSchema": {}}, "$jsonSchema"),
    ({"$comment": "x"}, "$comment"),
    ({"a.$where": "1"}, "name of a field"),
    ({"a\0": 1}, "name of a field"),
    ({1: 2}, "name of a field"),
    ({"a": {"$gt": {"$where": 1}}}, "$where"),
    ({"a": {"$exists": {"$where": 1}}}, "$exists"),
    ({"$or": {"a": 1}}, "$or"),
    ({"$or": [5]}, "expected an object"),
    ({"a": {"$in": 5}}, "$in"),
    ({"a": {"$oid": "not an id"}}, "neither an id nor a date"),
    ({"a": {"$oid": "65f0" * 6, "$where": "1"}}, "$oid"),
    ("{", "not JSON"),
    (json.loads('{"a":' * 200 + "1" + "}" * 200), "too deeply"),
    ({"a": object()}, "object"),
]


@pytest.mark.parametrize(("query", "named"), INJECTIONS)
def test_filters_cannot_do_more_than_compare(query: Any, named: str) -> None:
    """Code, writes, pipelines and unknown operators are refused by name, however deep."""
    with pytest.raises(UsageError) as refused:
        checked_filter(query)
    assert named in refused.value.what and "$gte" in refused.value.fix


def test_filters_that_compare(config: MongoConfig, tmp_path: Path) -> None:
    """What is allowed means what it says on the server; ids and dates have their types."""
    oid = bson.ObjectId()
    rows = [document(0, _id=oid, when=datetime(2026, 1, 1)), document(1, when=None, more=[1, 2])]
    collection(config).insert_many(rows)
    for query, count in (
        ({"_id": {"$oid": str(oid)}}, 1),
        ({"when": {"$gte": {"$date": "2026-01-01T00:00:00Z"}}}, 1),
        ({"$or": [{"n": 0}, {"n": {"$in": [1, 5]}}], "reward": {"$gt": 0.5, "$lte": 1}}, 2),
        ({"more": {"$elemMatch": {"$gt": 1}}}, 1),
        ({"n": {"$not": {"$eq": 0}}}, 1),
        ({"scores.1": 1.0}, 2),
        ('{"split": "train"}', 1),
        (None, 2),
    ):
        asked = replace(config, filter=query)
        (source,) = mongo_sources(asked, "train", folder=tmp_path, say=lambda line: None)
        assert len(lines(source.files[0])) == count, query


def test_addresses_lose_their_passwords(config: MongoConfig) -> None:
    """Only the process that was given an address can open it; nothing else ever holds it."""
    assert "s3cret" not in str(MongoConfig(uri=MOCK)) and hidden(MOCK).endswith(
        "@mock.example:27017/own"
    )
    shown = hide("mongodb://u:p%40ss@h1,h2/db?x=1")
    assert (
        shown == "mongodb://***@h1,h2/db?x=1" and reveal(shown) == "mongodb://u:p%40ss@h1,h2/db?x=1"
    )
    assert hide("mongodb://plain/db") == reveal("mongodb://plain/db")
    with pytest.raises(UsageError, match="lost its password"):
        reveal("mongodb://***@never.seen/db")


@pytest.mark.parametrize("words", [["--dry-run"], ["data.mongo.limit=0"]])
def test_no_command_prints_a_password(words: list[str], capsys: Any) -> None:
    """Neither the resolved configuration nor an error shows it."""
    main(["train", f"data.mongo.uri={MOCK}", *words])
    told = capsys.readouterr()
    assert "s3cret" not in told.out + told.err


def address(config: MongoConfig, name: str = "DBRecordData") -> str:
    """What `data.train_files` would hold for a collection of the test's database."""
    front, _, options = reveal(str(config.uri)).partition("?")
    host = front.rpartition("/")[0] if front.count("/") > 2 else front
    return f"{host}/{config.database}.{name}" + (f"?{options}" if options else "")


def test_an_address_in_the_files_is_the_same_as_its_keys(
    config: MongoConfig, tmp_path: Path
) -> None:
    """`data.train_files=mongodb://HOST/DB.COLLECTION` reads what `data.mongo.*` would."""
    collection(config, "other.rows").insert_many([document(n) for n in range(6)])
    asked = replace(config, collection="other.rows", filter={"split": "train"})
    (by_keys,) = mongo_sources(asked, "train", folder=tmp_path / "keys", say=lambda line: None)
    data = DataConfig(
        train_files=address(config, "other.rows"),
        val_files={"all": [address(config, "other.rows")]},
        mongo=MongoConfig(filter={"split": "train"}, batch_size=2),
    )
    assert "s3cret" not in repr(data)
    said: list[str] = []
    train, val = open_sources(data, cache=tmp_path, say=said.append)
    assert train[0].files[0].read_bytes() == by_keys.files[0].read_bytes()
    assert len(lines(val["all"][0].files[0])) == 6 and "s3cret" not in "".join(said)


def test_collections_in_a_mix(config: MongoConfig, tmp_path: Path) -> None:
    """Several collections and files, each with its weight and its own filter."""
    collection(config, "a").insert_many([document(n) for n in range(6)])
    collection(config, "b").insert_many([document(n) for n in range(4)])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": document(9)["messages"]}) + "\n")
    spec = [
        {"path": address(config, "a"), "weight": 2.0, "filter": {"n": {"$lt": 2}}, "name": "A"},
        {"path": address(config, "b"), "max_rows": 3},
        str(path),
    ]
    sources, _ = open_sources(DataConfig(train_files=spec), cache=tmp_path, say=lambda line: None)
    options = ReadOptions(multiturn=True)
    found = list(read_mix(sources, options=options))
    assert [r.sample_weight for r in found] == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert [r.data_source for r in found[:2]] == ["A", "A"]
    wrong = DataConfig(train_files={"path": str(path), "filter": {"n": 1}})
    with pytest.raises(UsageError, match="only documents"):
        open_sources(wrong, cache=tmp_path)
    for command in (["convert", f"in={address(config)}", f"out={tmp_path / 'o'}"],):
        assert main(command) == 2


@pytest.mark.parametrize(
    "uri", ["mongodb://ann:p@s3cret@h/d", "mongodb://ann:s3cret/x@h/d", "mongodb://ann:s3cret?@h/d",
            "mongodb://ann:s3:cret@h/d", "mongodb://ann:s3cret#@h/d"],
)  # fmt: skip
def test_passwords_that_break_an_address(uri: str, tmp_path: Path) -> None:
    """Characters that must be escaped are named; no part of the password reaches an error."""
    with pytest.raises(UsageError, match="%40") as refused:
        export(MongoConfig(uri=uri, timeout_s=0.1), query={}, folder=tmp_path)
    assert "s3" not in str(refused.value) and "cret" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["data.train_files=mongodb://ann:s3cret@h1,h2/own.rows?replicaSet=r", "--dry-run"],
        ["data.train_files=[mongodb://ann:s3cret@h/own.rows]", "--dry-run"],
        ["data.train_files=[{path: mongodb://ann:s3cret@h/own.rows, weight: 2}]", "--dry-run"],
        ["data.val_files={a: mongodb://ann:s3cret@h/own.rows}", "--dry-run"],
        ["data.mongo.uri=[mongodb://ann:s3cret@h/own", "--dry-run"],
        ["data.mongo.uri='mongodb://ann:s3cret'@h/own'", "--dry-run"],
        ["data.mongo.uri=ann:s3cret@h/own", "--dry-run"],
        ["data.max_length=mongodb://ann:s3cret@h/own", "--dry-run"],
        ["data.train_file=mongodb://ann:s3cret@h/own", "--dry-run"],
        ["data.custom_cls.path=mongodb://ann:s3cret@h/own", "--dry-run"],
        ["mongodb://ann:s3cret@h/own", "--dry-run"],
        ["--db_connection_string", "mongodb://ann:s3cret@h/own", "--tp_size", "2"],
    ],
)
def test_no_configuration_shows_a_password(words: list[str], capsys: Any) -> None:
    """Printed or refused, in any key and any shape."""
    main(["train", *words])
    told = capsys.readouterr()
    assert (told.out or told.err) and "s3cret" not in told.out + told.err


def test_an_address_that_is_none(tmp_path: Path) -> None:
    """A wrong address and a missing database are named, without the password."""
    for uri, said in (("http://ann:s3cret@x/d", "not one of MongoDB"), ("mongodb://x", "database")):
        with pytest.raises(UsageError, match=said) as refused:
            export(MongoConfig(uri=uri), query={}, folder=tmp_path)
        assert "s3cret" not in str(refused.value)


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    """The error names address and reason, not the password."""
    asked = MongoConfig(uri="mongodb://ann:s3cret@127.0.0.1:1/d", timeout_s=0.05)
    with pytest.raises(InputError, match="reports") as refused:
        export(asked, query={}, folder=tmp_path)
    assert "s3cret" not in str(refused.value) and refused.value.exit_code == 3


CHAT = (Message("user", "u"), Message("assistant", "a"))


def stored(config: MongoConfig, found: list[SFTRecord], **options: Any) -> tuple[Any, list[Reject]]:
    report, bad = UploadReport(), list[Reject]()
    chosen = {"split": "train", "batch_size": 2, **options}
    upload(collection(config), named(found), report=report, reject=bad.append, **chosen)
    return report, bad


def test_upload_twice_is_upload_once(config: MongoConfig, tmp_path: Path) -> None:
    """The same records are there once; fields that AgentRL changed meanwhile stay changed."""
    some = [replace(SFTRecord(messages=CHAT), episode_id=f"e{n}", seed=n) for n in range(5)]
    some = [replace(r, record_id=f"r{r.seed}") for r in some]
    report, bad = stored(config, some[:3])
    assert (report.inserted, report.present, bad) == (3, 0, [])
    collection(config).update_many({}, {"$set": {"fetched": True}})
    report, _ = stored(config, some)
    assert (report.inserted, report.present) == (2, 3)
    assert collection(config).count_documents({"fetched": True}) == 3
    one = collection(config).find_one({"record_id": "e4"})
    assert (one["split"], one["fetched"], one["advantages"]) == ("train", False, {"1": 1.0})
    assert isinstance(one["_id"], bson.ObjectId)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=records())
def test_what_is_uploaded_comes_back(
    config: MongoConfig, tmp_path: Path, record: SFTRecord
) -> None:
    """Up and down again, a record is what it was; what BSON cannot hold is refused."""
    collection(config).delete_many({})
    (wanted,) = named([record])
    _, bad = stored(config, [record])
    if bad:
        text = "".join(map(repr, (record.messages, record.tools, record.meta)))
        assert bad[0].code == "NOT_BSON" and ("\\ud" in text or "\\x00" in text)
        return
    path = export(config, query={}, folder=tmp_path / uuid.uuid4().hex, say=lambda line: None)
    (back,) = read_records(path)
    own = back.meta.get("agentrl")
    back = replace(back, source="", meta={k: v for k, v in back.meta.items() if k != "agentrl"})
    assert own is not None and back == wanted


def test_documents_have_a_limit(config: MongoConfig) -> None:
    """A record above 16 MB is refused by name, the others are stored."""
    big = replace(SFTRecord(messages=CHAT), meta={"logprobs": "x" * (17 << 20)})
    report, (bad,) = stored(config, [big, SFTRecord(messages=CHAT)])
    assert bad.code == "TOO_LARGE" and "16 MB" in bad.message and report.inserted == 1


def test_the_upload_command(config: MongoConfig, tmp_path: Path, capsys: Any) -> None:
    """From any format, with counts, a file of refused rows and an exit code."""
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    rows: list[Any] = [{"conversations": turns, "system": str(n)} for n in range(3)]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([*rows, {"conversations": "lost"}]))
    words = [f"in={path}", "to=mongodb", f"uri={reveal(str(config.uri))}",
             f"database={config.database}", f"rejected={tmp_path / 'rejected.jsonl'}"]  # fmt: skip
    assert main(["upload", *words]) == 3
    told = capsys.readouterr()
    assert "inserted: 3; there already: 0" in told.out and "s3cret" not in told.out + told.err
    assert lines(tmp_path / "rejected.jsonl")[0]["row"] == 3
    assert main(["upload", *words, "max_reject_fraction=0.5", "from=sharegpt"]) == 0
    assert "inserted: 0; there already: 3" in capsys.readouterr().out
    assert main(["upload", f"in={path}"]) == 2
