"""How large a model on the Hugging Face hub is, before it is here: from the headers of its files.

Counted are the files that a download takes, so that a run is judged alike before it and after it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePosixPath

from ray_synth.errors import first_line

TIMEOUT_S = 10.0
LEFT_OUT = {"safety_checker"}  # of a pipeline's parts, that no generator of ours loads


@lru_cache(maxsize=32)
def hub_parameters(model: str, revision: str | None = None) -> int | str:
    """Numbers in the safetensors files of a hub model; or why that is not known.

    Transformers models have theirs at the top, pipelines of diffusers one folder for each part; of
    variants of a part, the plain one is counted.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        found = api.model_info(model, revision=revision, timeout=TIMEOUT_S)
        names = [file.rfilename for file in found.siblings or []]
        total = 0
        for name in weight_files(names):
            header = api.parse_safetensors_file_metadata(
                model, name, revision=found.sha, timeout=TIMEOUT_S
            )
            total += sum(header.parameter_count.values())
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return first_line(error)
    except Exception as error:  # of the network, by whatever client
        return f"the hub does not answer ({type(error).__name__})"
    return total or "it has no safetensors files"


def weight_files(names: list[str]) -> list[str]:
    """Those of a repository's files that a pipeline, or a model without one, is loaded from."""
    weights = [PurePosixPath(name) for name in names if name.endswith(".safetensors")]
    if "model_index.json" in names:
        parts = {path.parent for path in weights if len(path.parts) == 2} - {
            PurePosixPath(part) for part in LEFT_OUT
        }
    else:
        parts = {PurePosixPath(".")}
    chosen: list[PurePosixPath] = []
    for part in parts:
        mine = [path for path in weights if path.parent == part]
        plain = [path for path in mine if ".fp16." not in path.name and ".non_ema" not in path.name]
        chosen += plain or mine
    return sorted(map(str, chosen))
