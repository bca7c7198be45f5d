"""What a few minutes of a GPU can tell: `make gpu-check STAGE=a RESULTS=DIR`, then `STAGE=b` with `PREVIOUS=DIR`.

    python benchmarks/gpu_check.py --stage a --results DIR                  # 240 s: right, and how fast as it ships
    python benchmarks/gpu_check.py --stage b --results DIR2 --previous DIR  # 430 s: tuned, and beside its peers
    python benchmarks/gpu_check.py --stage c --results DIR3                 # peers whose kernels come from the Hub

Every step is a process of its own with a budget of seconds. One that fails or runs out of it does not stop the next,
and what is known is written after each: `a.json` (a row a line), `a.txt` (what the steps printed), and the files that
steps leave, 8 files of 16 MiB each at most. The exit status is 1 only where a step that judges correctness failed.
`--stand-in` runs the same steps on a CPU, at tiny sizes: it tries this script, and its figures mean nothing.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tables import parser_of, write_json

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "gpu-cache"  # git ignores it, and a machine that is held keeps it
SECONDS = {"a": 240, "b": 430, "c": 430}  # of a whole stage
MAX_FILES, MAX_BYTES = 8, 16 << 20
PRINTED_BYTES = 1 << 20  # of each step, the end of what it printed
NEXT = {  # what is to be done after a stage
    "a": "Next: make gpu-check STAGE=b PREVIOUS={results}",
    "b": 'Send a.json, b.json, b_bar.json, b_tuned.json: an issue with the form "GPU results".',
    "c": 'Send c.json and c_hub.json with the others: an issue with the form "GPU results".',
}
REST = math.inf  # the budget of a step that takes what is left
LEFT = "{seconds left}"  # in a command: until when it must have ended by itself
AGAIN_SECONDS = 60  # of stage b, for what stage a found wrong
END_SECONDS = 8  # of these, for what a command has begun
TESTS = "not sanitizer and not two_to_the_31"  # of those marked gpu, in stage a: the sanitizer is a step of its own
BAR_CASES, MORE_CASES = "0-6", "7,9,11-17"  # of experts.py: the bar; Qwen3-30B, Zipf routing, 512 and 2048 tokens


class Step(NamedTuple):
    """A command, how long it may take, and what of it is kept."""

    name: str
    seconds: float
    command: tuple[str, ...]
    judges: bool = False  # correctness: its failure is the check's
    keeps: tuple[Path, ...] = ()  # files that it writes


class Result(NamedTuple):
    """How a step ended: `state` is "passed", "failed", "out of time", or "skipped" where no test of its report ran."""

    name: str
    state: str
    seconds: float
    rows: list[dict]
    printed: str
    judges: bool


def tables(stage: str, scratch: Path, found: dict, stand_in: bool) -> list[Step]:
    """Return the steps of a stage, in their order; `found` is what stage a found, for stage b, or nothing."""
    python, cpu = (sys.executable, "-u"), ("--stand-in",) if stand_in else ()
    tune, device = (*python, "-m", "tiedmoe_kernels.tune", *cpu), "cpu" if stand_in else "cuda"
    experts = (*python, str(HERE / "experts.py"), "--device", device, *(("--tiny",) if stand_in else ()))
    cache = Step("cache", 20, (*python, str(HERE / "gpu_cache.py"), "unpack", *cpu))
    if stage == "a":
        tests, sanitizer = scratch / "a_tests.xml", scratch / "a_sanitizer.xml"
        return [
            Step("machine", 20, (*python, str(HERE / "timing.py"), device)),
            cache,
            Step("float64", 50, (*experts, "--check"), judges=True),
            Step("tests", 95, pytest(tests, TESTS, stand_in), True, (tests,)),
            Step("times", 40, (*tune, "--defaults")),
            Step("sanitizer", REST, pytest(sanitizer, "sanitizer", False, workers=2), True, (sanitizer,)),
        ]

    def bench(name: str, seconds: float, cases: str, peers: str) -> Step:
        prefix = scratch / f"{stage}_{name}"
        command = (*experts, "--output", str(prefix), "--cases", "0-2" if stand_in else cases, "--peers", peers)
        keeps = (prefix.with_suffix(".json"), prefix.with_suffix(".md"))
        return Step(name, seconds, (*command, "--budget-s", LEFT), keeps=keeps)

    if stage == "c":
        return [cache, bench("hub", REST, BAR_CASES, "sonicmoe,deepgemm")]
    tuned = scratch / "b_tuned.json"
    tune += ("--seconds", LEFT, "--output" if stand_in else "--copy", str(tuned))
    return [
        cache,
        *(again(tables("a", scratch, {}, stand_in), found) if found else ()),
        Step("tune", 130, tune, keeps=(tuned,)),
        bench("bar", 130, BAR_CASES, "grouped_mm,batched_mm,liger"),
        bench("more", REST, MORE_CASES, "grouped_mm,liger"),
    ]


def again(steps: Iterable[Step], found: dict) -> list[Step]:
    """Return the steps that judge and that stage a found wrong or did not end; of tests the failed ones."""
    done = [step["name"] for step in found["steps"] if step["state"] in ("passed", "skipped")]
    todo = [step for step in steps if step.judges and step.name not in done]
    failures = {row["step"]: tuple(row["failures"]) for row in found["rows"] if row.get("failures")}
    for number, step in enumerate(todo):
        command = step.command
        if step.name in failures:
            command = (*(word for word in command if not word.startswith("tests/")), *failures[step.name])
        todo[number] = step._replace(seconds=AGAIN_SECONDS / len(todo), command=command, keeps=())
    return todo


def pytest(report: Path, selected: str, stand_in: bool, workers: int = 8) -> tuple[str, ...]:
    """Return the command for the tests marked gpu of which `selected` is true; for a stand-in, others."""
    names, marks = gpu_tests(), ("-m", "gpu", "-k", selected)
    if stand_in:
        names, marks = ["tests/test_reference.py"], ("-m", "not gpu and not slow and not minutes")
    options = ["-p", "no:cacheprovider", "-v", "--maxfail", "20", f"--junitxml={report}"]
    plugins = {each.name for each in importlib.metadata.entry_points(group="pytest11")}
    if "xdist" in plugins:
        options += ["-n", "2" if stand_in else str(workers), "--dist", "worksteal"]
    if "timeout" in plugins:
        options += ["--timeout", "90"]
    return (sys.executable, "-m", "pytest", *marks, *options, *names)


def gpu_tests() -> list[str]:
    """Name the files that hold tests marked gpu: others may need packages that a GPU machine lacks."""
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in files]


def check(steps: Iterable[Step], seconds: float, results: Path, stage: str, env: dict | None = None) -> list[Result]:
    """Run the steps one after another within `seconds` and write what is known to `results` after each."""
    steps, start, found = list(steps), time.monotonic(), []
    if 2 + sum(len(step.keeps) for step in steps) > MAX_FILES:
        raise ValueError(f"stage {stage} would leave more than {MAX_FILES} files; let its steps keep fewer")
    results.mkdir(parents=True, exist_ok=True)
    for step in steps:
        print(f"{time.monotonic() - start:5.0f} s  {step.name} ...", flush=True)
        budget = min(step.seconds, seconds - (time.monotonic() - start))
        result = run(step, budget, env)
        rows = [*kept(step.keeps, results), *result.rows, *tests_in(result.printed)]
        if result.state == "passed" and any(row.get("skipped") and not row["passed"] for row in rows):
            result = result._replace(state="skipped")
        found.append(result._replace(rows=rows))
        written = {
            "stage": stage,
            "date": datetime.date.today().isoformat(),
            "seconds": round(time.monotonic() - start),
            "to_come": [later.name for later in steps[len(found) :]],
            "steps": [{"name": r.name, "state": r.state, "seconds": round(r.seconds, 1)} for r in found],
            "rows": [{"step": r.name} | row for r in found for row in r.rows],
        }
        write_json(results / f"{stage}.json", written)
        printed = [f"===== {r.name}: {r.state}, {r.seconds:.1f} s\n{r.printed}\n" for r in found]
        (results / f"{stage}.txt").write_text("".join(printed) + summary(found, stage))
    print(f"{summary(found, stage)}{results}/{stage}.txt has all that was printed.")
    print(NEXT[stage].format(results=results))
    return found


def run(step: Step, budget: float, environment: dict[str, str] | None) -> Result:
    """One step in a group of processes of its own, which ends with it or with its budget."""
    start = time.monotonic()
    if budget <= 0:
        return Result(step.name, "out of time", 0.0, [{"reason": "no time was left to start it"}], "", step.judges)
    before = compiled()
    command = [word.replace(LEFT, f"{max(1.0, budget - END_SECONDS):.0f}") for word in step.command]
    with tempfile.TemporaryFile() as printed:
        env = {**(environment or os.environ), "COLUMNS": "300"}  # or pytest cuts why a test failed
        options = {"cwd": ROOT, "env": env, "start_new_session": True}
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, **options)
        try:
            state = "failed" if process.wait(budget) else "passed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        with contextlib.suppress(ProcessLookupError):  # all of its group has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - PRINTED_BYTES))
        text = printed.read().decode(errors="replace")
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut by the end of the budget, or no row
            rows += [json.loads(line)] if line.startswith("{") else []
    if state == "failed":
        rows.append({"exit_status": process.returncode, "last_line": text.strip().rpartition("\n")[2][-300:]})
    if new := compiled() - before:
        rows.append({"kernels_compiled": new})
    return Result(step.name, state, time.monotonic() - start, rows, text, step.judges)


def compiled() -> int:
    """Kernels in triton's cache."""
    return sum(1 for _ in CACHE.glob("*/*.cubin")) + sum(1 for _ in CACHE.glob("*/*.hsaco"))


