"""Real processes under torchrun: one is killed, fails, or all are told to stop, in the middle of a recipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.tiny_recipe import write_recipe

from plait.core.files import find_run, read_json, read_jsonl, sha256_file
from plait.recipes.run import summary

STEPS = 24
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def root(tmp_path: Path, tiny_folders: Mapping[str, Path]) -> Path:
    write_recipe(tmp_path, tiny_folders, steps=STEPS, pretrain=False)
    return tmp_path


def torchrun(
    root: Path, home: Path, *options: str, program: tuple[str, ...] = ("-m", "plait")
) -> subprocess.Popen[bytes]:
    """Two processes that run the recipe; the launcher's own process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    with (root / "out").open("w") as out, (root / "err").open("w") as err:
        return subprocess.Popen(
            [*command, *program, "run", "tiny.yaml"],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_HOME": str(home), "PYTHONPATH": str(SRC)},
            stdout=out,
            stderr=err,
        )


def ended(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], root: Path) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, (root / "err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def in_last_phase(root: Path, steps: int = STEPS // 4) -> bool:
    metrics = root / "runs" / "latest" / "02-tune" / "decoder" / "metrics.jsonl"
    return metrics.is_file() and metrics.read_text().count("\n") >= steps


def worker(agent: int, rank: int) -> int:
    """The process that the launcher started under this number."""
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(agent) and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (OSError, IndexError):
            continue
    raise AssertionError("no such process")


def model(root: Path) -> dict[str, str]:
    """Digests of what each phase of tune left, and of what align made of it."""
    run = find_run("latest", root / "runs")
    assert [stage["state"] for stage in summary(run)["stages"]] == ["done"] * 3
    last = [
        max((run / "02-tune" / phase / "checkpoints").glob("[0-9]*")) for phase in ("words", "connector", "decoder")
    ]
    last.append(max((run / "03-align" / "checkpoints").glob("[0-9]*")))
    files = [path for folder in last for path in folder.rglob("*.safetensors") if path.name != "rng.safetensors"]
    return {path.relative_to(run).as_posix(): sha256_file(path) for path in files}


@pytest.mark.row("S2-31")
def test_killed_processes_start_all_again_and_the_model_has_the_bits_of_a_quiet_run(
    root: Path, home: Path, tmp_path_factory: pytest.TempPathFactory, tiny_folders: Mapping[str, Path]
) -> None:
    process = torchrun(root, home, "--max-restarts", "2")
    wait_for(lambda: in_last_phase(root), process, root)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    wait_for(lambda: in_last_phase(root, STEPS // 2), process, root)
    os.kill(worker(process.pid, 0), signal.SIGKILL)  # for which the other one may be waiting now
    assert ended(process) == 0, (root / "err").read_text()
    assert (root / "out").read_text().count("started again by torchrun: going on with tiny-0001") == 2
    assert "forcefully" not in (root / "err").read_text(), "the other one had to be killed, too"
    assert not (root / "runs" / "tiny-0002").exists()
    run = find_run("latest", root / "runs")
    resumed = [e["step"] for e in read_jsonl(run / "events.jsonl") if e["text"].startswith("resumed at step")]
    assert resumed[0] == 3, "the first phase was not done again"
    assert 0 < resumed[2] <= resumed[-1] < STEPS
    assert len(read_jsonl(run / "02-tune" / "decoder" / "metrics.jsonl")) == STEPS

    quiet = tmp_path_factory.mktemp("quiet")
    for path in root.iterdir():
        if path.suffix in (".png", ".csv", ".yaml"):
            (quiet / path.name).write_bytes(path.read_bytes())
    assert ended(torchrun(quiet, home)) == 0, (quiet / "err").read_text()
    assert model(quiet) == model(root)


def test_a_fault_of_one_process_ends_all_at_once_and_each_with_its_code(root: Path, home: Path) -> None:
    process = torchrun(root, home, program=(str(Path(__file__).with_name("victim_rank.py")),))
    began = time.monotonic()
    assert ended(process) == 1  # the launcher's own
    assert time.monotonic() - began < 45
    said = (root / "err").read_text()
    assert "process 1: error [checkpoint]: weights of the decoder are damaged" in said
    assert "\nerror [checkpoint]: process 1 of 2: weights of the decoder are damaged" in "\n" + said
    assert said.count("exitcode  : 7") == 2
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : 7" in said.partition("Root Cause")[2]
    assert "weights of the decoder are damaged" in said.partition("Root Cause")[2]
    assert said.count("Traceback") == 1  # the launcher's own, of its own frames


@pytest.mark.row("S2-31")
def test_told_to_stop_both_stop_after_one_step_and_one_process_goes_on(root: Path, home: Path) -> None:
    process = torchrun(root, home, "--max-restarts", "2")
    wait_for(lambda: in_last_phase(root), process, root)
    process.send_signal(signal.SIGTERM)
    assert ended(process) != 0
    assert "which is saved" in (root / "err").read_text()
    run = find_run("latest", root / "runs")
    assert not (root / "runs" / "tiny-0002").exists()
    stopped = [read_jsonl(folder / "02-tune" / "decoder" / "metrics.jsonl") for folder in (run, run / "ranks" / "1")]
    assert len(stopped[0]) == len(stopped[1]) < STEPS
    last = max((run / "02-tune" / "decoder" / "checkpoints").glob("[0-9]*"))
    assert int(last.name) == len(stopped[0])

    result = subprocess.run(
        [sys.executable, "-m", "plait", "resume"],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_HOME": str(home), "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert f"resumed at step {len(stopped[0])} of {STEPS}" in result.stdout
    records = read_jsonl(run / "02-tune" / "decoder" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [stage["state"] for stage in summary(run)["stages"]] == ["done"] * 3
    assert read_json(run / "env.json")["job"]["recipe"] == "tiny.yaml"
