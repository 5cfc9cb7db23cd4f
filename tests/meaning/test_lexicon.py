"""WordNet's noun files, tiny but true to their format, and what becomes of a gloss."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning import lexicon
from ray_synth.meaning.answers import MAX_WORDS, clean_phrase
from ray_synth.meaning.lexicon import WordNet, sense_phrase

LICENCE = b"".join(
    b"  %d This software and database is provided as is, %s  \n" % (n, b"of no warranty")
    for n in range(1, 6)
)
# (words, gloss), in the order of data.noun; an accent before them all tells bytes from characters
SYNSETS = (
    (("résumé",), 'a short account of a career (un résumé); "she sent her résumé"'),
    (("crane", "wading_bird"), "large long-necked wading bird of marshes and plains"),
    (("crane", "Crane"), 'lifts and moves heavy objects; "the crane was on a ship"'),
    (("mouse",), "any of numerous small rodents"),
    (("axis",), "a straight line through a body"),
    (("ax", "axe"), "an edge tool with a heavy bladed head"),
    (("guitar_pick",), "a plectrum used to pluck a guitar"),
    (("glass",), "a container for holding liquids while drinking"),
    (("glasses", "spectacles"), "optical instrument consisting of a frame"),
    (("boss",), "a person who exercises control over workers"),
    (("bos",), "wild and domestic cattle"),
    (("os",), "a hard silvery metallic element"),
    (("o",), "the 15th letter of the Roman alphabet"),
    (("berry",), "a small fruit"),
    (("church",), "a place for public worship"),
    (("dish",), "a piece of tableware"),
    (("wolf",), "a wild canine"),
    (("fireman",), "one who fights fires"),
    (("box",), "a container with a lid"),
    (("waltz",), "music in triple time"),
    (("virus",), "an infectious agent"),
    (("hood", "bonnet"), "metal part that covers the engine"),
    (("bonnet",), "hat tied under the chin"),
    (("entity",), "(anything)"),
)
# crane is a machine first; "bonnets" gives the hat, and then the part of a car
ORDER = {"crane": (2, 1), "bonnet": (22, 21)}
EXCEPTIONS = "axes ax axis\nmice mouse\n\n"
FIX = r"install Debian's package wordnet-base.*nltk\.downloader wordnet.*meaning\.lexicon"


def data_lines(newline: bytes = b"\n") -> tuple[bytes, list[int]]:
    """The file data.noun, and the byte offset of each synset."""
    data, offsets = LICENCE.replace(b"\n", newline), []
    for words, gloss in SYNSETS:
        offsets.append(len(data))
        listed = " ".join(f"{word} 0" for word in words)
        line = f"{len(data):08d} 05 n {len(words):02x} {listed} 001 @ 00001740 n 0000 | {gloss}  "
        data += line.encode() + newline
    return data, offsets


def write_wordnet(folder: Path) -> Path:
    """A folder with index.noun, data.noun and noun.exc."""
    data, offsets = data_lines()
    lemmas = sorted({word.casefold() for words, _ in SYNSETS for word in words})
    index = LICENCE
    for lemma in lemmas:
        mine = [i for i, (words, _) in enumerate(SYNSETS) if lemma in words]
        listed = " ".join(f"{offsets[i]:08d}" for i in ORDER.get(lemma, mine))
        index += f"{lemma} n {len(mine)} 2 @ ~ {len(mine)} 0 {listed}  \n".encode()
    folder.mkdir(parents=True)
    (folder / "index.noun").write_bytes(index)
    (folder / "data.noun").write_bytes(data)
    (folder / "noun.exc").write_text(EXCEPTIONS)
    return folder


def zipped(folder: Path, path: Path) -> Path:
    """A zip file of the folder, as NLTK's downloader leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir(folder.name)
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{folder.name}/{file.name}")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wordnet(tmp_path / "wordnet")


@pytest.fixture
def wordnet(folder: Path) -> WordNet:
    return WordNet(str(folder))


BIRD = "a large long-necked wading bird of marshes and plains"
MACHINE = "lifts and moves heavy objects"
GLASS = "a container for holding liquids while drinking"


def test_senses_come_in_the_dictionarys_order(wordnet: WordNet) -> None:
    assert wordnet.senses("crane") == [MACHINE, BIRD]
    assert wordnet.senses("wading bird") == [BIRD]


@pytest.mark.parametrize(
    "name", ["guitar_pick", "guitar pick", "Guitar_Pick", "  guitar \t pick ", "GUITAR PICKS"]
)
def test_a_name_is_found_however_it_is_spaced_and_cased(wordnet: WordNet, name: str) -> None:
    assert wordnet.senses(name) == ["a plectrum used to pluck a guitar"]


