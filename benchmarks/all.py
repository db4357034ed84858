"""Run the benchmarks whose tables docs/benchmarks.md has, and put what they print there.

    python benchmarks/all.py [NAME ...]

Other benchmarks, which take long or draw random numbers, are run by hand.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
NAMES = ["structure", "accuracy", "latency", "fuse_time"]


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        print(f"{name}:", flush=True)
        lines = []
        with subprocess.Popen([sys.executable, FOLDER / f"{name}.py"], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or []:
                lines.append(line.rstrip())
                print(lines[-1], flush=True)
        if process.returncode:
            sys.exit(process.returncode)
        block = "\n".join(["```text", *lines, "```"])
        text, found = re.subn(
            rf"(`python benchmarks/{name}\.py`\n\n)```text\n.*?\n```",
            lambda match, block=block: match[1] + block,
            PAGE.read_text(),
            flags=re.DOTALL,
        )
        if found != 1:
            sys.exit(f"docs/benchmarks.md has {found} tables of benchmarks/{name}.py, not one")
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
