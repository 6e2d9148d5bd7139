"""dxtbx models of a simulated experiment, made from the settings alone.

The frame is that of dxtbx for images without further information: the source is at +z,
the beam goes along -z, and the detector stands at z = -distance with fast along +x and
slow along -y. Rotations by three angles are about x, then y, then z of the laboratory.

Whatever is random follows from the seed, a number for its purpose and the number of the
series, never from what was drawn before: results depend neither on the order nor on the
number of processes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

import dxtbx.format.Registry
from cctbx import sgtbx, uctbx
from cctbx.eltbx import attenuation_coefficient
from dxtbx.imageset import ImageSet, ImageSetFactory
from dxtbx.model import (
    Beam,
    BeamFactory,
    Crystal,
    Detector,
    Experiment,
    Goniometer,
    GoniometerFactory,
    Panel,
    ParallaxCorrectedPxMmStrategy,
    Scan,
    ScanFactory,
)
from dxtbx.model.experiment_list import ExperimentList
from dxtbx.sequence_filenames import template_regex

from dials_diffuse.geometry.orientation import inverse
from dials_diffuse.io.images import turns_about_x
from dials_diffuse.simulation.settings import (
    DetectorSettings,
    ScanSettings,
    SimulationSettings,
    Vector,
)
from dials_diffuse.symmetry import rotation_matrices
from dials_diffuse.util.compat import photon_counter_trusted_range

ORIENTATIONS, CELLS = 301, 302  # purposes of random numbers

SOURCE = (0.0, 0.0, 1.0)  # direction from the sample to the source


@dataclasses.dataclass(frozen=True)
class Series:
    """The images of one crystal, or of no crystal: a sweep, or a number of stills.

    Attributes:
        number: 1 for the first crystal; the background follows the last crystal.
        experiments: One experiment for a sweep; one for each still, without goniometer
            and scan, as ``dials.import convert_sequences_to_stills=True`` makes them.
        n_images: Number of images.
        width: Rotation during one image, degrees; 0 for stills.
    """

    number: int
    experiments: ExperimentList
    n_images: int
    width: float

    @property
    def is_background(self) -> bool:
        return self.experiments[0].crystal is None

    @property
    def is_stills(self) -> bool:
        return self.experiments[0].scan is None

    @property
    def name(self) -> str:
        """The part of the names of its files that tells it from other series."""
        return "background" if self.is_background else str(self.number)


def make_beam(settings: SimulationSettings) -> Beam:
    """The beam, s0 = (0, 0, -1/wavelength)."""
    beam = settings.beam
    normal = np.array(beam.polarization_normal)
    return BeamFactory.make_polarized_beam(
        sample_to_source=SOURCE,
        wavelength=beam.wavelength,
        polarization=tuple(normal / np.linalg.norm(normal)),
        polarization_fraction=beam.polarization_fraction,
        flux=beam.flux,
    )


def needs_nexus(settings: SimulationSettings) -> bool:
    """Whether a mini-CBF header cannot tell the geometry of the images.

    It knows one panel perpendicular to the beam, and a rotation about +x.
    """
    detector = settings.detector
    if detector.panels != (1, 1) or detector.two_theta != 0:
        return True
    return not (settings.is_stills or turns_about_x(make_goniometer(settings)))


def make_detector(settings: SimulationSettings) -> Detector:
    """The detector: its panels row by row, the first at the upper left.

    Raises:
        ValueError: Panels are turned so far that they do not face the sample.
    """
    detector = Detector()
    frames = panel_frames(settings.detector)
    for i, (fast, slow, origin) in enumerate(frames):
        panel = detector.add_panel()
        panel.set_name(f"Panel{i}" if len(frames) > 1 else "Panel")
        panel.set_frame(fast, slow, origin)
        _set_sensor(panel, settings)
    return detector


def _set_sensor(panel: Panel, settings: SimulationSettings) -> None:
    """Size, counting and sensor of a panel, as dxtbx' formats set them."""
    detector = settings.detector
    panel.set_type("SENSOR_PAD")
    panel.set_image_size(detector.size)
    panel.set_pixel_size((detector.pixel, detector.pixel))
    panel.set_trusted_range(photon_counter_trusted_range(detector.count_cutoff))
    panel.set_gain(detector.gain)
    if detector.thickness > 0:
        table = attenuation_coefficient.get_table("Si")
        mu = table.mu_at_angstrom(settings.beam.wavelength) / 10  # 1/mm
        panel.set_material("Si")
        panel.set_mu(mu)
        panel.set_thickness(detector.thickness)
        panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(mu, detector.thickness))


