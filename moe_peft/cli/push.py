"""`push`: an adapter folder, to the Hugging Face Hub."""

from collections.abc import Iterator
import contextlib
import pathlib
import re
import tempfile

from moe_peft import errors
from moe_peft.convert import adapter_folder
from moe_peft.weights import saved_run


def push(folder: str, repo: str, private: bool, message: str | None) -> str:
    """Sends an adapter folder, or that of a run's newest checkpoint; returns its address.

    The repository then holds these files of a folder and no others of their names. Raises UserError
    before anything is sent: there is no adapter, no library, no token, no network, or the
    repository is public where `private` was asked for.
    """
    path = pathlib.Path(folder).expanduser()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise errors.UserError(f"The repository is {repo!r}; expected NAME/REPO.")
    saved = saved_run.load(path)  # it is there, and whole
    try:
        import huggingface_hub as hub
    except ImportError:
        how = "pip install 'moe-peft-jax[hub]'"
        raise errors.UserError(f"push needs the package huggingface_hub: {how}.") from None
    api = hub.HfApi()
    if not hub.get_token():
        how = "run `hf auth login`, or set HF_TOKEN"
        raise errors.UserError(f"There is no token for {api.endpoint}; {how}.")
    with tempfile.TemporaryDirectory() as temporary:
        if not saved_run.is_adapter_folder(path):
            place = pathlib.Path(temporary) / repo.partition("/")[2]
            path = adapter_folder.write(saved, place, run_folder=path)
        with _one_line(f"{api.endpoint}/{repo} cannot be written"):
            api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                what = "exists and is public, so nothing was sent; make it private, or choose"
                raise errors.UserError(f"{repo} {what} another name.")
            files, what = list(adapter_folder.FILES), message or f"Adapter {path.name}"
            api.upload_folder(
                repo_id=repo,
                folder_path=path,
                commit_message=what,
                allow_patterns=files,
                delete_patterns=files,
            )
    return f"{api.endpoint}/{repo}"


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns any error of the library, or of the one it speaks HTTP with, into a UserError."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise errors.UserError(f"{what}: {reason.rstrip('.')}.") from error
