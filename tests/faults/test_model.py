"""Three processes write, append, fail, give up, merge, read and die on one folder, in any order of their steps.

Each stops before every operation on a file, and chance says which goes on. A list in memory says what the index must
hold: after each change of the manifest, and at instants in between, its rows are those of the calls that finished,
nothing is lost or mixed, and every error says what it is.
"""

from __future__ import annotations

import random
import re
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import dropinf
from dropinf.index import verify
from dropinf.index.fingerprint import fingerprint
from dropinf.index.manifest import Manifest
from tests.faults.forks import Forks, Process
from tests.faults.model import Call, Line, batch_of, ids, rows

ACTORS, ASKED = 3, 12  # what is asked for in a sequence
# What may be said of an index that others write to, and of calls that do not belong.
CLEAN = re.compile(
    r"another process is writing to|was begun with (others|\d+ of them)|holds others' gradients|is another than the one whose rows|"
    r"not as many as before|ids: those of batch \d+ are|no index \(it has no|the index is not finished|"
    r"has changed since it was opened|a run is not finished; finish it|there is nothing to go back to|"
    r"its shards were merged since it was opened|fisher: it is of \d+ samples"
)


class Member:
    """One of the processes, as it is seen from here: idle, or before a step of what it was asked for."""

    def __init__(self, forks: Forks, server: socket.socket, address: str) -> None:
        self.process: Process = forks.start("act", address)
        self.line = Line(server.accept()[0])
        self.asked: dict[str, Any] | None = None
        self.step: list[str] = []
        self.held: list[list[float]] | None = None  # what its open handle is of
        self.alone, self.seen = True, []  # whether no other wrote meanwhile; what the index held meanwhile

    def ask(self, **what) -> None:
        self.asked = what
        self.line.say(**what)

    def hear(self) -> dict[str, Any] | None:
        """Take the next message: None for a step, what came of it in the end."""
        message = self.line.hear()
        self.step = message.get("step", [])
        return None if self.step else message

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -9


