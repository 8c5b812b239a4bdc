"""A data set that every Python has at hand: the standard library's docstrings, by module.

Given a passage from the docstring of a public function, class or method, name the top-level module
it is from.
The library's sources are parsed, never imported, so that building the data set has no side effects,
misses nothing for want of a C library and does not depend on what is already imported. Modules
written in C have no such sources; where a Python twin exists (`_pydecimal`) it stands for them.

Three things keep a classifier from cheating:

- the names of all classes are cut from all texts, also where they are part of an identifier
  ("HTTPServer") or written apart ("unit test"). Cutting from every text, not only from those of
  the class so named, keeps the cuts themselves from telling the class;
- a text is in the data once, and not at all if two classes have it (inherited documentation);
- the held-out part is split off by *member*: a class is on one side with all its methods.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

CLASSES = 16
MIN_WORDS = 6
PASSAGE_WORDS = 24
"""Docstrings are cut into passages of about this many words: long ones have more to say than a
short one, and the library has too few docstrings to teach an encoder anything one by one."""
MAX_PER_MEMBER = 60
"""Passages taken from one member, or a class with a hundred methods would be half of its module and
all of that half on one side of the split."""
MAX_PER_CLASS = 500
HELD_OUT_SHARE = 0.25
"""How much of each class is held out, at most: whole members, as many as fit."""

# Tests and demonstrations document themselves, not the module; the rest is not the library's own.
_NOT_THE_LIBRARY = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo"),
    *("site-packages", "dist-packages", "__pycache__"),
}
# A name of two letters ("io", "os", "re") cannot be cut from texts without cutting words to pieces.
_SHORTEST_NAME = 3


@dataclasses.dataclass(frozen=True)
class Passage:
    """Some of a docstring: the module it belongs to, that module's member, and the text."""

    module: str
    member: str
    text: str

    def digest(self, *parts: str) -> int:
        """A number that depends on the module, `parts` and nothing else, on every run.

        Python's own `hash` of a string changes from process to process.
        """
        key = "\0".join((self.module, *parts)).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Class names, and for both sides of the split the passages in a fixed shuffled order."""

    classes: tuple[str, ...]
    train: tuple[Passage, ...]
    held_out: tuple[Passage, ...]

    def labels(self, passages: Sequence[Passage]) -> list[int]:
        """The index in `classes` of each passage's module."""
        index = {name: i for i, name in enumerate(self.classes)}
        return [index[passage.module] for passage in passages]


def load(classes: int = CLASSES) -> Dataset:
    """Build the data set from the running interpreter's standard library; takes a few seconds.

    Args:
        classes: how many modules to tell apart; those with the most passages are taken.

    Raises:
        RuntimeError: the interpreter comes without its library's sources, or with too few.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found = [passage for passage in read_library(library) if _long_enough(passage.text)]
    sizes = collections.Counter(
        passage.module for passage in _limit(found) if len(passage.module) >= _SHORTEST_NAME
    )
    if len(sizes) < classes:
        raise RuntimeError(
            f"{library} has documented sources of {len(sizes)} modules only, {classes} are needed; "
            "is the standard library installed as .py files?"
        )
    # By size, then by name, so that a tie is broken the same way every time.
    names = tuple(sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[:classes]))

    cut = name_cutter(names)
    passages = unique(
        dataclasses.replace(passage, text=cut(passage.text))
        for passage in found
        if passage.module in names
    )
    kept = sorted(
        _limit([passage for passage in passages if _long_enough(passage.text)]),
        key=lambda passage: passage.digest(passage.text),
    )
    aside = held_out_members(kept)
    return Dataset(
        names,
        tuple(passage for passage in kept if (passage.module, passage.member) not in aside),
        tuple(passage for passage in kept if (passage.module, passage.member) in aside),
    )


def held_out_members(passages: Iterable[Passage]) -> set[tuple[str, str]]:
    """The (module, member) pairs that are kept from training, with everything in them."""
    members: dict[str, dict[str, list[Passage]]] = {}
    for passage in passages:
        of_module = members.setdefault(passage.module, {})
        of_module.setdefault(passage.member, []).append(passage)
    aside = set()
    for module, of_module in members.items():
        room = HELD_OUT_SHARE * sum(map(len, of_module.values()))
        # A lottery drawn by digest, in which a member too large for what room is left is passed
        # over: a plain threshold on the digest holds out most of one class and none of another.
        for member in sorted(of_module, key=lambda name: of_module[name][0].digest("split", name)):
            if len(of_module[member]) <= room:
                room -= len(of_module[member])
                aside.add((module, member))
    return aside


def read_library(library: Path) -> Iterator[Passage]:
    """The docstrings of all public members, passage by passage, in a fixed order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        # `_pydecimal` and its like are the Python twins of modules that are otherwise in C.
        module = re.sub("^_py(?=[a-z])", "", parts[0])
        if (
            _NOT_THE_LIBRARY.intersection(parts)
            or module not in sys.stdlib_module_names
            or module.startswith("_")
        ):
            continue
        with warnings.catch_warnings():
            # A stray backslash in somebody else's source is no concern of ours.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for member, docstring in _docstrings(tree):
            for text in cut_up(docstring):
                yield Passage(module, member, text)


