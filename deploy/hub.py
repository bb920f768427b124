"""Models by their names on the Hugging Face hub, from its local cache or downloaded into it by `huggingface_hub`."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_DESCRIPTION = ("*.json", "*.jinja", "tiktoken.model")  # what is read besides weights; never code
_WEIGHTS = ("*.safetensors",)


def is_name(model: str) -> bool:
    """Return whether `model` is a name such as "org/name" rather than the path of a folder that exists."""
    return _NAME.fullmatch(model) is not None and not Path(model).exists()


def model_folder(name: str, revision: str | None = None, *, weights: bool = True) -> str:
    """Return the folder of a model of the hub, downloaded if need be.

    Args:
        name: "org/name".
        revision: branch, tag or commit; None: the main branch.
        weights: whether the weights are needed, or its description only.

    Raises:
        ValueError: there is no such model or revision, it is not allowed, or the hub cannot be reached and the cache lacks it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    what = f"model {name!r}" + ("" if revision is None else f" of revision {revision!r}")
    patterns = [*_DESCRIPTION, *(_WEIGHTS if weights else ())]
    try:
        return str(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{what} is neither a folder nor in the cache of the Hugging Face hub, and the hub cannot be reached; download it "
            f"where it can be (hf download {name}), or give its folder"
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(f"{what} is gated: accept its licence on the hub and log in (hf auth login)") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{what} is neither a folder nor on the Hugging Face hub (or it is private: hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"model {name!r} has no revision {revision!r} on the Hugging Face hub") from error
    except (OSError, ValueError) as error:  # of HTTP, the disk, or the name
        raise ValueError(f"{what} cannot be downloaded from the Hugging Face hub: {error}") from error
