"""The tool that reads every image beforehand."""

import shutil

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
