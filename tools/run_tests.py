"""Run the tests: those of tests/ in .venv, one process for every core, then those of tests_vllm/ in .vllm.

    python tools/run_tests.py                      both, and one closing line in the form of pytest's, with their sum
    python tools/run_tests.py -k rows tests/mask   with arguments, which are pytest's: tests/ alone

tests_vllm/ needs Linux and Python 3.11 or later. Where there is none it does not run, and the output says so.
"""

import re
import subprocess
import sys

import setup_env
import setup_vllm
from setup_env import ROOT

CLOSING = re.compile(r"^=*\s*((?:\d+ [a-z]+(?:, )?)+) in ([\d.]+)s\b")


def main(arguments=None):
    """The exit status: that of the first part that failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    main_suite = [sys.executable, "-m", "pytest", "-n", "logical", *given]
    if given:
        return subprocess.run(main_suite, cwd=str(ROOT)).returncode
    parts = {"tests": run(main_suite)}
    why = lacks_python()
    if why:
        print(f"tests_vllm: not run, {why}", flush=True)
    else:
        status = setup_vllm.main([])
        command = [str(setup_env.venv_python(setup_vllm.VENV)), "-m", "pytest", "tests_vllm"]
        parts["tests_vllm"] = run(command) if status == 0 else (status, "1 error in 0.00s")
    for name, (status, closing) in parts.items():
        print(f"{name}: {closing or 'no closing line'}, exit status {status}")
    print(total([closing for _, closing in parts.values()]), flush=True)
    return next((status for status, _ in parts.values() if status), 0)


def lacks_python():
    """Why tests_vllm/ cannot run on this machine; None: it can."""
    if not sys.platform.startswith("linux"):
        return f"vLLM's CPU build is for Linux, this is {sys.platform}"
    setup_env.OLDEST = setup_vllm.OLDEST
    python, problems = setup_env.find_python(sys.executable)
    return "; ".join(problems) if python is None else None


def run(command):
    """Run pytest, show what it prints as it comes, and return its exit status and its closing line."""
    closing = ""
    with subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            found = CLOSING.match(line)
            closing = f"{found[1]} in {found[2]}s" if found else closing
    return process.returncode, closing


def total(closings):
    """The sum of pytest's closing lines, in their form. One that is missing is an error."""
    counts, seconds = {}, 0.0
    for closing in closings:
        found = CLOSING.match(closing)
        listed = found[1].split(", ") if found else ["1 error"]
        seconds += float(found[2]) if found else 0.0
        for number, what in (each.split() for each in listed):
            what = {"errors": "error", "warnings": "warning"}.get(what, what)
            counts[what] = counts.get(what, 0) + int(number)
    # pytest's order: what failed comes first.
    order = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warning", "error", "rerun")
    words = [
        f"{counts[what]} {what}{'s' if what in ('warning', 'error') and counts[what] > 1 else ''}"
        for what in sorted(counts, key=lambda what: order.index(what) if what in order else len(order))
    ]
    return f" {', '.join(words)} in {seconds:.2f}s ".center(100, "=")


if __name__ == "__main__":
    sys.exit(main())