@pytest.mark.parametrize("name", ["", " ", "_", "heron", "This", "1", "software", "crane_fly"])
def test_a_name_that_it_lacks_has_no_senses(wordnet: WordNet, name: str) -> None:
    assert wordnet.senses(name) == []


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("cranes", "crane"),
        ("berries", "berry"),
        ("churches", "church"),
        ("dishes", "dish"),
        ("wolves", "wolf"),
        ("firemen", "fireman"),
        ("boxes", "box"),
        ("waltzes", "waltz"),
        ("viruses", "virus"),
        ("wading birds", "wading bird"),
        ("mice", "mouse"),
    ],
)
def test_a_plural_has_its_singulars_senses(wordnet: WordNet, plural: str, singular: str) -> None:
    assert wordnet.senses(plural) == wordnet.senses(singular) != []


def test_an_irregular_plural_may_be_of_several_words(wordnet: WordNet) -> None:
    assert wordnet.senses("axes") == [*wordnet.senses("ax"), *wordnet.senses("axis")]


def test_a_words_own_senses_come_before_those_of_its_singular(wordnet: WordNet) -> None:
    own = "an optical instrument consisting of a frame"
    assert wordnet.senses("glasses") == [own, GLASS]
    assert wordnet.senses("bonnets") == [
        "a hat tied under the chin",
        "a metal part that covers the engine",
    ]


def test_what_only_looks_like_a_plural_is_none(wordnet: WordNet) -> None:
    assert wordnet.senses("boss") == ["a person who exercises control over workers"]
    assert wordnet.senses("os") == ["a hard silvery metallic element"]
    assert wordnet.senses("glass") == [GLASS]


def test_offsets_count_bytes_and_an_empty_gloss_is_no_sense(wordnet: WordNet) -> None:
    assert wordnet.senses("résumé") == ["a short account of a career"]
    assert wordnet.senses("entity") == []


def test_a_zip_file_of_the_folder_says_the_same(folder: Path, tmp_path: Path) -> None:
    archive = WordNet(str(zipped(folder, tmp_path / "corpora" / "wordnet.zip")))
    assert archive.senses("crane") == [MACHINE, BIRD]
    assert archive.senses("mice") == ["any of numerous small rodents"]


def test_irregular_plurals_may_be_missing(folder: Path, tmp_path: Path) -> None:
    (folder / "noun.exc").unlink()
    for source in (folder, zipped(folder, tmp_path / "wordnet.zip")):
        bare = WordNet(str(source))
        assert bare.senses("cranes") == [MACHINE, BIRD]
        assert bare.senses("mice") == []


