"""Build the token cache of a run and write what it would train on: table, JSON, page, dump."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from verl_sft.audit.gather import Outcomes, audit_json, choose, find_sources, page_samples
from verl_sft.audit.page import page
from verl_sft.audit.spell import Speller
from verl_sft.config.checks import naming, template_text, tokenizer_folder
from verl_sft.config.inspect import InspectConfig
from verl_sft.config.train import ModelConfig
from verl_sft.data.load import load_samples, read_options
from verl_sft.data.sources import open_sources
from verl_sft.data.store import SampleStore
from verl_sft.data.template import TokenizerSpec
from verl_sft.data.tokenizer import load_tokenizer
from verl_sft.errors import UsageError
from verl_sft.records.mix import read_mix
from verl_sft.safe_io import dump_json, make_output_dir, publishing, write_json, write_text
from verl_sft.types import JSON


def inspect(
    config: InspectConfig, *, tokenizer: TokenizerSpec | None = None
) -> tuple[SampleStore, list[str]]:
    """Write `audit.json`, `audit.html` and the dump; returns the cache and lines to print.

    Args:
        config: what to read and where to write.
        tokenizer: default: that of `model.partial_pretrain`.

    Raises:
        UsageError: no data or no model was named.
        StorageError: nothing can be written there.
    """
    if tokenizer is None:
        tokenizer = _tokenizer(config.model)
    out = make_output_dir(Path(config.out).expanduser())
    cache = Path(config.data.cache_dir) if config.data.cache_dir else out / "token_cache"
    most = config.max_rows if config.max_rows >= 0 else config.data.train_max_samples
    sources, _ = open_sources(config.data, cache=cache)
    files = [file for source in sources for file in source.files]
    store = load_samples(
        sources,
        tokenizer=tokenizer,
        config=config.data,
        cache_dir=cache,
        max_samples=most,
        check=False,
    )
    speller = Speller(tokenizer)
    chosen = choose(store, most=config.page_samples)
    outcomes = Outcomes(wanted={store.source(i) for i in chosen}, most_failed=config.page_samples)
    limit = None if most < 0 else most
    records = read_mix(sources, options=read_options(config.data), reject=lambda _: None)
    outcomes.read(islice(records, limit))
    chosen = sorted({*chosen, *find_sources(store, outcomes.failed, most=config.page_samples)})
    audit = audit_json(
        store, outcomes=outcomes, files=[f.name for f in files], model=tokenizer.template_name
    )
    samples, left_out = page_samples(store, chosen, outcomes=outcomes, speller=speller)
    write_json(out / "audit.json", audit)
    write_text(out / "audit.html", page(audit, samples=samples, left_out=left_out))
    if config.dump:
        dump(store, path=Path(config.dump).expanduser(), speller=speller)
    return store, [*table(audit), *first_samples(store, speller=speller, count=config.show)]


def _tokenizer(config: ModelConfig) -> TokenizerSpec:
    key = "model.tokenizer_path" if config.tokenizer_path else "model.partial_pretrain"
    path, given = config.tokenizer_path or config.partial_pretrain, config.custom_chat_template
    if not path:
        raise UsageError("no model given", fix="Set model.partial_pretrain=HF_DIR")
    folder = tokenizer_folder(key, path)
    with naming(key):
        return load_tokenizer(
            folder,
            trust_remote_code=config.trust_remote_code,
            chat_template=template_text(given) if given else None,
        )


def dump(store: SampleStore, *, path: Path, speller: Speller) -> None:
    """Publish one JSON object per sample, for anyone who wants to check the masks."""
    make_output_dir(path.parent)
    with publishing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for sample in store:
            row = {
                "record_id": sample.record_id,
                "source": sample.source,
                "input_ids": sample.input_ids.tolist(),
                "target_ids": sample.target_ids.tolist(),
                "weights": sample.weights.tolist(),
                "position_ids": list(range(len(sample))),
                "learned_text": speller.learned_text(sample),
            }
            stream.write(dump_json(row) + "\n")


def first_samples(store: SampleStore, *, speller: Speller, count: int) -> Iterator[str]:
    """The first samples, one line per learned message with the context before it as its length."""
    for index in range(min(count, len(store))):
        sample = store[index]
        yield f"\n{sample.source}  {sample.num_learned} of {len(sample)} tokens learned"
        yield from (f"  {line}" for line in speller.compressed(sample))


def table(audit: JSON) -> Iterator[str]:
    """The figures of `audit.json` for a terminal, one name and value per line."""
    figures = audit["figures"]
    stops = figures["turns"] - figures["lost_stops"] - figures["without_stop"]
    reasons = {**figures["rejected"], **figures["dropped"]}
    rows = {
        "rows": f"{figures['rows']:,}",
        "samples": f"{figures['samples']:,}",
        "folded rows": f"{figures['folded']:,}",
        "views of split conversations": f"{figures['split']:,}",
        "tokens": f"{figures['tokens']:,}",
        "learned tokens": f"{figures['learned_tokens']:,} ({figures['learned_share']:.1%})",
        "learned turns": f"{figures['turns']:,}",
        "turns with a learned stop token": f"{stops:,}",
        "samples that lost a stop token": f"{figures['samples_with_lost_stop']:,}",
        "samples that learn nothing": f"{figures['samples_learning_nothing']:,}",
        "truncated": f"{figures['truncated']:,}",
        "control texts escaped": f"{figures['escaped']:,}",
        "longest sample": f"{figures['longest']:,} tokens",
        "refused or dropped": f"{sum(reasons.values()):,}",
        **{f"  {code}": f"{count:,}" for code, count in sorted(reasons.items())},
    }
    for name, found in audit["by_template"].items():
        rows[f"exact by {name}"] = f"{found['exact_rows']:,} of {figures['rows']:,} rows"
    width = max(map(len, rows))
    yield from (f"{name:<{width}}  {value}" for name, value in rows.items())
    for row in audit["refused_rows"][:5]:
        yield f"\nrefused {row['where']}: {row['code']}: {row['reason']}"
        if row["fix"]:
            yield f"  fix: {row['fix']}"
