"""What a long stage has done so far survives a kill, and costs one small file each."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.storage.folder import Folder
from ray_synth.storage.journal import Journal


def test_another_process_goes_on_with_what_was_kept(tmp_path):
    folder = Folder(tmp_path)
    for key in ("crane", "../x", "crane"):
        Journal(folder, "meanings", "aa").add(key, {"of": key, "n": 1})
    Journal(folder, "meanings", "bb").add("heron", {})
    again = Journal(folder, "meanings", "aa")
    assert again.entries() == {key: {"of": key, "n": 1} for key in ("crane", "../x")}
    assert Journal(folder, "contexts", "aa").entries() == {}
    assert len(list((tmp_path / "meanings.partial").iterdir())) == 3
    again.clear()
    assert again.entries() == {}
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), st.text(), max_size=8))
def test_any_class_name_is_a_key(tmp_path_factory, entries):
    journal = Journal(Folder(tmp_path_factory.mktemp("run")), "contexts", "aa")
    for key, value in entries.items():
        journal.add(key, value)
    assert journal.entries() == entries


def test_each_entry_is_written_once_whatever_was_kept_before(tmp_path, monkeypatch):
    """1,000 classes are 1,000 small writes, not one growing file a thousand times."""
    written = []
    write = Folder.write_bytes
    monkeypatch.setattr(
        Folder,
        "write_bytes",
        lambda self, n, data: (written.append(len(data)), write(self, n, data)),
    )
    journal = Journal(Folder(tmp_path), "contexts", "aa")
    for number in range(1_000):
        journal.add(f"class {number}", ["a scene"] * 20)
    assert max(written) < 2 * min(written)
    assert len(journal.entries()) == 1_000