def test_it_is_found_where_nltk_puts_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lexicon, "SYSTEM_FOLDERS", ())
    zipped(folder, tmp_path / "second" / "corpora" / "wordnet.zip")
    monkeypatch.setenv(
        "NLTK_DATA", os.pathsep.join([str(tmp_path / "first"), str(tmp_path / "second"), ""])
    )
    assert WordNet().senses("crane") == [MACHINE, BIRD]
    monkeypatch.delenv("NLTK_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    zipped(folder, tmp_path / "home" / "nltk_data" / "corpora" / "wordnet.zip")
    assert WordNet("wordnet").senses("crane") == [MACHINE, BIRD]
    assert WordNet("~/nltk_data/corpora/wordnet.zip").senses("crane") == [MACHINE, BIRD]


def test_a_missing_dictionary_is_said_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (str(tmp_path), str(tmp_path / "gone"), str(tmp_path / "gone.zip"), ""):
        with pytest.raises(ValueError, match=f"no WordNet in {source}.*{FIX}"):
            WordNet(source)
    monkeypatch.setattr(lexicon, "_places", lambda: iter([tmp_path / "corpora" / "wordnet"]))
    with pytest.raises(ValueError, match=f"no WordNet in its usual places.*{FIX}"):
        WordNet()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("index.noun", None),
        ("index.noun", b""),
        ("index.noun", LICENCE),
        ("index.noun", b"crane\n"),
        ("index.noun", b"crane n 1 0 1 0 eight  \n"),
        ("index.noun", b"crane n 9 0 1 0 00000300  \n"),
        ("index.noun", b"crane n -1 0 1 0 00000300  \n"),
        ("index.noun", b"\xff\xfe\x00 n 1"),
        ("data.noun", b""),
        ("data.noun", LICENCE),
        ("data.noun", data_lines(b"\r\n")[0]),
        ("data.noun", data_lines()[0][:-200]),
        ("noun.exc", b"mice \xff"),
    ],
)
def test_corrupt_files_are_said_with_their_mend(
    folder: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    for source in (folder, zipped(folder, tmp_path / "wordnet.zip")):
        with pytest.raises(ValueError, match=f"{source} holds no readable WordNet .*{FIX}"):
            WordNet(str(source))


def test_any_damage_to_a_zip_file_is_a_value_error_or_harmless(
    folder: Path, tmp_path: Path
) -> None:
    whole = zipped(folder, tmp_path / "wordnet.zip").read_bytes()
    path = tmp_path / "damaged.zip"
    said = []
    for at in range(len(whole)):
        for damaged in (whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(damaged)
            try:
                WordNet(str(path)).senses("axes")
            except ValueError as error:
                said.append(str(error))
    assert all(f"{path} holds no readable WordNet" in text for text in said)
    assert len(said) > 1.5 * len(whole)  # every cut one, and most of those with a byte changed


@pytest.mark.parametrize(
    ("gloss", "phrase"),
    [
        # articles
        ("container for liquids", "a container for liquids"),
        ("a container for liquids", "a container for liquids"),
        ("the act of lifting", "the act of lifting"),
        ("edge tool", "an edge tool"),
        ("hour of rest", "an hour of rest"),
        ("urban district", "an urban district"),
        ("union of workers", "a union of workers"),
        ("European shrub", "a European shrub"),
        ("one-eyed giant", "a one-eyed giant"),
        ("outer garment", "an outer garment"),
        ("any of several trees", "any of several trees"),
        ("someone who guides ships", "someone who guides ships"),
        ("clothing that is loose", "clothing that is loose"),
        ("reddish-brown wood", "reddish-brown wood"),
        ("leaves of a shrub", "leaves of a shrub"),
        ("evergreen shrubs or small trees", "evergreen shrubs or small trees"),
        ("long narrow glass with a stem", "a long narrow glass with a stem"),
        ("used in a game of chess", "used in a game of chess"),
        # examples, parentheses, space
        ('feline pet; "the cat sat"; "a cat ran"', "a feline pet"),
        ("a port: a place where ships lie", "a port"),
        ("(botany) a plant  (Catha edulis)  with leaves  ", "a plant with leaves"),
        ("a plant (of a (large) family) with leaves", "a plant with leaves"),
        # too long: it ends where a clause does
        (
            "large long-necked wading bird of marshes and plains in many parts of the world",
            "a large long-necked wading bird of marshes and plains in many parts",
        ),
        (
            "rectangular block of clay baked by the sun or in a kiln and used as a building "
            "or paving material",
            "a rectangular block of clay baked by the sun",
        ),
        (
            "thick brown paste made from soya beans that has been fermented for many months by monks",
            "a thick brown paste made from soya beans",
        ),
        ("a very tall bird, which one two three four five six seven eight", "a very tall bird"),
        # nothing that can be said in a prompt
        ("", ""),
        ("   ", ""),
        ("(anything)", ""),
        ('; "an example"', ""),
        ("word " * 30, ""),
        ("– –", ""),
    ],
)
def test_a_gloss_becomes_a_short_phrase(gloss: str, phrase: str) -> None:
    assert sense_phrase(gloss) == phrase


GLOSS_WORDS = """
    a an the of in that which having used made and or , ( ) ; : " bird birds clay baked Large one hour
    X-ray 2nd any | < [
"""


@given(st.text() | st.lists(st.sampled_from(GLOSS_WORDS.split()), max_size=40).map(" ".join))
def test_any_gloss_gives_a_phrase_fit_for_a_prompt_or_none(gloss: str) -> None:
    phrase = sense_phrase(gloss)
    assert clean_phrase(phrase) == phrase
    assert len(phrase.split()) <= MAX_WORDS
    assert not set(phrase) & set("();:\n")


def test_the_real_dictionary_knows_both_cranes() -> None:
    try:
        lexicon._locate("wordnet")
    except ValueError:
        pytest.skip("WordNet is not installed: apt-get install wordnet-base")
    real = WordNet()
    for name in ("crane", "cranes"):
        phrases = real.senses(name)
        assert any("wading bird" in phrase for phrase in phrases)
        assert any("heavy objects" in phrase for phrase in phrases)
    assert any("rodents" in phrase for phrase in real.senses("mice"))
    assert real.senses("guitar_pick") == ["a plectrum used to pluck a guitar"]
    assert not any("cattle" in phrase for phrase in real.senses("boss"))
