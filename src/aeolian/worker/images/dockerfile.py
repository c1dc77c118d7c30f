"""Dockerfile lines as instructions. Facts of the syntax: https://docs.docker.com/reference/dockerfile/."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aeolian.domain.errors import InvalidArgument

INSTRUCTIONS = frozenset(
    [
        "ADD",
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "HEALTHCHECK",
        "LABEL",
        "MAINTAINER",
        "ONBUILD",
        "RUN",
        "SHELL",
        "STOPSIGNAL",
        "USER",
        "VOLUME",
        "WORKDIR",
    ]
)
HEREDOC = re.compile(r"(?<![<\w$(])\d?<<(-?)([\"']?)([A-Za-z_]\w*)\2(?![\w<])")
QUOTING = re.compile(r"(ENV|LABEL)\s+[^\s=]+=", re.IGNORECASE)
VARIABLE = re.compile(
    r"\\(?P<escaped>\$)|\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)(?::(?P<op>[-+?])(?P<word>[^}]*))?\})"
)


class Heredoc(NamedTuple):
    name: str
    content: str
    expands: bool


class Instruction(NamedTuple):
    keyword: str
    flags: tuple[tuple[str, str], ...]
    """`--from=…` and the like, in order; `--mount` may come more than once."""
    rest: str
    heredocs: tuple[Heredoc, ...] = ()

    def __str__(self) -> str:
        flags = "".join(f"--{name}={value} " if value else f"--{name} " for name, value in self.flags)
        return f"{self.keyword} {flags}{self.rest}"

    def flag(self, name: str) -> str | None:
        """The value of `--name=value`; "" for a bare `--name`."""
        return next((value for known, value in self.flags if known == name), None)

    @property
    def exec_form(self) -> list[str] | None:
        """The list of `["a", "b"]`; None for the shell form."""
        if not self.rest.lstrip().startswith("["):
            return None
        try:
            words = json.loads(self.rest)
        except ValueError:
            return None
        return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def parse(lines: Sequence[str]) -> list[Instruction]:
    """Raises InvalidArgument naming the line that is none."""
    text = "\n".join(lines).split("\n")
    instructions: list[Instruction] = []
    at = 0
    while at < len(text):
        line = text[at]
        at += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        joined = [line]
        while joined[-1].rstrip().endswith("\\") and at < len(text):
            joined[-1] = joined[-1].rstrip()[:-1]
            while at < len(text) and (not text[at].strip() or text[at].lstrip().startswith("#")):
                at += 1
            if at < len(text):
                joined.append(text[at])
                at += 1
        if joined[-1].rstrip().endswith("\\"):
            joined[-1] = joined[-1].rstrip()[:-1]
        logical = "".join(joined).strip()
        while QUOTING.match(logical) and _is_quote_open(logical) and at < len(text):  # a value of several lines
            logical += "\n" + text[at]
            at += 1
        keyword, *others = logical.split(None, 1)
        keyword, rest = keyword.upper(), others[0] if others else ""
        if keyword not in INSTRUCTIONS:
            raise InvalidArgument(
                f"{logical[:100]!r} is no Dockerfile instruction: a line begins with RUN, COPY, ENV …"
            )
        heredocs, at = _heredocs(rest, text, at) if keyword in ("RUN", "COPY", "ADD") else ((), at)
        flags, rest = _flags(rest) if keyword in ("FROM", "COPY", "ADD", "RUN", "HEALTHCHECK") else ((), rest)
        if not rest and keyword not in ("CMD", "ENTRYPOINT"):
            raise InvalidArgument(f"{keyword} needs something to work on")
        instructions.append(Instruction(keyword, flags, rest, heredocs))
    return instructions


def _is_quote_open(line: str) -> bool:
    quote, escaped = "", False
    for char in line:
        if escaped:
            escaped = False
        elif char == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
    return bool(quote)


def _heredocs(rest: str, text: list[str], at: int) -> tuple[tuple[Heredoc, ...], int]:
    found = []
    for strip, quote, name in HEREDOC.findall(rest):
        content = []
        while True:
            if at >= len(text):
                raise InvalidArgument(f"the here-document {name} has no end")
            line = text[at].lstrip("\t") if strip else text[at]
            at += 1
            if line == name:
                break
            content.append(line + "\n")
        found.append(Heredoc(name, "".join(content), not quote))
    return tuple(found), at


def _flags(rest: str) -> tuple[tuple[tuple[str, str], ...], str]:
    flags: list[tuple[str, str]] = []
    while rest.startswith("--"):
        word, *others = rest.split(None, 1)
        name, _, value = word[2:].partition("=")
        flags.append((name, value.strip("\"'")))
        rest = others[0] if others else ""
    return tuple(flags), rest


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME:+other}`; unknown ones become nothing."""

    def replace(match: re.Match) -> str:
        if match["escaped"]:
            return "$"
        name = match["name"] or match["braced"]
        value = variables.get(name, "")
        if match["op"] == "-":
            return value or expand(match["word"], variables)
        if match["op"] == "+":
            return expand(match["word"], variables) if value else ""
        if match["op"] == "?" and not value:
            raise InvalidArgument(f"the variable {name} is not set: {match['word']}")
        return value

    return VARIABLE.sub(replace, text)


def words(text: str) -> list[str]:
    """Split as COPY does: quotes group, backslashes escape."""
    try:
        listed = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError:
        listed = None
    if isinstance(listed, list):
        return [str(word) for word in listed]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(f"{text!r} cannot be split into words: {error}") from None


def assignments(text: str, variables: Mapping[str, str]) -> dict[str, str]:
    """`A=1 B="two words"`, or the old form `A the rest of the line`. Values are expanded, unless single-quoted."""
    first = text.split(None, 1)
    if "=" not in first[0]:
        return {first[0]: expand(first[1], variables)} if len(first) > 1 else {first[0]: ""}
    found: dict[str, str] = {}
    for name, value in _pairs(text):
        found[name] = _unquoted(value, variables)
    return found


def _pairs(text: str):
    at = 0
    while at < len(text):
        while at < len(text) and text[at].isspace():
            at += 1
        if at >= len(text):
            return
        equals = text.find("=", at)
        if equals < 0 or not re.fullmatch(r"[^\s=]+", text[at:equals]):
            raise InvalidArgument(f"{text[at : at + 60]!r} is no assignment: write NAME=value")
        name, start, quote, end = text[at:equals], equals + 1, "", equals + 1
        while end < len(text) and (quote or not text[end].isspace()):
            if text[end] == "\\" and quote != "'":
                end += 1
            elif quote:
                quote = "" if text[end] == quote else quote
            elif text[end] in "\"'":
                quote = text[end]
            end += 1
        yield name.strip("\"'"), text[start:end]
        at = end


def _unquoted(value: str, variables: Mapping[str, str]) -> str:
    out: list[str] = []
    at, quote = 0, ""
    plain: list[str] = []

    def flush() -> None:
        if plain:
            out.append(expand("".join(plain), variables))
            plain.clear()

    while at < len(value):
        char = value[at]
        if quote == "'":
            if char == "'":
                quote = ""
            else:
                out.append(char)
        elif char == "\\" and at + 1 < len(value):
            at += 1
            if value[at] == "$":
                plain.append("\\$")
            else:
                if quote == '"' and value[at] not in '"\\':
                    plain.append("\\")
                plain.append(value[at])
        elif char in "\"'" and not quote:
            flush()
            quote = char
        elif char == quote:
            flush()
            quote = ""
        else:
            plain.append(char)
        at += 1
    flush()
    return "".join(out)
