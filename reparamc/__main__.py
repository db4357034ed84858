"""The command line, also as ``python -m reparamc``. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from reparamc import __version__
from reparamc.errors import InputError, ReparamcError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reparamc.report.data import Report

DONE, DIFFERS, BAD_INPUT, UNCERTAIN = 0, 1, 2, 3
"""Exit codes: done; verification failed, nothing written; bad usage or bad input; verify has doubts."""

EPILOGUE = (
    "exit codes: 0 written (also when there was nothing to fuse); 1 verification failed; 2 bad usage or bad input"
)
AUDIT_EPILOGUE = (
    "exit codes: 0 all that was checked holds; 1 the graph was changed since, was made from another original, "
    "or differs from it; 2 no record, bad usage or bad input"
)
VERIFY_EPILOGUE = (
    "exit codes: 0 no difference found; 1 the models differ; 2 bad usage or bad input, nothing compared; "
    "3 not certain: no input shows a difference, but the proof or the size of the errors speaks for one"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
    if argv is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files go
        gc.set_threshold(500_000)  # most objects stay until the process ends, from imports on
    try:
        arguments = parser().parse_args(argv)
        return arguments.run(arguments)
    except VerificationError as error:
        print(f"reparamc: {error}", file=sys.stderr)
        return DIFFERS
    except ReparamcError as error:
        print(f"reparamc: {error}", file=sys.stderr)
        return BAD_INPUT
    except MemoryError as error:
        why = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        print(f"reparamc: the memory does not suffice{why}; nothing was written", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("reparamc: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        if argv is None:
            gc.freeze()  # the end of the process need not look through them either
        _give_up_what_cannot_be_written()


def _show(page: str, but: str = "") -> None:
    """Print ``page``; ``but`` goes with the message if that fails.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        print(page, flush=True)
    except OSError as error:
        raise InputError(f"standard output cannot be written: {error.strerror or error}{but}") from error