def kept(paths: Iterable[Path], results: Path) -> list[dict]:
    """Copy a step's files to the results; which are not there, or too large, as rows."""
    rows = []
    for path in paths:
        if not path.exists():
            rows.append({"missing": path.name})
        elif path.stat().st_size > MAX_BYTES:
            rows.append({"left_out": path.name, "bytes": path.stat().st_size})
        else:
            shutil.copyfile(path, results / path.name)
    return rows


def tests_in(text: str) -> list[dict]:
    """Return a row that counts what `pytest -v` has printed so far; `failures` by name, with a reason."""
    states = "PASSED|FAILED|ERROR|SKIPPED"
    found = {name.strip(): state for state, name in re.findall(rf"^\[gw\d+\].*? ({states}) (.+)$", text, re.MULTILINE)}
    found |= dict(re.findall(rf"^(\S+::.+) ({states})\b", text, re.MULTILINE))
    why = dict(re.findall(r"^(?:FAILED|ERROR) (\S.*?) - (.*)$", text, re.MULTILINE))
    failures = {name: why.get(name, "") for name, state in found.items() if state in ("FAILED", "ERROR")}
    failures |= {name: reason for name, reason in why.items() if name not in found}  # what could not be imported
    counts = {word: list(found.values()).count(word.upper()) for word in ("passed", "skipped")}
    return [{**counts, "failed": len(failures), "failures": failures}] if found or why else []


