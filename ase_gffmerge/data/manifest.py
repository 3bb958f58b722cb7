"""Data manifests: one YAML document per public data set says where it is, whose it is, and what it holds.

The documents live in ``data_manifests/`` at the top of the repository and are installed with the package.
They hold no data: :func:`ase_gffmerge.data.download.fetch` downloads the files, checks them and converts them.
"""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from ase.data import atomic_numbers
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ase_gffmerge.errors import DataError
from ase_gffmerge.storage.documents import parse_yaml


def _relative(path: str) -> str:
    """Refuse paths that would be written outside the download folder."""
    parts = PurePosixPath(path).parts
    if not parts or "\\" in path or ":" in path or PurePosixPath(path).is_absolute() or ".." in parts:
        raise ValueError(f"{path!r} must be a relative path with forward slashes and without '..'")
    return path


def _element(symbol: str) -> str:
    """Accept symbols of the periodic table only."""
    if atomic_numbers.get(symbol, 0) < 1:
        raise ValueError(f"{symbol!r} is not an element symbol")
    return symbol


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Citation(_Strict):
    """A work to cite when the data set is used."""

    text: str = Field(min_length=1)
    doi: str | None = Field(default=None, pattern=r"^10\.\d{4,}/\S+$")


class Units(_Strict):
    """Units of the files as they are published (converted files are always in eV and Å)."""

    length: Literal["Å"]
    energy: Literal["eV", "kcal/mol"]
    force: Literal["eV/Å", "kcal/mol/Å"]
    virial: Literal["eV"] | None = None


class DataFile(_Strict):
    """One file to download.

    Without a verified `sha256`, `reason` must say why; the fetcher then records the hash it sees first.
    """

    path: Annotated[str, AfterValidator(_relative)]
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    reason: str | None = None
    system: str
    split: str | None = None

    @model_validator(mode="after")
    def _hash_or_reason(self) -> DataFile:
        if (self.sha256 is None) == (self.reason is None):
            raise ValueError(
                f"{self.path}: give either a sha256 or, with `sha256: null`, the reason why there is none"
            )
        return self


class Manifest(_Strict):
    """A data set: names, rights, contents and files. Unknown keys are errors."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    citations: list[Citation] = Field(min_length=1)
    licence: str
    licence_note: str | None = None
    homepage: str
    base_url: str = Field(pattern=r"^https?://")
    reader: Literal["npz", "deepmd", "ase"]
    units: Units
    keys: dict[str, str]
    level_of_theory: str
    elements: list[Annotated[str, AfterValidator(_element)]] = Field(min_length=1)
    splits: str
    notes: str | None = None
    files: list[DataFile] = Field(min_length=1)

    @field_validator("files")
    @classmethod
    def _unique(cls, files: list[DataFile]) -> list[DataFile]:
        paths = [file.path for file in files]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"listed more than once: {', '.join(twice)}")
        return files

    @property
    def systems(self) -> list[str]:
        """Names of the molecules or crystals, each once, in the order of the files."""
        return list(dict.fromkeys(file.system for file in self.files))


def _folder() -> Traversable:
    """Where the documents lie: inside an installed package, or at the top of a checkout."""
    installed = resources.files("ase_gffmerge") / "data_manifests"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "data_manifests"


def list_manifests() -> list[str]:
    """Names of the data sets with a manifest, sorted.

    Raises
    ------
    DataError
        If the installation holds no manifests.
    """
    folder = _folder()
    names = (
        sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
        if (folder.is_dir())
        else []
    )
    if not names:
        raise DataError(
            f"no data manifests in {folder}: the installation is incomplete; reinstall ase-gffmerge"
        )
    return names


def load_manifest(name: str | Path) -> Manifest:
    """Load and validate a manifest.

    Parameters
    ----------
    name
        Name of a data set (:func:`list_manifests`; upper and lower case are the same), or the path of a YAML
        document (anything that ends in ``.yaml`` or ``.yml``).

    Returns
    -------
    Manifest

    Raises
    ------
    DataError
        If the name is unknown (with the closest names), or the document is missing, not YAML, or not valid.

    Examples
    --------
    >>> load_manifest("rmd17").licence
    'CC0-1.0'
    """
    if str(name).endswith((".yaml", ".yml")):
        return _parse(Path(name))
    known = list_manifests()
    if (key := str(name).lower()) not in known:
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known data sets: {', '.join(known)}"
        raise DataError(f"unknown data set {str(name)!r}: {hint}")
    return _parse(_folder() / f"{key}.yaml")


def _parse(document: Path | Traversable) -> Manifest:
    """Read one YAML document; every failure is a `DataError` that names the document."""
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the manifest {document}: {error}") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise DataError(f"the manifest {document} is not valid YAML: {error}") from error
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors()
        )
        raise DataError(f"the manifest {document} is not valid: {problems}") from error
