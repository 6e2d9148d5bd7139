"""The choices of the user for a run from images to a map, checked once."""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any, Mapping, Sequence

from cctbx import uctbx

from dials.command_line import dials_import
from dials_diffuse.extraction.settings import processes

PROGRAMS = (
    "import",
    "find_spots",
    "index",
    "stills_process",
    "combine_experiments",
    "refine",
    "integrate",
)


@dataclasses.dataclass(frozen=True)
class ProcessSettings:
    """What is processed and how. All paths are absolute.

    Attributes:
        files: Image files and folders.
        templates: Templates of image files.
        experiments: An imported experiment list instead of images.
        mode: auto, stills or rotation.
        reference_geometry, mask: Files for dials.import and for spot finding.
        space_group, unit_cell: Known symmetry.
        integrate: Whether rotation data are integrated.
        nproc: Number of processes.
        options: Arguments of the user for each program of DIALS, without ``dials.``.
    """

    files: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    experiments: str | None = None
    mode: str = "auto"
    reference_geometry: str | None = None
    mask: str | None = None
    space_group: str | None = None
    unit_cell: tuple[float, ...] | None = None
    integrate: bool = False
    nproc: int = 1
    options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        errors = []
        n_kinds = sum(map(bool, (self.files, self.templates, self.experiments)))
        if n_kinds == 0:
            errors.append(
                "Please give image files, a template, a folder, or an imported .expt"
            )
        if n_kinds > 1:
            errors.append(
                "Please give either image files and folders, or templates, or one "
                "imported .expt"
            )
        if self.experiments and self.reference_geometry:
            errors.append(
                "input.reference_geometry is for importing images: give it to "
                f"dials.import, not with {self.experiments}"
            )
        if self.experiments and self.options.get("import"):
            errors.append(f"{self.experiments} is imported: there is no dials.import")
        if self.mode == "stills" and self.integrate:
            errors.append("integrate=True is for rotation data only")
        if errors:
            raise ValueError("\n".join(errors))

    @classmethod
    def from_phil(cls, params: Any, inputs: Sequence[str]) -> ProcessSettings:
        """The settings of the PHIL parameters.

        Args:
            params: Extracted parameters of ``phil/process.phil``.
            inputs: Image files, folders, templates (with #) and .expt files.

        Raises:
            ValueError: A file does not exist, or the parameters contradict each other.
        """
        expt = [name for name in inputs if name.endswith(".expt")]
        if len(expt) > 1:
            raise ValueError(f"Please give one .expt, not {len(expt)}")
        folders = [name for name in params.input.directory if name]
        files = [n for n in inputs if not n.endswith(".expt") and not is_template(n)]
        templates = [n for n in params.input.template if n]
        templates += [n for n in inputs if is_template(n)]
        symmetry = params.space_group
        return cls(
            files=tuple(existing(name, "image") for name in (*files, *folders)),
            templates=tuple(os.path.abspath(name) for name in templates),
            experiments=existing(expt[0], "experiment list") if expt else None,
            mode=params.mode,
            reference_geometry=_optional(
                params.input.reference_geometry, "input.reference_geometry"
            ),
            mask=_optional(params.input.mask, "input.mask"),
            space_group=str(symmetry).replace(" ", "") if symmetry else None,
            unit_cell=params.unit_cell and params.unit_cell.parameters(),
            integrate=params.integrate,
            nproc=processes(params.mp.nproc),
            options={
                name: user_options(name, getattr(params.dials, name))
                for name in PROGRAMS
            },
        )

    def cell(self) -> uctbx.unit_cell | None:
        """The known unit cell."""
        return uctbx.unit_cell(self.unit_cell) if self.unit_cell else None


def is_template(name: str) -> bool:
    """Whether a name is a template and not a file of that name."""
    return "#" in name and not os.path.exists(name)


def existing(name: str, what: str) -> str:
    """The absolute path of a file or folder.

    Raises:
        ValueError: It does not exist.
    """
    if not os.path.exists(name):
        raise ValueError(f"{what} {name} does not exist")
    return os.path.abspath(name)


def _optional(name: str | None, what: str) -> str | None:
    return existing(name, what) if name else None


def user_options(program: str, params: Any) -> tuple[str, ...]:
    """The user's arguments for a program: PHIL files, then single parameters.

    Args:
        program: Name without ``dials.``.
        params: Its ``phil`` and ``options``.

    Raises:
        ValueError: A file does not exist, or a parameter is none.
    """
    files = [existing(name, f"{program}.phil") for name in params.phil if name]
    options = []
    for text in filter(None, params.options):
        try:
            options += shlex.split(text)
        except ValueError as e:
            raise ValueError(f"{program}.options={text}: {e}") from None
    for option in options:
        if "=" not in option:
            raise ValueError(
                f"{program}.options: {option} is no parameter: write name=value"
            )
    if program == "import":
        _check_import_options(options)
    return (*files, *options)


def _check_import_options(options: Sequence[str]) -> None:
    """dials.import passes over arguments that it does not understand."""
    interpreter = dials_import.phil_scope.command_line_argument_interpreter()
    for option in options:
        try:
            interpreter.process_arg(option)
        except Exception as e:  # libtbx raises Sorry and RuntimeError alike
            reason = " ".join(str(e).split())
            raise ValueError(f"import.options: {option}: {reason}") from None


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into images (or .expt) and the rest, which is PHIL.

    A file named like a parameter, with an equals sign, is an image if it exists.
    """
    inputs, rest = [], []
    for arg in args:
        is_option = arg.startswith("-") or ("=" in arg and not os.path.exists(arg))
        is_phil = os.path.splitext(arg)[1] in (".phil", ".eff", ".def")
        (rest if is_option or is_phil else inputs).append(arg)
    return inputs, rest