def summary(found: list[Result], stage: str) -> str:
    """Return a line a step, and what follows from them."""
    lines = [f"===== stage {stage}"]
    for result in found:
        last = next((json.dumps(row) for row in reversed(result.rows) if result.state != "passed"), "")
        lines.append(f"{result.name:10} {result.state:12} {result.seconds:6.1f} s  {last[:200]}".rstrip())
    wrong = ", ".join(r.name for r in found if r.judges and r.state == "failed")
    unknown = ", ".join(f"{r.name} ({r.state})" for r in found if r.judges and r.state in ("out of time", "skipped"))
    others = ", ".join(f"{r.name} ({r.state})" for r in found if not r.judges and r.state != "passed")
    right = any(r.judges and r.state == "passed" for r in found)
    lines.append(f"wrong: {wrong}" if wrong else "nothing was found wrong" if right else "nothing was judged")
    lines += [f"not known: {unknown}"] * bool(unknown) + [f"not measured, or in part: {others}"] * bool(others)
    return "\n".join(lines) + "\n"


def environment_of(site: Path, stand_in: bool) -> dict[str, str]:
    """Make the checkout's packages, and pure Python wheels in `.whl`, importable; triton's cache in its place."""
    for wheel in sorted(ROOT.glob(".whl/*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    folders = [ROOT / "src", ROOT / "kernels" / "torch-ext", ROOT / "conversion", ROOT / "examples", site]
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": str(CACHE)}
    return found | ({"TRITON_INTERPRET": "1"} if stand_in else {})


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--stage", choices=SECONDS, required=True)
    parser.add_argument("--results", type=Path, required=True, help="a folder, made if it is not there")
    parser.add_argument("--previous", type=Path, help="stage b: the results of stage a, whose failures run again")
    parser.add_argument("--seconds", type=float, help=f"of the whole stage, shared out alike; default {SECONDS}")
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args(arguments)
    seconds, found = options.seconds or SECONDS[options.stage], {}
    if options.previous:
        if not (options.previous / "a.json").exists():
            parser.error(f"--previous {options.previous} holds no a.json; name the folder that stage a wrote")
        found = json.loads((options.previous / "a.json").read_text())
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        steps = tables(options.stage, Path(folder), found, options.stand_in)
        steps = [step._replace(seconds=step.seconds * seconds / SECONDS[options.stage]) for step in steps]
        environment = environment_of(Path(folder, "site"), options.stand_in)
        results = check(steps, seconds, options.results, options.stage, environment)
    return int(any(result.judges and result.state == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
