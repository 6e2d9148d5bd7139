"""The stages from images to indexed and refined models, as a list.

A stage is a program with its log and its output. Its arguments are made when it is its
turn, since they may depend on what the stages before it wrote. Everything is run in the
current folder.

Stills are indexed without dials.stills_process refining the candidates of each image
(``indexing.refinement_protocol.mode=None stills.refine_all_candidates=False``): that
needs an extension of cctbx (xfel_mono_sim_ext) which not all installations have. All
stills are refined together by dials.refine instead, which does it better: with beam and
detector fixed. A shift of the beam or the detector can hardly be told from a rotation of
every still, nor the distance from the cells, so that the headers or a reference
geometry are the better source; ``refine.options="detector.fix=None"`` refines
the detector.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.process.programs import run_program
from dials_diffuse.process.settings import ProcessSettings

logger = logging.getLogger("dials.diffuse.process")

IMPORTED = "imported.expt"
STILLS_FOLDER = "stills_process"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step from images to a map.

    Attributes:
        name: The program, for example dials.index.
        arguments: Makes its arguments.
        outputs: Names or patterns of the files that it must write.
        log: Its log file.
        execute: Runs it: takes name, arguments, log and outputs, and raises ValueError
            if it fails.
    """

    name: str
    arguments: Callable[[], list[str]]
    outputs: tuple[str, ...]
    log: str
    execute: Callable[[str, list[str], str, tuple[str, ...]], Any] = run_program


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        command: The command line that does the same by hand.
        seconds: Wall-clock time.
        state: done or failed.
    """

    name: str
    command: str
    seconds: float
    state: str
    log: str


def run_stages(stages: Sequence[Stage], results: list[StageResult]) -> None:
    """Run stages one after the other.

    Args:
        stages: The stages.
        results: What became of each is appended, the one that failed included.

    Raises:
        ValueError: A stage failed; those after it are not run.
    """
    for stage in stages:
        arguments = stage.arguments()
        command = shlex.join([stage.name, *arguments])
        logger.info("\n== %s", stage.name)
        logger.debug("%s", command)
        start, state = time.monotonic(), "failed"
        try:
            stage.execute(stage.name, arguments, stage.log, stage.outputs)
            state = "done"
        finally:
            seconds = time.monotonic() - start
            result = StageResult(stage.name, command, seconds, state, stage.log)
            results.append(result)
            logger.info("%s: %s in %.1f s", stage.name, state, seconds)


def _stage(
    settings: ProcessSettings,
    program: str,
    arguments: Sequence[str],
    outputs: Sequence[str],
    log: str | None = None,
) -> Stage:
    """A program of DIALS; the user's options come last and so override ours."""
    all_arguments = [*arguments, *settings.options.get(program, ())]
    return Stage(
        name=f"dials.{program}",
        arguments=lambda: all_arguments,
        outputs=tuple(outputs),
        log=log or f"dials.{program}.log",
    )


def import_stages(settings: ProcessSettings, mode: str) -> list[Stage]:
    """dials.import, unless an imported experiment list was given."""
    if settings.experiments:
        return []
    arguments = [*settings.files, *(f"template={name}" for name in settings.templates)]
    reference = settings.reference_geometry
    if reference:
        arguments.append(f"input.reference_geometry={reference}")
        if mode == "rotation" and not _has_goniometer(reference):
            arguments.append("input.use_gonio_reference=False")
    if mode == "stills":
        # else stills that share a template become sequences without a rotation
        arguments.append("geometry.convert_sequences_to_stills=True")
    return [_stage(settings, "import", arguments, [IMPORTED])]


def _has_goniometer(path: str) -> bool:
    try:
        reference = ExperimentList.from_file(path, check_format=False)
    except Exception as e:  # whatever a damaged file brings about
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"Cannot read the geometry {path} ({reason})") from None
    return any(e.goniometer is not None for e in reference)


def _imported(settings: ProcessSettings) -> str:
    return settings.experiments or IMPORTED


