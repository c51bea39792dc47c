"""Exports to a hub and to S3 through the real clients, against servers on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import FakeHub, running_hub
from tests.train_ranks import run_ranks, toy_config, toy_model
from verl_sft.export.upload import upload

SEND = """
import sys
from pathlib import Path
from verl_sft.export.upload import try_upload
print(try_upload(Path(sys.argv[1]), sys.argv[2], say=print, attempts=2, wait_s=0.01))
"""
READ = """
import sys
from verl_sft.records.resolve import resolve_files
for path in resolve_files(sys.argv[1], split="train"):
    print(path.name, path.read_bytes())
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    (made / "adapter").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    for name in ("config.json", "adapter/adapter_config.json", "manifest.json"):
        (made / name).write_text(json.dumps({"name": name}))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def started(code: str, *words: str, tmp_path: Path, **env: str) -> subprocess.Popen[str]:
    """A Python of its own: the hub's client reads its settings when it is imported."""
    settings = {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path / "hf"),
        "VERL_SFT_CACHE": str(tmp_path / "cache"),
        **env,
    }
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        env={**os.environ, **settings}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ran(code: str, *words: str, tmp_path: Path, **env: str) -> str:
    out, err = started(code, *words, tmp_path=tmp_path, **env).communicate(timeout=120)
    assert "Traceback" not in err and "hf_secret" not in out + err, err
    return out


def test_a_hub_gets_the_folder_in_one_commit(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """Created private, small and large files, byte for byte; once more into a folder of it."""
    told = ran(SEND, str(folder), "hf://ann/model", tmp_path=tmp_path, HF_ENDPOINT=hub.url)
    assert told.endswith("done: hf://ann/model\n")
    assert hub.repos["ann/model"] == contents(folder)
    assert hub.commits == ["ann/model"] and "ann/model" in hub.private
    ran(SEND, str(folder), "hf://ann/model/step/2", tmp_path=tmp_path, HF_ENDPOINT=hub.url)
    inside = {f"step/2/{name}": value for name, value in contents(folder).items()}
    assert hub.repos["ann/model"] == {**contents(folder), **inside}


@pytest.mark.parametrize(
    ("part", "status"),
    [("repos/create", 403), ("preupload", 403), ("objects/batch", 403), ("/commit/", 500)],
)
def test_a_hub_that_refuses(
    hub: FakeHub, folder: Path, tmp_path: Path, part: str, status: int
) -> None:
    """At whatever request: each attempt is told, nothing is published, the folder stays."""
    before = contents(folder)
    hub.fail = {part: status}
    name = f"bob/model{len(part)}"
    try:
        told = ran(SEND, str(folder), f"hf://{name}", tmp_path=tmp_path, HF_ENDPOINT=hub.url)
    finally:
        hub.fail = {}
    assert told.count("UPLOAD FAILED") == 2 and str(status) in told
    assert f"the export is complete in {folder}" in told
    assert "failed: " in told.splitlines()[-1]
    assert not hub.repos.get(name) and contents(folder) == before
    assert "done:" in ran(SEND, str(folder), f"hf://{name}", tmp_path=tmp_path, HF_ENDPOINT=hub.url)
    assert hub.repos[name] == before


def test_nobody_answers(folder: Path, tmp_path: Path) -> None:
    """A closed port is told like any other failure."""
    address = "http://127.0.0.1:9"
    told = ran(SEND, str(folder), "hf://ann/x", tmp_path=tmp_path, HF_ENDPOINT=address)
    assert told.count("UPLOAD FAILED") == 2 and "refused" in told


def test_an_upload_that_is_interrupted(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    """A killed process leaves the folder here whole, and no commit there."""
    hub.slow_s = 60.0
    hub.asked.clear()
    before = contents(folder)
    try:
        child = started(
            SEND, str(folder), "hf://ann/killed", tmp_path=tmp_path, HF_ENDPOINT=hub.url
        )
        while not any("PUT /large/" in line for line in hub.asked):
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
    finally:
        hub.slow_s = 0.0
    assert hub.repos["ann/killed"] == {} and contents(folder) == before


def test_a_run_uploads_its_export_once(tmp_path: Path) -> None:
    """One that failed is tried again by the same command; one that arrived is not sent twice."""
    model, run, place = toy_model(tmp_path), tmp_path / "run", tmp_path / "place"
    place.mkdir()

    def go(**changes: Any) -> dict[str, Any]:
        config = toy_config(
            model, run, trainer__export=True, trainer__total_training_steps=1, **changes
        )
        assert [r["code"] for r in run_ranks(config, hook=None)] == [0]
        status: dict[str, Any] = json.loads((run / "status.json").read_text())
        return status

    assert "upload" not in go()
    assert go(trainer__upload_uri=str(place / "one"))["upload"].startswith("done: ")
    assert contents(place / "one") == contents(run / "huggingface")
    (place / "one" / "config.json").write_text("changed there")
    assert "upload" not in go(trainer__upload_uri=str(place / "one"))
    assert (place / "one" / "config.json").read_text() == "changed there"


def test_rows_from_a_hub(hub: FakeHub, tmp_path: Path) -> None:
    """`hf://datasets/...` is read through the real client, a directory by its split's name."""
    hub.repos["ann/rows"] = {"train.jsonl": b'{"a": 1}\n', "val.jsonl": b'{"a": 2}\n'}
    for address in ("hf://datasets/ann/rows/train.jsonl", "hf://datasets/ann/rows"):
        told = ran(READ, address, tmp_path=tmp_path, HF_ENDPOINT=hub.url)
        assert told == "train.jsonl b'{\"a\": 1}\\n'\n"


def test_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export to a bucket and rows out of it, through s3fs; an absent bucket is told."""
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    from verl_sft.errors import StorageError
    from verl_sft.records.resolve import resolve_files

    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "VERL_SFT_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = fs.S3FileSystem()
        bucket.mkdir("place")
        assert upload(folder, "s3://place/runs/one") == 4
        there = {p.removeprefix("place/runs/one/"): bucket.cat(p)
                 for p in bucket.find("place/runs/one")}  # fmt: skip
        assert there == contents(folder)
        (folder / "model.safetensors").write_bytes(b"shorter")
        upload(folder, "s3://place/runs/one")
        assert bucket.cat("place/runs/one/model.safetensors") == b"shorter"
        bucket.pipe("place/set/train.jsonl", b'{"a": 1}\n')
        bucket.pipe("place/set/val.jsonl", b'{"a": 2}\n')
        for address in ("s3://place/set", "s3://place/set/train.jsonl", "s3://place/set/tr*.jsonl"):
            (found,) = resolve_files(address, split="train")
            assert found.read_bytes() == b'{"a": 1}\n'
        with pytest.raises(StorageError, match="s3://absent/x"):
            upload(folder, "s3://absent/x")
        assert contents(folder)["model.safetensors"] == b"shorter"
    finally:
        running.stop()
