"""A finished child on its way to the Hugging Face Hub, through the library's own upload, which takes up where it ended.

Knows a folder and a name; whether the person wants it there is asked elsewhere.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from slerpkit.files import read_text_if_there
from slerpkit.lazy import huggingface_hub
from slerpkit.messages import SlerpMergeError, printable, shorten
from slerpkit.parents.checkpoint import CARD_NAME
from slerpkit.parents.hub import LOG_IN, errors_explained
from slerpkit.parents.hub_cache import NAME, HubName

MAX_NAME_LENGTH = 96  # as the Hub has it


def repository_name(text: str) -> str:
    """The part of a repository's name behind the slash that a folder's name makes: letters, digits and . _ - alone."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^\w.-]+", "-", plain))
    return re.sub(r"(\.git)+$", "", plain[:MAX_NAME_LENGTH].strip("-._")).rstrip("-._") or "child"


def parse_repository(text: str, user: str) -> str:
    """`org/name`, or a name alone, which is the user's. Raises SlerpMergeError for what the Hub does not take."""
    name = text.strip() if "/" in text else f"{user}/{text.strip()}"
    if not NAME.fullmatch(name) or re.search(r"--|\.\.|\.git$", name) or name != name.rstrip("-."):
        hint = f"Letters, digits and . _ - alone, such as {user}/{repository_name(text.rpartition('/')[2])}."
        raise SlerpMergeError(f"{text!r} is no name that the Hub takes.", hint)
    return name


def logged_in_user() -> str:
    """Who the token on this machine belongs to. Raises SlerpMergeError where there is none, or it is not known."""
    if huggingface_hub.get_token() is None:
        raise SlerpMergeError(
            "Nobody is logged in to the Hub here.", f"To upload, {LOG_IN}, with a token that may write."
        )
    with errors_explained(HubName("your account")):
        return str(huggingface_hub.HfApi().whoami()["name"])


def check_card(folder: Path) -> None:
    """Raises SlerpMergeError where the Hub would not take the child's model card."""
    text = read_text_if_there(folder / CARD_NAME)
    if text is None:
        raise SlerpMergeError(f"{folder} has no {CARD_NAME}.", "Make the child again, or write a card of your own.")
    try:
        huggingface_hub.ModelCard(text).validate(repo_type="model")
    except ValueError as error:
        reason = printable(shorten(" ".join(str(error).split()), 200))
        raise SlerpMergeError(f"The Hub does not take the child's {CARD_NAME}: {reason}", "Mend its head.") from error


def stands_in_public(name: str) -> bool:
    """Whether a repository is there already, and is not private."""
    try:
        return not huggingface_hub.HfApi().model_info(name).private
    except huggingface_hub.utils.RepositoryNotFoundError:
        return False


def upload(folder: Path, name: str, is_private: bool) -> str:
    """Uploads a child's folder under a name that it makes where there is none; returns its page's address.

    Raises SlerpMergeError where the Hub or the network does not let it; uploaded again, it goes on where it ended.
    """
    api = huggingface_hub.HfApi()
    with errors_explained(HubName(name), shows_bars=True):
        check_card(folder)
        if is_private and stands_in_public(name):
            what = f"{name} stands on the Hub already, where everybody can see it."
            raise SlerpMergeError(what, "Give another name, or say that the child may be public too.")
        api.create_repo(name, private=is_private, exist_ok=True)
        # Older versions have another function for uploads that are taken up again.
        whole = getattr(api, "upload_large_folder", None)
        if whole is None:
            api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="The child of a SLERP merge")
        else:
            whole(repo_id=name, folder_path=str(folder), repo_type="model", print_report=False)
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"
