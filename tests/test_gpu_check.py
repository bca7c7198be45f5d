"""`benchmarks/gpu_check.py` with real processes on a CPU: budgets, what is written, what decides the exit status."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_check
from gpu_check import Step

ROOT = Path(__file__).parents[1]

PRINTED = """
tests/test_x.py::TestY::test_z[1] FAILED
tests/test_x.py::test_w PASSED
tests/test_x.py::test_v SKIPPED (no)
FAILED tests/test_x.py::TestY::test_z[1] - assert 2 == 3
"""


def shell(name: str, script: str, seconds: float = 20, **facts) -> Step:
    return Step(name, seconds, ("sh", "-c", script), **facts)


def steps(folder: Path) -> list[Step]:
    """A table like a stage's own: rows, a report, a failure of each kind."""
    report = folder / "tests.xml"
    return [
        shell("rows", """echo '{"a": 1}'; echo noise; echo '{"cut'; echo '{"b": 2}'"""),
        shell("tests", f"echo '{PRINTED}' | tee {report}; exit 1", judges=True, keeps=(report,)),
        shell("broken", "echo sorry >&2; exit 3"),
        shell("right", "exit 0", judges=True),
    ]


def results(folder: Path, stage: str = "a") -> tuple[dict, dict]:
    found = json.loads((folder / f"{stage}.json").read_text())
    by_name = {step["name"]: step | {"rows": []} for step in found["steps"]}
    for row in found["rows"]:
        by_name[row.pop("step")]["rows"].append(row)
    return found, by_name


def test_every_step_runs_and_its_rows_are_kept(tmp_path, capsys):
    found = gpu_check.check(steps(tmp_path), 60, tmp_path / "out", "a")
    assert [(r.name, r.state) for r in found] == [
        ("rows", "passed"),
        ("tests", "failed"),
        ("broken", "failed"),
        ("right", "passed"),
    ]
    written, by_name = results(tmp_path / "out")
    assert written["to_come"] == []
    assert by_name["rows"]["rows"] == [{"a": 1}, {"b": 2}]
    assert by_name["tests"]["rows"][1:] == [
        {"passed": 1, "failed": 1, "skipped": 1, "failures": {"tests/test_x.py::TestY::test_z[1]": "assert 2 == 3"}}
    ]
    assert by_name["broken"]["rows"] == [{"exit_status": 3, "last_line": "sorry"}]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "a.txt", "tests.xml"]
    assert "noise" in (tmp_path / "out" / "a.txt").read_text()
    text = capsys.readouterr().out
    assert "wrong: tests\n" in text
    assert "not measured, or in part: broken (failed)\n" in text
    assert f"Next: make gpu-check STAGE=b PREVIOUS={tmp_path / 'out'}" in text


@pytest.mark.parametrize("slow", range(4))
def test_the_clock_runs_out_in_each_step_and_the_others_run(slow, tmp_path, capsys):
    table = steps(tmp_path)
    table[slow] = table[slow]._replace(seconds=2, command=("sh", "-c", """echo '{"begun": 1}'; sleep 60 & sleep 60"""))
    start = time.monotonic()
    found = gpu_check.check(table, 60, tmp_path / "out", "a")
    assert time.monotonic() - start < 30  # both of its processes were ended
    assert [r.state for r in found].index("out of time") == slow
    _, by_name = results(tmp_path / "out")
    assert {"begun": 1} in by_name[table[slow].name]["rows"]
    for i, (step, fresh) in enumerate(zip(table, gpu_check.check(steps(tmp_path), 60, tmp_path / "all", "a"))):
        assert i == slow or by_name[step.name]["state"] == fresh.state
    text = capsys.readouterr().out
    assert f"{table[slow].name:10} out of time" in text
    assert (f"not known: {table[slow].name} (out of time)" in text) == table[slow].judges


