"""ImageNet's folders become classes, whether they are named by WordNet id or by index."""

from samples import encoded

from ray_synth.config import SourceConfig
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import load_index
from ray_synth.data.imagenet import class_map


def test_the_thousand_names_differ_and_are_in_timms_order():
    names = read_class_names("imagenet")
    assert len(set(names)) == 1000
    assert names[0] == "tench"
    assert names[999] == "toilet tissue"
    cranes = [name for name in names if name.startswith("crane")]
    assert cranes == [
        "crane (large long-necked wading bird of)",
        "crane (lifts and moves heavy objects)",
    ]


def folder(path, labels):
    for number, label in enumerate(labels):
        (path / label).mkdir(parents=True)
        (path / label / "a.png").write_bytes(encoded(number))
    return str(path)


def test_val_and_its_variants_are_read_by_wnid_and_v2_by_index(tmp_path):
    names = read_class_names("imagenet")
    by_wnid = SourceConfig(
        format="imagefolder",
        path=folder(tmp_path / "r", ["n01440764", "n02012849", "n15075141"]),
        class_map="imagenet_wnids",
    )
    index = load_index(by_wnid, names)
    assert sorted(index.label.tolist()) == [0, 134, 999]
    by_index = SourceConfig(
        format="imagefolder",
        path=folder(tmp_path / "v2", ["0", "134", "517"]),
        class_map="imagenet_indices",
    )
    index = load_index(by_index, names)
    assert [names[i] for i in sorted(index.label)] == [names[0], names[134], names[517]]
    assert names[134].startswith("crane (large") and names[517].startswith("crane (lifts")
    assert class_map("imagenet_indices")["0517"] == names[517]
