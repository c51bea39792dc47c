"""Chat templates cannot run away: each is stopped by a limit, before one operation takes long."""

from __future__ import annotations

import pytest

from tests.chat_templates import read_template, template_for, template_names
from verl_sft.data.limits import MAX_PARTS, OutOfLimitsError, check_size
from verl_sft.data.messages import Refused
from verl_sft.data.render import render
from verl_sft.data.template import ChatTemplate, RunawayTemplate, TemplateFailure
from verl_sft.errors import UsageError
from verl_sft.types import Message

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BIG = "{% set a = 'x' * 8000000 %}"
GROW = "{% set n = namespace(s='x', t='x') %}{% for i in range(60) %}"
END = "{% endfor %}"
LISTS = "{% set r = [range(99999)|list] * 99999 %}"
LONG = "{% for i in range(99999) %}"
MANY = "{% set r = range(99999)|list %}"

TIME = "takes more than"
TEXT = "builds more text"
HUGE = "spells out a huge structure"
WIDTH = "asks for a huge width"
FIELD = "formats a huge field"
NUMBER = "computes a huge number"
REPEAT = "repeats a text or list too often"
LENGTH = "handles a text or list of"
JSON = "indents JSON without measure"
NEVER = "which no"

RUNAWAYS = [
    # Loops, macros and comparisons without end.
    (LONG + "{% for j in range(999) %}{{ 'x' * 99 }}{% endfor %}" + END, "prints over"),
    (LONG + LONG + END + END, TIME),
    ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
     "{{ f(60) }}", TIME),
    (MANY + "{{ range(-99999, 0)|select('in', r)|list }}", TIME),
    (LONG + "{{ ('x ' * 7000000)|wordcount }}" + END, TIME),
    (LONG + "{{ range(99999)|map('string')|list|sort|length }}" + END, TIME),
    # Large texts, lists and numbers.
    ("{{ 'x' * 10000000000 }}", REPEAT),
    ("{{ [1] * 900000 * 900000 }}", REPEAT),
    ("{{ 10 ** 100000000 }}", NUMBER),
    ("{{ ('f' * 8000000)|int(0, 16) // 3 }}", NUMBER),
    (GROW + "{% set n.s = n.s * 9 %}" + END, REPEAT),
    (GROW + "{% set n.s = n.s ~ n.s %}" + END, LENGTH),
    (GROW + "{% set n.s = n.s + n.s %}" + END, LENGTH),
    (BIG + LONG + "{% set b = a[1:] %}" + END, TEXT),
    # Structures whose parts are shared.
    (GROW + "{% set n.s = [n.s, n.s] %}" + END + "{{ n.s }}", HUGE),
    (GROW + "{% set n.s, n.t = [n.s, n.s], [n.t, n.t] %}" + END + "{{ n.s == n.t }}", HUGE),
    (GROW + "{% set n.s = (n.s, n.s) %}" + END + "{{ {n.s: 1} }}", HUGE),
    (LONG.replace("99999", "999") + "{% set ns.s = (ns.s,) %}" + END, "nests lists too deeply"),
    (LISTS + "{{ r|tojson }}", HUGE),
    (LISTS + "{{ r }}", HUGE),
    (BIG + "{{ [a] * 100000 }}", HUGE),
    (BIG + "{{ ([a] * 100000)|tojson }}", HUGE),
    (BIG + "{{ ([a] * 100000)|sort|length }}", HUGE),
    (BIG + "{{ ([{'a': a}] * 100000)|join('', attribute='a') }}", HUGE),
    (BIG + "{{ (a ~ 'b').startswith((a ~ 'c',) * 100000) }}", HUGE),
    ("{{ ([[1] * 1000] * 900)|sum(none, []) }}", "adds up lists"),
    ("{{ ([[1] * 1000] * 900)|sum(start=[]) }}", "adds up lists"),
    # Widths, fields and separators.
    ("{{ 'x'|center(10000000000) }}", WIDTH),
    ("{{ 'x'.ljust(10000000000) }}", WIDTH),
    ("{{ ('x'|safe).center(10000000000) }}", WIDTH),
    ("{{ [1]|batch(10000000000, 'x')|list }}", WIDTH),
    ("{{ '%*d' % (10000000000, 1) }}", WIDTH),
    ("{{ '{:{w}}'.format(1, w=10000000000) }}", WIDTH),
    ("{{ '%10000000000d' % 1 }}", FIELD),
    ("{{ '{:10000000000d}'.format(1) }}", FIELD),
    ("{{ ('{:99999}' * 100000).format(*r) }}", TEXT),
    (BIG + "{{ ('{a}' * 1000000).format(a=a) }}", TEXT),
    (BIG + "{{ ('%(a)s' * 1000000) % {'a': a} }}", TEXT),
    (BIG + "{{ ''.join([a] * 100000) }}", HUGE),
    (BIG + "{{ a.join(range(99999)|map('string')) }}", TEXT),
    (BIG + "{{ range(99999)|map('string')|join(a) }}", LENGTH),
    (BIG + "{{ a.replace('x', a) }}", TEXT),
    (BIG + "{{ a.replace('', a) }}", TEXT),
    (BIG + "{{ (a|safe).replace('x', a) }}", TEXT),
    ("{{ range(99999)|map('string')|map('center', 900000)|list }}", TEXT),
    ("{{ ('x\n' * 4000000)|indent(1000000) }}", TEXT),
    ("{{ ('\t' * 4000000).expandtabs(1000000) }}", TEXT),
    ("{{ ([1] * 900000)|tojson(indent=1000000) }}", JSON),
    ("{{ [1, 2]|tojson(separators=('x' * 1000000, ':')) }}", JSON),
    ("{{ strftime_now('%A' * 8000000) }}", "formats a date at great length"),
    # Searches that compare every place with everything.
    (BIG + "{{ a.rfind('b' + a[:4000000]) }}", TEXT),
    (BIG + "{{ a.strip('b' * 4000000 + 'x') }}", TEXT),
    (BIG + "{{ a|trim('b' * 4000000 + 'x') }}", TEXT),
    # What no template needs.
    (BIG + "{{ a.translate({120: a}) }}", NEVER),
    ("{{ ('\u00e9' * 8000000).encode('punycode') }}", NEVER),
    ("{{ (5).to_bytes(4000000000, 'big') }}", "calls a method of a number"),
    ("{{ (')' * 900000 ~ 'x')|urlize }}", "which none needs"),
    ("{{ range(9)|random }}", "which none needs"),
]  # fmt: skip