class Sequence:
    """One folder, and what it must hold."""

    def __init__(self, seed: int, folder: Path, members: list[Member], replace) -> None:
        self.chance = random.Random(seed)
        self.folder, self.members, self.replace = folder, members, replace
        self.ids, self.ordered = self.chance.random() < 0.5, self.chance.random() < 0.5
        self.dtype = self.chance.choice(["float32", "int8"])
        firsts = [1, 1, 2]  # so that calls begin alike
        self.calls: list[Call] = [
            [self.chance.choice(firsts), *(self.chance.randrange(3, 9) for _ in range(self.chance.randrange(5)))]
            for _ in range(5)
        ]
        self.done: list[Call] = []
        self.pending: Call | None = None
        self.stored = False  # whether batches of it are in the folder
        self.since: list[Call] = []  # written since the pending one began, or as it did
        self.exists = False
        self.outcomes: Counter[str] = Counter()

    def about(self) -> dict[str, Any]:
        """What all calls have in common."""
        return {"ids": self.ids, "ordered": self.ordered, "dtype": self.dtype}

    def rows(self, calls: list[Call]) -> list[list[float]]:
        return rows(calls, self.ordered, self.dtype)

    # What is asked for.

    def start(self, member: Member) -> None:
        do = self.chance.choice(
            [
                "write",
                "append",
                "append",
                "append",
                "resume",
                "fail",
                "discard",
                "save_fisher",
                "compact",
                "open",
                "read",
            ]
        )
        if not self.exists and self.chance.random() < 0.7:
            do = "write"
        asked: dict[str, Any] = {"do": do, "folder": str(self.folder)}
        if do in ("write", "append", "resume", "fail"):
            again = do == "resume" and self.pending is not None
            asked |= {
                "do": "write",
                "call": self.pending if again else self.chance.choice(self.calls),
                "append": do != "write" and self.chance.random() < 0.9,
                "once": self.chance.random() < 0.2,
                **self.about(),
                "fisher": self.chance.choice([None, None, "diagonal"]),
                "fails_at": self.chance.randrange(4) if do == "fail" else None,
            }
        writers = [other for other in self.members if other.asked is not None and writes(other.asked)]
        member.alone, member.seen = not writers, [list(self.done)]
        self.note(member, asked)
        if writes(asked):
            for other in self.members:
                other.alone = False
            member.alone = not writers
        member.ask(**asked)
        self.advance(member)

    def note(self, member: Member, asked: dict[str, Any]) -> None:
        """Remember how things stood as this was asked for."""
        self.stored = self.has_stored()
        # A call of which nothing was stored is as if it had never been.
        begun = self.pending if self.stored else None
        exists = self.exists and (bool(self.done) or begun is not None)
        member.before = (list(self.done), begun, exists, self.rivals(), self.pending)
        if asked["do"] == "write":
            self.since.append(asked["call"])

    def has_stored(self) -> bool:
        """Return whether batches of an unfinished call are in the folder."""
        try:
            manifest = Manifest.load(self.folder)
        except FileNotFoundError:
            return False
        known = {f"{shard.number:06d}-{shard.checksum}" for shard in manifest.shards}
        files = [path for part in ("shards", "parts") for path in (self.folder / part).glob("[0-9]*.safetensors")]
        return any(path.stem not in known for path in files)

    def rivals(self) -> bool:
        """Return whether calls that begin alike may have gone on with the pending one, each as long as nothing differed."""
        return self.pending is not None and any(c[0] == self.pending[0] and c != self.pending for c in self.since)

    def advance(self, member: Member) -> None:
        """Look at the next step of a process, or at what came of it."""
        stepped = member.step
        member.step = []
        message = member.hear()
        if stepped and stepped[0] == "rename" and stepped[-1].endswith("/manifest.json"):
            self.changed(member)
            self.stored = self.has_stored()
        elif stepped and stepped[0] == "rename":
            self.stored = self.has_stored()
        elif self.chance.random() < 0.03:
            self.check()
        if message is not None:
            self.ended(member, message)

    def go(self, member: Member) -> None:
        member.line.say(go=True)
        self.advance(member)

    def run(self) -> None:
        asked = 0
        while asked < ASKED or any(member.asked for member in self.members):
            member = self.chance.choice(self.members)
            if member.asked is None:
                if asked < ASKED:
                    asked += 1
                    self.start(member)
            elif self.chance.random() < (0.015 if member.asked["do"] == "write" else 0.06):
                self.kill(member)
            else:
                for _ in range(self.chance.choice([1, 3, 30])):
                    if member.asked is not None:
                        self.go(member)
        self.check()
        self.finish()

    def kill(self, member: Member) -> None:
        """Its lock goes with it, and no step that it did not take was taken."""
        self.outcomes["killed"] += 1
        member.kill()
        self.members[self.members.index(member)] = self.replace()

    def finish(self) -> None:
        """Whatever was left can be finished or given up, killed in the midst of it too, and is sound."""
        if self.pending is not None and (self.chance.random() < 0.5 or not self.done):
            for call in [self.pending, *self.calls] if self.rivals() else [self.pending]:
                if self.pending is not None and call[0] == self.pending[0]:
                    self.write(call, once=True)
        for do in ("discard", "compact"):
            if not self.done:
                break
            if do == "discard":
                self.write(self.chance.choice(self.calls), fails_at=2)
            self.solo(dies=True, do=do)
            self.write([9, *self.chance.choice(self.calls)])
            self.solo(do=do)
        if self.done:
            assert self.pending is None
            assert verify(self.folder) == []
            for call in self.done:
                self.write(call, once=self.chance.random() < 0.3)
        for member in self.members:
            self.solo(member, do="forget")
            member.held = None

    def write(self, call: Call, once: bool = False, fails_at: int | None = None) -> None:
        self.solo(do="write", call=call, append=True, once=once, fisher=None, fails_at=fails_at, **self.about())

    def solo(self, member: Member | None = None, dies: bool = False, **asked) -> None:
        """Ask for something while no other does anything; `dies`: it may be killed at any step."""
        member = member or self.members[0]
        member.alone, member.seen = True, [list(self.done)]
        self.note(member, asked)
        member.ask(folder=str(self.folder), **asked)
        self.advance(member)
        while member.asked is not None:
            if dies and self.chance.random() < 0.06:
                self.kill(member)
                break
            self.go(member)

    # What the index must hold.

    def changed(self, member: Member) -> None:
        """A process has put another manifest in place: what it may have changed is what it was asked for."""
        asked, manifest = member.asked, Manifest.load(self.folder)
        assert asked is not None
        assert writes(asked), asked
        self.exists = True
        finished, was = self.rows(self.done), self.pending
        count = sum(shard.rows for shard in manifest.shards)
        if not manifest.unfinished and was is not None:
            self.pending = None
            if count != len(finished):
                assert asked["do"] == "write"
                assert asked["call"][0] == was[0]  # of the rest, what was stored must agree: its rows are checked
                self.done.append(asked["call"])
            elif asked["do"] == "write":  # an iterator that turned out to be a finished call again
                assert (
                    asked["call"] in self.done or not self.stored
                )  # or a call of which nothing was stored is given up
            else:
                assert asked["do"] == "discard", asked
        elif manifest.unfinished and was is None:
            assert asked["do"] == "write"
            first = fingerprint(batch_of(asked["call"][0]), named=self.ids)
            assert manifest.runs[-1].first == first
            self.pending = asked["call"]
        elif manifest.unfinished and asked["do"] == "write" and not self.stored:  # in the place of one with nothing
            assert manifest.runs[-1].first == fingerprint(batch_of(asked["call"][0]), named=self.ids)
            self.pending = asked["call"]
        if self.pending is not was:
            self.since = [m.asked["call"] for m in self.members if m.asked is not None and m.asked["do"] == "write"]
        for other in self.members:
            other.seen.append(list(self.done))
        self.check()

    def check(self) -> None:
        """A reader that comes now sees what is finished, whole."""
        if not self.done:
            with pytest.raises((FileNotFoundError, ValueError), match=r"no index|not finished"):
                dropinf.Index.open(self.folder)
            return
        index = dropinf.Index.open(self.folder)
        assert index[:].flat.tolist() == self.rows(self.done)
        every = ids(self.done, self.ordered)
        assert index.ids() == (every if self.ids else [str(i) for i in range(len(index))])
        assert [line for line in index.verify() if "not finished" not in line] == []
        assert index.manifest.unfinished == (self.pending is not None)
        try:
            assert index.fisher().count == len(index)
        except (FileNotFoundError, ValueError) as error:
            assert re.search(r"no Fisher matrix in it|stale, of \d+ samples where the index has", str(error)), error  # noqa: PT017

    def ended(self, member: Member, message: dict[str, Any]) -> None:
        """What came of it is what must come, where no other wrote meanwhile; and else a clean error at most."""
        asked, member.asked = member.asked, None
        assert asked is not None
        error = message.get("error")
        self.outcomes[f"{asked['do']}: {'done' if error is None else message['kind']}"] += 1
        if error is not None and message["kind"] != "LossError":
            assert message["kind"] in ("ValueError", "FileNotFoundError"), message
            assert CLEAN.search(error), message
        if member.alone:
            self.expected(asked, member, error)
        if error is None and asked["do"] == "open":
            assert message["found"] in [self.rows(done) for done in member.seen]
            member.held = message["found"]
        elif error is None and asked["do"] == "read":
            found = [self.rows(done) for done in member.seen] if member.held is None else [member.held]
            assert message["found"] in found

    def expected(self, asked: dict[str, Any], member: Member, error: str | None) -> None:
        done, pending, exists, rivals, was = member.before
        do, call = asked["do"], asked.get("call")
        if do == "write" and asked["fails_at"] is None:
            if pending is not None and rivals:
                pass  # whose batches it has is not known here
            elif not exists or (pending == call and call not in done):
                assert (error, self.done, self.pending) == (None, [*done, call], None)
            elif call in done:
                if asked["append"] and (not asked["once"] or pending is None):
                    assert (error, self.done) == (None, done)
            elif pending is not None and pending[0] == call[0]:
                pass  # it goes on where nothing else was stored
            elif pending is not None or not asked["append"]:
                assert error is not None
                assert self.done == done
            else:
                assert (error, self.done) == (None, [*done, call])
        elif do in ("discard", "compact", "save_fisher", "open"):
            fine = bool(done) and (do != "compact" or was is None)
            assert (error is None) == fine, error
            assert self.pending == (None if do == "discard" and fine else was)


