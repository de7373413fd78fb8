"""The options that several commands share, and the meaning of their values."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from defuse_core.errors import InputError, RunFileError
from defuse_core.formatting import has_control_characters
from defuse_core.steps import STEPS

IS_SET = "is the variable set?"  # it is not, in scripts
EMPTY = f"expected a value, found an empty one; {IS_SET}"


def checked_text(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Return the text of an option or argument. Raises BadParameter for an empty one, and for control characters.

    These would act on the terminal of whoever reads the text later. Raises it for another option of the command, too.
    """
    if value == "":
        raise click.BadParameter(EMPTY, context, parameter)
    if value is not None:
        _expect_no_option(context, parameter, value)
    if value is not None and has_control_characters(value):
        raise click.BadParameter(
            f"expected text on one line without control characters, found {value!r}", context, parameter
        )
    return value


def checked_fields(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the values of --set. Raises BadParameter for another option of the command in place of one."""
    for value in values:
        _expect_no_option(context, parameter, value)
    return values


def _expect_no_option(context: click.Context, parameter: click.Parameter | None, value: str) -> None:
    """Raise BadParameter where click took the next option for the value, as where a variable is empty and unquoted."""
    options = (name for each in context.command.get_params(context) for name in each.opts)
    if value.startswith("--") and value.partition("=")[0] in options:
        raise click.BadParameter(f"expected a value, found the option {value}; {IS_SET}", context, parameter)


class GivenPath(click.Path):
    """The type of a path, with ~ expanded, which shells leave after `--to=`.

    Raises BadParameter for an empty one, which Path takes for the current folder, and for an address such as s3://.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if value == "":
            self.fail(EMPTY, param, ctx)
        if ctx is not None:
            _expect_no_option(ctx, param, str(value))
        if re.match("[A-Za-z][A-Za-z0-9+.-]*://", str(value)):  # Path would make a folder s3: of it
            self.fail(f"{value}: expected a path of this machine, found an address", param, ctx)
        try:
            return Path(str(super().convert(value, param, ctx))).expanduser()
        except RuntimeError:
            self.fail(f"{value}: expected the home of an existing user after ~", param, ctx)


class WholeNumber(click.IntRange):
    """A whole number within bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            self.fail(_refusal("a whole number", self.min, self.max, value), param, ctx)


class Number(click.FloatRange):
    """A number within bounds. nan is none, which click takes for a number within any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = float(super().convert(value, param, ctx))
        except click.BadParameter:
            found = math.nan
        if math.isnan(found):
            self.fail(_refusal("a number", self.min, self.max, value), param, ctx)
        return found


def _refusal(kind: str, least: float | None, most: float | None, value: object) -> str:
    if value == "":
        return EMPTY
    bounds = f"of at least {least:,}" if most is None else f"from {least:,} to {most:,}"
    return f"expected {kind} {bounds}, found {value!r}"


text_option = partial(click.option, callback=checked_text)
store_option = text_option(
    "--store",
    default="runs",
    show_default=True,
    help="Folder, or s3://bucket/prefix, where the runs are stored.",
)
name_option = text_option("--name", help="Name of the run. [default: the run file's name]")
address_option = text_option(
    "--address", help="Address of a running Ray cluster. [default: RAY_ADDRESS, else an embedded Ray]"
)
set_option = partial(
    click.option, "--set", "overrides", multiple=True, metavar="KEY=VALUE", callback=checked_fields
)
until_option = click.option(
    "--until", type=click.Choice(STEPS), default=STEPS[-1], help="Stop after this step."
)


STDOUT = "services.cli.stdout"  # in the context of a command with --json: its stdout


def _reserve_stdout(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """With --json, send to stderr what a user's classifier, native libraries and child processes print.

    `print_json` alone has stdout.
    """
    if value:
        stdout = sys.stdout
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a closed one, or one in memory
            if (stdout.fileno(), sys.stderr.fileno()) == (1, 2):
                stdout.flush()
                stdout = context.with_resource(_closing(os.fdopen(os.dup(1), "w")))
                os.dup2(2, 1)  # for good: C writes its buffers when the process ends
        context.meta[STDOUT] = stdout
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    return value


@contextlib.contextmanager
def _closing(stream: TextIO) -> Iterator[TextIO]:
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):  # raised by print_json already
            stream.close()


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_reserve_stdout, help="Print one JSON object."
)