def test_no_step_starts_without_time_and_each_is_named(tmp_path):
    table = [shell("long", "sleep 60", seconds=gpu_check.REST), *steps(tmp_path)]
    found = gpu_check.check(table, 0.2, tmp_path / "out", "b")
    assert {r.state for r in found} == {"out of time"}
    _, by_name = results(tmp_path / "out", "b")
    assert by_name["right"]["rows"] == [{"reason": "no time was left to start it"}]


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_what_pytest_prints_is_counted(workers, tmp_path):
    """Also where its report is missing: it writes none when its time is over."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', ['a b', 'c', 'd'])\n"
        "def test_it(i):\n    pytest.skip() if i == 'd' else None\n    assert i != 'c'\n"
    )
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", f"--rootdir={tmp_path}", *workers)
    step = Step("tests", 60, (*command, str(tmp_path)), judges=True, keeps=(tmp_path / "report.xml",))
    (result,) = gpu_check.check([step], 60, tmp_path / "out", "a")
    missing, *_, found = result.rows
    assert missing == {"missing": "report.xml"}
    ((name, why),) = found.pop("failures").items()
    assert name.partition("::")[2] == "test_it[c]"
    assert "assert 'c' != 'c'" in why
    assert found == {"passed": 1, "failed": 1, "skipped": 1}, result.printed


def test_a_file_that_cannot_be_imported_is_a_failure():
    text = "tests/test_a.py::test_b PASSED\nERROR tests/test_c.py - ModuleNotFoundError: No module named 'hypothesis'"
    (found,) = gpu_check.tests_in(text)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert found["failures"] == {"tests/test_c.py": "ModuleNotFoundError: No module named 'hypothesis'"}


def test_a_step_without_a_test_that_ran_is_no_success(tmp_path, capsys):
    gpu_check.check([shell("tests", "echo 'tests/x.py::test_v SKIPPED (no)'", judges=True)], 60, tmp_path / "out", "a")
    text = capsys.readouterr().out
    assert "not known: tests (skipped)" in text
    assert "nothing was judged" in text


def test_a_step_is_told_what_it_has_left(tmp_path):
    (result,) = gpu_check.check(
        [shell("long", f"echo '{{\"left\": {gpu_check.LEFT}}}'", 40)], 30, tmp_path / "out", "a"
    )
    assert result.rows == [{"left": 30 - gpu_check.END_SECONDS}]


def test_what_is_known_is_written_after_each_step(tmp_path):
    out = tmp_path / "out"
    table = [
        shell("first", "echo '{\"a\": 1}'"),
        shell("second", f"cp {out}/a.json {tmp_path}/then.json"),
    ]
    gpu_check.check(table, 60, out, "a")
    then = json.loads((tmp_path / "then.json").read_text())
    assert [step["name"] for step in then["steps"]] == ["first"]
    assert then["to_come"] == ["second"]


def test_files_are_few_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "MAX_BYTES", 100)
    monkeypatch.setattr(gpu_check, "PRINTED_BYTES", 50)
    large = tmp_path / "large.json"
    table = [shell("large", f"head -c 101 /dev/zero > {large}; yes | head -c 5000; echo end", keeps=(large,))]
    (result,) = gpu_check.check(table, 60, tmp_path / "out", "a")
    assert result.rows == [{"left_out": "large.json", "bytes": 101}]
    assert len(result.printed) == 50
    assert result.printed.endswith("end\n")
    many = tuple(tmp_path / f"{i}.json" for i in range(7))
    with pytest.raises(ValueError, match="more than 8 files"):
        gpu_check.check([shell("many", "true", keeps=many)], 60, tmp_path / "out", "a")


@pytest.mark.parametrize("stage", gpu_check.SECONDS)
@pytest.mark.parametrize("stand_in", [False, True])
def test_the_tables_fit_their_stage(stage, stand_in, tmp_path):
    failed = {"steps": [{"name": name, "state": "failed"} for name in ("float64", "tests")], "rows": []}
    table = gpu_check.tables(stage, tmp_path, failed, stand_in)
    assert 2 + sum(len(step.keeps) for step in table) <= gpu_check.MAX_FILES
    assert table[-1].seconds == gpu_check.REST
    assert sum(step.seconds for step in table[:-1]) < gpu_check.SECONDS[stage]
    assert [step.name for step in table] == [step.name for step in gpu_check.tables(stage, tmp_path, failed, False)]
    names = [path.name for step in table for path in step.keeps]
    assert len(set(names)) == len(names)
    for step in table:
        script = next((word for word in step.command if word.endswith(".py") and "benchmarks" in word), None)
        assert script is None or Path(script).exists()


def test_stage_b_repeats_what_stage_a_found_wrong_or_did_not_end(tmp_path):
    failure = "tests/test_x.py::test_y"
    states = {"machine": "failed", "float64": "passed", "tests": "failed", "sanitizer": "out of time"}
    steps = [{"name": name, "state": state} for name, state in states.items()]
    found = {"steps": steps, "rows": [{"step": "tests", "failures": {failure: "why"}}]}
    first = {step.name: step for step in gpu_check.tables("a", tmp_path, {}, False)}
    second = {step.name: step for step in gpu_check.tables("b", tmp_path, found, False)}
    assert list(second) == ["cache", "tests", "sanitizer", "tune", "bar", "more"]
    assert [word for word in second["tests"].command if word.startswith("tests/")] == [failure]
    assert second["sanitizer"].command == first["sanitizer"].command
    assert second["tests"].judges
    assert second["tests"].seconds == second["sanitizer"].seconds == gpu_check.AGAIN_SECONDS / 2


def test_plugins_of_pytest_are_asked_for_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name="timeout")])
    command = gpu_check.pytest(tmp_path / "report.xml", "sanitizer", stand_in=False)
    assert "-n" not in command
    assert command[command.index("--timeout") + 1] == "90"


def test_only_a_step_that_judges_decides_the_exit_status(tmp_path, monkeypatch):
    table = steps(tmp_path)
    monkeypatch.setattr(gpu_check, "tables", lambda *_: [table[0], table[2], table[3]])
    arguments = ["--stage", "a", "--results", str(tmp_path / "out")]
    assert gpu_check.main(arguments) == 0
    table[3] = table[3]._replace(seconds=0)
    assert gpu_check.main(arguments) == 0  # not known is not wrong, and the summary says it
    assert "not known: right (out of time)" in (tmp_path / "out" / "a.txt").read_text()
    table[3] = shell("right", f"echo '{{\"left\": {gpu_check.LEFT}}}'", seconds=20)
    assert gpu_check.main([*arguments, "--seconds", "480"]) == 0  # twice as long for each step
    assert results(tmp_path / "out")[1]["right"]["rows"] == [{"left": 40 - gpu_check.END_SECONDS}]
    monkeypatch.setattr(gpu_check, "tables", lambda *_: table)
    assert gpu_check.main(arguments) == 1


def test_wrong_arguments_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--stage", "b", "--results", str(tmp_path / "out"), "--previous", str(tmp_path)])
    assert "holds no a.json" in capsys.readouterr().err


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    paths = [str(ROOT / part) for part in ("kernels/torch-ext", "src")] + [os.environ.get("PYTHONPATH", "")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=ROOT)


# One kernel, compiled into a cache, packed, unpacked elsewhere, and asked for by a launch on tensors with memory.
ROUND_TRIP = """
import sys; sys.path.insert(0, "benchmarks")
import gpu_cache, triton
from pathlib import Path
what, folder, archive = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
triton.knobs.cache.dir = str(folder)
target, shape = gpu_cache.GPUTarget("cuda", 90, 32), gpu_cache.CHECKED_CASES[0].shape
if what == "unpack":
    build = gpu_cache.cache.triton_key()
    gpu_cache.cache.triton_key = lambda: build + "of another Python"
    print(gpu_cache.unpack(archive, folder))
