"""Changes the code at random places and counts the changes that tests notice.

    python -m tests.mutation [--mutants 100] [--seed 0] [--jobs 2] [--again] [module ...]

A mutant is one change (`tests.mutation_operators`). Its tests are those that run the changed line,
recorded once by tracing and kept in a cache folder until sources or tests change. Each mutant has
its own fork of a process in which everything but this project is imported. Changes that mean
nothing are listed in mutation_equivalent.toml, each with its reason, and count neither way.
`--again` tries only what survived the last time. Exit status 1 below 90 % caught.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.mutation_operators import Mutant, compiled, mutants_of
from tests.tree import ROOT

PASSED = 0.9  # the share of mutants to be caught
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "opcd_nemo_mutation"
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.toml")
RECORDED_CPU_S, TEST_CPU_S = 400, 10  # of a test file that is recorded; of a test that is chosen
CHOSEN_CPU_S = 30  # of all tests of a mutant, as they took while they were traced: thrice as long
MUTANT_CPU_S, MUTANT_S = 90, 90  # a mutant that waits for ever is one that was noticed
DATA_BYTES = 6 << 30
OURS = ("opcd_nemo", "opcd_kernels", "tests")
Lines = dict[str, list[int]]
Record = dict[str, tuple[float, Lines]]  # CPU-seconds and lines of each test


class Recorder:
    """A plug-in of pytest: which lines of the modules each test runs, and its CPU time."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._modules = {path: module for module, path in sources.items()}
        self._lines: set[tuple[str, int]] = set()
        self.record: Record = {}
        self.failed: set[str] = set()

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self._modules else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        self._lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._lines = set()
        begun = _cpu_s()
        sys.settrace(self._call)
        yield
        sys.settrace(None)
        lines: Lines = {}
        for path, line in sorted(self._lines):
            lines.setdefault(self._modules[path], []).append(line)
        for module in self._modules.values():
            if module in sys.modules:  # its own lines have run before any test
                lines.setdefault(module, [])
        self.record[item.nodeid] = (_cpu_s() - begun, lines)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # one that measures time, say: tracing is slow
            self.failed.add(report.nodeid)