def _known_symmetry(settings: ProcessSettings) -> list[str]:
    result = []
    if settings.space_group:
        result.append(f"indexing.known_symmetry.space_group={settings.space_group}")
    if settings.unit_cell:
        cell = ",".join(f"{x:g}" for x in settings.unit_cell)
        result.append(f"indexing.known_symmetry.unit_cell={cell}")
    return result


def _mask_for_spots(settings: ProcessSettings) -> list[str]:
    return [f"spotfinder.lookup.mask={settings.mask}"] if settings.mask else []


def rotation_stages(settings: ProcessSettings) -> list[Stage]:
    """Spot finding, indexing of all sweeps together, refinement, integration."""
    imported = _imported(settings)
    nproc = settings.nproc
    stages = [
        _stage(
            settings,
            "find_spots",
            [imported, f"spotfinder.mp.nproc={nproc}", *_mask_for_spots(settings)],
            ["strong.refl"],
        ),
        _stage(
            settings,
            "index",
            [
                imported,
                "strong.refl",
                "indexing.joint_indexing=True",
                *_known_symmetry(settings),
            ],
            ["indexed.expt", "indexed.refl"],
        ),
        _stage(
            settings,
            "refine",
            ["indexed.expt", "indexed.refl"],
            ["refined.expt", "refined.refl"],
        ),
    ]
    if settings.integrate:
        stages.append(
            _stage(
                settings,
                "integrate",
                ["refined.expt", "refined.refl", f"integration.mp.nproc={nproc}"],
                ["integrated.expt", "integrated.refl"],
            )
        )
    return stages


def stills_stages(settings: ProcessSettings) -> list[Stage]:
    """Each still by itself, then all together."""
    patterns = [
        f"{STILLS_FOLDER}/idx-*_{kind}" for kind in ("refined.expt", "indexed.refl")
    ]
    stills = [
        _imported(settings),
        *_known_symmetry(settings),
        *_mask_for_spots(settings),
        "indexing.refinement_protocol.mode=None",
        "indexing.stills.refine_all_candidates=False",
        "dispatch.integrate=False",
        "output.composite_output=True",
        f"output.output_dir={STILLS_FOLDER}",
        "output.strong_filename=%s_strong.refl",  # for the number of spots
        f"mp.nproc={settings.nproc}",
    ]

    def process(name: str, arguments: list[str], log: str, outputs: tuple) -> None:
        Path(STILLS_FOLDER).mkdir(exist_ok=True)
        for path in Path(STILLS_FOLDER).glob("idx-*"):
            path.unlink()  # a run with more processes leaves more files
        run_program(name, arguments, log, outputs, "indexed none of the images")

    def combine() -> list[str]:
        files = [str(path) for name in patterns for path in sorted(Path().glob(name))]
        return [
            *files,
            *shared_models(_imported(settings)),
            *settings.options.get("combine_experiments", ()),
        ]

    return [
        dataclasses.replace(
            _stage(settings, "stills_process", stills, patterns, "dials.process.log"),
            execute=process,
        ),
        Stage(
            name="dials.combine_experiments",
            arguments=combine,
            outputs=("combined.expt", "combined.refl"),
            log="dials.combine_experiments.log",
        ),
        _stage(
            settings,
            "refine",
            [
                "combined.expt",
                "combined.refl",
                "refinement.parameterisation.beam.fix=all",
                "refinement.parameterisation.detector.fix=all",
            ],
            ["refined.expt", "refined.refl"],
        ),
    ]


def shared_models(imported: str) -> list[str]:
    """Arguments by which all stills share one detector and one beam, if they are alike.

    Args:
        imported: The experiment list before indexing.
    """
    experiments = ExperimentList.from_file(imported, check_format=False)
    result = []
    for name, models in (
        ("detector", experiments.detectors()),
        ("beam", experiments.beams()),
    ):
        # XFEL pulses differ in wavelength; several detectors may have been used
        if all(model.is_similar_to(models[0]) for model in models):
            result.append(f"reference_from_experiment.{name}=0")
    return result
