"""Rows of the training files held out for validation: whole groups, chosen by a seeded hash.

Every group has a place between 0 and 2^64, from the seed and its name. Groups below a cut are held
out, the others are trained on; both sides are read from the same files by that one number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from verl_sft.errors import UsageError
from verl_sft.records.build import group_of
from verl_sft.records.mix import Source, place_of, read_mix
from verl_sft.records.parse import ReadOptions
from verl_sft.safe_io import content_hash, make_output_dir, write_json
from verl_sft.types import JSON


def hold_out(
    sources: Sequence[Source],
    *,
    size: float,
    seed: int,
    options: ReadOptions,
    folder: Path,
) -> tuple[list[Source], list[Source]]:
    """The sources of both sides: train and validation.

    Caps and fractions of a source come first, so what is divided is what would be trained on.

    Args:
        sources: all training data; read once to count groups, unless `folder` knows them.
        size: rows to hold out: below 1 a share, else a number; whole groups, so about as many.
        seed: another seed holds out other groups.
        options: how rows are read.
        folder: where the cut is kept.

    Raises:
        UsageError: everything is one group, or nothing would be left to train on.
        InputError: a file cannot be read.
    """
    cut = _known_cut(sources, size=size, seed=seed, options=options, folder=folder)
    sides = [
        [replace(source, side=side, split_seed=seed, split_cut=cut) for source in sources]
        for side in ("train", "val")
    ]
    return sides[0], sides[1]


def _known_cut(
    sources: Sequence[Source], *, size: float, seed: int, options: ReadOptions, folder: Path
) -> int:
    stats = [(file, file.stat()) for source in sources for file in source.files]
    key: JSON = {
        "files": [[str(f.absolute()), s.st_size, s.st_mtime_ns] for f, s in stats],
        "sources": [source.choices() for source in sources],
        "read": asdict(options),
        "wanted": [size, seed],
    }
    path = folder / f"held_out-{content_hash(key)}.json"
    if path.is_file():
        return int(json.loads(path.read_text("utf-8"))["cut"])
    rows: Counter[int] = Counter()
    whole = [replace(source, repeat=1) for source in sources]
    for record in read_mix(whole, options=options, reject=lambda _: None):
        rows[place_of(group_of(record), seed)] += 1
    cut = _cut(rows, size=size)
    make_output_dir(folder)
    write_json(path, {"cut": cut, **key})
    return cut


def _cut(rows: Counter[int], *, size: float) -> int:
    """The place below which groups are held out: as many as come nearest to `size` rows."""
    total = rows.total()
    wanted = round(size * total) if size < 1 else int(size)
    if wanted >= total or len(rows) < 2:
        what = f"{total} usable rows" if len(rows) != 1 else f"{total} rows of one group"
        raise UsageError(
            f"data.val_size={size:g} leaves nothing to train on: there are {what}",
            why="A group (a task, an episode, one beginning of a chat) is never divided",
            fix="Lower data.val_size, or give data.val_files",
        )
    held, places = 0, sorted(rows)
    for before, place in enumerate(places[:-1]):
        if before and held + rows[place] / 2 >= wanted:
            return place
        held += rows[place]
    return places[-1]