def template(body: str) -> ChatTemplate:
    """A template that prints the chat before the body, which may use `ns` and `r`."""
    head = "{% set ns = namespace(s=1) %}{% set r = range(99999)|list + [1] %}"
    return template_for(head + "{% for m in messages %}{{ m.content }}{% endfor %}" + body)


@pytest.mark.parametrize(("body", "limit"), RUNAWAYS, ids=[body[-40:] for body, _ in RUNAWAYS])
def test_runaways_are_stopped_by_a_limit(body: str, limit: str) -> None:
    """Every way to spend hours or gigabytes ends with the message of the limit it ran into."""
    with pytest.raises(RunawayTemplate, match=limit):
        template(body).render(CHAT, tools=None, add_generation_prompt=False, template_kwargs={})


@pytest.mark.parametrize(
    "body",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}{{ messages[0]['__class__'].x }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (messages|attr('__class__')).__mro__ }}",
        "{{ messages.append(1) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    ],
)
def test_templates_cannot_break_out(body: str) -> None:
    """Attribute tricks, changes of the data and endless recursion fail, and refuse the row."""
    found = template(body)
    with pytest.raises(TemplateFailure):
        found.render(CHAT, tools=None, add_generation_prompt=False, template_kwargs={})


def test_the_limit_is_what_the_row_is_refused_with() -> None:
    """The reason names the limit, not what the template did when it was tried in other ways."""
    with pytest.raises(Refused, match="asks for a huge width") as refused:
        render([Message("user", "a"), Message("assistant", "b")],
               template=template("{{ 'x'.center(10000000000) }}"))  # fmt: skip
    assert refused.value.code == "template_error"


def test_endless_templates_are_not_compiled() -> None:
    """A template of a million characters, or one nested too deeply, is a clear error."""
    with pytest.raises(UsageError, match="over 1000000 characters"):
        template_for("x" * 1_000_001)
    with pytest.raises(UsageError, match="nested too deeply"):
        template_for("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}")


def test_honest_numbers_and_texts_pass_the_limits() -> None:
    """Contents with wide numbers, percent signs and time stamps are no bomb (negative control)."""
    text = "100% of 1732000000 is {:1000000}"
    body = (
        "{{ messages[0].content|trim|replace('a', 'b') }}{{ 1732000000|string }}"
        "{{ '%s|%05d' % (messages[0]['content'], 7) }}{{ '{:>4}'.format('x') }}"
        "{{ messages|tojson(indent=4)|length > 9 }}{{ messages[::-1][0].content.rsplit('z')[0] }}"
        "{{ messages == messages[:] }}{{ 7 // 2 }}{{ [1] + [2] }}{{ 1 + 2 }}"
        "{{ strftime_now('%d') }}"
    )
    chat = [{"role": "user", "content": text}, CHAT[1]]
    found = template_for(body).render(
        chat, tools=None, add_generation_prompt=False, template_kwargs={}
    )
    assert found.text.startswith(text + f"1732000000{text}|00007   xTruebTrue3[1, 2]3")


def test_a_long_conversation_passes_the_limits() -> None:
    """Two million characters in a thousand messages are rendered by every known template's text."""
    chat = [
        {"role": role, "content": "some words " * 180}
        for _ in range(500)
        for role in ("user", "assistant")
    ]
    for name in template_names():
        if name.startswith(("qwen3", "llama3", "gptoss", "gemma4")):
            found = template_for(read_template(name), name=name).render(
                chat, tools=None, add_generation_prompt=False, template_kwargs={}
            )
            assert found.text.count("some words") == 180_000


def test_sizes_count_shared_parts_and_cycles() -> None:
    """A structure is as large as it is spelled out; one that holds itself has no size."""
    part = ["ab"] * 3
    assert check_size([part, part]) == (8, 12)
    assert check_size({"k": [1, None]}) == (4, 1)
    with pytest.raises(OutOfLimitsError):
        check_size([0] * (MAX_PARTS + 1))
    part.append(part)  # type: ignore[arg-type]
    with pytest.raises(OutOfLimitsError):
        check_size(part)