def _chain(n: int, length: float, tilt: float) -> tuple[np.ndarray, np.ndarray]:
    """n sides of a polygon, symmetric about its middle.

    Args:
        n: Number of sides.
        length: Of each side.
        tilt: Angle between neighbours, degrees.

    Returns:
        Their directions and their centres, shape (n, 2) each: components along the
        middle of the chain, and towards the side to which it bends.
    """
    angles = np.radians(tilt) * (np.arange(n) - (n - 1) / 2)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ends = np.cumsum(directions * length, axis=0)
    return directions, ends - directions * length / 2


def panel_frames(
    detector: DetectorSettings,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Fast axis, slow axis and origin (mm) of each panel, row by row.

    The panels of a row touch at their edges, each turned by ``panel_tilt`` about the
    vertical against its neighbour; the rows, rigid in themselves, are turned likewise
    about the horizontal. (Corners of panels that are tilted both ways overlap a little.)
    The whole is moved without rotation until the pixel ``beam_centre``, counted over all
    panels, is on the beam at ``distance``, and then turned by ``two_theta`` about x.
    """
    n_panels, n_px = np.array(detector.panels), np.array(detector.size)
    size = n_px * detector.pixel
    columns, column_centres = _chain(n_panels[0], size[0], detector.panel_tilt)
    rows, row_centres = _chain(n_panels[1], size[1], detector.panel_tilt)
    frames = []
    for (down, to_sample), (y, z) in zip(rows, row_centres):
        # x, -y and z of the plane in which a row lies, as columns
        row = np.array([[1, 0, 0], [0, -down, to_sample], [0, to_sample, down]]).T
        for (across, outward), (x, height) in zip(columns, column_centres):
            fast, slow = row @ [across, 0, outward], row[:, 1]
            centre = np.array([0, -y, z]) + row @ [x, 0, height]
            frames.append(
                (fast, slow, centre - fast * size[0] / 2 - slow * size[1] / 2)
            )
    # On a corner between pixels: masking.h of DIALS fails where a pixel has no resolution
    beam_px = np.array(detector.beam_centre or n_panels * n_px // 2)
    i, j = np.clip(beam_px // n_px, 0, n_panels - 1).astype(int)
    fast, slow, corner = frames[j * n_panels[0] + i]
    px = beam_px - np.array([i, j]) * n_px
    hit = corner + (fast * px[0] + slow * px[1]) * detector.pixel
    shift = np.array([0, 0, -detector.distance]) - hit
    _check_facing([(fast, slow, o + shift) for fast, slow, o in frames], detector)
    arm = Rotation.from_euler("x", detector.two_theta, degrees=True).as_matrix()
    return [(arm @ fast, arm @ slow, arm @ (o + shift)) for fast, slow, o in frames]


def _check_facing(
    frames: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    detector: DetectorSettings,
) -> None:
    for fast, slow, origin in frames:
        if not np.dot(np.cross(fast, slow), origin) > 0:
            raise ValueError(
                f"{detector.panels[0]} x {detector.panels[1]} panels turned by "
                f"detector.panel_tilt={detector.panel_tilt:g} degrees each do not all "
                "face the sample: use a smaller angle or fewer panels"
            )


def _rotation(angles: Vector | None) -> np.ndarray:
    """Matrix of a rotation about x, then y, then z of the laboratory, in degrees."""
    return Rotation.from_euler("xyz", angles or (0, 0, 0), degrees=True).as_matrix()


def make_goniometer(settings: SimulationSettings) -> Goniometer:
    """The goniometer: axis, fixed rotation and setting rotation."""
    goniometer = settings.goniometer
    axis = np.array(goniometer.axis)
    result = GoniometerFactory.make_goniometer(
        tuple(axis / np.linalg.norm(axis)),
        tuple(_rotation(goniometer.fixed_rotation).ravel()),
    )
    result.set_setting_rotation(tuple(_rotation(goniometer.setting_rotation).ravel()))
    return result


def make_scan(settings: ScanSettings, n_images: int) -> Scan:
    """A sweep of images 1 to n_images."""
    return ScanFactory.make_scan(
        (1, n_images),
        settings.exposure,
        (settings.start, settings.width),
        dict.fromkeys(range(1, n_images + 1), 0.0),
    )


def spread_cell(
    unit_cell: uctbx.unit_cell,
    space_group: sgtbx.space_group,
    spread: float,
    rng: np.random.Generator,
) -> uctbx.unit_cell:
    """A cell with edges multiplied by 1 + spread·N(0, 1), with the same angles.

    Edges that the symmetry mixes get the same factor: the metric matrix D G D, with D
    diagonal, has the symmetry of G if D commutes with the operators.
    """
    tied = np.any(rotation_matrices(space_group) != 0, axis=0)
    tied |= tied.T
    tied |= tied @ tied  # through the third edge
    deviations = rng.normal(size=3)
    factors = 1 + spread * deviations[tied.argmax(axis=1)]
    edges = np.array(unit_cell.parameters()[:3]) * factors
    return uctbx.unit_cell((*edges, *unit_cell.parameters()[3:]))


def series_crystals(
    settings: SimulationSettings,
    unit_cell: uctbx.unit_cell,
    space_group: sgtbx.space_group,
    number: int,
) -> list[Crystal]:
    """The crystal of a sweep, or that of each still of a series.

    Stills ``stepped``: A_i = S R(phi_i) F U B, the crystal of a sweep at the start
    phi_i = start + i·width of its image i.

    Raises:
        ValueError: An orientation is given for stills that have random ones.
    """
    rng = np.random.default_rng([settings.seed, CELLS, number])
    cell = spread_cell(unit_cell, space_group, settings.crystal.cell_spread, rng)
    # a* along x, b* in the xy plane
    b = np.array(cell.reciprocal().orthogonalization_matrix()).reshape(3, 3)
    return [
        Crystal(*(tuple(row) for row in inverse(u @ b)), space_group=space_group)
        for u in _orientations(settings, number)
    ]


def _orientations(settings: SimulationSettings, number: int) -> np.ndarray:
    """Rotation of the crystal at each still, or of that of a sweep, shape (n, 3, 3)."""
    given = settings.crystal.orientation
    random = settings.is_stills and settings.scan.orientations == "random"
    if random and given is not None:
        raise ValueError(
            "crystal.orientation is given, but scan.orientations=random makes all "
            "orientations random: leave one of them out"
        )
    rng = np.random.default_rng([settings.seed, ORIENTATIONS, number])
    # normalized, four normal deviates are a uniformly distributed rotation
    quaternions = rng.normal(size=(settings.n_images if random else 1, 4))
    rotations = Rotation.from_quat(quaternions).as_matrix()
    if given is not None and number == 1:
        rotations = _rotation(given)[None]
    if not settings.is_stills or random:
        return rotations
    goniometer = make_goniometer(settings)
    angles = settings.scan.start + settings.scan.width * np.arange(settings.n_images)
    axis = np.array(goniometer.get_rotation_axis_datum())
    turns = Rotation.from_rotvec(np.radians(angles)[:, None] * axis).as_matrix()
    setting = np.array(goniometer.get_setting_rotation()).reshape(3, 3)
    fixed = np.array(goniometer.get_fixed_rotation()).reshape(3, 3)
    return setting @ turns @ fixed @ rotations


def make_series(
    settings: SimulationSettings,
    unit_cell: uctbx.unit_cell,
    space_group: sgtbx.space_group,
    prefix: str = "sim",
) -> list[Series]:
    """All series of images, that of the background last.

    Beam, detector and goniometer are shared. Identifiers are made of the prefix, the
    seed, the number of the series and that of the still.

    Raises:
        ValueError: The settings of detector or crystals contradict each other.
    """
    beam, detector = make_beam(settings), make_detector(settings)
    goniometer = None if settings.is_stills else make_goniometer(settings)

    def series(number: int, crystals: Sequence[Crystal | None], n: int) -> Series:
        identifier = f"{prefix}-{settings.seed}-{number}"
        experiments = ExperimentList()
        for i, crystal in enumerate(crystals, 1):
            experiments.append(
                Experiment(
                    identifier=f"{identifier}-{i:05d}"
                    if settings.is_stills
                    else identifier,
                    beam=beam,
                    detector=detector,
                    goniometer=goniometer,
                    scan=None if settings.is_stills else make_scan(settings.scan, n),
                    crystal=crystal,
                )
            )
        width = 0.0 if settings.is_stills else settings.scan.width
        return Series(number, experiments, n, width)

    result = [
        series(
            number,
            series_crystals(settings, unit_cell, space_group, number),
            settings.n_images,
        )
        for number in range(1, settings.n_crystals + 1)
    ]
    n = settings.background.n_images
    if n > 0:
        nothing = [None] * (n if settings.is_stills else 1)
        result.append(series(settings.n_crystals + 1, nothing, n))
    return result


def image_paths(
    series: Series, folder: str | Path, prefix: str, nexus: bool
) -> list[Path]:
    """Absolute paths of the CBF files of a series, or of its one NeXus file."""
    start = Path(folder).absolute() / f"{prefix}_{series.name}"
    if nexus:
        return [start.with_name(f"{start.name}.nxs")]
    return [
        start.with_name(f"{start.name}_{i:05d}.cbf")
        for i in range(1, series.n_images + 1)
    ]


def attach_images(series: Series, paths: Sequence[str | Path]) -> ExperimentList:
    """Give the experiments of a series the images in the files that were written.

    Only the first file is opened. Each still gets an image set of its own, with its own
    image alone: those of a shared sequence are told apart by scans, which stills lack.

    Args:
        series: Its experiments are changed.
        paths: The CBF files in their order, or one NeXus file.

    Returns:
        The experiments of the series.

    Raises:
        ValueError: The number of files is not that of the images.
    """
    names = [str(Path(path).absolute()) for path in paths]
    if len(names) not in (1, series.n_images):
        raise ValueError(
            f"{len(names)} files for the {series.n_images} images of series "
            f"{series.name}: one file for each is needed, or one for all"
        )
    format_class = dxtbx.format.Registry.get_format_class_for_file(names[0])
    if series.is_stills:
        imageset = _imageset(format_class, names, series.experiments)
        for i, experiment in enumerate(series.experiments):
            experiment.imageset = imageset[i : i + 1]
        return series.experiments
    (e,) = series.experiments
    is_cbf = names[0].endswith(".cbf")
    e.imageset = ImageSetFactory.make_sequence(
        template_regex(names[0])[0] if is_cbf else names[0],
        range(1, series.n_images + 1),
        format_class=format_class,
        beam=e.beam,
        detector=e.detector,
        goniometer=e.goniometer,
        scan=e.scan,
    )
    return series.experiments


def _imageset(
    format_class: type, names: Sequence[str], experiments: ExperimentList
) -> ImageSet:
    """All stills of a series in one image set, with the models of the experiments."""
    nothing = [None] * len(experiments)  # a list, else the files are asked for models
    return format_class.get_imageset(
        list(names),
        as_imageset=True,
        beam=[e.beam for e in experiments],
        detector=[e.detector for e in experiments],
        goniometer=nothing,
        scan=nothing,
    )