def _give_up_what_cannot_be_written() -> None:
    """Have nothing left for the end of the process to write, which would fail with a message of its own."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line, with the exit code of bad input."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(BAD_INPUT)


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="reparamc",
        description="Collapse every linear structure of a network into the operators it is equal to, and prove it.",
        epilog=EPILOGUE,
    )
    top.add_argument("--version", action="version", version=f"reparamc {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")

    fuse = commands.add_parser("fuse", help="fuse an ONNX model", description="Fuse an ONNX model.", epilog=EPILOGUE)
    _add_choices(fuse)
    fuse.add_argument("positional", type=Path, nargs="?", metavar="OUT", help="the file to write, in place of -o")
    fuse.add_argument("-o", "--output", type=Path, metavar="OUT", help="the file to write; - for stdout")
    fuse.add_argument(
        "--verify",
        choices=("off", "region", "full"),
        default="full",
        help="region: every replacement in float64, and the proof; full: also both models in ONNX Runtime (default)",
    )
    fuse.add_argument(
        "--only-if-faster",
        action="store_true",
        help="time both models in ONNX Runtime, and write the original unless the fused one is faster beyond noise",
    )
    fuse.add_argument("--report", type=Path, metavar="FILE.json", help="write everything that was done and declined")
    fuse.add_argument("--in-place", action="store_true", help="write the result to the file that is read")
    fuse.add_argument("--no-record", action="store_true", help="leave out the record of what was done from the file")
    fuse.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    fuse.set_defaults(run=_fuse)

    explain = commands.add_parser(
        "explain",
        help="say what fusing an ONNX model would do, and why the rest stays",
        description="Say what fusing an ONNX model would do, and why every other linear operator stays. "
        "Every replacement is checked in float64; nothing is written.",
        epilog=EPILOGUE.replace("written (also when there was nothing to fuse)", "explained"),
    )
    _add_choices(explain)
    explain.add_argument("--json", action="store_true", help="print JSON, with all places")
    explain.add_argument("--all", action="store_true", help="list all places, not the first few of each kind")
    explain.set_defaults(run=_explain)

    _add_verify(commands.add_parser("verify", help="compare two ONNX models", epilog=VERIFY_EPILOGUE))

    audit = commands.add_parser(
        "audit",
        help="print what a fused ONNX file says of itself",
        description="Print the record in a fused ONNX file: what it was made from, by which rewrites, and how well "
        "they agreed. With --against, check that it was made from that file, and compare both as verify does.",
        epilog=AUDIT_EPILOGUE,
    )
    audit.add_argument("model", type=Path, metavar="FUSED", help="the ONNX file to read")
    audit.add_argument("--against", type=Path, metavar="ORIGINAL", help="the ONNX file that it should be made from")
    audit.add_argument("--json", action="store_true", help="print JSON")
    audit.add_argument("--all", action="store_true", help="list all regions, not the first few")
    audit.set_defaults(run=_audit)

    refresh = commands.add_parser(
        "refresh",
        help="put new weights into a fused ONNX file",
        description="Put the weights of a checkpoint into an ONNX file that reparamc fused: the same graph, with what "
        "becomes of these weights. The file tells the structure of its original, which is fused again and verified.",
        epilog=EPILOGUE.replace(" (also when there was nothing to fuse)", ""),
    )
    refresh.add_argument("model", type=Path, metavar="FUSED", help="the ONNX file that reparamc fused")
    refresh.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="the new weights: .pth, .pt, .safetensors, .npz, or the original as .onnx",
    )
    refresh.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the file to write")
    refresh.add_argument("--verify", choices=("off", "region", "full"), default="full", help="as for fuse")
    refresh.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    refresh.set_defaults(run=_refresh)

    passes = commands.add_parser("passes", help="list the passes", description="List the passes.")
    passes.set_defaults(run=_passes)
    return top


def _add_choices(command: argparse.ArgumentParser) -> None:
    """What to read, and by which rules to rewrite it."""
    command.add_argument("model", type=Path, metavar="MODEL", help="the ONNX file to read; - for stdin")
    command.add_argument("--passes", type=_names, metavar="A,B", help="apply these passes only")
    command.add_argument("--skip", type=_names, default=[], metavar="A,B", help="leave these passes out")
    command.add_argument(
        "--objective",
        choices=("latency", "macs", "params"),
        default="latency",
        help="what to minimize: latency (default), multiply-adds, or parameters",
    )
    command.add_argument(
        "--target",
        choices=("onnxruntime", "openvino"),
        help="the runtime whose latency is meant (default: onnxruntime)",
    )


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.description = (
        "Compare an ONNX model with a rewritten one, whoever rewrote it: inputs and outputs first, then both models in "
        "ONNX Runtime on many inputs. The smallest input for which they differ is saved."
    )
    verify.add_argument("original", type=Path, metavar="ORIGINAL", help="the ONNX file to trust; - for stdin")
    verify.add_argument("fused", type=Path, metavar="FUSED", help="the ONNX file to check; - for stdin")
    verify.add_argument(
        "--inputs",
        type=Path,
        metavar="PATH",
        help="compare on these alone: a .npz file; a folder of .npz, .npy or .pb",
    )
    verify.add_argument("--examples", type=_count, default=100, metavar="N", help="random inputs to try (default 100)")
    verify.add_argument(
        "--seconds",
        type=_positive,
        metavar="S",
        help="how long to try (default 3, or 2.5 times what loading and running both models once takes)",
    )
    verify.add_argument("--seed", type=_count, default=0, metavar="N", help="of the random inputs (default 0)")
    verify.add_argument("--rtol", type=float, metavar="R", help="judge every entry by |a - b| <= A + R |a| instead")
    verify.add_argument("--atol", type=float, metavar="A", help="of what the original's response to rounding explains")
    verify.add_argument("--non-finite", action="store_true", help="also try inputs that hold NaN or an infinity")
    verify.add_argument("--optimize", action="store_true", help="let ONNX Runtime optimise both models")
    verify.add_argument(
        "--save", type=Path, metavar="FAIL.npz", help="where to save a failing input (default: FUSED with .failing.npz)"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.add_argument("-q", "--quiet", action="store_true", help="print the verdict only")
    verify.set_defaults(run=_verify)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _output(arguments: argparse.Namespace) -> Path:
    """Where to write."""
    given = [path for path in (arguments.output, arguments.positional) if path is not None]
    if arguments.in_place:
        if given or str(arguments.model) == "-":
            raise InputError("--in-place writes to the file that it reads: give that alone")
        return arguments.model
    if not given:
        raise InputError("no output: give -o OUT, or a second file name")
    if len(given) > 1:
        raise InputError("two outputs: give either -o OUT or a second file name")
    return given[0]


def _check_names(arguments: argparse.Namespace) -> None:
    """Refuse a misspelt pass before a large model is loaded."""
    from reparamc.algebra.rewrite import select
    from reparamc_passes import PASSES

    select(PASSES, arguments.passes, arguments.skip)


def _keep_freed_memory() -> None:
    """Have glibc keep it: arrays of weights come and go, and new pages take longer than what is computed in them."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def _fuse(arguments: argparse.Namespace) -> int:
    output = _output(arguments)
    _check_names(arguments)
    _keep_freed_memory()
    from reparamc.onnx import weights
    from reparamc.onnx.files import (
        STANDARD,
        check_keeps_weights,
        check_target,
        file_origin,
        from_standard_input,
        opened,
        save_outcome,
        write_atomically,
    )
    from reparamc.onnx.fuse import fuse_light
    from reparamc.onnx.record import stream_origin

    check_target(arguments.model, output, arguments.in_place)
    if arguments.report is not None:
        check_target(arguments.model, arguments.report)
        if arguments.report.resolve() == output.resolve():
            raise InputError("the report and the output are the same file")
    start = perf_counter()
    source: Path | bytes = arguments.model
    with weights.holding():
        if arguments.model == STANDARD:
            model, source = from_standard_input()
            origin = stream_origin(source)
        else:
            model, origin = opened(arguments.model), file_origin(arguments.model)
        check_keeps_weights(output, arguments.report)
        loaded = perf_counter()
        with _progress(arguments.quiet) as progress:
            result, report = fuse_light(
                model,
                passes=arguments.passes,
                skip=arguments.skip,
                verify=arguments.verify,
                objective=_objective(arguments),
                only_if_faster=arguments.only_if_faster,
                progress=progress,
                described=arguments.report is not None,
            )
        report.origin = origin
        before_save = perf_counter()
        save_outcome(result, report, source, output, record=not arguments.no_record)
    report.seconds = {
        "loading": loaded - start,
        **report.seconds,
        "saving": perf_counter() - before_save,
        "in all": perf_counter() - start,
    }
    if arguments.report is not None:
        write_atomically(arguments.report, [report.to_json().encode()])
    if not arguments.quiet:
        page = f"{report.table()}\nwritten    {'to standard output' if output == STANDARD else output}"
        if output == STANDARD:
            print(page, file=sys.stderr)
        else:
            _show(page, but=f"; {output} is written")
    _warn(report)
    return DONE


