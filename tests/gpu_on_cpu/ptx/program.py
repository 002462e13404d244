"""PTX as text: kernels, their parameters, registers and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """An error in the program, or a feature unknown to this machine."""


@dataclass
class Instruction:
    guard: str
    op: list[str]
    operands: list[str]
    text: str
    line: int = 0  # of the PTX file, from 1


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, int]]  # names and bytes
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # by prefix: type and count
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # static, by name: bytes


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
PARAMETER = re.compile(r"\.[busf](\d+)\s+(?:\.ptr\b[\s.\w]*\s)?(\w+)(?:\[(\d+)\])?\s*$")
STATEMENT = re.compile(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", re.S)
OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file."""
    # .loc ends without a semicolon. Each line stays one: machine code names the lines that it came from.
    text = re.sub(r"//[^\n]*|^[ \t]*\.loc\b[^\n]*", "", text, flags=re.M)
    shared = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]", text)
    kernels = {}
    for head in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(?:\.\w+\s+[\d, ]+\s*)*\{", text, re.S):
        parameters = []
        for declaration in head[2].split(",") if head[2].strip() else ():
            found = PARAMETER.search(declaration)
            if found is None:
                raise PtxError(f"not a parameter: {declaration}")
            parameters.append((found[2], SIZES[found[1]] * int(found[3] or 1)))
        kernel = Kernel(head[1], parameters, shared={name: int(size or 0) for name, size in shared})
        body = text[head.end() : closing(text, head.end())]
        read_body(kernel, body, 1 + text.count("\n", 0, head.end()))
        kernels[head[1]] = kernel
    return kernels


def closing(text: str, at: int) -> int:
    """The end of the brace that was opened before ``at``."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[at:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return at + brace.start()
    raise PtxError("a brace is not closed")


def statements(body: str, line: int) -> Iterator[tuple[str, int]]:
    """Yields instructions and declarations, labels with their colon, and the braces of scopes, each with its line."""
    text, begun = "", line
    for character in body:
        if not text.strip():
            begun = line
        line += character == "\n"
        if character in "{}" and not text.strip():
            yield character, begun
        elif character == ";":
            yield text.strip(), begun
            text = ""
        elif character == ":" and re.fullmatch(r"\s*\$?\w+", text):
            yield text.strip() + ":", begun
            text = ""
        else:
            text += character


def read_body(kernel: Kernel, body: str, line: int) -> None:
    scopes: list[dict[str, str]] = [{}]  # of inline assembly: its own registers, renamed
    inner: list[tuple[int, dict[str, str]]] = []  # the begin of such a scope, and its own labels
    for statement, begun in statements(body, line):
        if statement == "{":
            scopes.append({})
            inner.append((len(kernel.code), {}))
        elif statement == "}":
            scopes.pop()
            begin, renamed = inner.pop()
            for jump in (i for i in kernel.code[begin:] if i.op[0] == "bra"):
                jump.operands[0] = renamed.get(jump.operands[0], jump.operands[0])
        elif statement.endswith(":"):
            label, here = statement[:-1], len(kernel.code)
            if inner:
                inner[-1][1][label] = f"{label}@{here}"
                label = f"{label}@{here}"
            kernel.labels[label] = here
        elif statement.startswith(".reg"):
            _, kind, names = statement.replace(".", " ").split(None, 2)
            for name in names.split(","):
                if found := re.fullmatch(r"(%\w+?)<(\d+)>", name.strip()):
                    kernel.registers[found[1]] = (kind, int(found[2]))
                else:
                    prefix = f"%scoped{len(kernel.registers)}_"
                    scopes[-1][name.strip()] = f"{prefix}0"
                    kernel.registers[prefix] = (kind, 1)
        elif statement and not statement.startswith("."):
            for name, register in (item for scope in scopes for item in scope.items()):
                statement = re.sub(rf"(?<![\w%.]){re.escape(name)}\b", register, statement)
            found = STATEMENT.fullmatch(statement)
            if found is None:
                raise PtxError(f"not a statement: {statement}")
            words, op, operands = " ".join(statement.split()), found[2].split("."), OPERANDS.findall(found[3])
            kernel.code.append(Instruction(found[1] or "", op, operands, words, begun))
