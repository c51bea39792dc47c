"""Where chat templates run: jinja's immutable sandbox, with limits on work, text and numbers.

A template is a stranger's program. Every loop turn, macro call, concatenation, operator, filter and
method call is charged to the budget of its rendering; processor time and iterations are checked
inside loops, so a loop that prints nothing ends as well. What one operation may be given is bounded
by `limits`.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from verl_sft.data.jinja_code import DICT_NAMES, Generator, Marks, Rewriter
from verl_sft.data.limits import (
    COSTLY,
    MAX_LENGTH,
    MAX_PARTS,
    OutOfLimitsError,
    bounded,
    check_call,
    check_length,
    check_number,
    check_operands,
    check_size,
)

MAX_OUTPUT_CHARS = 50_000_000
_MAX_SECONDS = 2.0  # of processor time: a busy machine changes no result
_MAX_TURNS = 2_000_000
_MAX_CHARS = 400_000_000  # of all intermediate texts and lists
_LARGE = 10_000  # what is longer is worth a look at the clock
_MAX_FORMAT = 1000  # of a date

_MISSING = object()
_TEXTS = {str}
_HIDDEN = ("_loop_vars", "_block_vars")  # what jinja itself adds to calls
_SCALARS = frozenset((str, bool, type(None)))
_NUMBERS = (int, float, complex, bytes)
_LOOP_NAMES = frozenset(n for n in dir(jinja2.runtime.LoopContext) if n[0] != "_")
_TEXT_METHODS = frozenset(
    name for name in dir(str) if name[0] != "_" and not name.startswith("format")
)
# What no chat template needs: their work grows faster than their text, or they play dice.
_FORBIDDEN_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# These work on a whole text at once; the others walk through what they get.
_TEXT_FILTERS = frozenset(
    ("_to_json", "do_capitalize", "do_center", "do_default", "do_first", "do_float", "do_format",
     "do_forceescape", "do_indent", "do_int", "do_lower", "do_mark_safe", "do_replace",
     "do_string", "do_title", "do_trim", "do_truncate", "do_upper", "do_urlencode",
     "do_wordcount", "escape", "len", "soft_str", "sync_do_first", "do_last", "do_reverse",
     "do_attr")
)  # fmt: skip
_UNSEEN = frozenset(("do_default", "do_attr", "do_first", "sync_do_first", "len", "do_mark_safe"))
_COMPARING_TESTS = frozenset(
    ("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">",
     "greaterthan", "ge", ">=", "in")
)  # fmt: skip


class _Budget(threading.local):
    """What the rendering in this thread has used; constants are folded outside any rendering."""

    end = math.inf
    turns = 0
    chars = 0


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that all chat templates share; budgets are per thread and rendering."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))
    code_generator_class = Generator

    def __init__(self, today: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Marks, jinja2.ext.loopcontrols],
            finalize=self._spelled,
        )
        self._local = _Budget()
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise
        day = datetime.combine(date.fromisoformat(today), datetime.min.time())
        self.globals["strftime_now"] = functools.partial(_strftime, day)
        self.filters["tojson"] = _to_json
        self.filters.update({name: _forbidden(name) for name in _FORBIDDEN_FILTERS})
        self.filters = {name: self._limited(f) for name, f in self.filters.items()}
        self.filters.update(
            _tick=self._tick_filter,
            _kept=self._kept,
            _new=self._new_filter,
            _small=self._small,
            _joined=self._joined,
            _added=self._added,
        )
        tests: dict[str, Any] = self.tests
        tests.update({name: self._comparing(tests[name]) for name in _COMPARING_TESTS})

    def run(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The output of a template.

        Raises:
            OutOfLimitsError: it needs too much time, memory or output.
            Exception: whatever else the template raises.
        """
        self._local.end = time.thread_time() + _MAX_SECONDS
        self._local.turns = self._local.chars = 0
        pieces, size = [], 0
        for piece in template.generate(values):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise OutOfLimitsError(
                    f"the chat template prints over {MAX_OUTPUT_CHARS} characters"
                )
        return "".join(pieces)

    def _tick(self) -> None:
        """Charge one turn of a loop, call of a macro or of a filter."""
        local = self._local
        local.turns += 1
        if local.turns % 16 == 0:
            self._check_time()

    def _check_time(self) -> None:
        if time.thread_time() > self._local.end or self._local.turns > _MAX_TURNS:
            raise OutOfLimitsError(
                f"the chat template takes more than {_MAX_SECONDS:g} s or {_MAX_TURNS} loop turns"
            )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, refused where its result would be huge."""
        if (
            type(left) is type(right) is int
            and operator in ("+", "-")
            and abs(left) < _LARGE > abs(right)
        ):
            return self.binop_table[operator](left, right)
        check_operands(operator, left, right, charge=self._charge)
        return self._new(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, macro or method, charged."""
        # jinja hands out `format` wrapped.
        owner: Any = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, _NUMBERS):
            raise OutOfLimitsError("the chat template calls a method of a number")
        named = {k: v for k, v in kwargs.items() if k not in _HIDDEN}
        plain = not named and _SCALARS.issuperset(map(type, args))
        if plain and type(owner) is str and obj.__name__ not in COSTLY:
            check_length(owner)
            return self._new(obj(*args))
        given = args
        if not plain:
            given = tuple([bounded(a) for a in args])
            check_size((given, named))
        if not isinstance(owner, str):
            if isinstance(owner, list | tuple | dict):
                check_size(owner)
            return self._new(super().call(context, obj, *given, **kwargs))
        name = str(getattr(obj, "__name__", ""))
        check_call(name, [owner, *given, *([named] if named else [])], charge=self._charge)
        return self._new(obj(*given, **named))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`, without the long way round for what templates do most."""
        if type(obj) is dict and attribute not in DICT_NAMES:
            found = obj.get(attribute, _MISSING)
            return self.undefined(obj=obj, name=attribute) if found is _MISSING else found
        if type(obj) is str and attribute in _TEXT_METHODS:
            return getattr(obj, attribute)
        if type(obj) is jinja2.runtime.LoopContext and attribute in _LOOP_NAMES:
            return getattr(obj, attribute)
        if type(obj) is jinja2.utils.Namespace and attribute[:1] != "_" and hasattr(obj, attribute):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """The syntax tree with charges in it, as filters: those cost no sandboxed call."""
        return Rewriter().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    @jinja2.pass_context  # a filter that knows the context is not taken for a constant
    def _tick_filter(self, _: Any, value: Any) -> Any:
        self._tick()
        return value

    @jinja2.pass_context
    def _kept(self, _: Any, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self._charge(len(value))
            check_length(value)
        return value

    @jinja2.pass_context
    def _new_filter(self, _: Any, value: Any) -> Any:
        return self._new(value)

    @jinja2.pass_context
    def _small(self, _: Any, value: Any) -> Any:
        return self._spelled(value)

    @jinja2.pass_context
    def _joined(self, _: Any, *values: Any) -> Any:
        texts = (
            values if {*map(type, values)} == _TEXTS else [str(self._spelled(v)) for v in values]
        )
        return self._kept(_, "".join(texts))

    @jinja2.pass_context
    def _added(self, context: Any, *values: Any) -> Any:
        """`a + b + ...`: texts at once, anything else from left to right."""
        if {*map(type, values)} == _TEXTS:
            return self._kept(context, "".join(values))
        return functools.reduce(lambda a, b: self.call_binop(context, "+", a, b), values)

    def _limited(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks its arguments and charges its result."""
        name = run.__name__
        skip = bool(getattr(run, "jinja_pass_arg", None))  # its first argument is the environment

        @functools.wraps(run)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            given = [bounded(a) for a in args]
            values = [*given[skip:], *kwargs.values()]
            for value in values:
                if isinstance(value, str):
                    check_length(value, most=MAX_LENGTH if name in _TEXT_FILTERS else MAX_PARTS)
                elif name not in _UNSEEN:
                    check_size(value)
            check_call(name, values, charge=self._charge)
            return self._new(run(*given, **kwargs))

        return limited

    def _comparing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A test that compares, so that it cannot be run over a list for ever."""

        @functools.wraps(run)
        def limited(*args: Any) -> Any:
            self._tick()
            for value in args:
                if type(value) is not str and max(check_size(value)) > _LARGE:
                    self._check_time()
            return run(*args)

        return limited

    def _spelled(self, value: Any) -> Any:
        """A value that is about to be printed or compared, however often its parts are shared."""
        if type(value) not in _SCALARS:
            check_size(value)
        return value

    def _new(self, value: Any) -> Any:
        """A value that the template made: charged, and of bounded size when spelled out."""
        if isinstance(value, str):
            self._charge(len(value))
            check_length(value)
        elif type(value) is int:
            check_number(value)
        elif value is not None and not isinstance(value, bool):
            self._charge(check_size(value)[0])
        return value

    def _charge(self, count: int) -> None:
        self._local.chars += count
        if self._local.chars > _MAX_CHARS or count > _MAX_CHARS:
            raise OutOfLimitsError("the chat template builds more text than any conversation needs")
        if count > _LARGE:
            self._check_time()


def _forbidden(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OutOfLimitsError(f"the chat template uses the filter '{name}', which none needs")

    return refuse


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime(day: datetime, form: str) -> str:
    if len(form) > _MAX_FORMAT:
        raise OutOfLimitsError("the chat template formats a date at great length")
    return day.strftime(form)


def _raise(message: str) -> Iterator[str]:
    raise jinja2.TemplateError(message)
