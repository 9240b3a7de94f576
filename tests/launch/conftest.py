"""Stand-ins for programs of clusters: small scripts on PATH that write down their calls."""

import os
import pathlib
import signal

import pytest


class StandIns:
    """A folder of programs.

    Attributes:
      folder: of the programs and of what they know, `calls` among it.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._bin = folder / "bin"
        self._bin.mkdir(parents=True)

    def add(self, name: str, body: str = "") -> None:
        """Adds a program: `body` is bash, $here the folder; the call is written down before it."""
        path = self._bin / name
        path.write_text(
            f"#!/usr/bin/env bash\nhere='{self.folder}'\n"
            f"""printf '%s\\n' "{name} $*" >>"$here/calls"\n{body}\n"""
        )
        path.chmod(0o755)

    def environ(self, **variables: str) -> dict[str, str]:
        """This process's variables, with the programs first on PATH."""
        return {**os.environ, "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}", **variables}

    @property
    def calls(self) -> list[str]:
        """Each call's words, oldest first."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """A shell cannot catch SIGINT where it was ignored before, as for what runs with `&`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path / "stand_ins")
