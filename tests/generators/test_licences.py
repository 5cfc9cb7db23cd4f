"""Licences: what a card says, else the name, else the family; what is not known is said to be."""

import json

import pytest
from samples import ROOT

from ray_synth.config import load_config
from ray_synth.generators import licences as module
from ray_synth.generators.families import listed
from ray_synth.generators.licences import Terms, licence_of, licences, table, warning
from ray_synth.generators.settings import family_of

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def test_every_licence_of_a_family_is_in_the_table():
    names = {terms.name for terms, _, _ in table()}
    assert {family.licence for family in listed()} <= names


def test_the_table_is_whole_and_each_tag_is_one_licences():
    tags = [tag for _, tags, _ in table() for tag in tags]
    assert len(tags) == len(set(tags)) and all(tag == tag.lower() for tag in tags)
    for terms, _, _ in table():
        assert terms.source.startswith("https://"), terms.name
        assert all(vars(terms)[key] for key in ("name", "outputs", "commercial", "checked"))
        assert isinstance(terms.limits, bool) and isinstance(terms.checked, str)


def test_the_table_of_the_documents_is_the_one_of_the_code():
    lines = (ROOT / "docs" / "model-licences.md").read_text(encoding="utf-8").splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith("| licence | outputs"))
    assert lines[head + 2 : head + 2 + len(table())] == [
        f"| [{t.name}]({t.source}) | {t.outputs} | {t.commercial} | {t.checked} |"
        for t, _, _ in table()
    ]


@pytest.mark.parametrize(
    ("model", "family", "says"),
    [
        ("black-forest-labs/FLUX.1-dev", "", "outputs may not be used to train, fine-tune or distill"),
        ("black-forest-labs/FLUX.1-schnell", "", "Apache-2.0 (by its name): it says nothing"),
        ("black-forest-labs/FLUX.2-klein-9B", "", "FLUX non-commercial (by its name)"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "", "Apache-2.0 (by its name)"),
        ("stabilityai/stable-diffusion-3.5-large", "", "foundational generative model"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "", "OpenRAIL++-M"),
        ("meta-llama/Llama-3.1-8B-Instruct", "", 'begins with "Llama"'),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "", "another large language model"),
        ("gpt-image-1", "", "compete with OpenAI"),
        ("open_clip:laion2b_s34b_b79k", "", "MIT"),
        ("somebody/tuned", "CreativeML OpenRAIL-M", "OpenRAIL-M (by its family)"),
        ("somebody/tuned", "", "licence unknown: read the model's card"),
    ],
)  # fmt: skip
def test_without_a_card_the_name_says_it_or_the_family(model, family, says):
    assert says in licence_of("generator", model, family=family, ask=False).line


@pytest.mark.parametrize(
    ("card", "name", "limits"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "Apache-2.0", False),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT", False),
        ("---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n",
         "FLUX non-commercial", True),
        ("---\nlicense: other\nlicense_name: my-own-terms\n---\n", "my-own-terms", True),
        ("---\nlicense: other\n---\n", "unknown", True),
        ("no head at all", "unknown", True),
        ("---\nlicense: [a\n---\n", "unknown", True),
        ("---\nlicense: {a: b}\n---\n", "unknown", True),
        ("---\n- 1\n---\n", "unknown", True),
        ("---\nlicense: \"x\\x1b[31m <b>\"\n---\n", "unknown", True),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", "unknown", True),
    ],
)  # fmt: skip
def test_a_folders_card_says_it(tmp_path, card, name, limits):
    (tmp_path / "README.md").write_bytes(card.encode())
    found = licence_of("generator", str(tmp_path))
    assert (found.terms.name, found.terms.limits, found.model) == (name, limits, tmp_path.name)
    if name == "my-own-terms":
        assert found.line.endswith(
            "my-own-terms (by its card): not in our table: read the model's card"
        )


def test_a_card_counts_more_than_the_name_and_a_hub_model_has_its_own(tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(card)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = licence_of("generator", "stable-diffusion-v1-5/stable-diffusion-v1-5", "abc")
    assert (found.terms.name, found.by) == ("CC BY-NC", "its card")
    options = {"revision": "abc", "repo_type": "model"}
    assert asked == [("stable-diffusion-v1-5/stable-diffusion-v1-5", "README.md", options)]
    licence_of("training data", "ILSVRC/imagenet-1k")
    assert asked[1][2]["repo_type"] == "dataset"

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    found = licence_of("generator", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert (found.terms.name, found.by) == ("CreativeML OpenRAIL-M", "its name")


def test_a_runs_models_are_all_named_and_the_quickstart_warns_of_nothing():
    found = licences(load_config(QUICKSTART))
    assert [licence.role for licence in found] == ["generator", "LLM", "CLIP"]
    assert warning(found) == ""


def test_one_line_warns_of_what_restricts_and_of_what_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_card", lambda *_: "")
    monkeypatch.setattr(module, "_of_family", lambda config: "")
    config = load_config(
        QUICKSTART,
        ["generation.model=black-forest-labs/FLUX.1-dev", "meaning.llm.model=Qwen/Qwen3-8B",
         "meaning.clip={model: ViT-B-16, pretrained: some_weights}",
         "data.train={format: huggingface, path: ILSVRC/imagenet-1k, split: train}"],
    )  # fmt: skip
    line = warning(licences(config))
    assert "\n" not in line and line.startswith("licences (no legal advice")
    for part in (
        "generator black-forest-labs/FLUX.1-dev: FLUX non-commercial",
        "CLIP open_clip:some_weights: licence unknown",
        "training data ILSVRC/imagenet-1k: ImageNet",
    ):
        assert part in line
    assert "Qwen3" not in line
    plain = [*licences(config)]
    assert json.loads(json.dumps([licence.as_dict() for licence in plain]))[0]["line"] in line


def test_the_family_of_a_folder_says_it(tmp_path):
    config = load_config(QUICKSTART)
    from ray_synth.embedded import sd_folder

    asked = config.model_copy(
        update={"generation": config.generation.model_copy(update={"model": str(sd_folder())})}
    )
    found = licences(asked)[0]
    assert found.terms.name == family_of(asked.generation).licence
    assert found.by == "its family"
    assert Terms("x").limits, "what is not known is taken to restrict"
