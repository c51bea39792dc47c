"""How chat templates are compiled: charges written into the syntax tree, and faster look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.visitor

GENERATION = ("\U0010f8f1", "\U0010f8f2")  # around {% generation %} blocks
DICT_NAMES = frozenset(dir(dict))


class Marks(jinja2.ext.Extension):
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


class Rewriter(jinja2.visitor.NodeTransformer):
    """Writes charges into a tree, as filters of the sandbox.

    Loops and macros are counted; texts that are joined, values that are built, and lists that are
    compared are charged.
    """

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        """Count the turns of a loop."""
        return self._ticked(node)

    def visit_Macro(self, node: jinja2.nodes.Macro) -> jinja2.nodes.Node:
        """Count the calls of a macro."""
        return self._ticked(node)

    def visit_AssignBlock(self, node: jinja2.nodes.AssignBlock) -> jinja2.nodes.Node:
        """Charge the text of a block that is kept."""
        self.generic_visit(node)
        node.filter = _filter(node.filter, "_kept", line=node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Charge `a ~ b`."""
        self.generic_visit(node)
        return _filter(node.nodes[0], "_joined", line=node.lineno, rest=node.nodes[1:])

    def visit_Add(self, node: jinja2.nodes.Add) -> jinja2.nodes.Node:
        """Make one sum of `a + b + c`: texts are joined once."""
        terms: list[jinja2.nodes.Expr] = []
        left: jinja2.nodes.Expr = node
        while isinstance(left, jinja2.nodes.Add):
            terms.append(left.right)
            left = left.left
        visited = [self.visit(term) for term in (left, *reversed(terms))]
        return _filter(visited[0], "_added", line=node.lineno, rest=visited[1:])

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        """Charge what a slice copies."""
        self.generic_visit(node)
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _filter(node, "_kept", line=node.lineno)
        return node

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        """Bound what is compared; to a constant nothing compares for long."""
        self.generic_visit(node)
        if len(node.ops) == 1 and (_is_constant(node.expr) or _is_constant(node.ops[0].expr)):
            return node
        node.expr = _filter(node.expr, "_small", line=node.lineno)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_small", line=node.lineno)
        return node

    def visit_List(self, node: jinja2.nodes.List) -> jinja2.nodes.Node:
        """Charge a list that is built."""
        return self._built(node)

    def visit_Dict(self, node: jinja2.nodes.Dict) -> jinja2.nodes.Node:
        """Charge a mapping that is built."""
        return self._built(node)

    def visit_Tuple(self, node: jinja2.nodes.Tuple) -> jinja2.nodes.Node:
        """Charge a tuple that is built."""
        return self._built(node) if node.ctx == "load" else node

    def _built(self, node: Any) -> jinja2.nodes.Node:
        if _is_constant(node):
            return node  # type: ignore[no-any-return]
        self.generic_visit(node)
        return _filter(node, "_new", line=node.lineno)

    def _ticked(self, node: Any) -> jinja2.nodes.Node:
        self.generic_visit(node)
        charge = _filter(jinja2.nodes.Const(None), "_tick", line=node.lineno)
        node.body.insert(0, jinja2.nodes.ExprStmt(charge).set_lineno(node.lineno))
        return node  # type: ignore[no-any-return]


class Generator(jinja2.compiler.CodeGenerator):
    """Reads a key of a plain mapping in place; all else goes through the sandbox."""

    def visit_Getattr(self, node: jinja2.nodes.Getattr, frame: Any) -> None:
        """`message.role`."""
        if isinstance(node.node, jinja2.nodes.Name) and node.attr not in DICT_NAMES:
            self._direct(node.node, node.attr, frame, "getattr")
        else:
            super().visit_Getattr(node, frame)

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Any) -> None:
        """`message['role']`."""
        key = node.arg.value if isinstance(node.arg, jinja2.nodes.Const) else None
        if isinstance(node.node, jinja2.nodes.Name) and isinstance(key, str):
            self._direct(node.node, key, frame, "getitem")
        else:
            super().visit_Getitem(node, frame)

    def _direct(self, node: jinja2.nodes.Name, key: str, frame: Any, method: str) -> None:
        self.write("(")
        self.visit(node, frame)
        self.write(f"[{key!r}] if type(")
        self.visit(node, frame)
        self.write(f") is dict and {key!r} in ")
        self.visit(node, frame)
        self.write(f" else environment.{method}(")
        self.visit(node, frame)
        self.write(f", {key!r}))")


def _is_constant(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.List | jinja2.nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, jinja2.nodes.Const | jinja2.nodes.TemplateData)


def _filter(
    node: jinja2.nodes.Expr | None,
    name: str,
    *,
    line: int,
    rest: Sequence[jinja2.nodes.Expr] = (),
) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, list(rest), [], None, None, lineno=line)
