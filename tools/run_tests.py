"""Run the tests: those of tests/ in .venv, one process for every core, then those of tests_vllm/ in .vllm.

    python tools/run_tests.py                      both, and one closing line in the form of pytest's, with their sum
    python tools/run_tests.py -k rows tests/mask   with arguments, which are pytest's: tests/ alone

tests_vllm/ needs Linux and Python 3.11 or later. Where there is none it does not run, and the output says so. An
interrupt ends the part that runs, by pytest's own end; the other does not begin.
"""

import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import setup_env
import setup_vllm
from setup_env import ROOT

CLOSING = re.compile(r"^=*\s*((?:\d+ [a-z]+(?: [a-z]+)?(?:, )?)+) in ([\d.]+)s\b")
# Of pytest's summary. What one of these tests prints itself does not begin a line so.
FAILED = re.compile(r"^(?:FAILED|ERROR) tests\S*")
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Part:
    """How one of the suites ended.

    Attributes:
        status: the exit status; 0 only where pytest ended well.
        closing: pytest's closing line without its rule; empty: there was none.
        failed: the lines of pytest's summary that name what failed.
    """

    status: int
    closing: str
    failed: tuple[str, ...] = ()


def main(arguments=None):
    """The exit status: that of the first part that failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    main_suite = [sys.executable, "-m", "pytest", "-n", "logical", *given]
    if given:
        return subprocess.run(main_suite, cwd=str(ROOT)).returncode
    parts, left_out = {"tests": run(main_suite)}, ""
    if not interrupted(parts["tests"]):
        left_out = lacks_python() or ""
        if left_out:
            left_out = f"tests_vllm: not run, {left_out}"
            print(left_out, flush=True)
        else:
            parts["tests_vllm"] = run_vllm()
    for name, part in parts.items():
        print(f"\n{name}: {part.closing or 'no closing line'}, exit status {part.status}")
        print("".join(f"  {line}\n" for line in part.failed), end="")
    if left_out:
        print(f"\n{left_out}")
    print(total([part.closing for part in parts.values()]), flush=True)
    return next((part.status for part in parts.values() if part.status), 0)


def lacks_python():
    """Why tests_vllm/ cannot run on this machine; None: it can."""
    if not sys.platform.startswith("linux"):
        return f"vLLM's CPU build is for Linux, this is {sys.platform}"
    setup_env.OLDEST = setup_vllm.OLDEST
    python, problems = setup_env.find_python(sys.executable)
    return "; ".join(problems) if python is None else None


def run_vllm():
    """Set up .vllm and run the tests that need it. A set-up that fails is an error like a test's."""
    try:
        status = setup_vllm.main([])
    except KeyboardInterrupt:
        return Part(128 + signal.SIGINT, "", ("ERROR tests_vllm: setting up .vllm was interrupted",))
    if status:
        return Part(status, "1 error in 0.00s", ("ERROR tests_vllm: .vllm could not be set up",))
    return run([str(setup_env.venv_python(setup_vllm.VENV)), "-m", "pytest", "tests_vllm"])


def run(command):
    """Run pytest, show what it prints as it comes, and tell how it ended.

    A terminal interrupts pytest too, which then ends its tests, servers and all; so this waits for it. A request to end
    that comes to this process alone is handed on as an interrupt. A second one of either kind ends pytest at once.
    """
    closing, failed, asked, started = "", [], [], []

    def end(number, _frame):
        asked.append(number)
        for process in started:
            if len(asked) > 1:
                process.kill()
            elif number != signal.SIGINT:
                process.send_signal(signal.SIGINT)

    # Before pytest starts: it would go on ignoring interrupts where this process was told to, as in the background.
    before = [signal.signal(number, end) for number in INTERRUPTS]
    try:
        with subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, text=True, bufsize=1) as process:
            started.append(process)
            for line in process.stdout:
                print(line, end="", flush=True)
                found = CLOSING.match(line)
                closing = f"{found[1]} in {found[2]}s" if found else closing
                failed += [line.rstrip()] if FAILED.match(line) else []
            status = process.wait()
    finally:
        for number, handler in zip(INTERRUPTS, before, strict=True):
            signal.signal(number, handler)
    if asked:
        status = 128 + asked[0]
    # Without its closing line pytest did not end well, whatever it says.
    return Part(status or (0 if closing else 1), closing, tuple(failed))


def interrupted(part):
    """Whether somebody asked for the end of a part."""
    return part.status in [128 + number for number in INTERRUPTS]


def total(closings):
    """The sum of pytest's closing lines, in their form. One that is missing is an error."""
    counts, seconds = {}, 0.0
    for closing in closings:
        found = CLOSING.match(closing)
        listed = found[1].split(", ") if found else ["1 error"]
        seconds += float(found[2]) if found else 0.0
        for number, _, what in (each.partition(" ") for each in listed):
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