def print_json(result: dict[str, Any]) -> None:
    """Print the result of a command that was given --json; nothing where stdout is closed, as by `>&-`."""
    stdout = click.get_current_context().meta[STDOUT]
    if stdout is not None:  # which click takes for the current stdout, and that is stderr
        click.echo(json.dumps(result), file=stdout)


def local_user(option: str) -> str:
    """Return the name of this machine's user. Raises InputError, naming `option`, if it has none, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise InputError(f"{option}: this machine has no name for its user; give yours") from error


def section_overrides(section: str, overrides: tuple[str, ...], tree: dict[str, Any]) -> dict[str, Any]:
    """Return `section` of `tree` with the values of --set, which may name fields of that section alone.

    Raises RunFileError for another field, and for no usable value.
    """
    from defuse_core.config import apply_override

    for override in overrides:
        if not override.strip().startswith(f"{section}."):
            raise RunFileError(f"--set {override}: expected {section}.field=value")
        apply_override(tree, override)
    fields: dict[str, Any] = tree.get(section, {})
    return fields


track_option = click.option(
    "--track",
    type=click.Choice(["mlflow"]),
    help="Send settings, figures, report and model to the server in MLFLOW_TRACKING_URI, when the command ends.",
)


CLASSIFIER_HELP = (
    "Your classifier: package.module:factory (with --weights), a file of torch.export.save (or of torch.jit.save, if "
    "DEFUSE_TRUST_TORCHSCRIPT=1), a folder of Hugging Face's, or timm:NAME (with --weights)."
)


def classifier_fields(text: str | None, weights: Path | None) -> dict[str, Any] | None:
    """Return section `classifier` of a run file for --classifier and --weights; None without any. Raises InputError."""
    if text is None:
        _expect_none(weights, "(none)", "give --classifier too")
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"--classifier {text}: expected the home of an existing user after ~") from error
    if text.startswith("timm:"):
        if weights is None:
            raise InputError(f"--classifier {text}: needs --weights with a file, since nothing is downloaded")
        return {
            "architecture": "timm",
            "timm_model": text.removeprefix("timm:"),
            "weights": _existing(weights),
        }
    if path.is_dir():
        _expect_none(weights, text, "its weights are in the folder")
        return {"architecture": "transformers", "weights": str(path.absolute())}
    script, function = Path(str(path).partition(":")[0]), text.partition(":")[2] or "build"
    if script.suffix == ".py":
        outside = script.is_absolute() or ".." in script.parts
        module = script.stem if outside else ".".join(script.with_suffix("").parts)
        raise InputError(
            f"--classifier {text}: a Python file; name the function in it that returns the network: --classifier "
            f"{module}:{function}"
        )
    if path.suffix == ".safetensors":
        raise InputError(
            f"--classifier {text}: holds weights only; add the code: --classifier package.module:factory "
            f"--weights {text}"
        )
    if path.is_file() or path.suffix in {".pt", ".pt2", ".torchscript", ".pth"}:
        _expect_none(weights, text, "the file holds its own")
        return {"architecture": "program", "weights": _existing(path)}
    if ":" not in text:
        raise InputError(
            f"--classifier {text}: expected package.module:factory, a file, a folder of Hugging Face's, or timm:NAME; "
            f"found no such file{_meant(text)}"
        )
    section: dict[str, Any] = {"architecture": "custom", "import_path": text}
    return section | ({"weights": _existing(weights)} if weights is not None else {})


def _meant(text: str) -> str:
    """Return which function is meant by the name of a module, or one without a colon: nets:build for nets.build."""
    module, _, factory = text.rpartition(".")
    with contextlib.suppress(ValueError, ImportError):  # no name of a module; its package cannot be imported
        if importlib.util.find_spec(text) is not None:
            return f"; did you mean {text}:build?"
    with contextlib.suppress(ValueError):
        if module and importlib.util.find_spec(text.partition(".")[0]) is not None:
            return f"; did you mean {module}:{factory}?"
    return ""


def _existing(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path}: expected a file of weights, found none")
    return str(path.absolute())


def _expect_none(weights: Path | None, classifier: str, reason: str) -> None:
    if weights is not None:
        raise InputError(f"--weights {weights}: does not go with --classifier {classifier}; {reason}")
