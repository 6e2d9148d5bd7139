"""Image files that DIALS imports: mini-CBF, one image each, and NeXus (NXmx).

A mini-CBF header knows one panel, perpendicular to the beam, and a rotation about x.
NeXus holds any number of panels in any position and a goniometer. Neither tells dxtbx
the polarization: an experiment list does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import h5py
import numpy as np
import pycbf
from scipy.spatial.transform import Rotation

from dxtbx.format.FormatCBFMultiTile import cbf_wrapper
from dxtbx.model import Beam, Detector, Experiment, Goniometer, Panel

from dials_diffuse.io.nexus import nexus_group
from dials_diffuse.util.files import atomic_path, disk_full_message
from dials_diffuse.util.hdf5 import HDF5Output

# From the frame of dxtbx (imgCIF, z to the source) to that of NeXus (McStas, z along the
# beam), and back: y is the same.
LAB_TO_NEXUS = np.array([-1.0, 1.0, -1.0])

# Directions that differ by less count as parallel: 1e-3 of a pixel over 4000 pixels.
PARALLEL = 2.5e-7

CBF_END = b"--CIF-BINARY-FORMAT-SECTION----\r\n;\r\n\r\n"  # how CBFlib ends an image

# A mini-CBF header is told by its first word, the other lines by theirs; dxtbx reads what
# stands at fixed places after it (dxtbx.format.FormatCBFMini). Numbers are written to
# full precision: six digits, as usual, are up to 0.005 pixels for the beam centre.
HEADER = """
# Detector: simulated, S/N 0
# Pixel_size {pixel[0]!r} m x {pixel[1]!r} m
{sensor}# Exposure_time {exposure!r} s
# Exposure_period {exposure!r} s
# Tau = 0 s
# Count_cutoff {count_cutoff:d} counts
# Wavelength {wavelength!r} A
# Detector_distance {distance!r} m
# Beam_xy ({beam[0]!r}, {beam[1]!r}) pixels
# Flux {flux!r}
# Polarization {polarization!r}
# Start_angle {start!r} deg.
# Angle_increment {width!r} deg.
# Detector_2theta 0.0000 deg.
"""


def write_cbf(
    path: str | os.PathLike,
    counts: np.ndarray,
    experiment: Experiment,
    exposure: float,
    start: float = 0.0,
    width: float = 0.0,
) -> None:
    """Write one image as mini-CBF, from which dxtbx reads the same models.

    The fixed rotation of a goniometer is lost: to the images it is one of the crystal.

    Args:
        path: Its name must end with the number of the image and ``.cbf``.
        counts: Shape (n_slow, n_fast), integers; -1 in the gaps between modules.
        experiment: One panel, perpendicular to the beam, fast along +x and slow along -y;
            beam along -z; no goniometer, or one that turns about +x of the laboratory.
        exposure: s.
        start: Angle at the start of the image, degrees; 0 is written for a still.
        width: Rotation during the image, degrees; 0 for a still.

    Raises:
        ValueError: The header cannot tell the geometry, the array is not an image of the
            detector, or the file cannot be written.
    """
    panel = _only_panel(experiment.detector, experiment.beam)
    if experiment.goniometer is not None and not turns_about_x(experiment.goniometer):
        raise ValueError(
            "A CBF header cannot tell a rotation that is not about x of the laboratory: "
            "write NeXus"
        )
    _check_image(counts, panel)
    if counts.dtype.kind not in "iu":
        raise ValueError(f"A CBF image holds integers, not {counts.dtype}")
    header = _cbf_header(panel, experiment.beam, exposure, start, width)
    cbf = cbf_wrapper()
    cbf.new_datablock(Path(path).stem.encode())
    cbf.add_category("array_data", ["header_convention", "header_contents", "data"])
    cbf.add_row(["GENERIC_MINI", header])
    _set_cbf_image(cbf, counts)
    with atomic_path(path) as temporary:
        try:
            cbf.write_widefile(
                os.fsencode(temporary),
                pycbf.CBF,
                pycbf.MIME_HEADERS | pycbf.MSG_DIGEST,
                0,
            )
        except Exception as e:  # pycbf has no class of its own
            if "CBF_FILEWRITE" not in str(e):
                raise
            raise ValueError(disk_full_message(path)) from e
        # CBFlib does not notice that the end does not reach the disk
        if not _ends_with(temporary, CBF_END):
            raise ValueError(disk_full_message(path))


def _set_cbf_image(cbf: cbf_wrapper, counts: np.ndarray) -> None:
    n_slow, n_fast = counts.shape
    cbf.set_integerarray_wdims_fs(
        pycbf.CBF_BYTE_OFFSET,
        1,  # number of the binary section
        np.ascontiguousarray(counts, dtype="<i4").tobytes(),
        4,  # bytes of an element
        1,  # signed
        counts.size,
        b"little_endian",
        n_fast,
        n_slow,
        1,
        0,  # padding
    )


def _ends_with(path: Path, end: bytes) -> bool:
    with open(path, "rb") as handle:
        handle.seek(-min(len(end), path.stat().st_size), os.SEEK_END)
        return handle.read() == end


def _only_panel(detector: Detector, beam: Beam) -> Panel:
    """The panel of a detector of which a mini-CBF header can tell everything."""
    if len(detector) != 1:
        raise ValueError(
            f"A CBF file holds one panel, but the detector has {len(detector)}: write "
            "NeXus"
        )
    panel = detector[0]
    expected = ((1, 0, 0), (0, -1, 0), (0, 0, -1))
    found = (panel.get_fast_axis(), panel.get_slow_axis(), beam.get_unit_s0())
    if not np.allclose(found, expected, rtol=0, atol=PARALLEL):
        raise ValueError(
            "A CBF header cannot tell the position of a detector that is not "
            "perpendicular to the beam with its axes along x and -y: write NeXus"
        )
    return panel


def turns_about_x(goniometer: Goniometer) -> bool:
    """Whether the axis of rotation S·m is +x of the laboratory, as in a mini-CBF file."""
    return np.allclose(goniometer.get_rotation_axis(), (1, 0, 0), rtol=0, atol=PARALLEL)


def _check_image(counts: np.ndarray, panel: Panel) -> None:
    n_fast, n_slow = panel.get_image_size()
    if counts.shape != (n_slow, n_fast):
        raise ValueError(
            f"An array of shape {counts.shape} is not an image of a panel with "
            f"{n_slow} x {n_fast} pixels (slow, fast)"
        )


def _cbf_header(
    panel: Panel, beam: Beam, exposure: float, start: float, width: float
) -> str:
    pixel = np.array(panel.get_pixel_size())
    x, y, z = panel.get_origin()
    sensor = ""  # without it, dxtbx makes a panel without parallax
    if panel.get_thickness() > 0:
        sensor = f"# Silicon sensor, thickness {panel.get_thickness() / 1000!r} m\n"
    return HEADER.format(
        pixel=(pixel / 1000).tolist(),
        sensor=sensor,
        exposure=float(exposure),
        count_cutoff=int(panel.get_trusted_range()[1]),
        wavelength=beam.get_wavelength(),
        distance=-z / 1000,
        beam=(np.array([-x, y]) / pixel).tolist(),
        flux=beam.get_flux(),
        polarization=beam.get_polarization_fraction(),
        # dxtbx of DIALS 3.30 joins stills at different angles to a sweep of rotations
        start=float(start) if width != 0 else 0.0,
        width=float(width),
    )


def write_nexus(
    path: str | os.PathLike,
    experiment: Experiment,
    images: Iterable[Sequence[np.ndarray]],
    exposure: float,
    active: Sequence[np.ndarray] | None = None,
) -> None:
    """Write a sweep or a number of stills as one NXmx file.

    Panels are stacked along slow in one array, each a module with its own position.
    Fixed and setting rotation become goniometer axes of their own. In a file with one
    image, no axis moves and dxtbx could not tell which of them scans: only the axis of
    rotation in the laboratory is written. Stills have no goniometer.

    Args:
        path: The file.
        experiment: Beam and detector; goniometer and scan of a sweep.
        images: For each image, in turn, an array for each panel, shape (n_slow, n_fast).
            The first one gives the type of all.
        exposure: Of each image, s.
        active: Array for each panel, False where it has no pixels (gaps).

    Raises:
        ValueError: The panels differ in size or have no silicon sensor, an array is not
            an image of its panel, the scan has another number of images, or the file
            cannot be written.
    """
    detector = experiment.detector
    n_fast, n_slow = _common_size(detector)
    with atomic_path(path) as temporary:
        output = HDF5Output(temporary, with_times=False)
        try:
            entry = nexus_group(output.file, "entry", "NXentry")
            entry["definition"] = "NXmx"
            # Files do not depend on the time.
            entry["start_time"] = "2000-01-01T00:00:00Z"
            nexus_group(entry, "source", "NXsource")["name"] = "simulation"
            instrument = nexus_group(entry, "instrument", "NXinstrument")
            instrument["name"] = "simulation"
            _write_beam(nexus_group(instrument, "beam", "NXbeam"), experiment.beam)
            group = nexus_group(instrument, "detector", "NXdetector")
            _write_detector(group, detector, exposure, active)
            _write_sample(nexus_group(entry, "sample", "NXsample"), experiment)
            data = nexus_group(entry, "data", "NXdata")
            data.attrs["signal"] = "data"
            gain = detector[0].get_gain()
            if gain != 1:
                data["data_scale_factor"] = 1 / gain
            n_images = _write_images(
                data, images, detector, (n_slow, n_fast), output.check
            )
            if experiment.scan and n_images != experiment.scan.get_num_images():
                raise ValueError(
                    f"{n_images} images for a scan of {experiment.scan.get_num_images()}"
                )
            output.check()
        finally:
            output.close()


def _common_size(detector: Detector) -> tuple[int, int]:
    """Size (fast, slow) of each panel, and a check that NXmx can tell their sensor."""
    sizes = {tuple(panel.get_image_size()) for panel in detector}
    if len(sizes) > 1:
        raise ValueError(
            f"Panels of different sizes {sorted(sizes)} do not fit into one NeXus array"
        )
    # dxtbx gives every panel of an NXmx file a parallax strategy
    if any(p.get_material() != "Si" or not p.get_thickness() > 0 for p in detector):
        raise ValueError(
            "dxtbx reads no NeXus file without material and thickness of the sensor: "
            "give a thickness, or write one untilted panel, turned about x, as CBF"
        )
    return sizes.pop()


def _write_images(
    data: h5py.Group,
    images: Iterable[Sequence[np.ndarray]],
    detector: Detector,
    size: tuple[int, int],
    check: Callable[[], None],
) -> int:
    """Write the stacked panels of each image and return the number of images."""
    n_slow, n_fast = size
    dataset, n_images = None, 0
    for n_images, panels in enumerate(images, 1):
        if len(panels) != len(detector):
            raise ValueError(f"{len(panels)} arrays for {len(detector)} panels")
        for counts, panel in zip(panels, detector):
            _check_image(counts, panel)
        if dataset is None:
            dataset = data.create_dataset(
                "data",
                shape=(0, len(detector) * n_slow, n_fast),
                maxshape=(None, len(detector) * n_slow, n_fast),
                chunks=(1, n_slow, n_fast),
                dtype=panels[0].dtype,
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
        dataset.resize(n_images, axis=0)
        dataset[n_images - 1] = np.concatenate(panels)
        check()
    if dataset is None:
        raise ValueError("There are no images to write")
    return n_images


def _quantity(parent: h5py.Group, name: str, value: float, units: str) -> None:
    parent[name] = value
    parent[name].attrs["units"] = units


def _axis(
    parent: h5py.Group,
    name: str,
    values: float | np.ndarray,
    kind: str,
    vector: Sequence[float],
    depends_on: str,
) -> str:
    """Write a transformation and return its path.

    Args:
        values: Angles in degrees, or a length in mm.
        kind: ``rotation`` or ``translation``.
        vector: Its axis in the frame of dxtbx.
        depends_on: Path of the transformation that is made after this one.
    """
    axis = parent.create_dataset(name, data=values)
    axis.attrs["transformation_type"] = kind
    axis.attrs["units"] = "deg" if kind == "rotation" else "mm"
    axis.attrs["vector"] = LAB_TO_NEXUS * vector
    axis.attrs["depends_on"] = depends_on
    return axis.name


def _write_beam(group: h5py.Group, beam: Beam) -> None:
    _quantity(group, "incident_wavelength", beam.get_wavelength(), "angstrom")
    _quantity(group, "total_flux", beam.get_flux(), "Hz")


def _write_detector(
    group: h5py.Group,
    detector: Detector,
    exposure: float,
    active: Sequence[np.ndarray] | None,
) -> None:
    """The detector, its modules displaced from its position along the beam."""
    if active is not None:
        gaps = np.concatenate([~np.asarray(a, dtype=bool) for a in active])
        group.create_dataset(
            "pixel_mask", data=gaps.astype(np.uint32), compression="gzip"
        )
    first = detector[0]
    group["type"] = "Pixel"
    group["sensor_material"] = "Silicon"
    _quantity(group, "sensor_thickness", first.get_thickness() / 1000, "m")
    group["underload_value"] = 0
    group["saturation_value"] = int(first.get_trusted_range()[1])
    for name in ("frame_time", "count_time"):
        _quantity(group, name, float(exposure), "s")
    transformations = nexus_group(group, "transformations", "NXtransformations")
    # dxtbx takes the last transformation of all modules as the frame of the detector:
    # they must have one in common
    distance = -first.get_origin()[2]
    common = _axis(
        transformations, "distance", distance, "translation", (0, 0, -1), "."
    )
    group["depends_on"] = common
    n_fast, n_slow = first.get_image_size()
    for i, panel in enumerate(detector):
        module = nexus_group(group, f"module_{i:04d}", "NXdetector_module")
        module["data_origin"] = np.array([i * n_slow, 0])
        module["data_size"] = np.array([n_slow, n_fast])
        offset = np.array(panel.get_origin()) + [0, 0, distance]
        length = np.linalg.norm(offset)
        at = _axis(
            module,
            "module_offset",
            length,
            "translation",
            offset / length if length > 0 else (1, 0, 0),
            common,
        )
        pixel = panel.get_pixel_size()
        axes = (panel.get_fast_axis(), panel.get_slow_axis())
        for name, size, vector in zip(("fast", "slow"), pixel, axes):
            _axis(module, f"{name}_pixel_direction", size, "translation", vector, at)


def _write_sample(group: h5py.Group, experiment: Experiment) -> None:
    """The sample and, if it is turned, the chain of axes from it to the floor."""
    group["name"] = "sample"
    if experiment.scan is None:
        return
    transformations = nexus_group(group, "transformations", "NXtransformations")
    depends_on = "."
    for name, angles, vector in reversed(list(_rotation_axes(experiment))):
        depends_on = _axis(
            transformations, name, angles, "rotation", vector, depends_on
        )
        if name == "omega":
            width = experiment.scan.get_oscillation()[1]
            _quantity(transformations, "omega_end", angles + width, "deg")
    group["depends_on"] = depends_on


def _rotation_axes(
    experiment: Experiment,
) -> Iterator[tuple[str, float | np.ndarray, Sequence[float]]]:
    """Name, angles (degrees) and direction of each axis, from the sample outwards."""
    goniometer, scan = experiment.goniometer, experiment.scan
    n_images = scan.get_num_images()
    start, width = scan.get_oscillation()
    omega = start + width * np.arange(n_images)
    if n_images == 1:
        # S R(m) F = R(S·m) S F, and S F is a rotation of the crystal
        yield "omega", omega, goniometer.get_rotation_axis()
        return
    yield from _fixed_axis("fixed", goniometer.get_fixed_rotation())
    yield "omega", omega, goniometer.get_rotation_axis_datum()
    yield from _fixed_axis("setting", goniometer.get_setting_rotation())


def _fixed_axis(
    name: str, matrix: Sequence[float]
) -> Iterator[tuple[str, float, Sequence[float]]]:
    """A rotation matrix as axis and angle, if it is not the identity."""
    rotvec = Rotation.from_matrix(np.reshape(matrix, (3, 3))).as_rotvec()
    angle = np.linalg.norm(rotvec)
    if angle > 0:
        yield name, np.degrees(angle), rotvec / angle
