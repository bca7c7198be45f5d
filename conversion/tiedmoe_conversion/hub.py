"""Uploads a finished checkpoint, through huggingface_hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .errors import ConversionError


def check_upload(repo_id: str) -> None:
    """Raise `ConversionError` unless `repo_id` is a name that the account that is logged in could upload to.

    Called before a conversion begins, which may take hours.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConversionError(f"push_to_hub={repo_id!r}: {error}; expected a name such as account/model") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a bad one, no network: all have their own classes
        raise ConversionError(
            f"push_to_hub={repo_id!r}, but the Hub does not know who you are ({error}); run `hf auth login` first, or leave it out"
        ) from error


def push_to_hub(folder: str | Path, repo_id: str, message: str) -> str:
    """Upload everything in `folder` to the model repository `repo_id`, which is made where it is not there.

    Returns:
        The address of the commit.

    Raises:
        ConversionError: the Hub refused or was not to be reached. The folder is complete all the same.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        raise ConversionError(
            f"{folder} is complete, but uploading it to {repo_id!r} failed: {error}. Try again with "
            f"`hf upload {repo_id} {folder}`"
        ) from error
    return str(commit.commit_url)
