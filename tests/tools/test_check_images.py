"""The tool that reads every image beforehand."""

import shutil
import tarfile

import pytest
from PIL import Image

from runtime.guards import InputError
from tools.check_images import main


def test_it_lists_what_is_wrong_and_says_so_by_its_exit_code(imagenet_sample, tmp_path, capsys):
    """Bad files are printed with reasons and written to the list; exit 1 with them, 0 without."""
    good = sorted(imagenet_sample.rglob("*.[jJ]*"))[:3]
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i, file in enumerate(good):
            shutil.copy(file, tmp_path / name / f"{i}.jpg")
    assert main(["--data_path", str(tmp_path), "--num_workers", "0"]) == 0
    assert "2 classes of 3 to 3 images" in capsys.readouterr().out
    (tmp_path / "bee" / "9.png").write_bytes(b"text")
    (tmp_path / "ant" / "9.jpg").write_bytes(good[0].read_bytes()[:500])
    assert main(["--data_path", str(tmp_path), "--num_workers", "1", "--output", str(tmp_path / "bad.txt")]) == 1
    out = capsys.readouterr().out
    assert "9.png: is not an image in a known format" in out
    assert "6 of 8 images are good, 2 bad" in out
    assert [line[-9:] for line in (tmp_path / "bad.txt").read_text().splitlines()] == ["ant/9.jpg", "bee/9.png"]


@pytest.fixture
def broken(tmp_path):
    """A list of a good image, a broken one and one that is not there; the path of the list."""
    Image.new("RGB", (9, 7)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"text")
    (tmp_path / "l.txt").write_text("good.png\nbroken.png\ngone.png\n")
    return tmp_path / "l.txt"


def test_it_opens_the_broken_data_that_it_exists_for(broken, tmp_path, capsys):
    """Missing files of a list, a folder without one good image, and damaged shards are reported, not refused."""
    assert main(["--data_path", str(broken), "--num_workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "gone.png: can't be read: No such file" in out
    assert "1 of 3 images are good, 2 bad" in out
    (tmp_path / "good.png").unlink()
    assert main(["--data_path", str(tmp_path), "--num_workers", "0"]) == 1
    assert "0 of 1 images are good" in capsys.readouterr().out
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(tmp_path / "broken.png", "a/1.png")
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:1024] + b"\7" * 1024)
    assert main(["--data_path", str(tmp_path / "x.tar"), "--num_workers", "0"]) == 1
    assert "x.tar is damaged at byte 1,024" in capsys.readouterr().out


def test_the_place_of_the_output_is_tried_before_the_work(broken, tmp_path, monkeypatch):
    """A folder, or a place that can't be written, is refused before any image is read."""

    def read(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr("tools.check_images.open_images", read)
    for output in (tmp_path, tmp_path / "good.png" / "bad.txt"):
        with pytest.raises(InputError, match="--output"):
            main(["--data_path", str(broken), "--output", str(output)])


def test_an_impossible_number_of_workers_is_an_input_error(broken):
    """--num_workers -2 is one line."""
    with pytest.raises(InputError, match=r"--num_workers -2"):
        main(["--data_path", str(broken), "--num_workers", "-2"])


def test_the_default_number_of_workers_gives_no_warning(broken, recwarn):
    """No more workers than cores, of which torch warns."""
    assert main(["--data_path", str(broken)]) == 1
    assert not [w for w in recwarn if "worker" in str(w.message)]
