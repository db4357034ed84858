"""Which layer of verification sees which fault.

    python benchmarks/faults.py [WORD ...]

Plants each fault of `tests/faults.py` (those whose name or place holds a WORD), fuses the smallest models on which it
shows, and asks every layer alone that `docs/faults.md` has, and `reparamc verify` about the two ONNX models. The
error is the largest of an output with verification off, relative to its largest value; it is infinite where the result
does not run. "default" is what a fusion at the default level comes to. Exit code 1 if a fault gets through or changes
nothing.
"""

import sys
import warnings
from collections import Counter
from pathlib import Path
from time import process_time

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from faults import ALL  # noqa: E402
from onnx import ModelProto  # noqa: E402
from planting import ONNX_LAYERS, judge  # noqa: E402

from reparamc.errors import InputError  # noqa: E402
from reparamc.verify.search import verify_onnx  # noqa: E402


def verified(model: ModelProto, wrong: ModelProto) -> bool:
    """Whether `reparamc verify` sees the difference, on its fixed inputs alone."""
    try:
        return not verify_onnx(model, wrong, examples=0).equal
    except InputError:
        return True


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    warnings.simplefilter("ignore")
    ONNX_LAYERS["reparamc verify"] = verified  # a command of its own: no part of a fusion
    start, failed = process_time(), False
    seen: Counter[tuple[str, str]] = Counter()
    count: Counter[str] = Counter()
    print(f"{'fault':<58} {'where':<44} {'way':<5} {'error':>7}  {'default':<8} seen by")
    for fault in ALL:
        if len(sys.argv) > 1 and not any(word in f"{fault.name} {fault.where}" for word in sys.argv[1:]):
            continue
        for way, verdict in judge(fault).verdicts.items():
            wrong = verdict.error < fault.least or verdict.outcome == "escaped" or not verdict.seen_by
            failed |= wrong
            count[way] += 1
            seen.update((way, layer) for layer in verdict.seen_by)
            print(
                f"{fault.name:<58} {fault.where:<44} {way:<5} {verdict.error:7.1e}  {verdict.outcome:<8} "
                f"{', '.join(verdict.seen_by)}{'   <-- not caught' if wrong else ''}"
            )
    for way, n in count.items():
        layers = ", ".join(f"{layer} {times}" for (w, layer), times in seen.items() if w == way)
        print(f"{way}: {n} faults; seen by {layers}")
    print(f"{process_time() - start:.0f} CPU seconds")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