with gpu_cache.compiling(target), gpu_cache.keys_kept(), gpu_cache.tune.counted():
    device = gpu_cache.torch.device("meta" if what == "pack" else "cpu")
    case = gpu_cache.Case("decode", shape if what == "pack" else shape._replace(E=16, H=1024), 1)
    gpu_cache.launch(case, device)
if what == "pack":
    print(gpu_cache.pack(folder, archive, target))
"""


def test_a_cache_made_without_a_gpu_is_found_at_another_place_by_another_build(tmp_path):
    pytest.importorskip("triton")
    archive = str(tmp_path / "cache.tar.xz")
    made = python("-c", ROUND_TRIP, "pack", str(tmp_path / "a"), archive)
    assert made.returncode == 0, made.stderr[-3000:]
    counts = json.loads(made.stdout.splitlines()[0])
    assert counts["cache_hits"] == 0
    assert counts["cache_misses"] > 0
    (tmp_path / "a").rename(tmp_path / "gone")
    found = python("-c", ROUND_TRIP, "unpack", str(tmp_path / "b"), archive)
    assert found.returncode == 0, found.stderr[-3000:]
    again = json.loads(found.stdout.splitlines()[1])
    assert (again["cache_hits"], again["cache_misses"]) == (counts["cache_misses"], 0)


@pytest.mark.minutes
@pytest.mark.parametrize("stage", ["a", "b"])
def test_a_stage_runs_end_to_end_on_a_stand_in(stage, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "out"
    # With time enough beside other work: whether it runs is tried, not how fast.
    arguments = ["--stage", stage, "--results", str(out), "--stand-in", "--seconds", "2400"]
    if stage == "b":
        states = {"float64": "failed", "tests": "passed"}
        steps = [{"name": name, "state": state} for name, state in states.items()]
        (tmp_path / "a.json").write_text(json.dumps({"steps": steps, "rows": []}))
        arguments += ["--previous", str(tmp_path)]
    run = python("benchmarks/gpu_check.py", *arguments)
    _, by_name = results(out, stage)
    assert run.returncode == 0, run.stdout
    states = {name: step["state"] for name, step in by_name.items()}
    assert states.pop("sanitizer", "skipped") == "skipped"
    assert states == dict.fromkeys(states, "passed"), run.stdout
    assert len(list(out.iterdir())) <= gpu_check.MAX_FILES
    if stage == "a":
        assert all(row["right"] for row in by_name["float64"]["rows"] if "right" in row)
        assert by_name["tests"]["rows"][-1]["passed"] > 0
