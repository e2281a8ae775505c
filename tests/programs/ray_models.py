"""Models for `fastood score --engine ray`, which note where they are or kill their worker; copied beside the files."""

import os
import signal
import time
from pathlib import Path

HERE = Path(__file__).parent


def logits_as_they_are(before):
    def model():
        def run(x):
            before(x)
            return x, None

        return run

    return model


def kill_once(x):
    if 3 in x[:, 0] and not (HERE / "killed").exists():
        (HERE / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def kill_always(x):
    if 3 in x[:, 0]:
        (HERE / "killed").open("a").write("x")
        os.kill(os.getpid(), signal.SIGKILL)


def note_where(x):
    time.sleep(0.2)
    with (HERE / "where").open("a") as file:
        file.write(os.readlink("/proc/self/ns/net") + chr(10))


where = logits_as_they_are(note_where)
killed_once = logits_as_they_are(kill_once)
killed_always = logits_as_they_are(kill_always)
slow = logits_as_they_are(lambda x: time.sleep(0.1))
