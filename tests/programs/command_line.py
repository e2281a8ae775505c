"""`fastood` in processes of its own, which are forked off once torch is loaded: what they load and how they end.

Run in an empty folder. Prints JSON: what `--help` says and what it loads; and by the name of a signal, with what a
`fastood score` that gets it in the midst of writing exits, and what it leaves in the folder.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from multiprocessing import Pipe

import numpy as np

from fastood.__main__ import main


def forked(action):
    if (child := os.fork()) == 0:
        try:
            action()
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(99)
    return child


def run(*words):
    sys.argv = ["fastood", *words]
    main()


def say_help():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run("--help")
    there.send({"help": out.getvalue(), "loads": sorted(sys.modules)})


def score(number):
    signal.signal(number, signal.SIG_DFL)  # which may be ignored here, under nohup for one
    run("score", "big.npy", "out.csv", "--chunk-rows", "1")


here, there = Pipe()
os.waitpid(forked(say_help), 0)
answer = here.recv()

np.save("big.npy", np.zeros((500_000, 2), np.float32))
before = sorted(os.listdir())
for name in ("SIGTERM", "SIGHUP"):
    number = getattr(signal, name)
    child = forked(lambda number=number: score(number))
    deadline = time.monotonic() + 60
    while sorted(os.listdir()) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    began = sorted(os.listdir()) != before
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    left = sorted(set(os.listdir()) - set(before))
    answer[name] = {"began": began, "exit": os.waitstatus_to_exitcode(status), "left": left}
print(json.dumps(answer))
