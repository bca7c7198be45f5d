"""A checkpoint's way to the Hub: the stub that loads it there, names, upload."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import TiedMoeError
from .version import __version__

STUB_NAME = "tiedmoe_remote.py"
STUB = f'''"""Loads this checkpoint's classes from the package transformers-tiedmoe, {__version__} or newer."""

from packaging.version import Version

HOW = (
    "clone the package's repository and run `pip install ./transformers-tiedmoe` "
    "(once a registry has it: pip install 'transformers-tiedmoe>={__version__}')"
)

try:
    import transformers_tiedmoe
    from transformers_tiedmoe import (
        TiedMoeConfig,
        TiedMoeForCausalLM,
        TiedMoeForSequenceClassification,
        TiedMoeForTokenClassification,
        TiedMoeModel,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers_tiedmoe":
        raise
    raise ImportError(
        "This checkpoint ties experts across layers and needs the package transformers-tiedmoe, which is not "
        f"installed: {{HOW}}"
    ) from error

if Version(transformers_tiedmoe.__version__) < Version("{__version__}"):
    raise ImportError(
        f"This checkpoint was written by transformers-tiedmoe {__version__}, but {{transformers_tiedmoe.__version__}} "
        f"is installed, which may not know all of it: {{HOW}}"
    )

__all__ = [
    "TiedMoeConfig",
    "TiedMoeForCausalLM",
    "TiedMoeForSequenceClassification",
    "TiedMoeForTokenClassification",
    "TiedMoeModel",
]
'''


def write_stub(directory: str | Path) -> None:
    """Write the stub that `trust_remote_code=True` imports into a `directory`, which is made if missing."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / STUB_NAME).write_text(STUB, encoding="utf-8")


def public_name(name: str) -> str:
    """Return a folder's or file's own name in place of its path on this machine; a hub id stays."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else str(name)


def is_hub_id(name: str) -> bool:
    """Tell whether `name` has the form `account/model`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_upload(repo_id: str) -> None:
    """Raise `TiedMoeError` unless `repo_id` is a valid name and an account is logged in to the Hub.

    Called before a conversion begins, which may take hours.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TiedMoeError(f"push_to_hub={repo_id!r}: {error}; expected a name such as account/model") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a bad one, no network: all have their own classes
        raise TiedMoeError(
            f"push_to_hub={repo_id!r}, but the Hub does not know who you are ({error}); run `hf auth login` first, or "
            "leave it out"
        ) from error


def push_to_hub(folder: str | Path, repo_id: str, message: str) -> str:
    """Upload everything in `folder` to the model repository `repo_id`, which is made if missing.

    Returns:
        The address of the commit.

    Raises:
        TiedMoeError: the Hub refused or could not be reached. The folder is complete all the same.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        raise TiedMoeError(
            f"{folder} is complete, but uploading it to {repo_id!r} failed: {error}. Try again with "
            f"`hf upload {repo_id} {folder}`"
        ) from error
    return str(commit.commit_url)
