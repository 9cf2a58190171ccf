"""A manifest that lies: of names that are paths, sizes that are none, files that are links, hashes of other bytes."""

import json

import pytest

from nf4lora.hf.checkpoint import CheckpointError, latest, read, save


def lies(folder, change):
    """Change the entries of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "", ".", "..", "manifest.json", "a\0b"])
def test_names_in_a_checkpoint_are_plain(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain name"):
        save(tmp_path, 1, {name: b""})
    assert list(tmp_path.iterdir()) == []
    folder = save(tmp_path, 1, {"b": b"x"})
    lies(folder, lambda files: files.update({name: files.pop("b")}))
    with pytest.raises(CheckpointError, match="plain name"):
        read(folder)


@pytest.mark.parametrize("size", [-1, 2**63, 1.5, "4", None, True, 10**30])
def test_sizes_in_a_manifest_are_checked(tmp_path, size):
    folder = save(tmp_path, 1, {"b": b"four"})
    lies(folder, lambda files: files["b"].update(size=size))
    with pytest.raises(CheckpointError, match=r"b: |'b'"):
        read(folder)


def test_a_file_that_is_terabytes_of_holes(tmp_path):
    folder = save(tmp_path, 1, {"b": b"four"})
    with (folder / "b").open("r+b") as file:
        file.truncate(1 << 43)
    with pytest.raises(CheckpointError, match="b: 5 bytes that are not the 4 bytes"):
        read(folder)
    lies(folder, lambda files: files["b"].update(size=1 << 43))
    with pytest.raises(CheckpointError, match="b: cannot be read"):
        read(folder)
    assert latest(tmp_path) is None


@pytest.mark.parametrize("entry", [[], None, 3, {"size": 4}, {"size": 4, "sha256": None}, {"size": 4, "sha256": ["x"]}, {"size": 4, "sha256": "0" * 64}])
def test_entries_that_are_none(tmp_path, entry):
    folder = save(tmp_path, 1, {"b": b"four"})
    lies(folder, lambda files: files.update(b=entry))
    with pytest.raises(CheckpointError, match=r"b: |'b'"):
        read(folder)
