"""Files -> a token cache that all ranks share: tokenised in parallel, once, by whoever is first.

No rank waits inside a collective: each computes the same key, and opens the published directory or
builds it under a file lock that dies with its process. A cache of the same files with another key
is never used; what differs is said, or refused under `data.token_cache=require`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path

from verl_sft.config.train import DataConfig
from verl_sft.data.fold import conversations
from verl_sft.data.stale import key_changes, remove_old, stale_cache
from verl_sft.data.store import LoadReport, SampleStore, StoreWriter
from verl_sft.data.template import TokenizerSpec
from verl_sft.data.tokenizer import load_tokenizer
from verl_sft.data.view import RenderOptions
from verl_sft.data.workers import tokenise_all
from verl_sft.errors import InputError, VerlSftError
from verl_sft.records.mix import Source, read_mix
from verl_sft.records.parse import ReadOptions, Reject
from verl_sft.records.values import LEFT_OUT
from verl_sft.safe_io import content_hash, file_sha256, make_output_dir, publish_dir, storage_error
from verl_sft.types import JSON

_POLL_SECONDS = 0.1
_KEPT_CACHES = 8  # of one cache directory: the splits and the variants that are being compared


def load_samples(
    files: Sequence[Path | Source],
    *,
    tokenizer: str | Path | TokenizerSpec,
    config: DataConfig,
    cache_dir: Path,
    num_workers: int | None = None,
    max_samples: int = -1,
    check: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> SampleStore:
    """Open the token cache of these files, building it first where it does not exist.

    Every process may call this at the same time; one builds, the others wait for the result.

    Args:
        files: files of records, or sources of a mix, in order.
        tokenizer: model folder or hub name, or an already read tokenizer.
        config: the `data` section; keys that change tokens are part of the cache key.
        cache_dir: where caches are kept.
        num_workers: tokenising processes; default `config.num_workers`, else one per core.
        max_samples: rows to read at most; -1: all.
        check: as `check_store`; without it a store of any quality is opened.
        say: told by the process that builds why an older cache of these files is not used.

    Raises:
        InputError: too many rows were refused, nothing is left, a row is too long under
            `data.truncation=error`, or there is no valid cache under `data.token_cache=require`.
        StorageError: the cache cannot be written, or is damaged.
    """
    spec = tokenizer if isinstance(tokenizer, TokenizerSpec) else load_tokenizer(tokenizer)
    sources = [file if isinstance(file, Source) else Source((file,)) for file in files]
    key = _cache_key(sources, spec=spec, config=config, max_samples=max_samples)
    path = cache_dir.expanduser() / content_hash(key)
    if not path.exists():
        make_output_dir(path.parent)
    with _building(path) as must_build:
        if must_build:
            _say_stale(path, key=key, sources=sources, config=config, say=say)
            workers = num_workers or config.num_workers or len(os.sched_getaffinity(0))
            limit = None if max_samples < 0 else max_samples
            _build(path, sources, spec=spec, config=config, workers=workers, limit=limit, key=key)
            remove_old(path.parent, keep=_KEPT_CACHES)
    with contextlib.suppress(OSError):  # a cache may be read-only
        os.utime(path)  # those that were opened last are kept
    store = SampleStore(path)
    if check:
        check_store(store, config=config)
    return store


def check_store(store: SampleStore, *, config: DataConfig) -> None:
    """Raise if the samples are not what may be trained on.

    Raises:
        InputError: too many rows were refused, nothing is left, or a row is too long under
            `data.truncation=error`.
    """
    report, journal = store.report, store.path / "rejected.jsonl"
    fraction = report.num_rejected / max(report.rows, 1)
    reasons = ", ".join(f"{code} {count}" for code, count in report.rejected.most_common(5))
    if report.rejected["too_long"] and config.truncation == "error":
        raise InputError(
            f"{report.rejected['too_long']} of {report.rows} rows have more than "
            f"data.max_length={config.max_length} tokens",
            where=str(journal),
            why="data.truncation is 'error'",
            fix="Raise data.max_length, or set data.truncation=oldest_turns, left, right or drop",
        )
    if fraction > config.max_reject_fraction:
        raise InputError(
            f"{report.num_rejected} of {report.rows} rows were refused ({reasons})",
            where=str(journal),
            why=f"More than data.max_reject_fraction={config.max_reject_fraction}",
            fix="The file says for each row what to change",
        )
    if len(store) == 0:
        dropped = ", ".join(f"{code} {count}" for code, count in report.dropped.most_common(5))
        raise InputError(
            f"nothing is left to train on, of {report.rows} rows",
            where=str(journal),
            why=", ".join(filter(None, (reasons, dropped))),
            fix="Check the data files and the reasons in this file",
        )


def _say_stale(
    path: Path,
    *,
    key: JSON,
    sources: Sequence[Source],
    config: DataConfig,
    say: Callable[[str], None],
) -> None:
    """Tell why the newest cache of the same files is of no use; refuse to build if so asked."""
    stale = stale_cache(path.parent, paths=_absolute(sources), key=key)
    changes = [] if stale is None else key_changes(stale.key, key)
    if config.token_cache == "require":
        raise InputError(
            "the token cache is stale" if stale else "there is no token cache of these files",
            where=str(stale.path if stale else path.parent),
            why="; ".join(changes),
            fix="Set data.token_cache=build to tokenise anew, or undo the change",
        )
    if stale is not None:
        say(f"token cache {stale.path.name} is stale ({'; '.join(changes)}): tokenising anew")


def _build(
    path: Path,
    sources: Sequence[Source],
    *,
    spec: TokenizerSpec,
    config: DataConfig,
    workers: int,
    limit: int | None,
    key: JSON,
) -> None:
    temporary = path.parent / f".tmp-{path.name}.{uuid.uuid4().hex[:8]}"
    report = LoadReport(template=spec.template_name)
    try:
        with StoreWriter(temporary) as writer:

            def refuse(bad: Reject) -> None:
                report.rows += 1
                left_out = bad.code in LEFT_OUT
                (report.dropped if left_out else report.rejected)[bad.code] += 1
                writer.reject(
                    {"file": bad.file, "row": bad.row, "field": bad.field, "code": bad.code,
                     "reason": bad.message, "fix": bad.fix}
                )  # fmt: skip

            records = read_mix(
                sources, options=read_options(config), reject=refuse, counts=report.mix
            )
            chats = conversations(islice(records, limit), multiturn=config.multiturn.enable)
            options = RenderOptions.from_config(config)
            for chunk in tokenise_all(chats, spec=spec, options=options, num_workers=workers):
                writer.add(
                    chunk.ids,
                    weights=chunk.weights,
                    labels=chunk.labels,
                    lengths=chunk.lengths,
                    names=chunk.names,
                    groups=chunk.groups,
                    flags=chunk.flags,
                )
                for row in chunk.refused:
                    writer.reject(row)
                report.add(chunk.counts)
            writer.finish(report, key={**key, "paths": _absolute(sources)})
        if not path.exists():  # a machine without shared locks may have been faster
            publish_dir(temporary, path)
    except OSError as error:
        if isinstance(error, VerlSftError):
            raise
        raise storage_error(error, temporary) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _building(path: Path) -> Iterator[bool]:
    """Whether this process has to build `path`; others hold here until it is there."""
    if path.exists():
        yield False
        return
    lock = os.open(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while not path.exists():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_POLL_SECONDS)
        yield not path.exists()
    finally:
        os.close(lock)


def read_options(config: DataConfig) -> ReadOptions:
    """Which columns hold what, out of the `data` section."""
    prompt, response = config.prompt_dict_keys, config.response_dict_keys
    return ReadOptions(
        multiturn=config.multiturn.enable,
        messages_key=config.multiturn.messages_key,
        tools_key=config.multiturn.tools_key,
        prompt_key=config.prompt_key,
        response_key=config.response_key,
        prompt_dict_keys=None if prompt is None else tuple(prompt),
        response_dict_keys=None if response is None else tuple(response),
        enable_thinking_key=config.multiturn.enable_thinking_key,
        format=config.format,
        mask_history=config.mask_history,
        **asdict(config.agentrl),
        **asdict(config.raw),
    )


def _cache_key(
    sources: Sequence[Source], *, spec: TokenizerSpec, config: DataConfig, max_samples: int
) -> JSON:
    """Everything that the tokens depend on, as JSON."""
    tokenizer = asdict(spec)
    tokenizer["backend_json"] = hashlib.sha256(spec.backend_json.encode()).hexdigest()
    return {
        "code": _code_version(),
        "readers": _own_readers(sources, config),
        "tokenizer": tokenizer,
        "read": asdict(read_options(config)),
        "render": asdict(RenderOptions.from_config(config)),
        "max_samples": max_samples,
        "files": [[f.name, file_sha256(f)] for source in sources for f in source.files],
        "sources": [source.choices() for source in sources],
    }


def _absolute(sources: Sequence[Source]) -> list[str]:
    return [str(file.absolute()) for source in sources for file in source.files]


@cache
def _code_version() -> str:
    """A hash of the modules that decide tokens: no version number that someone forgets to raise."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("data", "records"):
        for source in sorted((package / folder).rglob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _own_readers(sources: Sequence[Source], config: DataConfig) -> JSON:
    """The hash of each `file.py` that a format is read by: its code decides tokens too."""
    names = {config.format, *(source.format for source in sources)}
    files = {Path(name.rpartition(":")[0]) for name in names if ".py:" in name}
    return {str(file): file_sha256(file) for file in sorted(files) if file.is_file()}
