"""Verbs that hand on what a run made: predict with its model, push it to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ray_synth.cli.output import say, say_json
from ray_synth.errors import UserError

Run = Annotated[str, typer.Argument(metavar="RUN", help="a run's directory, or its URI")]
Chosen = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="which trained model: mixed.main (as in the report's headline), mixed.average, mixed.aux, "
        "real_only",
    ),
]
NAME_WIDTH = 60  # characters of a picture's name that the table keeps room for


def predict(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="a run's directory, a model that `export` wrote, or its URI"
        ),
    ],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="pictures, or folders of them")
    ],
    weights: Chosen = None,
    top: Annotated[int, typer.Option(min=1, help="classes to name of each picture")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="an object per line")] = False,
) -> None:
    """Say what is on pictures: the class and its probability, by a run's trained model."""
    from ray_synth.export.classifier import open_classifier
    from ray_synth.export.predictions import find_pictures
    from ray_synth.export.predictions import predict as answers

    pictures = find_pictures(images)
    classifier = open_classifier(run, weights)
    say(f"{classifier.told}; {len(classifier.class_names)} classes", err=True)
    width = min(NAME_WIDTH, max(len(shown(picture.name)) for picture in pictures))
    bad = 0
    for found in answers(classifier, pictures, top=top):
        bad += bool(found.error)
        if as_json:
            say_json(found.as_json())
        elif found.error:
            say(f"{shown(found.name):<{width}}  not read: {shown(found.error)}")
        else:
            said = ", ".join(f"{shown(name)} {100 * value:.1f}%" for name, value in found.top)
            say(f"{shown(found.name):<{width}}  {said}")
    summary = f"{len(pictures):,} pictures, {bad:,} of them could not be read"
    if pictures.others:
        summary += f"; {pictures.others:,} other files passed over"
    say(summary, err=True)
    if bad == len(pictures):
        raise UserError("not one of the pictures could be read")


def shown(text: Any) -> str:
    """Text from strangers on a terminal: one line, without control characters."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def export_model(
    run_folder: Any, to: str, model: str, weights: str | None, images: list[str] | None
) -> None:
    """What `export --model` does."""
    from ray_synth.export.model_export import export_model as write
    from ray_synth.export.weights import choose_weights
    from ray_synth.storage.folder import Folder

    folder = Folder(to)
    chosen = choose_weights(run_folder, weights)
    checked = write(chosen, folder, form=model, pictures=images)
    say(
        f"wrote {chosen.name} ({chosen.card['model']}, {len(chosen.card['class_names'])} classes) as "
        f"{model} to {folder.address()}; checked on {checked.pictures} {checked.of}: logits differ by "
        f"{checked.difference:.2g} at most, the largest is {checked.largest:.3g}"
    )


def push(
    run: Run,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub")],
    only: Annotated[str | None, typer.Option(help="images or model; default: both")] = None,
    weights: Chosen = None,
    public: Annotated[bool, typer.Option("--public", help="for everybody to see")] = False,
    licence: Annotated[str | None, typer.Option(help="for the cards, such as cc-by-4.0")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="where files are put together first; default: push/ in the run"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be pushed")] = False,
) -> None:
    """Push a run's images and its model, each with a card, to a Hugging Face hub; private by default.

    The token is that of HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another hub. The same command
    again continues.
    """
    from ray_synth.export.push import Push, describe
    from ray_synth.storage.folder import Folder

    wanted = Push.of(
        Folder(run),
        repo,
        only=only,
        weights=weights,
        public=public,
        licence=licence,
        staging=folder,
    )
    say(*describe(wanted), err=not dry_run)
    if dry_run:
        return
    for line in wanted.push():
        say(line)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(predict)
    app.command()(push)
