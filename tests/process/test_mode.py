from __future__ import annotations

import pytest
from simulate_images import count_images, make_scan, write_images

from dials_diffuse.process.mode import Series, decide_mode, image_series, read_headers
from dials_diffuse.util.compat import oscillation_width


@pytest.fixture
def images(tmp_path):
    """Returns a function that writes images of one rotation width to a folder."""

    def write(name: str, n_images: int, width: float) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        paths = write_images(folder, count_images(n_images), width, prefix=name)
        return [str(path) for path in paths]

    return write


def mode_of(files, templates=()):
    return decide_mode(image_series(read_headers(files, templates)))


def test_rotation(images):
    assert mode_of(images("sweep", 4, 0.5)) == (
        "rotation",
        "4 images of 0.5 degrees in 1 sweep",
    )


def test_several_sweeps(images):
    files = [*images("a", 3, 0.5), *images("b", 2, 0.1)]
    assert mode_of(files) == ("rotation", "5 images of 0.1 to 0.5 degrees in 2 sweeps")


def test_a_single_rotation_image(images):
    assert mode_of(images("one", 1, 2.0)) == (
        "rotation",
        "1 image of 2 degrees in 1 sweep",
    )


def test_stills(images):
    assert mode_of(images("still", 3, 0.0)) == (
        "stills",
        "angle increment 0 in all 3 headers",
    )


def test_each_still_is_named_by_its_own_image(images):
    """Stills that share a template share an image sequence, too."""
    files = images("still", 3, 0.0)
    series = image_series(read_headers(files, ()))
    assert sorted(s.path for s in series) == files


@pytest.mark.parametrize("width", [0.0, 0.25])
def test_folder_and_template_are_like_files(images, tmp_path, width):
    expected = mode_of(images("x", 3, width))
    assert mode_of([str(tmp_path / "x")]) == expected
    assert mode_of([], [str(tmp_path / "x" / "x_####.cbf")]) == expected


def test_no_scan():
    assert decide_mode([Series(1, None, "a"), Series(1, None, "b")]) == (
        "stills",
        "no scan in any of 2 headers",
    )
    assert decide_mode([Series(1, None, "a"), Series(2, 0.0, "b")]) == (
        "stills",
        "angle increment 0 in 2 headers, no scan in 1",
    )


def test_mixed(images):
    rotation, stills = images("sweep", 3, 0.5), images("still", 2, 0.0)
    expected = rf"3 of rotation data \(as {rotation[0]}\) and 2 still\(s\) \(as "
    headers = read_headers([*rotation, *stills], ())
    with pytest.raises(ValueError, match=expected):
        decide_mode(image_series(headers))


def test_no_images(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    with pytest.raises(ValueError, match="None of the files is an image.*notes.txt"):
        read_headers([str(path)], ())


def test_damaged_header(images):
    (file,) = images("still", 1, 0.0)
    with open(file, "r+b") as handle:
        handle.seek(200)
        handle.write(b"\0" * 100_000)
    with pytest.raises(ValueError, match="Cannot read the image headers|None of the"):
        read_headers([file], ())


def test_width_of_a_scan():
    """Of rotation data, of stills, of images without a scan."""
    assert oscillation_width(make_scan(3, 0.25)) == pytest.approx(0.25)
    assert oscillation_width(make_scan(1, 0.0)) == 0
    assert oscillation_width(None) is None
