"""What README and docs say exists: commands, options, targets, files and links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from modal.cli.entry_point import entrypoint_cli

from aeolian.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CLIS = {"aeolian": main, "modal": entrypoint_cli}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TAKES_A_SCRIPT = {"run", "deploy", "serve", "shell"}
"""Commands of the client whose arguments after the script belong to the script."""


def commands(text: str) -> Iterator[list[str]]:
    """Every command in code blocks for a shell, and in code spans."""
    for language, block in FENCE.findall(text):
        if language in ("sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _split(line.removeprefix("$ "))
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        yield from _split(span)


def _split(line: str) -> Iterator[list[str]]:
    line = re.sub(r"\$\(([^)]*)\)", r"; \1 ;", line.partition(" #")[0]).replace('"', " ").replace("…", "")
    for part in re.split(r"&&|\||;", line):
        part = re.sub(r"^\s*(sudo|eval|exec|[A-Z_]+=\S*)\s+", "", part)
        words = shlex.split(part.replace("'", " ").replace("(", " ").replace(")", " "))
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def check(words: list[str]) -> None:
    """Raises AssertionError when a command, or an option of it, does not exist."""
    command: click.Command = CLIS[words[0]]
    context = click.Context(command)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        assert found is not None, f"{' '.join(words)}: there is no command {rest[0]!r}"
        command, rest = found, rest[1:]
        if command.name in TAKES_A_SCRIPT and words[0] == "modal":
            return
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known | {"--help"}, f"{' '.join(words)}: there is no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page.read_text()):
        if words[0] in CLIS:
            check(words)
        elif words[0] == "make":
            names = {word for word in words[1:] if "=" not in word}
            assert names <= targets, f"{' '.join(words)}: the Makefile has no such target"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_named_file_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:src|examples|scripts|docs|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_a_command_that_does_not_exist_is_found_out():
    (words,) = commands("Run `aeolian up --colour`.")
    with pytest.raises(AssertionError, match="no option --colour"):
        check(words)
    (words,) = commands("```sh\n$ modal volumes list  # yours\n```")
    with pytest.raises(AssertionError, match="no command 'volumes'"):
        check(words)


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, f"{page.name} is linked nowhere"
