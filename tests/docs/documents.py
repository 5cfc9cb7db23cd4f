"""Reads Markdown as a reader does: links, headings, inline code, and blocks with their commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from samples import ROOT

SHELL = ("bash", "sh")
KEYWORDS = {"while", "until", "if", "then", "else", "do", "done", "fi", "!", "{", "}", "nohup"}
SEPARATOR = re.compile(r"[;&|()]+")


@dataclass(frozen=True)
class Block:
    language: str
    text: str


@dataclass(frozen=True)
class Document:
    """A Markdown text, and the file that it is, or would be."""

    text: str
    path: Path = field(default=ROOT / "README.md")

    @classmethod
    def read(cls, path: Path) -> Document:
        return cls(path.read_text(encoding="utf-8"), path)

    @cached_property
    def tokens(self) -> list[Token]:
        """All tokens, those within a line among them."""
        tokens = MarkdownIt().enable("table").parse(self.text)
        return [part for token in tokens for part in (token, *(token.children or []))]

    @cached_property
    def blocks(self) -> list[Block]:
        return [Block(token.info, token.content) for token in self.tokens if token.type == "fence"]

    @cached_property
    def inline_code(self) -> list[str]:
        return [token.content for token in self.tokens if token.type == "code_inline"]

    @cached_property
    def links(self) -> list[tuple[str, str]]:
        """Text and target of each link and image."""
        found: list[tuple[str, str]] = []
        start = None
        for index, token in enumerate(self.tokens):
            if token.type == "image":
                found.append((token.content, str(token.attrs["src"])))
            elif token.type == "link_open":
                start = index
            elif token.type == "link_close" and start is not None:
                text = "".join(part.content for part in self.tokens[start + 1 : index])
                found.append((text, str(self.tokens[start].attrs["href"])))
        return found

    @cached_property
    def anchors(self) -> set[str]:
        """What a `#...` may name: headings, as the repository's host spells them."""
        texts = [
            "".join(part.content for part in self.tokens[index + 1].children or [])
            for index, token in enumerate(self.tokens)
            if token.type == "heading_open"
        ]
        return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}

    def shell(self) -> list[list[str]]:
        """Every command of the shell blocks, functions that a block defines put in their place."""
        functions: dict[str, list[list[str]]] = {}
        found = []
        for block in self.blocks:
            if block.language in SHELL:
                text = block.text
                for name, body in re.findall(r"^(\w+)\(\) \{\n(.*?)^\}$", text, re.M | re.S):
                    functions[name] = list(commands(body))
                text = re.sub(r"^\w+\(\) \{\n.*?^\}$", "", text, flags=re.M | re.S)
                for words in commands(text):
                    for body_words in functions.get(words[0], [words]):
                        found.append(_with_arguments(body_words, words[1:]))
        return found


def _with_arguments(words: list[str], given: list[str]) -> list[str]:
    return [part for word in words for part in (given if word == "$@" else [word])]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell text: no comments, redirections, keywords or settings.

    Raises:
        ValueError: a quotation is not closed.
    """
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        into_file = False
        for word in [*lexer, ";"]:
            if into_file:
                into_file = False
            elif re.fullmatch(r"[<>&]*[<>][<>&]*", word):
                into_file = True
                if words and words[-1].isdigit():
                    words.pop()  # the 2 of 2>&1
            elif SEPARATOR.fullmatch(word):
                if words := _stripped(words):
                    yield words
                words = []
            else:
                words.append(word)


def _stripped(words: list[str]) -> list[str]:
    """Without the keywords and the settings of variables before the command itself."""
    while words and (words[0] in KEYWORDS or re.match(r"[A-Za-z_]\w*=", words[0])):
        words = words[1:]
    return words


def documents() -> list[Path]:
    """What a user is told to read, CHANGELOG.md aside."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "ray_synth/embedded/MODEL_CARD.md",
    ]
