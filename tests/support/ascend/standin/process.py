"""The subprocess in which torch_npu is loaded on the stand-in libraries, and its set-up."""

from __future__ import annotations

import importlib.machinery
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import torch

from tests.support.ascend.standin.build import BuildError, build

ROOT = Path(__file__).resolve().parents[4]
WHEEL = ROOT / ".npu"
INSTALL = "python tools/setup_env.py --extra dev"


class RemoteError(Exception):
    """A function failed in the other process; the message is its traceback. ``kind`` names the exception's class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class SetupError(Exception):
    """The other process cannot be started, with what to do."""


def unsupported() -> str | None:
    """Why torch_npu cannot be installed on this platform at all, or None."""
    if not sys.platform.startswith("linux"):
        return f"torch_npu has wheels for Linux only, this is {sys.platform}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return f"torch_npu 2.13 has wheels for Python 3.10 to 3.13, this is {sys.version.split()[0]}"
    return None


def environment() -> dict[str, str]:
    """The environment variables of the other process; builds the libraries.

    Raises:
        SetupError: torch_npu is not there, not for this Python, or the libraries cannot be built.
    """
    package = WHEEL / "torch_npu"
    if not package.exists():
        raise SetupError(f"torch_npu is not in {WHEEL}: run `{INSTALL}`, and see what pip says about torch_npu there")
    if not any((package / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        version = "{}.{}".format(*sys.version_info)
        raise SetupError(f"the torch_npu in {WHEEL} is not for Python {version}: run `{INSTALL} --force`")
    try:
        libraries = build(WHEEL, Path(torch.__file__).parent, WHEEL)
    except BuildError as error:
        raise SetupError(str(error)) from None
    variables = dict(os.environ)
    search = [str(libraries), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
    path = [str(ROOT), str(WHEEL), *filter(None, [variables.get("PYTHONPATH")])]
    return variables | {
        "LD_LIBRARY_PATH": os.pathsep.join(search),
        "PYTHONPATH": os.pathsep.join(path),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


class Npu:
    """One subprocess with torch_npu; ``call`` runs functions in it, one after another."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        read, requests = os.pipe()
        answers, write = os.pipe()
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            "tests.support.ascend.standin.worker",
            str(read),
            str(write),
        ]
        self._process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, pass_fds=(read, write), stdout=self._log, stderr=self._log
        )
        os.close(read)
        os.close(write)
        self._requests = Connection(requests, readable=False)
        self._answers = Connection(answers, writable=False)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a module-level function of this repository, run in the other process.

        Raises:
            RemoteError: the function raised, or the process ended; with the other side's text.
        """
        # By file, because pytest imports a test module under its bare name.
        file = Path(inspect.getfile(function)).resolve().relative_to(ROOT)
        name = ".".join(file.with_suffix("").parts), function.__qualname__
        try:
            self._requests.send_bytes(pickle.dumps((name, args, kwargs)))
            done, result = pickle.loads(self._answers.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            status = self._process.wait()
            raise RemoteError("died", f"the process ended with status {status}:\n{self.output()[-6000:]}") from None
        if not done:
            raise RemoteError(*result)
        return result

    def output(self) -> str:
        """What the process has written so far."""
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self._log.seek(0, os.SEEK_END)
        return text

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait()
        self._answers.close()
        self._log.close()
