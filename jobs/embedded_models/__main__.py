"""The recipe's command line: stages by name, in the order given.

    python -m jobs.embedded_models all --work build/mini --data data/mini --minutes 3

All stages took one H100 about 20 minutes. The folder `--data` holds what is
downloaded by hand:

    tiny-imagenet-200/   the unpacked archive (for research use only)
    wordnet/data.noun    from WordNet 3.0's `dict` folder (not 3.1: the ids differ)
    minilm/              sentence-transformers/all-MiniLM-L6-v2
    fonts/               .ttf and .otf files, a few hundred if you can
"""

import argparse
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from jobs.embedded_models.settings import MissingInputError, Settings, prefer_speed

# A stage's module and function; imported when it runs, as most need heavy libraries.
STAGES = {
    "wordnet": ("wordnet", "build_lexicon"),
    "photographs": ("photographs", "pack_photographs"),
    "tokenizer": ("tokenizer", "build_tokenizer"),
    "text": ("text", "train_text"),
    "render": ("render", "render"),
    "vae": ("vae", "train_vae"),
    "clip": ("clip", "train_clip"),
    "diffusion": ("diffusion", "train_diffusion"),
    "distillation": ("distillation", "distil"),
    "pack": ("pack", "pack"),
}


def run_stage(name: str, settings: Settings) -> Path:
    """Runs one stage; returns what it wrote.

    Raises:
        ValueError: there is no such stage, or its input is missing.
    """
    if name not in STAGES:
        raise ValueError(f"No stage {name!r}: the stages are {', '.join(STAGES)}.")
    module, function = STAGES[name]
    stage: Callable[[Settings], Path] = getattr(
        import_module(f"jobs.embedded_models.{module}"), function
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    prefer_speed(settings.device)
    return stage(settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs its stages."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.embedded_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--work", type=Path, required=True, help="where the stages write")
    parser.add_argument("--data", type=Path, required=True, help="what is downloaded by hand")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time per stage")
    parser.add_argument("--workers", type=int, help="processes that draw (default: all CPUs but 1)")
    parser.add_argument("--smoke", action="store_true", help="four steps per stage, few pictures")
    options = parser.parse_args(arguments)
    settings = Settings(options.work, options.data, options.minutes, options.smoke)
    if options.workers is not None:
        settings = Settings(
            options.work, options.data, options.minutes, options.smoke, options.workers
        )
    stages = list(STAGES) if "all" in options.stages else options.stages
    for name in stages:
        started = time.monotonic()
        try:
            path = run_stage(name, settings)
        except MissingInputError as error:
            parser.exit(2, f"{name}: {error}\n")
        print(f"[{name}] {path} in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
