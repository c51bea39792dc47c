"""Where chat templates run: jinja's immutable sandbox, with limits on work, text and numbers.

A template is a stranger's program. Every loop turn, macro call, concatenation, operator, filter and
method call is charged to the budget of its rendering; processor time and iterations are checked
inside loops, so a loop that prints nothing ends as well.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized, ValuesView
from datetime import date, datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

GENERATION = ("\U0010f8f1", "\U0010f8f2")  # around {% generation %} blocks
MAX_OUTPUT_CHARS = 50_000_000
_MAX_SECONDS = 2.0  # of processor time: a busy machine changes no result
_MAX_TURNS = 2_000_000
_MAX_CHARS = 400_000_000  # of all intermediate texts and lists
_MAX_PARTS = 1_000_000  # of a list or mapping that is spelled out
_MAX_NUMBER = 1_000_000  # an argument that says how much
_PADDING = frozenset(
    ("ljust", "rjust", "center", "zfill", "expandtabs", "do_center", "do_indent", "do_batch")
) | {"do_slice", "sync_do_slice", "do_wordwrap"}
_WIDE = re.compile(r"\d{6}")  # a field width in a format text


_MISSING = object()
_PLAIN_TYPES = (jinja2.runtime.LoopContext, jinja2.utils.Namespace)
_DICT_NAMES = frozenset(dir(dict))
_TEXT_METHODS = frozenset(
    name for name in dir(str) if name[0] != "_" and not name.startswith("format")
)


class OutOfLimitsError(jinja2.TemplateError):
    """The template did more than any honest one does."""


class _Budget(threading.local):
    """What the rendering in this thread has used; constants are folded outside any rendering."""

    end = math.inf
    turns = 0
    chars = 0


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment that all chat templates share; budgets are per thread and rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, today: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Marks, jinja2.ext.loopcontrols],
            finalize=self._checked,
        )
        self._local = _Budget()
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise
        day = datetime.combine(date.fromisoformat(today), datetime.min.time())
        self.globals["strftime_now"] = day.strftime
        self.filters["tojson"] = _to_json
        self.filters = {name: self._limited(f) for name, f in self.filters.items()}
        self.filters.update(_tick=self._tick_filter, _kept=self._kept, _joined=self._joined)

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
        late = local.turns % 16 == 0 and time.thread_time() > local.end
        if late or local.turns > _MAX_TURNS:
            raise OutOfLimitsError(
                f"the chat template takes more than {_MAX_SECONDS:g} s or {_MAX_TURNS} loop turns"
            )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, refused where its result would be huge."""
        if operator == "+":
            return self._charged(left + right)
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        if operator in ("*", "**"):
            for this, other in ((left, right), (right, left)):
                if isinstance(this, int) and isinstance(other, Sized):
                    self._charge(max(this, 0) * len(other))
            _check_power(left, right, is_power=operator == "**")
        return self._charged(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, macro or method, charged."""
        # jinja hands out `format` wrapped.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if type(owner) is not str:
            return self._charged(super().call(context, obj, *args, **kwargs))
        self._check_text_method(owner, str(getattr(obj, "__name__", "")), args)
        given = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
        return self._charged(obj(*args, **given))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`, without the long way round for what templates do most."""
        if type(obj) is dict and attribute not in _DICT_NAMES:
            found = obj.get(attribute, _MISSING)
            return self.undefined(obj=obj, name=attribute) if found is _MISSING else found
        if type(obj) is str and attribute in _TEXT_METHODS:
            return getattr(obj, attribute)
        if type(obj) in _PLAIN_TYPES and attribute[:1] != "_" and hasattr(obj, attribute):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """The syntax tree with charges in it, as filters: those cost no sandboxed call."""
        tree = super()._parse(source, name, filename)
        loops: list[Any] = [*tree.find_all(jinja2.nodes.For), *tree.find_all(jinja2.nodes.Macro)]
        for node in loops:
            charge = _filter(jinja2.nodes.Const(None), "_tick", line=node.lineno)
            node.body.insert(0, jinja2.nodes.ExprStmt(charge).set_lineno(node.lineno))
        for block in tree.find_all(jinja2.nodes.AssignBlock):
            block.filter = _filter(block.filter, "_kept", line=block.lineno)
        return _ConcatFilters().visit(tree)  # type: ignore[no-any-return]

    @jinja2.pass_context  # a filter that knows the context is not taken for a constant
    def _tick_filter(self, _: Any, value: Any) -> Any:
        self._tick()
        return value

    @jinja2.pass_context
    def _kept(self, _: Any, value: Any) -> Any:
        return self._charged(value)

    @jinja2.pass_context
    def _joined(self, _: Any, *values: Any) -> Any:
        return self._charged("".join([str(self._checked(v)) for v in values]))

    def _check_text_method(self, text: str, method: str, args: Sequence[Any]) -> None:
        if method in _PADDING:
            _check_numbers(args)
        if method in ("format", "format_map"):
            _check_format(text, *args)
        if method == "replace" and len(args) >= 2 and isinstance(args[1], str):
            self._charge((len(text) + 1) * len(args[1]))
        if method == "join" and args:
            self._check_join(text, args[0])

    def _check_join(self, separator: str, items: Any) -> None:
        if isinstance(items, Sequence):
            texts = sum(len(i) if isinstance(i, str) else 16 for i in items)
            self._charge(texts + len(separator) * len(items))

    def _limited(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks its arguments and charges its result."""

        @functools.wraps(run)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            texts = [a for a in args if isinstance(a, str)]
            if run.__name__ in _PADDING:
                _check_numbers((*args, *kwargs.values()))
            if run.__name__ == "do_format":
                _check_format(*args)
            if run.__name__ == "do_replace" and len(texts) == 3:
                self._charge((len(texts[0]) + 1) * len(texts[2]))
            if run.__name__ in ("do_join", "sync_do_join"):
                for items in args:
                    if not isinstance(items, str):
                        self._check_join(texts[-1] if texts else "", items)
            if run.__name__ in ("_to_json", "do_string", "do_pprint", "soft_str", "do_list"):
                self._checked(args[-1])
            if isinstance(kwargs.get("start"), Sized):  # of sum: quadratic
                raise OutOfLimitsError("the chat template adds up lists")
            return self._charged(run(*args, **kwargs))

        return limited

    def _checked(self, value: Any) -> Any:
        """A value that is about to be spelled out, however often its parts are shared."""
        if isinstance(value, str) or value is None or isinstance(value, int | float):
            return value
        open_, count = [value], 0
        while open_:
            part = open_.pop()
            children = part.values() if isinstance(part, Mapping) else part
            if isinstance(children, Sequence | ValuesView) and not isinstance(part, str):
                open_ += children
                count += len(children)
                if count > _MAX_PARTS:
                    raise OutOfLimitsError("the chat template spells out a huge structure")
        return value

    def _charged(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            self._charge(len(value))
        return value

    def _charge(self, count: int) -> None:
        self._local.chars += count
        if self._local.chars > _MAX_CHARS:
            raise OutOfLimitsError("the chat template builds more text than any conversation needs")


class _Marks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the template's own claim of what is learned.

    Its output is wrapped in marks, because positions would not survive captures and macros.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja's own attribute)

    def parse(self, parser: Any) -> Any:
        """Wrap the block's output in marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("wrap", []), [], [], body).set_lineno(line)

    def wrap(self, caller: Any) -> str:
        """The block's output between marks."""
        return f"{GENERATION[0]}{caller()}{GENERATION[1]}"


class _ConcatFilters(jinja2.visitor.NodeTransformer):
    """Turns `a ~ b` into a charged filter."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Replace one concatenation."""
        self.generic_visit(node)
        return _filter(node.nodes[0], "_joined", line=node.lineno, rest=node.nodes[1:])


def _filter(
    node: jinja2.nodes.Expr | None,
    name: str,
    *,
    line: int,
    rest: Sequence[jinja2.nodes.Expr] = (),
) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, list(rest), [], None, None, lineno=line)


def _check_numbers(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise OutOfLimitsError(f"the chat template asks for a width of {value}")


def _check_format(text: Any, *values: Any) -> None:
    """`%s` and `{}` with widths, given in the text or, for `*` and `{:{}}`, as values."""
    if _WIDE.search(str(text)):
        raise OutOfLimitsError("the chat template formats a huge field")
    if "*" in str(text) or ":{" in str(text):
        _check_numbers([n for v in values for n in (v if isinstance(v, tuple) else (v,))])


def _check_power(left: Any, right: Any, *, is_power: bool) -> None:
    if not isinstance(left, int) or not isinstance(right, int):
        return
    bits = left.bit_length() * max(right, 0) if is_power else left.bit_length() + right.bit_length()
    if bits > _MAX_NUMBER:
        raise OutOfLimitsError("the chat template computes a huge number")


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> Iterator[str]:
    raise jinja2.TemplateError(message)
