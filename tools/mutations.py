"""Small faults in Python and C++ sources: an operator swapped, a bound moved, a condition turned round, a call dropped.

The places are found in Python's syntax tree and, in C++, by patterns in what is neither comment, string nor
declaration. Strings are left as they are: messages have tests of their own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Mutation(NamedTuple):
    """Bytes from `start` to `stop` that become `new`."""

    start: int
    stop: int
    old: str
    new: str

    def of(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.stop :]

    def line(self, source: bytes) -> int:
        return source[: self.start].count(b"\n") + 1


COMPARE: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
}  # fmt: skip
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "minimum": "maximum"}


class Python(ast.NodeVisitor):
    """What may be changed in a module. Annotations, docstrings and the stubs of overloads do nothing at run time."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        lines = source.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
        self.found: list[Mutation] = []
        self.visit(ast.parse(source))

    def at(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def put(self, start: int, stop: int, new: str) -> None:
        self.found.append(Mutation(start, stop, self.source[start:stop].decode(), new))

    def between(self, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        start, stop = self.at(left)[1], self.at(right)[0]
        place = self.source.find(old.encode(), start, stop)
        if place >= 0:
            self.put(place, place + len(old), new)

    def turn(self, test: ast.expr) -> None:
        start, stop = self.at(test)
        self.put(start, stop, f"(not ({self.source[start:stop].decode()}))")

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right, operator in zip([node.left, *node.comparators], node.comparators, node.ops, strict=False):
            self.between(left, right, *COMPARE[type(operator)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC:
            self.between(node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            self.between(node.target, node.value, f"{old}=", f"{new}=")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.put(self.at(node)[0], self.at(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, stop = self.at(node)
        if isinstance(node.value, bool):
            self.put(start, stop, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.put(start, stop, f"({self.source[start:stop].decode()} + 1)")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in OTHER_NAMES:
            self.put(*self.at(node), OTHER_NAMES[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        stop = self.at(node)[1]
        if node.attr in OTHER_NAMES:
            self.put(stop - len(node.attr), stop, OTHER_NAMES[node.attr])
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.turn(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.turn(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.turn(test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """A call whose result nobody wants is there for what it does."""
        if isinstance(node.value, ast.Call) and "static_assert" not in ast.unparse(node.value.func):
            self.put(*self.at(node), "pass")
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.put(*self.at(node), "pass")

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip, which no caller can make unequal
            self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """For mypy."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not any("overload" in ast.unparse(each) for each in node.decorator_list):
            for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                self.visit(default)
            for statement in node.body:
                self.visit(statement)


# What is neither text nor a declaration.
HIDDEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
    r"|\btemplate\s*<[^;{(]*?>(?=\s*(?:\w|\[\[))|\bstatic_assert\([^;]*;|^\s*(?:using|namespace|struct|class)\b[^;{]*",
    re.DOTALL | re.MULTILINE,
)
NEXT_TO = {
    "==": "!=", "!=": "==", "<=": "<", ">=": ">", "<": "<=", ">": ">=", "+": "-", "-": "+", "*": "/", "/": "*",
    "%": "/", "&&": "||", "||": "&&", "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "*=": "/=", "&": "|", "|": "&",
}  # fmt: skip
OPERATOR = re.compile(r"(?<= )(?:" + "|".join(map(re.escape, sorted(NEXT_TO, key=len, reverse=True))) + r")(?= )")
NUMBER = re.compile(r"(?<![\w.])(?:\d+\.?\d*(?:e[+-]?\d+)?)(?P<suffix>[fuUlL]*)(?![\w.])")
CONDITION = re.compile(r"\b(?:if|while)(?: constexpr)? \(")
STATEMENT = re.compile(
    r"(?<=\n)[ \t]+(?P<body>(?:[A-Za-z_][\w:.\->\[\]]*(?:<\w+>)?\(|[\w.\->\[\]]+ [-+*/|&]?= )[^;{}]*;)(?=\n)"
)
WORDS = {"true": "false", "false": "true", "break": "", "continue": "", "min": "max", "max": "min"}
WORD = re.compile(r"\b(?:" + "|".join(WORDS) + r")\b(?=[;,)}(\s])")


def closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return -1


def cplusplus(source: bytes) -> Iterator[Mutation]:
    text = source.decode("latin-1")  # a character a byte
    seen = HIDDEN.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)

    def change(start: int, stop: int, new: str) -> Mutation:
        return Mutation(start, stop, text[start:stop], new)

    for m in OPERATOR.finditer(seen):
        # a reference or a pointer that is declared: its other side is no value
        if m[0] not in "*&" or seen[m.start() - 2] not in ">,(":
            yield change(m.start(), m.end(), NEXT_TO[m[0]])
    for m in NUMBER.finditer(seen):
        yield change(
            m.start(), m.end(), f"({m[0]} * 2)" if "." in m[0] and float(m[0].rstrip("fF")) else f"({m[0]} + 1)"
        )
    for m in CONDITION.finditer(seen):
        opening = m.end() - 1
        end = closing(seen, opening)
        inner = text[opening + 1 : end]
        if end > 0 and ";" not in inner:
            yield change(opening + 1, end, f"!({inner})")
    for m in WORD.finditer(seen):
        yield change(m.start(), m.end(), WORDS[m[0]])
    for m in STATEMENT.finditer(seen):
        if not re.match(r"(?:return|static|const|throw|goto|extern)\b", m["body"]):
            yield change(m.start("body"), m.end("body"), ";")


def python(source: bytes) -> Iterator[Mutation]:
    yield from Python(source).found


MAKERS: dict[str, Callable[[bytes], Iterator[Mutation]]] = {
    ".py": python, ".h": cplusplus, ".cuh": cplusplus, ".cpp": cplusplus, ".cu": cplusplus
}  # fmt: skip