def _objective(arguments: argparse.Namespace) -> str:
    timed = arguments.target is not None and arguments.objective == "latency"
    return f"latency@{arguments.target}" if timed else arguments.objective


def _explain(arguments: argparse.Namespace) -> int:
    _check_names(arguments)
    from reparamc.onnx import weights
    from reparamc.onnx.files import STANDARD, from_standard_input, opened
    from reparamc.onnx.fuse import fuse_light
    from reparamc.report.explain import explain_json, explain_text

    with weights.holding(), _progress(arguments.json) as progress:
        model = from_standard_input()[0] if arguments.model == STANDARD else opened(arguments.model)
        _, report = fuse_light(
            model,
            passes=arguments.passes,
            skip=arguments.skip,
            verify="region",
            objective=_objective(arguments),
            progress=progress,
        )
    _show(explain_json(report) if arguments.json else explain_text(report, everything=arguments.all))
    _warn(report)
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from reparamc.onnx import weights
    from reparamc.onnx.files import STANDARD, from_standard_input
    from reparamc.verify.search import verify_onnx

    models = [arguments.original, arguments.fused]
    if models == [STANDARD, STANDARD]:
        raise InputError("only one of the two models can come from standard input")
    default = Path("fused.onnx") if arguments.fused == STANDARD else arguments.fused
    with weights.holding():
        models = [weights.fill(from_standard_input()[0]) if model == STANDARD else model for model in models]
    result = verify_onnx(
        *models,
        inputs=arguments.inputs,
        examples=arguments.examples,
        seconds=arguments.seconds,
        seed=arguments.seed,
        rtol=arguments.rtol,
        atol=arguments.atol,
        non_finite=arguments.non_finite,
        optimize=arguments.optimize,
        save=arguments.save or default.with_suffix(".failing.npz"),
    )
    _show(result.to_json() if arguments.json else result.verdict if arguments.quiet else result.table())
    return DIFFERS if result.failure else UNCERTAIN if result.doubt else DONE


def _audit(arguments: argparse.Namespace) -> int:
    from reparamc.verify.audit import audit

    result = audit(arguments.model, arguments.against)
    _show(result.to_json() if arguments.json else result.page(everything=arguments.all))
    return DONE if result.holds else DIFFERS


def _refresh(arguments: argparse.Namespace) -> int:
    from reparamc.onnx.files import check_target, load, save
    from reparamc.onnx.refresh import read_weights, refreshed

    checkpoint, output = arguments.checkpoint, arguments.output
    check_target(arguments.model, output, in_place=True)
    check_target(checkpoint, output)
    model = load(arguments.model, output)
    if checkpoint.suffix.lower() in (".npz", ".safetensors", ".onnx"):
        weights = read_weights(checkpoint, output)
    else:
        try:
            from reparamc.training.checkpoints import read_checkpoint
        except ImportError as error:
            raise InputError(
                f"{checkpoint} is read by torch, which is not installed; save it as .safetensors"
            ) from error
        weights = read_checkpoint(checkpoint)
    result, report = refreshed(model, weights, checkpoint, arguments.verify)
    save(result, output)
    if not arguments.quiet:
        _show(f"{report.table()}\nwritten    {output}", but=f"; {output} is written")
    _warn(report)
    return DONE


def _warn(report: Report) -> None:
    if report.warning is not None:
        print(f"reparamc: warning: {report.warning}", file=sys.stderr)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears once the work has taken a second."""
    from rich.console import Console
    from rich.progress import Progress

    start = perf_counter()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("fusing", total=None)

    def advance(done: int, of: int) -> None:
        if not bar.live.is_started and perf_counter() - start > 1:
            bar.start()
        if bar.live.is_started:
            bar.update(task, completed=done, total=of)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _progress(quiet: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, of: None) if quiet or not sys.stderr.isatty() else _bar()


def _passes(arguments: argparse.Namespace) -> int:
    from reparamc_passes import PASSES

    _show("\n".join(f"{p.name}\n    {p.equation}\n    exact when: {p.exact_when}" for p in PASSES))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
