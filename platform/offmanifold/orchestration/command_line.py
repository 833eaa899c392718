"""A config dataclass as a command line: presets as sub-commands, every field an option.

The preset is taken off by hand, so that it can be left out and ``--help`` then still shows every field.
"""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

import tyro

from offmanifold.orchestration.session import Execution

Config = TypeVar("Config")


def parse(doc: str, presets: Mapping[str, Config], args: Sequence[str] | None = None) -> tuple[Config, Execution, str]:
    """``[preset] [--field value ...]`` -> the experiment's config, how to execute it, and the preset; without one, the first.

    A bad value ends the program with exit code 2 and one line that says which.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else next(iter(presets))
    if preset not in presets:
        near = get_close_matches(preset, presets, n=1)
        _refuse(f"preset {preset!r} is unknown; there are: {', '.join(presets)}" + (f" (did you mean {near[0]}?)" if near else ""))
    default = presets[preset]
    fields: list[Any] = [("config", type(default), field(default=default)), ("execution", Execution, field(default=Execution()))]
    command = make_dataclass("Command", fields, frozen=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Any = tyro.cli(
                command,
                args=arguments,
                prog=f"{sys.argv[0]} {preset}",
                description=f"{doc.strip()}\n\nPresets: {', '.join(presets)}. Shown are the defaults of {preset!r}.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
            )
    except SystemExit as stop:
        if stop.code:
            _refuse(_one_line(said.getvalue()))
        raise  # --help
    return parsed.config, parsed.execution, preset


def _one_line(box: str) -> str:
    """What tyro says in the box that it draws (in ASCII where the terminal has no more): the words between the title and the next rule."""
    lines = itertools.dropwhile(_is_rule, (line.strip("│| ") for line in box.splitlines()[1:]))
    words = itertools.takewhile(lambda line: not _is_rule(line), lines)
    return re.sub(r"^Error parsing config(\.\w+)*: ", "", " ".join(words)) or box


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-╰╯+")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
