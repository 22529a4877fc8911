"""What new users tripped over."""

import stat

from verbs import crosstill, refusal


def test_photos_that_are_not_read_are_listed(bundle_folder, photos, tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    (place / "IMG_1.HEIC").write_bytes(b"ftypheic")
    said = refusal("index", bundle_folder, place, "--out", tmp_path / "index")
    assert "no photo in it (IMG_1.HEIC: HEIC is not read; convert it to JPEG or PNG)" in said
    assert not (tmp_path / "index").exists()
    (place / "a.png").write_bytes((photos / "000000.png").read_bytes())
    assert "1 left out" in crosstill("index", bundle_folder, place, "--out", tmp_path / "i").stdout
    assert "HEIC is not read" in (tmp_path / "i/quarantine.jsonl").read_text()


def test_another_folder_is_said(bundle_folder, photos, tmp_path, caplog):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes((photos / "000001.png").read_bytes())
        crosstill("index", bundle_folder, tmp_path / name, "--out", tmp_path / "index")
    assert f"held the photos of {tmp_path / 'one'}, now those of {tmp_path / 'two'}" in caplog.text


def test_verify_asks_for_the_index():
    assert "give the index to check" in crosstill("index", "verify", code=2).stderr


def test_exported_files_are_for_everyone(bundle_folder):
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in bundle_folder.iterdir()}
    assert set(modes.values()) == {"-rw-r--r--"}, modes
