"""What reading is told and what it tells: which columns hold what, and rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: where it is, what is wrong, what to do."""

    file: str
    row: int
    field: str
    code: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.row}:{self.field}: {self.code}: {self.message}. {self.fix}"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Which columns hold what; the names are those of `data.*` in the training config."""

    multiturn: bool = False
    messages_key: str = "messages"
    tools_key: str = "tools"
    prompt_key: str = "prompt_data"
    response_key: str = "response_data"
    prompt_dict_keys: tuple[str, ...] | None = None
    response_dict_keys: tuple[str, ...] | None = None
    enable_thinking_key: str = "enable_thinking"
    format: str = "auto"
    columns: tuple[tuple[str, str], ...] = ()  # of a data set: (role of the column, its name)
    tags: tuple[tuple[str, str], ...] = ()  # ShareGPT keys and role names that differ
    mask_history: bool | None = None  # learn the last answer only; None: as the format has it
    drop_zero_advantage: bool | None = None  # of AgentRL; None: as the format has it
    minimal_advantage: float | None = None
    rows: str = "step"  # of raw episodes: step | episode
    prompt: str = ""  # template of their prompts; empty: as they were made
    history_length: int | None = None  # of windowed prompts; None: as they were made
    require_success: bool = True  # of episodes
    valid_actions: str = "any"

    @property
    def names_columns(self) -> bool:
        """Whether other columns than the default ones were asked for."""
        if self.multiturn:
            return self.messages_key != "messages"
        return (self.prompt_key, self.response_key) != ("prompt_data", "response_data")

    @property
    def reads_own_columns(self) -> bool:
        """Whether the keys are those of our own files, whose `messages_json` is the truth."""
        if self.multiturn:
            return self.messages_key == "messages"
        keys = (self.prompt_key, self.response_key)
        paths = (self.prompt_dict_keys or ("content",), self.response_dict_keys or ("content",))
        own_paths = all(tuple(p) == ("content",) for p in paths)
        return keys == ("prompt_data", "response_data") and own_paths
