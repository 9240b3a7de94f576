"""What `--from`, `--to` and `--base` name, and putting a finished conversion in its place."""

import contextlib
import dataclasses
import os
import pathlib

from etils import epath

from moe_peft import errors
from moe_peft.convert import tfew
from moe_peft.weights import backbone, formats, hub, locations, saved_run

RUN, TFEW = "run", "tfew"
_KINDS = (RUN, TFEW, *formats.FORMATS)
_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Place:
    """A file or folder and its format."""

    kind: str  # "run" (a run or an adaptation of ours), "tfew", or one of `formats`
    path: epath.Path | pathlib.Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_adapter_folder(self) -> bool:
        """Whether it is to hold an adapter in our own format, with a model card."""
        return self.kind == formats.ADAPTERS and self.path.suffix != _SUFFIX


def source(spec: str) -> Place:
    """Returns what is at "PATH", "FORMAT:PATH" or "embedded:NAME"; a UserError if it is unknown.

    The format is detected where it is not given. Of an adapter folder it is the file in it. "peft:"
    takes a name on the Hub, too.
    """
    prefix, _, name = spec.partition(":")
    if prefix == "embedded":
        return Place(formats.ADAPTERS, backbone.embedded_path(spec, name))
    kind, path = _split(spec)
    if kind == TFEW or (kind is None and tfew.is_file(path)):
        return Place(TFEW, locations.existing(path))
    if kind == formats.PEFT:
        path = hub.local(path)
    is_run = saved_run.steps(path) or saved_run.is_adaptation(pathlib.Path(path))
    detected = RUN if kind == RUN or (kind is None and is_run) else formats.detect(path)
    if kind not in (None, detected):
        raise errors.UserError(f"{path} is in the format {detected!r}, not {kind!r}.")
    is_folder = detected == formats.ADAPTERS and pathlib.Path(path).is_dir()
    return Place(detected, epath.Path(path) / (saved_run.ADAPTER if is_folder else ""))


def target(spec: str, default: str | None) -> Place:
    """Returns where "FORMAT:PATH", "FILE.safetensors" or "FOLDER" means to write.

    `default` is the format of a folder that names none; None if it has to name one.
    """
    kind, name = _split(spec)
    path = pathlib.Path(name)
    is_file = path.suffix == _SUFFIX
    kind = kind or (formats.ADAPTERS if is_file else default)
    if kind is None:
        ways = f"write hf:{spec}, t5x:{spec} or FILE{_SUFFIX}"
        raise errors.UserError(f"--to {spec} does not say in which format; {ways}.")
    if kind in (RUN, TFEW) or (is_file and kind != formats.ADAPTERS):
        expected = f"our own format is *{_SUFFIX} or ours:FOLDER, any other a folder"
        raise errors.UserError(f"--to {spec}: {expected}.")
    return Place(kind, path)


def check_free(place: Place, overwrite: bool) -> None:
    """Raises UserError if something is there that may not be replaced."""
    if not place.path.exists():
        return
    if not overwrite:
        raise errors.UserError(f"{place} exists; --overwrite replaces it.")
    found = "unknown"
    with contextlib.suppress(errors.UserError):
        found = formats.detect(place.path)
    if found != place.kind:
        what = f"{place} exists and is {found}, not {place.kind}; it is not replaced"
        raise errors.UserError(f"{what}. Choose another path or remove it.")


def _split(spec: str) -> tuple[str | None, str]:
    kind, colon, rest = spec.partition(":")
    kind = {"file": formats.ADAPTERS}.get(kind, kind)
    kind, path = (kind, rest) if colon and kind in _KINDS else (None, spec)
    return kind, os.path.expanduser(path)
