"""How much memory files take, of a process of their own: `memory.py FOLDER`, whose in.parquet is scored, and whose
other files are read chunk by chunk. Prints JSON: the bytes that Arrow held at most, and by file how many more kB of
memory the process held than after the first chunk."""

import json
import sys
from pathlib import Path

import pyarrow

from fastood.arrow import Scorer, score_file
from fastood.files import open_rows


def anonymous():
    """kB of the process's own: the pages of a mapped file are not."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


folder = Path(sys.argv[1])
score_file(folder / "in.parquet", folder / "out" / "scores.parquet", Scorer(), chunk_rows=250)
answer = {"arrow": pyarrow.default_memory_pool().max_memory()}
for path in sorted(folder.glob("x.*")):
    with open_rows(path) as rows:
        chunks = rows.chunks(2000)
        next(chunks)  # what the library itself needs
        before, most, count = anonymous(), 0, 2000
        for logits, _ in chunks:
            count += len(logits)
            most = max(most, anonymous() - before)
    answer[path.name] = {"rows": count, "more": most}
print(json.dumps(answer))