def writes(asked: dict[str, Any]) -> bool:
    return asked["do"] in ("write", "discard", "save_fisher", "compact")


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 50), pytest.param(50, 150, marks=pytest.mark.more), pytest.param(200, 2000, marks=pytest.mark.long)],
)
def test_three_processes_on_one_folder(first, count, forks, place):
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="dropinf-") as home, socket.socket(socket.AF_UNIX) as server:
        address = f"{home}/socket"
        server.bind(address)
        server.listen()
        members = [Member(forks, server, address) for _ in range(ACTORS)]
        for seed in range(first, first + count):
            folder = place / str(seed)
            sequence = Sequence(seed, folder, members, lambda: Member(forks, server, address))
            try:
                sequence.run()
            except BaseException as error:
                logs = "".join(member.process.text for member in members)
                raise AssertionError(f"sequence {seed}: {[m.asked for m in members]} {logs}") from error
            outcomes += sequence.outcomes
        for member in members:
            member.kill()
    print(dict(outcomes))
    for what in ("write", "discard", "save_fisher", "compact", "open", "read"):
        assert outcomes[f"{what}: done"] > count // 20, outcomes
    assert outcomes["write: ValueError"] > count // 20
    assert outcomes["write: LossError"] > count // 20
    assert outcomes["killed"] > count // 20
