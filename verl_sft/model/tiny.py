"""`verl-sft make-model`: a small Qwen2 model and a tokenizer trained on the data, from a seed."""

from __future__ import annotations

import glob
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl_sft.config.collect import MakeModelConfig
from verl_sft.errors import InputError, UsageError
from verl_sft.registry import unknown_name
from verl_sft.safe_io import make_output_dir, publish_dir

# hidden, intermediate, layers, heads, key-value heads; parameters without embeddings in the comment
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "nano": (64, 128, 2, 4, 2),  # 0.07M
    "tiny": (128, 352, 4, 4, 4),  # 0.8M
    "small": (256, 704, 4, 8, 8),  # 3M
    "medium": (384, 1024, 8, 6, 2),  # 12M
    "base": (768, 2048, 14, 12, 4),  # 90M
}
# A name such as " drawer 1" is then two tokens: copied sooner than " drawer", " ", "1".
_NUMBERS = [f" {digit}" for digit in range(10)]
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = """\
{%- if messages[0].role == 'system' or tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}
{{- '\\n\\n# Tools\\n' if messages[0].role == 'system' else '# Tools\\n' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n\\nCall a tool with <tool_call>{"name": ..., "arguments": ...}</tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first %}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set f = call.function if call.function else call %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def make_model(config: MakeModelConfig) -> Path:
    """Write the model folder; the same config and data give the same bytes.

    Returns:
        The folder, which `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        UsageError: no output folder or an unknown size; the folder exists already.
        InputError: no text in the data.
    """
    if config.size not in SIZES:
        raise UsageError(f"size={config.size}: unknown", fix=unknown_name("", "", SIZES).fix)
    if not config.out or not config.data:
        missing = "data" if config.out else "out"
        raise UsageError(
            f"{missing} is not given",
            where="make-model",
            fix="verl-sft make-model out=MODEL_DIR data=SFT_DATA_DIR",
        )
    out = Path(config.out).expanduser()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError("it exists already", where=f"out={out}", fix="Choose another folder")
    make_output_dir(out.parent)
    tokenizer = train_tokenizer(corpus(config.data), vocab_size=config.vocab_size)
    model = random_model(
        config.size,
        vocab_size=len(tokenizer),
        max_positions=config.max_position_embeddings,
        seed=config.seed,
        tokenizer=tokenizer,
    )
    temporary = out.parent / f".tmp-{out.name}.{uuid.uuid4().hex[:8]}"
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish_dir(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def corpus(data: str) -> Iterator[str]:
    """All texts of an sft_data directory or of parquet files, in file order.

    Raises:
        InputError: no parquet file there, one that cannot be read, or none of the known columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = ("messages_json", "messages", "prompt_data", "response_data")
    for path in _parquet_files(data):
        try:
            table = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError("not a whole parquet file", where=str(path), why=str(error)) from error
        with table:
            columns = [name for name in known if name in table.schema_arrow.names]
            if not columns:
                raise InputError(
                    "none of the text columns is there", where=str(path), fix=f"Known: {known}"
                )
            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield from _texts(row)


def _parquet_files(data: str) -> list[Path]:
    """The files of a folder (its training files if it has any), a file or a glob of either."""
    files: list[Path] = []
    given = Path(data).expanduser()
    for place in [given] if given.exists() else map(Path, sorted(glob.glob(str(given)))):
        inside = sorted(place.glob("train*.parquet")) or sorted(place.glob("*.parquet"))
        files += [place] if place.is_file() else inside
    if not files:
        raise InputError(
            "no parquet file there", where=f"data={data}", fix="Give an sft_data directory"
        )
    return files


def _texts(row: dict[str, Any]) -> Iterator[str]:
    messages = row.get("messages_json")
    messages = json.loads(messages) if messages else row.get("messages")
    for message in messages or ():
        if isinstance(message.get("content"), str):
            yield message["content"]
        for call in message.get("tool_calls") or ():
            yield json.dumps(call)
    for name in ("prompt_data", "response_data"):
        value = row.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield text


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with ChatML control tokens; every digit is its own token.

    A blank in front of a digit belongs to the digit, which the split of words would not allow.

    Counting is exact and ties are broken by token ids, so threads do not change the result.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    distinct = sorted(set(texts))
    if not distinct:
        raise InputError("no text to train the tokenizer on", where="data")
    backend = Tokenizer(models.BPE())
    # Qwen2's own split (single digits): AutoTokenizer gives a qwen2 model that class, whatever the
    # folder says, so that any other split would be trained but never used.
    pattern = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_NUMBERS),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(distinct, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(number, normalized=False) for number in _NUMBERS])
    tokenizer.chat_template = CHATML
    return tokenizer


def random_model(
    size: str, *, vocab_size: int, max_positions: int, seed: int, tokenizer: Any = None
) -> Any:
    """A Qwen2 model with random weights, fp32, tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    stop = tokenizer.eos_token_id if tokenizer is not None else 0
    pad = tokenizer.pad_token_id if tokenizer is not None else 0
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        # 1/sqrt(hidden), not the 0.02 of large models: a small one then learns to copy much sooner.
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=pad,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(eos_token_id=stop, pad_token_id=pad, do_sample=False)
    return model
