"""Every way in which one line of a file can be broken: what `scripts/mutate.py` draws from.

Left alone is what no test could be asked to notice: texts for people (a docstring, a line in a log and whether it is
written, a step of a bar), type annotations, decorators, what only a GPU runs, and how often somebody looks who waits (a
`time.sleep`, a choice named …EVERY_S, …PAUSE_S, …POLL_S or …IDLE_S): only the machine would notice. A number that a
module names in capitals is a choice, and 2,049 recent requests are as right as 2,048: it is not nudged but lost, to 0.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COMPARISONS = {ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
               ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",)}
ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"),
              ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "+")}
SAID_OR_SLEPT = re.compile(r"(log|logging|warnings|bar)\.|(UserError|RequestError|print|super|time\.sleep)$")
ASKS_FOR_A_GPU = re.compile(r"cuda|on_gpu|pinned|frame\.ready|piece\.written")
HOW_OFTEN = re.compile(r"(EVERY|PAUSE|POLL|IDLE)_S$")
SWAPPED = {"min": "max", "max": "min", "append": "appendleft", "appendleft": "append", "popleft": "pop", "any": "all",
           "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """Bytes `[start, end)` of line `line` of `file` (from 1) become `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def id(self) -> str:
        """The same as long as the line stays."""
        return f"{self.file}:{self.line}:{self.start} {self.old} -> {self.new}"

    def applied(self, source: str) -> str:
        """The source with this line changed."""
        lines = source.encode().split(b"\n")
        line = lines[self.line - 1]
        lines[self.line - 1] = line[:self.start] + self.new.encode() + line[self.end:]
        return b"\n".join(lines).decode()


def mutants_of(file: str, source: str, not_on_a_cpu: Sequence[str] = ()) -> list[Mutant]:
    """Every single-line mutant of a file; a few do not compile. `not_on_a_cpu`: functions and classes that only a GPU
    runs."""
    walk = _Walk(file, source.encode().split(b"\n"), not_on_a_cpu, [])
    walk.visit(ast.parse(source))
    return walk.found


def compiles(source: str) -> bool:
    """Whether Python can read this at all."""
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


@dataclass
class _Walk:
    """Through the syntax tree of one file."""

    file: str
    lines: list[bytes]
    not_on_a_cpu: Sequence[str]
    found: list[Mutant]

    def visit(self, node: ast.AST, is_choice: bool = False) -> None:
        """Note the mutants of a node and of what is in it, but for what is left alone."""
        if _is_left_alone(node) or getattr(node, "name", None) in self.not_on_a_cpu:
            return
        if _asks_for_a_gpu(node):
            for child in _on_a_cpu(node):
                self.visit(child)
            return
        is_choice = is_choice or _makes_a_choice(node)
        for start, end, new in _changes(node, is_choice):
            if start[0] == end[0]:
                text = self.lines[start[0] - 1][start[1]:end[1]].decode()
                for old, replacement in _replacements(text, new):
                    self.found.append(Mutant(self.file, start[0], start[1], end[1], old, replacement))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params", "pattern"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child, is_choice)
                    if _asks_for_a_gpu(child) and any(isinstance(last, ast.Return) for last in _on_a_cpu(child)[-1:]):
                        break  # a CPU comes no further


def _is_left_alone(node: ast.AST) -> bool:
    """Texts for people, names that are only handed on, pauses."""
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Raise() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Expr(value=ast.Call(func=func)) | ast.Call(func=func):
            return bool(SAID_OR_SLEPT.match(ast.unparse(func)))
        case ast.Assign(targets=[ast.Name(id=name)]):
            return bool(HOW_OFTEN.search(name))
        case ast.If(body=body, orelse=[]):
            return all(_is_left_alone(statement) and not isinstance(statement, ast.Raise) for statement in body)
    return False


def _asks_for_a_gpu(node: ast.AST) -> bool:
    return isinstance(node, ast.If | ast.IfExp) and bool(ASKS_FOR_A_GPU.search(ast.unparse(node.test)))


def _on_a_cpu(node: ast.If | ast.IfExp) -> list[ast.AST]:
    """Of a branch that asks for a GPU: what runs where there is none."""
    branch = node.body if "!=" in ast.unparse(node.test) else node.orelse
    return branch if isinstance(branch, list) else [branch]


def _makes_a_choice(node: ast.AST) -> bool:
    """Whether a module gives a name in capitals to something here."""
    return isinstance(node, ast.Assign) and node.col_offset == 0 and all(
        name.id.isupper() for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))


def _changes(node: ast.AST, is_choice: bool) -> Iterator[tuple]:
    """(start, end, what to put there) of one node: a text, or a pair (old, new) to replace inside it."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
            old = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
                   ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}[type(op)]
            for new in COMPARISONS[type(op)]:
                yield _end(left), _start(right), (old, new)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            yield _end(left), _start(right), ARITHMETIC[type(op)]
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in (ast.Add, ast.Sub):
            yield _end(target), _start(value), ("+=", "-=") if isinstance(op, ast.Add) else ("-=", "+=")
            yield _start(node), _end(node), "pass"
        case ast.BoolOp(op=op, values=values):
            for before, after in zip(values, values[1:]):
                yield _end(before), _start(after), ("and", "or") if isinstance(op, ast.And) else ("or", "and")
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield _start(node), _start(operand), ""
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield _start(node), _start(operand), ""
        case ast.Constant(value=bool() as value):
            yield _start(node), _end(node), str(not value)
        case ast.Constant(value=int() as value):
            yield _start(node), _end(node), "0" if is_choice and value else str(value + 1)
        case ast.Constant(value=float() as value):
            yield _start(node), _end(node), "1.0" if value == 0 else "0.0"
        case ast.Return(value=ast.AST() as value) if not isinstance(value, ast.Constant):
            yield _start(value), _end(value), "None"
        case ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break() | ast.Delete():
            yield _start(node), _end(node), "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield _start(node), _end(node), "pass"
        case ast.Call(func=ast.Name(id=name) as func) if name in SWAPPED:
            yield _start(func), _end(func), SWAPPED[name]
        case ast.Call(func=ast.Name(id="sorted") as func, keywords=[]):
            yield _start(func), _end(func), "list"
        case ast.Call(func=ast.Name(id="reversed") as func):
            yield _start(func), _end(func), "list"
        case ast.Call(func=ast.Attribute(value=value, attr=name) as func) if name in SWAPPED:
            yield _end(value), _end(func), f".{SWAPPED[name]}"
        case ast.keyword(arg="key", value=value):
            yield (value.lineno, value.col_offset), _end(value), "None"
        case ast.If(test=test) if not isinstance(test, ast.NamedExpr):
            yield _start(test), _end(test), "False"
            yield _start(test), _end(test), "True"


def _replacements(text: str, new: str | tuple[str, str]) -> list[tuple[str, str]]:
    if isinstance(new, str):
        return [(text, new)]
    return [(text, text.replace(*new, 1))] if new[0] in text else []


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset
