"""A Hugging Face tokenizer, read once into a `TokenizerSpec`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_sft.config.hub import absence, hub_access
from verl_sft.data.template import TokenizerSpec
from verl_sft.errors import UsageError

CHATML_NAME = "built-in ChatML"


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, chat_template: str | None = None
) -> TokenizerSpec:
    """Read the tokenizer of a model folder or hub name; `chat_template` (jinja) replaces its own.

    Raises:
        UsageError: there is none, it is a slow one, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        with hub_access(str(path)):
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot load a tokenizer: {str(error).splitlines()[0]}",
            where=str(path),
            why=absence(str(path)),
            fix="Point model.partial_pretrain at a folder with a tokenizer.json",
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer_spec(tokenizer, name=str(path))


def tokenizer_spec(tokenizer: Any, *, name: str = "tokenizer") -> TokenizerSpec:
    """The parts of a loaded fast tokenizer that rendering needs.

    Without a chat template it gets the built-in ChatML, whose turns end with the tokenizer's
    end-of-sequence token where it has no `<|im_end|>` of its own.

    Raises:
        UsageError: a slow tokenizer, or none of the tokens that could end a turn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            "the tokenizer is a slow one",
            where=name,
            why="Exact masks need the character range of each token",
            fix="Convert it once: AutoTokenizer.from_pretrained(path).save_pretrained(path)",
        )
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    template_name = f"{name}: chat template"
    if not template:
        vocab = tokenizer.get_added_vocab()
        stop = "<|im_end|>" if "<|im_end|>" in vocab else special.get("eos_token")
        if stop is None:
            raise UsageError(
                "the tokenizer has neither a chat template nor an end-of-sequence token",
                where=name,
                fix="Give it one of the two",
            )
        template, template_name = chatml(stop=stop), f"{name}: {CHATML_NAME}"
    return TokenizerSpec(
        backend_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template,
        template_name=template_name,
        special_tokens=special,
    )


def chatml(*, stop: str = "<|im_end|>") -> str:
    """The built-in ChatML template, its turns ended by `stop`."""
    return (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        f"{{{{ {stop!r} + '\\n' }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
