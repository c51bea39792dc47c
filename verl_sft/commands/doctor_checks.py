"""What a machine has for training and collecting; no check can fail the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from verl_sft.errors import VerlSftError

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy",
             "pyarrow", "hydra-core", "fsspec")  # fmt: skip
# Package -> what it is for, and the pip line.
_OPTIONAL = {
    "flash-attn": "pip install 'verl-sft[flash]'",
    "liger-kernel": "pip install 'verl-sft[liger]'",
    "alfworld": "pip install 'verl-sft[alfworld]'",
    "textworld": "pip install 'verl-sft[alfworld]'",
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install torchao",
    "pymongo": "pip install 'verl-sft[mongo]'",
    "wandb": "pip install wandb",
    "s3fs": "pip install s3fs",
}
_GIB = 1 << 30
_WRITTEN = 64 << 20  # bytes of the trial file
_WAIT_S = 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `state` is ok, warning or problem; `fix` says what to do."""

    state: str
    name: str
    told: str
    fix: str = ""


def machine(directory: Path, *, handshake: bool) -> Iterator[Finding]:
    """Look at this machine; `directory` is where a run would write."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", packages),
        ("devices", devices),
        ("attention", attention),
        ("disk", lambda: disk(directory)),
        ("memory", memory),
        ("alfworld", alfworld),
        ("hub", hub),
    ]
    if handshake:
        checks.append(("ranks", ranks))
    for name, check in checks:
        yield from guarded(name, check)


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks becomes a finding itself."""
    try:
        yield from check()
    except ImportError as error:
        yield Finding(WARNING, name, f"not looked at: {error}", "Install what is missing above")
    except (OSError, VerlSftError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        yield Finding(PROBLEM, name, f"{type(error).__name__}: {error}")


def packages() -> Iterator[Finding]:
    """Versions of what is needed, and which optional packages are absent."""
    python = ".".join(map(str, sys.version_info[:3]))
    known = [f"python {python}"]
    missing = []
    for package in _PACKAGES:
        version = version_of(package)
        if version:
            known.append(f"{package} {version}")
        else:
            missing.append(package)
    yield Finding(OK if sys.version_info >= (3, 11) else PROBLEM, "versions", ", ".join(known))
    if missing:
        yield Finding(
            PROBLEM, "packages", f"missing: {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )  # fmt: skip
    there = [f"{p} {version_of(p)}" for p in _OPTIONAL if version_of(p)]
    absent = {line: p for p, line in _OPTIONAL.items() if not version_of(p)}
    yield Finding(OK, "optional packages", ", ".join(there) or "none")
    if absent:
        lines = "; ".join(f"{package}: {line}" for line, package in absent.items())
        yield Finding(OK, "not installed", ", ".join(absent.values()), f"If wanted: {lines}")


def version_of(package: str) -> str | None:
    """The installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """GPUs, bf16 and cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(OK, "cores", f"{cores} usable, load {os.getloadavg()[0]:.1f}")
    import torch

    from verl_sft.distributed.sharding import compute_dtype

    count = torch.cuda.device_count()
    if not count:
        built = f"; torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        yield Finding(
            WARNING, "GPU", f"none is visible{built}",
            "Training runs on the CPU: enough for small models and for trying things out",
        )  # fmt: skip
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        state = OK if free > 0.9 * total else WARNING
        yield Finding(
            state, f"GPU {index}", f"{facts.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} free",
            "" if state == OK else "Another process holds memory of it",
        )  # fmt: skip
    device = torch.device("cuda" if count else "cpu")
    half = compute_dtype("auto", device=device) is torch.bfloat16
    kind = "in hardware" if half else "not in hardware: engine.dtype=auto computes in fp32"
    yield Finding(OK, "bf16", f"{kind} ({device.type})")


def attention() -> Iterator[Finding]:
    """Kernels that are there, and the one that `auto` takes."""
    import torch

    from verl_sft.distributed.sharding import compute_dtype
    from verl_sft.model.attention import pick_attention

    found = ["sdpa", "split"]
    if importlib.util.find_spec("flash_attn"):
        found.append("flash_attention_2")
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        found.append("varlen")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = compute_dtype("auto", device=device) is torch.bfloat16
    chosen = pick_attention("auto", device=device, half=half)
    yield Finding(OK, "attention", f"{', '.join(found)}; auto takes {chosen}")


def disk(directory: Path) -> Iterator[Finding]:
    """Space and write speed of the directory."""
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=place, prefix=".tmp-doctor") as stream:
        block = os.urandom(1 << 20)
        for _ in range(min(_WRITTEN, free // 4) >> 20):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    speed = size / (time.perf_counter() - started) / 1e6
    low = free < 10 * _GIB
    yield Finding(
        WARNING if low or speed < 50 else OK,
        "disk",
        f"{place.absolute()}: {free / _GIB:.1f} GiB free, {speed:.0f} MB/s written",
        "A checkpoint takes 12 bytes per trained parameter; choose trainer.default_local_dir "
        "with room"
        if low
        else "",
    )


def memory() -> Iterator[Finding]:
    """Host memory and shared memory."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = pages * size / _GIB
    limit = _read_number(Path("/sys/fs/cgroup/memory.max"))
    told = f"{total:.1f} GiB" + (f", this container may use {limit / _GIB:.1f}" if limit else "")
    yield Finding(OK, "memory", told)
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free / _GIB
        yield Finding(
            OK if free >= 0.5 else WARNING, "shared memory", f"{free:.1f} GiB free in {shm}",
            "" if free >= 0.5 else "NCCL needs more between GPUs: docker run --shm-size=8g",
        )  # fmt: skip


def alfworld() -> Iterator[Finding]:
    """Whether ALFWorld is importable without leaving traces, and where its games are."""
    if version_of("alfworld") is None:
        yield Finding(
            WARNING, "ALFWorld", "not installed", "To collect: pip install 'verl-sft[alfworld]'"
        )
        return
    code = (
        "import os; from verl_sft.envs.alfworld_engine import import_alfworld\n"
        "before = dict(os.environ)\n"
        "import_alfworld('alfworld.agents.environment.alfred_tw_env')\n"
        "print(dict(os.environ) == before and not os.listdir(os.environ['HOME']))"
    )
    with tempfile.TemporaryDirectory(prefix="verl_sft_") as home:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
            timeout=_WAIT_S, env={**os.environ, "HOME": home},
        )  # fmt: skip
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(PROBLEM, "ALFWorld", f"cannot be imported: {why}", _OPTIONAL["alfworld"])
        return
    clean = "without side effects" if last == "True" else "but leaves traces in HOME"
    yield Finding(OK, "ALFWorld", f"{version_of('alfworld')}, is imported {clean}")
    games = os.environ.get("ALFWORLD_DATA")
    there = bool(games) and (Path(str(games)) / "json_2.1.1").is_dir()
    yield Finding(
        OK, "public games", f"in {games}" if there else "none (ALFWORLD_DATA)",
        "" if there else "verl-sft make-games makes games of the same kind",
    )  # fmt: skip


def hub() -> Iterator[Finding]:
    """Whether models may be fetched."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = [n for n in names if os.environ.get(n, "0").lower() not in ("", "0", "false")]
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    mode = f"offline ({', '.join(offline)})" if offline else "online if the network is"
    yield Finding(OK, "Hugging Face", f"{mode}; {models} models in {cache}")


def ranks() -> Iterator[Finding]:
    """Whether two processes of this machine can talk through gloo on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys, torch, datetime, torch.distributed as d\n"
        "from verl_sft.processes import die_with_parent\n"
        "die_with_parent()\n"
        f"d.init_process_group('gloo', init_method='tcp://127.0.0.1:{port}', world_size=2,\n"
        "    rank=int(sys.argv[1]), timeout=datetime.timedelta(seconds=30))\n"
        "x = torch.ones(1); d.all_reduce(x); assert x.item() == 2; d.destroy_process_group()\n"
    )
    importlib.metadata.version("torch")
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        children = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code, str(rank)],
                stdout=errors,
                stderr=errors,
            )
            for rank in range(2)
        ]
        try:
            codes = [child.wait(timeout=_WAIT_S) for child in children]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for child in children:
                child.kill()
                child.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no answer"])[-1]
    if any(codes):
        yield Finding(
            PROBLEM, "ranks", f"two local ranks cannot talk: {last}",
            "Check that a firewall lets 127.0.0.1 through; GLOO_SOCKET_IFNAME=lo may help",
        )  # fmt: skip
        return
    took = time.perf_counter() - started
    yield Finding(OK, "ranks", f"two gloo ranks met on port {port} in {took:.1f} s")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
