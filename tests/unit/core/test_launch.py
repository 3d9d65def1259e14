"""What a launcher says: one process without it, who started this one, and the same call again."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from plait.core import launch
from plait.core.errors import DataError
from plait.core.launch import Launch, record

pytestmark = pytest.mark.light

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.launched(), launch.place(), launch.processes(), launch.own_share(6)) == (False, 0, 1, 6)
    assert launch.launch() is None
    assert launch.launches() == []
    with launch.together():
        assert launch.first(lambda: object) is object
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert (launch.launched(), launch.place()) == (False, 0)


def test_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.launched(), launch.place(), launch.processes(), launch.own_share(6)) == (True, 3, 8, 1)
    assert launch.own_share(8) == 2


def test_the_agent_is_known_by_number_and_beginning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    folder = tmp_path / str(os.getppid())
    folder.mkdir()
    fields = [str(number) for number in range(3, 30)]
    (folder / "stat").write_text(f"{os.getppid()} (a name) with (brackets) {' '.join(fields)}\n")
    found = launch.launch(tmp_path)
    agent = f"process {os.getppid()} on {socket.gethostname()}"
    assert found == Launch(id=agent, agent=f"{agent}, begun at 22", restarts=2)  # starttime is field 22 of proc(5)
    unknown = launch.launch(tmp_path / "nowhere")
    assert unknown == Launch(id=agent, agent="", restarts=2)
    (real,) = launch.launches()
    if Path("/proc/self/stat").exists():
        assert real.agent.rpartition(" ")[2].isdigit()


def test_the_same_call_again_and_another_one() -> None:
    first = Launch(id="night", agent="process 7 on a, begun at 5", restarts=0)
    kept = record([first, Launch(id="night", agent="process 3 on c, begun at 1", restarts=0)])
    assert kept == {"id": "night", "agents": ["process 3 on c, begun at 1", "process 7 on a, begun at 5"]}
    assert first.same(kept)  # machines came or went: its agent does not count that
    assert Launch(id="night", agent="process 9 on b, begun at 6", restarts=1).same(kept)  # the first one moved
    assert not Launch(id="night", agent="process 8 on a, begun at 9", restarts=0).same(kept)  # a person, once more
    assert not Launch(id="day", agent="process 8 on a, begun at 9", restarts=1).same(kept)
    nameless = Launch(id="process 7 on a", agent="", restarts=0)
    assert not nameless.same(record([nameless]))  # where nothing tells when it began, only its own count does
    assert Launch(id="process 7 on a", agent="", restarts=1).same(record([nameless]))


def test_a_fault_is_left_where_the_launcher_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "attempt_0" / "1" / "error.json"
    fault = DataError("half a picture", place="sample 7")
    launch.tell_launcher(fault)  # nobody asked
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    fault.rank = 1
    launch.tell_launcher(fault)  # another one's, which tells it
    assert not path.exists()
    fault.rank = None
    launch.tell_launcher(fault)
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    told = ProcessFailure(local_rank=1, pid=1, exitcode=4, error_file=str(path))
    assert told.timestamp > 0
    assert json.loads(path.read_text())["message"]["message"] == "half a picture | at sample 7"


def test_a_free_port_is_none_that_connections_are_given() -> None:
    port = launch.free_port()
    assert 10_000 <= port < 32_000
    with socket.socket() as own:
        own.bind(("127.0.0.1", port))
