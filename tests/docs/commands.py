"""Checks a command line against the programs themselves, without running it."""

import argparse
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import lru_cache
from typing import Any
from unittest import mock

import typer
from documents import ROOT

from owlrec.cli import app

# Programs of others, whose options are theirs to check. Whatever else begins a line must have a check below.
EXEMPT = {
    "kubectl", "kustomize", "helm", "aws", "gcloud", "docker", "openssl", "base64", "cat", "sed", "tail", "du",
    "export",
}  # fmt: skip
_OPERATORS = {"&&", "||", "|", ";", "&", ">>", ">"}
_FOLDERS = ("cluster/", "docs/", "pipelines/", "platform/", "serve_apps/", "tests/", "benchmarks/")
_PARSE = argparse.ArgumentParser.parse_args


class Wrong(Exception):
    """What is wrong with a command."""


class _Parsed(BaseException):
    """The arguments are understood, and nothing more is to happen."""


def lines_of(block: str) -> list[str]:
    """The command lines of a block, continued ones joined."""
    joined = re.sub(r"\\\n\s*", " ", block)
    return [line for line in map(str.strip, joined.splitlines()) if line and not line.startswith("#")]


def split(line: str) -> list[list[str]]:
    """The single commands of a line, as words; what they are redirected to is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if word in _OPERATORS:
            skip = word.startswith(">")
            commands += [] if skip else [[]]
        elif not skip:
            commands[-1].append(word)
        else:
            skip = False
    return [words for words in commands if words]


def check(words: Sequence[str], *, partial: bool = False) -> None:
    """Raises Wrong where the command is not one that could run.

    partial: it may lack arguments, as a command that is only named in a sentence does.
    """
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for word in words:
        if word.startswith(_FOLDERS) and "…" not in word and not (ROOT / word).exists():
            raise Wrong(f"there is no {word}")
    if not words or words[0] in EXEMPT:
        return
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    checks = {
        "owlrec": lambda: _click(owlrec_command(), arguments, partial),
        "python": lambda: _python(arguments, partial),
        "make": lambda: _make(arguments),
        "pytest": lambda: _pytest(arguments),
        "pip": lambda: _pip(arguments),
        "ray": lambda: _ray(arguments, partial),
        "serve": lambda: _click(_serve_command(), arguments, partial),
    }
    if program not in checks:
        raise Wrong(f"what is {program}? Check it in tests/docs/commands.py, or name it in EXEMPT there")
    checks[program]()


@lru_cache
def owlrec_command() -> Any:
    """The `owlrec` command."""
    return typer.main.get_command(app)


@lru_cache
def _ray_command() -> Any:
    from ray.scripts.scripts import cli

    return cli


@lru_cache
def _serve_command() -> Any:
    from ray.serve.scripts import cli

    return cli


def _click(command: Any, arguments: Sequence[str], partial: bool) -> None:
    arguments = list(arguments)
    if "--help" in arguments:
        arguments.remove("--help")
        partial = True
    while hasattr(command, "commands") and arguments:
        name = arguments.pop(0)
        if name in {opt for p in command.params for opt in p.opts}:  # such as --version, which would act now
            return
        if name not in command.commands:
            raise Wrong(f"there is no command {name}")
        command = command.commands[name]
    try:
        with redirect_stderr(io.StringIO()):
            command.make_context(command.name, arguments)
    except Exception as error:  # click's, or the copy of it that typer brings
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        lacking = "Missing" in message or "requires an argument" in message
        if not (partial and lacking):
            raise Wrong(message) from None


def _ray(arguments: Sequence[str], partial: bool) -> None:
    arguments = list(arguments)
    _click(_ray_command(), arguments, partial)
    if "--" in arguments:
        check(arguments[arguments.index("--") + 1 :], partial=partial)


def _python(arguments: Sequence[str], partial: bool) -> None:
    if arguments[:1] == ["-c"]:
        compile(arguments[1], "-c", "exec")
        return
    if arguments[:1] != ["-m"]:
        raise Wrong("python without -m or -c")
    module, rest = arguments[1], list(arguments[2:])
    if module == "pytest":
        _pytest(rest)
    elif module.split(".")[0] == "pipelines":
        _click(owlrec_command(), [*_command_of(module), *rest], partial)
    elif module.split(".")[0] not in ("benchmarks", "owlrec"):
        raise Wrong(f"no check for python -m {module}")
    else:
        _argparse(module, rest, partial)


def _command_of(module: str) -> list[str]:
    """The words of the `owlrec` command that an entry point runs."""
    command: list[str] = []
    try:
        with mock.patch("pipelines.command", lambda *words: command.extend(words)):
            runpy.run_module(module, run_name="__main__")
    except ImportError as error:
        raise Wrong(f"there is no {module} ({error})") from None
    return command


def _argparse(module: str, arguments: Sequence[str], partial: bool) -> None:
    def parsed(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        _PARSE(parser, *given, **named)
        raise _Parsed

    said = io.StringIO()
    try:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", parsed),
            mock.patch.object(sys, "argv", [module, *arguments]),
            warnings.catch_warnings(action="ignore"),  # that runpy meets a module which is loaded already
            redirect_stderr(said),
        ):
            runpy.run_module(module, run_name="__main__")
    except _Parsed:
        return
    except ImportError as error:
        raise Wrong(f"there is no {module} ({error})") from None
    except SystemExit:
        if not (partial and "required" in said.getvalue()):
            raise Wrong(said.getvalue().splitlines()[-1]) from None
    else:
        raise Wrong(f"{module} takes no arguments")


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def _make(arguments: Sequence[str]) -> None:
    targets = {word for word in arguments if "=" not in word}  # the others set a variable
    if not targets or (unknown := targets - make_targets()):
        raise Wrong(f"make has no target {', '.join(unknown) if targets else ''}")


def _pytest(arguments: Sequence[str]) -> None:
    own = set(re.findall(r'"(--[\w-]+)"', (ROOT / "tests" / "conftest.py").read_text("utf-8")))
    for word in arguments:
        if word.startswith("-") and word not in own | {"-s"}:
            raise Wrong(f"pytest {word}?")


def _pip(arguments: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for word in arguments:
        if match := re.fullmatch(r"\.\[(.+)\]", word):
            for extra in match[1].split(","):
                if extra not in extras:
                    raise Wrong(f"there is no extra {extra}")


@lru_cache
def every_option() -> set[str]:
    """The options of our commands, and those literal in our sources."""
    options, commands = set(), [owlrec_command()]
    for command in commands:  # which grows by the commands of groups
        commands += getattr(command, "commands", {}).values()
        options |= {opt for p in command.params for opt in [*p.opts, *p.secondary_opts]}
    for folder in ("pipelines", "benchmarks", "platform", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            options |= set(re.findall(r'"(--[\w-]+)"', file.read_text("utf-8")))
    return options
