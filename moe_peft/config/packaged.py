"""What the packaged gin files say, read as text: without gin's side effects, and at once."""

import pathlib
import re

from moe_peft.config import gin_files


def files(folder: str = "") -> list[pathlib.Path]:
    """Returns the files of a folder such as "methods", or all, in the order of their names."""
    return sorted((gin_files.packaged_folder() / folder).rglob("*.gin"))


def names() -> list[str]:
    """Returns what `--gin_file` calls them, such as "methods/mov.gin"."""
    top = gin_files.packaged_folder()
    return [path.relative_to(top).as_posix() for path in files()]


def text(path: pathlib.Path) -> str:
    """Returns the text of a file with those that it includes in place of their lines."""
    included = lambda match: text(gin_files.packaged_folder() / match[1])
    return re.sub(r"^include '([^']+)'$", included, path.read_text("utf-8"), flags=re.MULTILINE)


def about(path: pathlib.Path) -> str:
    """Returns the first sentence of the comment that a file begins with."""
    comment = re.match(r"(?:#.*\n)*", path.read_text("utf-8"))[0]
    words = " ".join(line.lstrip("# ") for line in comment.splitlines())
    return re.match(r".*?(?:[.](?=\s|$)|$)", words)[0]


def bindings(path: pathlib.Path) -> dict[str, str]:
    """Returns the last value of each macro and parameter as written, in lines of one statement.

    Keys are "TRAIN_STEPS" or "T5Config.vocab_size".
    """
    found = re.findall(r"^([\w./]+) = ([^#\n]+)", text(path), re.MULTILINE)
    return {name: value.strip() for name, value in found}


def imports(path: pathlib.Path) -> list[str]:
    """Returns the modules that a file and those that it includes import."""
    return re.findall(r"^import (\S+)", text(path), re.MULTILINE)
