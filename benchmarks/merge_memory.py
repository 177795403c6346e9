"""Peak memory of a merge against the number of checkpoints and the size of the model.

    python benchmarks/merge_memory.py --sources 2 10 50 --mebibytes 512 1024 4096

Each run is a process of its own; its peak is the high-water mark of its resident memory. All weights are zero, holes in
files, so that fifty checkpoints take no room; every byte is read and summed all the same. Lines go to
benchmarks/results/merge.jsonl: case `merge`, metric `peak_rss`, beside those of `whimbrel bench merge`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from whimbrel.bench.results import RESULTS, record

MERGE = """
import json, sys
from whimbrel.merge import merge_checkpoints
out, *sources = sys.argv[1:]
merge_checkpoints(sources, out)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(peak * 1024))
"""
TENSOR_MEBIBYTES = 64


def checkpoint(folder: Path, mebibytes: int) -> None:
    """A checkpoint of bfloat16 matrices of 64 MiB, all zero: a hole in the file, which takes no room on the disk."""
    folder.mkdir(parents=True)
    size = TENSOR_MEBIBYTES * 2**20
    header = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [size // 2048, 1024],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(mebibytes // TENSOR_MEBIBYTES)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + len(header) * size)
    (folder / "config.json").write_text("{}")


def peak(home: Path, sources: int, mebibytes: int) -> int:
    """Bytes of resident memory that a merge of `sources` checkpoints takes at most."""
    folders = [home / f"step-{i:06d}" for i in range(sources)]
    for folder in folders:
        if not folder.exists():
            checkpoint(folder, mebibytes)
    command = [sys.executable, "-c", MERGE, str(home / "out"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(home / "out")
    return int(json.loads(done.stdout.splitlines()[-1]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[512, 1024, 4096])
    parser.add_argument("--most", type=int, default=64, help="GiB of input of a run; larger ones are left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for mebibytes in args.mebibytes:
        with tempfile.TemporaryDirectory() as home:
            for sources in args.sources:
                if sources * mebibytes > args.most * 1024:
                    print(f"left out: {sources} checkpoints of {mebibytes} MiB are more than {args.most} GiB")
                    continue
                value = peak(Path(home), sources, mebibytes)
                params = {"sources": sources, "MiB": mebibytes, "dtype": "bfloat16", "study": "memory"}
                record("merge", "whimbrel", params, "peak_rss", value, "bytes", out=args.out)
                print(f"{sources} checkpoints of {mebibytes} MiB: {value / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
