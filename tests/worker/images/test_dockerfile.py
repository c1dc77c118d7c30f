import pytest

from aeolian.domain.errors import InvalidArgument
from aeolian.worker.images.dockerfile import assignments, expand, parse, words


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["FROM base", "", "# a comment", "  run echo hi"], ["FROM base", "RUN echo hi"]),
        (["RUN a && \\", "    b && \\", "", "# between", "    c"], ["RUN a &&     b &&     c"]),
        (["RUN cd /tmp && \\ ", "  poetry install"], ["RUN cd /tmp &&   poetry install"]),
        (["RUN a \\"], ["RUN a"]),
        (["RUN\techo tab"], ["RUN echo tab"]),
        (["COPY a.txt b.txt /x/\nCMD []"], ["COPY a.txt b.txt /x/", "CMD []"]),
        (["FROM --platform=linux/amd64 a AS b"], ["FROM --platform=linux/amd64 a AS b"]),
        (["COPY --link --chown=1:2 a b"], ["COPY --link --chown=1:2 a b"]),
        (["CMD"], ["CMD "]),
        (["ENV A='one\ntwo' B=3", "RUN x"], ["ENV A='one\ntwo' B=3", "RUN x"]),
        (["ENV A=it\\'s", "RUN x"], ["ENV A=it\\'s", "RUN x"]),
    ],
)
def test_lines_become_instructions(lines, expected):
    assert [str(instruction) for instruction in parse(lines)] == expected


def test_repeated_flags_are_all_kept():
    (run,) = parse(["RUN --mount=type=cache,target=/a --mount=type=cache,target=/b make"])
    assert [value for _, value in run.flags] == ["type=cache,target=/a", "type=cache,target=/b"]
    assert run.rest == "make"


@pytest.mark.parametrize(
    ("lines", "contents"),
    [
        (["RUN <<EOF", "a", "b", "EOF"], ["a\nb\n"]),
        (["RUN cat <<-END > /x", "\ta", "\tEND"], ["a\n"]),
        (["COPY <<A <<B /x/", "1", "A", "2", "B"], ["1\n", "2\n"]),
        (["RUN python3 <<'PY'", "print($x)", "PY"], ["print($x)\n"]),
        (["RUN cat <<< word"], []),
        (["RUN cat <<<word"], []),
        (["RUN echo $((1<<x))"], []),
    ],
)
def test_here_documents_are_read_to_their_end(lines, contents):
    (instruction,) = parse(lines)
    assert [heredoc.content for heredoc in instruction.heredocs] == contents


def test_quoted_here_documents_are_not_expanded():
    (instruction,) = parse(["COPY <<'A' <<B /x/", "1", "A", "2", "B"])
    assert [heredoc.expands for heredoc in instruction.heredocs] == [False, True]


@pytest.mark.parametrize("line", ["BUILD it", "RUN", "RUN <<EOF", "hello"])
def test_what_is_no_instruction_is_refused_by_name(line):
    with pytest.raises(InvalidArgument):
        parse([line])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$A", "1"),
        ("${A}b", "1b"),
        ("$AB", ""),
        ("\\$A", "$A"),
        ("${B:-two}", "two"),
        ("${A:-two}", "1"),
        ("${A:+yes}${B:+no}", "yes"),
        ("${B:-$A}", "1"),
    ],
)
def test_variables_are_expanded(text, expected):
    assert expand(text, {"A": "1"}) == expected


def test_a_required_variable_that_is_missing_is_an_error():
    with pytest.raises(InvalidArgument, match="NAME"):
        expand("${NAME:?say it}", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1 B=2", {"A": "1", "B": "2"}),
        ('A="two words" B=x\\ y', {"A": "two words", "B": "x y"}),
        ("A='$HOME'", {"A": "$HOME"}),
        ('A="$HOME/x"', {"A": "/root/x"}),
        ("PATH=/new:$PATH", {"PATH": "/new:/bin"}),
        ("A=", {"A": ""}),
        ("A the whole line", {"A": "the whole line"}),
        ("A='it'\"'\"'s'", {"A": "it's"}),  # how clients quote a value with an apostrophe
    ],
)
def test_assignments_of_env_and_label(text, expected):
    assert assignments(text, {"HOME": "/root", "PATH": "/bin"}) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b", ["a", "b"]), ('["a b", "c"]', ["a b", "c"]), ("'a b' c", ["a b", "c"]), ("a\\ b", ["a b"])],
)
def test_words_of_copy(text, expected):
    assert words(text) == expected


def test_unfinished_quotes_are_refused():
    with pytest.raises(InvalidArgument):
        words("'a")
