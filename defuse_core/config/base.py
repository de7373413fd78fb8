"""What every section of a run file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _whole_above_one(gpus: float) -> float:
    """Ray shares out fractions of one GPU only."""
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(f"{gpus:g} GPUs: expected a fraction of one, or a whole number")
    return gpus


def _with_home(path: Path) -> Path:
    """Nothing else would read a ~ that came through a run file or --set."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such user's home") from error


UserPath = Annotated[Path, AfterValidator(_with_home)]
GpuShare = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
