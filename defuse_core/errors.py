"""Every error that Defuse raises on purpose, and the exit code each one means.

DefuseError
├── CheckFailed              1  a check on a model did not pass
├── InputError               2  something given to Defuse is not usable
│   ├── RunFileError            the run file, or a --set
│   ├── DataError               images or labels
│   ├── ModelError              a model given by the user: its code or its weights
│   ├── VaeHealthError          the β-VAE draws images that are of no use (vae.accept)
│   └── RunMismatchError        the run file no longer matches the run it names
├── LabelsPending            3  people have not answered yet; the same command later goes on
└── MachineryError           4  the machinery failed: try again, nothing is lost
    ├── StoreError              the run's folder or bucket
    │   ├── NoAnswerError           it does not answer now, and may at the next attempt
    │   ├── DamagedError     2      a file there is damaged, or of another version: a person must look
    │   └── StoreSettingsError 2    the bucket's name, region, credentials or certificate, or a folder's name, are wrong
    ├── RunBusyError            another driver is writing this run
    ├── ComputeError            a worker, a task or a trial
    └── ServiceError            Label Studio or another server

A message is one line: what was expected, what was found and what to do. All of them pickle, since Ray carries them.
"""

import re

from defuse_core.formatting import escape_control_characters

ANOTHER_NAME = "another name (--name, or name= in Python)"  # remedy for a run's name, in messages
OTHER_FORMAT_REMEDY = f"use the version of Defuse that wrote it, or run again under {ANOTHER_NAME}"


class DefuseError(Exception):
    """Base of the tree. `str(error)` is the one line to show; `exit_code` is what the command exits with."""

    exit_code = 4

    def __init__(self, message: str) -> None:
        super().__init__(escape_control_characters(re.sub(r"\s*[\n\r]\s*", " ", message.strip())))


class CheckFailed(DefuseError):  # noqa: N818 - reads as the outcome that it is
    exit_code = 1


class InputError(DefuseError):
    exit_code = 2


class RunFileError(InputError): ...


class DataError(InputError): ...


class ModelError(InputError): ...


class VaeHealthError(InputError): ...


class RunMismatchError(InputError): ...


class LabelsPending(DefuseError):  # noqa: N818
    exit_code = 3


class MachineryError(DefuseError): ...


class StoreError(MachineryError): ...


class NoAnswerError(StoreError): ...


class DamagedError(StoreError):
    exit_code = InputError.exit_code


class StoreSettingsError(StoreError):
    exit_code = InputError.exit_code


class RunBusyError(MachineryError): ...


class ComputeError(MachineryError): ...


class ServiceError(MachineryError): ...