def _docstrings(node: ast.AST, member: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield (top-level member, docstring) of every public definition below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            name = member or child.name
            if docstring := ast.get_docstring(child, clean=False):
                yield name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _docstrings(child, name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            # A definition may stand under `if` or `try`.
            yield from _docstrings(child, member)


def cut_up(docstring: str) -> Iterator[str]:
    """Cut a docstring into passages, where a sentence or a paragraph ends if that is near.

    White space is collapsed.
    """
    passage: list[str] = []
    for sentence in re.split(r"(?<=[.!?:;])\s+|\n\s*\n", inspect.cleandoc(docstring)):
        words = sentence.split()
        if passage and len(passage) + len(words) > PASSAGE_WORDS:
            yield " ".join(passage)
            passage = []
        passage += words
        # Tables and examples have no sentences.
        while len(passage) > 2 * PASSAGE_WORDS:
            yield " ".join(passage[:PASSAGE_WORDS])
            passage = passage[PASSAGE_WORDS:]
    if passage:
        yield " ".join(passage)


def name_cutter(names: Iterable[str]) -> Callable[[str], str]:
    """A function that cuts `names` from a text, whatever their case and wherever they stand.

    One separator between any two letters is overlooked, which finds "unit test" and "e-mail" too,
    and the dot of a dotted prefix goes along.
    """
    spelled = ("[-_/. ]?".join(map(re.escape, name)) for name in sorted(names, key=len)[::-1])
    pattern = re.compile("(?:" + "|".join(spelled) + r")\.?", re.IGNORECASE)

    def cut(text: str) -> str:
        # What is left on both sides of a cut may spell a name again.
        while (shorter := pattern.sub("", text)) != text:
            text = shorter
        return " ".join(text.split())

    return cut


def unique(passages: Iterable[Passage]) -> list[Passage]:
    """The passages whose text, but for case, no earlier one and no other module has."""
    first: dict[str, Passage] = {}
    modules = collections.defaultdict(set)
    for passage in passages:
        key = passage.text.casefold()
        first.setdefault(key, passage)
        modules[key].add(passage.module)
    return [passage for key, passage in first.items() if len(modules[key]) == 1]


def _limit(passages: Iterable[Passage]) -> list[Passage]:
    """At most `MAX_PER_MEMBER` passages of a member and `MAX_PER_CLASS` of a module."""
    of_member: collections.Counter[tuple[str, str]] = collections.Counter()
    of_module: collections.Counter[str] = collections.Counter()
    kept = []
    # Taken in the order of their digests, or the alphabet would choose.
    for passage in sorted(passages, key=lambda passage: passage.digest(passage.text)):
        member = (passage.module, passage.member)
        if of_member[member] < MAX_PER_MEMBER and of_module[passage.module] < MAX_PER_CLASS:
            of_member[member] += 1
            of_module[passage.module] += 1
            kept.append(passage)
    return kept


def _long_enough(text: str) -> bool:
    return len(re.findall(r"\w+", text)) >= MIN_WORDS


def main() -> None:
    """Print how many passages each class has, and a few of them."""
    data = load()
    for name in data.classes:
        train, held_out = (
            [passage for passage in side if passage.module == name]
            for side in (data.train, data.held_out)
        )
        print(f"{name:16} {len(train):4} to train on, {len(held_out):3} held out")
        print(f"    {train[0].member}: {train[0].text[:100]}")
    print(f"{len(data.train)} to train on, {len(data.held_out)} held out")


if __name__ == "__main__":
    main()