class Chosen:
    """A plug-in of pytest: only these tests, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._places]
        items.sort(key=lambda item: self._places[item.nodeid])


class Changed:
    """Finds one module, whose code is the mutant's."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self._mutant.module:
            return None
        return importlib.util.spec_from_file_location(name, self._mutant.path, loader=self)

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compiled(self._mutant), module.__dict__)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _cpu_s() -> float:
    own, children = (resource.getrusage(who) for who in (0, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _fork(output: Path, cpu_s: int, wall_s: int, job: Any) -> int:
    """Start `job` in a process of its own, whose exit code is what it returns."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(wall_s)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _guard_others()
        code = job()
    except BaseException as error:
        _say(f"{type(error).__name__}: {error}")
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def _guard_others() -> None:
    """A changed process number must not reach whoever else is on this machine."""
    real = os.kill

    def kill(pid: int, number: int) -> None:
        assert pid > 1, "a mutant would kill others"
        real(pid, number)

    os.kill = kill


def _ended(running: Collection[int]) -> tuple[int, int]:
    """A fork that has ended, and its exit code; whatever it has started ends with it."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid in running:  # else an orphan of one
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            return pid, os.waitstatus_to_exitcode(status)


def _pytest(folder: Path, arguments: Sequence[str], plugin: object) -> int:
    folder.mkdir(exist_ok=True)
    shared = ["-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
    return int(pytest.main([*shared, *arguments], plugins=[plugin]))


def warm_up(folder: Path, tests: Sequence[str]) -> None:
    """Import whatever the tests import, but not this project."""
    listed = folder / "modules"

    def collect() -> int:
        code = _pytest(folder, ["--collect-only", *tests], object())
        names = [name for name in sys.modules if name.partition(".")[0] not in OURS]
        listed.write_text("\n".join(names))
        return code

    if _ended([_fork(folder / "warm", 300, 1200, collect)])[1]:
        raise SystemExit((folder / "warm").read_text()[-2000:])
    for name in listed.read_text().splitlines():
        with suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def record(
    folder: Path, tests: Sequence[str], sources: dict[str, str], state: str, jobs: int
) -> Record:
    """What each test runs: of the cache, or by a run of all tests of a file."""
    cache = CACHE / "lines" / state
    cache.mkdir(parents=True, exist_ok=True)
    waiting, running, together = list(tests), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            test = waiting.pop()
            content = hashlib.sha256(Path(test).read_bytes() + test.encode()).hexdigest()
            kept = cache / content[:32]
            if not kept.exists():
                pid = _fork(
                    folder / f"record-{kept.name}",
                    RECORDED_CPU_S,
                    1800,
                    lambda test=test, kept=kept: _recorded(folder, test, sources, kept),
                )
                running[pid] = (test, kept)
            else:
                together.update(json.loads(kept.read_text()))
        if running:
            pid, code = _ended(running)
            test, kept = running.pop(pid)
            _say(f"recorded: {test}")
            if code:
                _say(f"not whole: {test} (exit code {code})")
            if not kept.exists():
                kept.write_text("{}")
            together.update(json.loads(kept.read_text()))
    return together


def _recorded(folder: Path, test: str, sources: dict[str, str], kept: Path) -> int:
    recorder = Recorder(sources)
    code = _pytest(folder / f"tmp-{kept.name}", [test], recorder)
    if code in (0, 1):
        passed = {name: ran for name, ran in recorder.record.items() if name not in recorder.failed}
        kept.with_suffix(".new").write_text(json.dumps(passed))
        kept.with_suffix(".new").replace(kept)
    return code


def chosen_tests(mutant: Mutant, recorded: Record) -> list[str]:
    """The tests that run the changed line: those of the module's folder, and short ones.

    What runs at import may be seen by any test that has the module.
    """
    area = mutant.module.split(".")[1]
    stem = mutant.module.rpartition(".")[2]

    def place(name: str) -> tuple[bool, bool, float]:
        return f"test_{stem}.py" not in name, f"/{area}/" not in name, recorded[name][0]

    def runs(name: str) -> bool:
        lines = recorded[name][1].get(mutant.module)
        if lines is None or not mutant.in_function:
            return lines is not None
        return any(mutant.line <= line <= mutant.last_line for line in lines)

    names = [name for name in recorded if recorded[name][0] <= TEST_CPU_S and runs(name)]
    near = _within(sorted(names, key=place), recorded, CHOSEN_CPU_S / 2)
    others = sorted(set(names) - set(near), key=lambda name: (recorded[name][0], name))
    return near + _within(others, recorded, CHOSEN_CPU_S / 2)


def _within(names: Sequence[str], recorded: Record, cpu_s: float) -> list[str]:
    chosen = []
    for name in names:
        if (cpu_s := cpu_s - recorded[name][0]) < 0:
            break
        chosen.append(name)
    return chosen


def _try(folder: Path, mutant: Mutant, names: Sequence[str]) -> int:
    sys.meta_path.insert(0, Changed(mutant))
    files = sorted({name.partition("::")[0] for name in names})
    return _pytest(folder, ["-x", *files], Chosen(names))


def try_all(
    folder: Path, mutants: Sequence[Mutant], recorded: Record, jobs: int
) -> Iterator[tuple[Mutant, str, str]]:
    """Each mutant with `killed`, `survived` or `not run`, and the test or signal that ended it."""
    waiting = list(reversed(mutants))
    running: dict[int, tuple[Mutant, Path, int]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            names = chosen_tests(mutant, recorded)
            if not names:
                yield mutant, "survived", "no test runs it"
                continue
            own = Path(tempfile.mkdtemp(dir=folder))
            job = lambda own=own, mutant=mutant, names=names: _try(own, mutant, names)  # noqa: E731
            running[_fork(own / "out", MUTANT_CPU_S, MUTANT_S, job)] = mutant, own, len(names)
        if running:
            pid, code = _ended(running)
            mutant, own, count = running.pop(pid)
            yield mutant, *_outcome(code, own, count)
            shutil.rmtree(own, ignore_errors=True)


def _outcome(code: int, own: Path, count: int) -> tuple[str, str]:
    text = (own / "out").read_text(errors="replace") if (own / "out").exists() else ""
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code == 0:
        return "survived", f"{count} tests"
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return "survived", "no test was collected"
    return "killed", failed[0][:90] if failed else f"exit {code}"


def choose(modules: dict[str, str], count: int, seed: int) -> list[Mutant]:
    """Mutants of every module, by its size, of every kind of change alike."""
    found = {module: mutants_of(module, path) for module, path in modules.items()}
    total, chosen = sum(map(len, found.values())), []
    for module, mutants in found.items():
        chance = random.Random(f"{seed} {module}")
        kinds: dict[str, list[Mutant]] = {}
        for mutant in chance.sample(mutants, len(mutants)):
            kinds.setdefault(mutant.kind, []).append(mutant)
        wanted = min(len(mutants), max(2, round(count * len(mutants) / total)))
        while wanted:
            kind = chance.choice(sorted(kinds))
            chosen.append(kinds[kind].pop())
            wanted -= 1
            if not kinds[kind]:
                del kinds[kind]
    return chosen


def equivalents() -> dict[str, str]:
    """The reason of each mutant that means nothing."""
    listed = tomllib.loads(EQUIVALENT.read_text())["mutant"]
    return {f"{one['module']} {one['function']}: {one['change']}": one["reason"] for one in listed}


def state_of(modules: dict[str, str]) -> str:
    """A digest of the sources: what was recorded holds for these."""
    digest = hashlib.sha256()
    for _, path in sorted(modules.items()):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="+", metavar="module", help="such as config/schema")
    parser.add_argument("--tests", nargs="+", default=["tests/unit"], help="files and folders")
    parser.add_argument("--only", nargs="+", default=[], help="modules; lines of all are recorded")
    parser.add_argument("--mutants", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="what survived the last time")
    settings = parser.parse_args()
    os.chdir(ROOT)
    modules = {
        f"opcd_nemo.{name.replace('/', '.')}": str(ROOT / f"opcd_nemo/{name}.py")
        for name in settings.modules
    }
    tests = [
        str(file)
        for path in map(Path, settings.tests)
        for file in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])
    ]
    with tempfile.TemporaryDirectory(prefix="opcd-mutation-", ignore_cleanup_errors=True) as folder:
        return _run(settings, Path(folder), modules, tests)


def _run(
    settings: argparse.Namespace, folder: Path, modules: dict[str, str], tests: list[str]
) -> int:
    begun, survivors = time.monotonic(), CACHE / "survived.json"
    meaningless = equivalents()
    only = [f"opcd_nemo.{name.replace('/', '.')}" for name in settings.only or settings.modules]
    mutants = choose({name: modules[name] for name in only}, settings.mutants, settings.seed)
    if settings.again:
        last = set(json.loads(survivors.read_text()))
        mutants = [mutant for mutant in mutants if str(mutant) in last]
    tried = [mutant for mutant in mutants if str(mutant) not in meaningless]
    warm_up(folder, tests)
    recorded = record(folder, tests, modules, state_of(modules), settings.jobs)
    _say(f"{len(recorded)} tests, {time.monotonic() - begun:.0f} s")
    survived = []
    for mutant, outcome, why in try_all(folder, tried, recorded, settings.jobs):
        _say(f"{outcome:8} {mutant.line:4} {mutant}  [{why}]")
        if outcome == "survived":
            survived.append(str(mutant))
    survivors.write_text(json.dumps(survived))
    score = 1 - len(survived) / max(1, len(tried))
    _say(
        f"{len(mutants)} mutants: {len(tried) - len(survived)} killed, {len(survived)} survived, "
        f"{len(mutants) - len(tried)} equivalent: {score:.1%} ({PASSED:.0%} wanted), "
        f"{time.monotonic() - begun:.0f} s, {_cpu_s():.0f} CPU-seconds"
    )
    return int(score < PASSED)


if __name__ == "__main__":
    sys.exit(main())
