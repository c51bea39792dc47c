"""Records into a MongoDB collection as AgentRL's DBRecordData documents.

The `_id` of a document is made of its record's id, so that storing the same records again adds
nothing, and an upload that was stopped can be run again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from verl_sft.records.parse import Reject
from verl_sft.records.schema import SFTRecord
from verl_sft.records.sources.agentrl import AGENTRL
from verl_sft.records.values import BadRowError
from verl_sft.types import JSON

MOST_BYTES = 16 << 20  # of one document, MongoDB's limit
_REPEATED = 11000  # MongoDB's code for an `_id` that is there already


@dataclass(slots=True)
class UploadReport:
    """What became of the records."""

    inserted: int = 0
    present: int = 0  # were there already, and stay as they are
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Records and rows that were looked at."""
        return self.inserted + self.present + self.refused.total()


def upload(
    collection: Any,
    records: Iterable[SFTRecord],
    *,
    split: str,
    batch_size: int,
    report: UploadReport,
    reject: Callable[[Reject], None],
) -> None:
    """Store records with their ids; what cannot be stored is refused with the reason.

    Args:
        collection: of pymongo.
        records: with `record_id`s.
        split: of those that do not name theirs.
        batch_size: documents per request.
        report: counts.
        reject: told of each record that is not stored.
    """
    documents = _documents(records, split, reject)
    while batch := list(islice(documents, batch_size)):
        present = _insert(collection, batch)
        report.present += present
        report.inserted += len(batch) - present


def _documents(
    records: Iterable[SFTRecord], split: str, reject: Callable[[Reject], None]
) -> Iterator[JSON]:
    assert AGENTRL.write is not None
    for number, record in enumerate(records):
        try:
            for row in AGENTRL.write(record):
                yield _document(row, record, split)
        except BadRowError as bad:
            file, _, row_number = record.source.rpartition(":")
            place = int(row_number) if row_number.isdigit() else number
            reject(Reject(file, place, bad.field, bad.code, bad.message, bad.fix))


def _document(row: JSON, record: SFTRecord, split: str) -> JSON:
    import bson
    from bson.errors import BSONError

    given = str(row.pop("_id", ""))
    digest = hashlib.sha256(record.record_id.encode("utf-8", "surrogatepass")).hexdigest()
    identity = bson.ObjectId(given if bson.ObjectId.is_valid(given) else digest[:24])
    document = {"split": split, "fetched": False, **row, "_id": identity}
    try:
        size = len(bson.encode(document))
    except (BSONError, ValueError, OverflowError, RecursionError) as error:
        raise BadRowError("", "NOT_BSON", f"MongoDB cannot hold it: {error}") from error
    if size > MOST_BYTES:
        raise BadRowError(
            "",
            "TOO_LARGE",
            f"{size:,} bytes; a document of MongoDB has at most {MOST_BYTES:,} (16 MB)",
            "Keep images and log probabilities out of the row, or cut it into shorter ones",
        )
    return document


def _insert(collection: Any, batch: list[JSON]) -> int:
    """Insert documents; returns how many were there already.

    Raises:
        BulkWriteError: one could not be inserted for another reason.
    """
    from pymongo.errors import BulkWriteError

    try:
        collection.insert_many(batch, ordered=False)
    except BulkWriteError as error:
        errors = error.details.get("writeErrors", [])
        if any(e.get("code") != _REPEATED for e in errors):
            raise
        return len(errors)
    return 0
