"""Search the sources of the Python standard library by what its functions are about.

    modal run examples/code_search.py
    modal run examples/code_search.py --query "split a path into its parts"

Many containers read the library's sources, a share each, and write what they find as shards to a Volume. One merges
the shards into an index. `Search` answers from that index, the best match first: a function matches a query by the
words in its names and its docstring, and a rare word counts more than a common one (tf-idf).
"""

import ast
import json
import math
import os
import re
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import modal

app = modal.App("code-search", image=modal.Image.debian_slim())
volume = modal.Volume.from_name("code-search", create_if_missing=True)

FOLDER = Path("/index")
NUM_SHARES = 24
NOT_INDEXED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "distutils"}
COMMON = {"an", "and", "are", "as", "at", "be", "by", "for", "from", "if", "in", "is", "it", "none", "not", "of", "on"}
COMMON |= {"or", "return", "self", "that", "the", "this", "to", "with"}
QUERIES = (
    "least recently used cache",
    "find close matches of a misspelled word",
    "run a command and capture its output",
    "temporary file that is deleted when it is closed",
    "parse the headers of an email message",
)


class Definition(NamedTuple):
    """A function or class in the library, and the words that it is found by, each with its weight."""

    name: str
    place: str
    summary: str
    words: dict[str, float]


class Hit(NamedTuple):
    score: float
    name: str
    place: str
    summary: str


class Share(NamedTuple):
    """What one container made of its share."""

    number: int
    num_files: int
    num_definitions: int
    seconds: float
    container: str


# ---- in containers ------------------------------------------------------------------------------------------


@app.function()
def list_sources() -> list[list[str]]:
    """Every source file of the standard library, in shares of about the same size."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in library.rglob("*.py") if not NOT_INDEXED & set(path.relative_to(library).parts)]
    shares: list[list[str]] = [[] for _ in range(NUM_SHARES)]
    sizes = [0] * NUM_SHARES
    for path in sorted(files, key=lambda path: path.stat().st_size, reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(str(path.relative_to(library)))
        sizes[smallest] += path.stat().st_size
    return shares


@app.function(volumes={str(FOLDER): volume})
def index(number: int, files: list[str]) -> Share:
    """Read a share of the sources and write its shard."""
    started = time.monotonic()
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [definition for file in files for definition in definitions(file, (library / file).read_bytes())]
    shard = FOLDER / "shards" / f"{number:02}.json"
    shard.parent.mkdir(exist_ok=True)
    shard.write_text(json.dumps(found))
    volume.commit()
    return Share(number, len(files), len(found), time.monotonic() - started, os.environ["MODAL_TASK_ID"])


@app.function(volumes={str(FOLDER): volume})
def merge() -> tuple[int, int]:
    """Make one index of all shards; returns how many definitions and how many words it has."""
    volume.reload()
    shards = sorted((FOLDER / "shards").glob("*.json"))
    found = [Definition(*fields) for shard in shards for fields in json.loads(shard.read_text())]
    postings = weigh(found)
    documents = [(definition.name, definition.place, definition.summary) for definition in found]
    (FOLDER / "index.json").write_text(json.dumps({"documents": documents, "postings": postings}))
    volume.commit()
    return len(documents), len(postings)


@app.cls(volumes={str(FOLDER): volume})
class Search:
    @modal.enter()
    def load(self) -> None:
        content = json.loads((FOLDER / "index.json").read_text())
        self.documents, self.postings = content["documents"], content["postings"]

    @modal.method()
    def best(self, query: str, count: int = 3) -> list[Hit]:
        scores = score(words(query), self.postings, len(self.documents))
        ranked = sorted(scores, key=lambda document: scores[document], reverse=True)
        return [Hit(scores[document], *self.documents[document]) for document in ranked[:count]]


# ---- finding definitions and weighing words -----------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of an identifier or a sentence: `HTTPServer`, `http_server` and `http servers` are alike."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)
    lower = [part.lower() for part in parts if len(part) > 1 and part.lower() not in COMMON]
    return [re.sub(r"(ings?|ed|ers?|es?|s)$", "", word) if len(word) > 3 else word for word in lower]


def definitions(file: str, source: bytes) -> Iterator[Definition]:
    """The public functions, classes and methods of a public module that have a docstring."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if re.search(r"(^|\.)_", module):
        return
    try:
        tree = ast.parse(source)
    except SyntaxError:  # left in the library on purpose, for its own tests
        return
    yield from _below(tree, module, file)


def _below(parent: ast.Module | ast.ClassDef, prefix: str, file: str) -> Iterator[Definition]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            summary = docstring.split("\n\n")[0].replace("\n", " ")
            found: dict[str, float] = defaultdict(float)
            for text, weight in ((node.name, 3), (prefix, 1), (summary, 3), (docstring, 1)):
                for word in words(text):
                    found[word] += weight
            yield Definition(name, f"{file}:{node.lineno}", summary, dict(found))
        if isinstance(node, ast.ClassDef):
            yield from _below(node, name, file)


def weigh(found: list[Definition]) -> dict[str, list[tuple[int, float]]]:
    """Word -> (document, weight): how often a word occurs, times how rare it is (tf-idf), the sum of squares of each
    document brought to one."""
    num_documents = Counter(word for definition in found for word in definition.words)
    postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for document, definition in enumerate(found):
        weights = {
            word: math.log1p(count) * math.log(len(found) / num_documents[word])
            for word, count in definition.words.items()
        }
        length = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
        for word, weight in weights.items():
            postings[word].append((document, round(weight / length, 4)))
    return postings


def score(query: list[str], postings: dict[str, list[tuple[int, float]]], num_documents: int) -> dict[int, float]:
    """Document -> how well it matches: the weights of the query's words in it, times the share of the query that it
    has (a rare word is a larger share)."""
    rarity = {word: math.log(num_documents / len(postings[word])) for word in set(query) if word in postings}
    scores: dict[int, float] = defaultdict(float)
    covered: dict[int, float] = defaultdict(float)
    for word, rare in rarity.items():
        for document, weight in postings[word]:
            scores[document] += weight * rare
            covered[document] += rare
    total = sum(rarity.values()) or 1.0
    return {document: value / total * covered[document] / total for document, value in scores.items()}


# ---- on your machine ----------------------------------------------------------------------------------------


@app.local_entrypoint()
def main(query: str = "") -> None:
    started = time.monotonic()
    shares = list_sources.remote()
    print(f"The standard library has {sum(map(len, shares))} source files; {NUM_SHARES} shares of them are indexed:")
    containers = set()
    results = index.starmap(enumerate(shares), order_outputs=False)
    for done, share in enumerate(results, start=1):
        containers.add(share.container)
        print(
            f"  {done:>2}/{NUM_SHARES}  share {share.number:02}: {share.num_files:>3} files, "
            f"{share.num_definitions:>4} definitions in {share.seconds:.2f} s by {share.container}"
        )
    num_definitions, num_words = merge.remote()
    print(
        f"An index of {num_definitions:,} definitions and {num_words:,} words was made "
        f"by {len(containers)} containers in {time.monotonic() - started:.1f} s."
    )
    search = Search()
    for text in [query] if query else QUERIES:
        asked = time.monotonic()
        hits = search.best.remote(text)
        print(f"\n{text}   ({(time.monotonic() - asked) * 1000:.0f} ms)")
        for hit in hits:
            print(f"  {hit.score:4.0%}  {hit.name}  ({hit.place})\n        {hit.summary[:96]}")
