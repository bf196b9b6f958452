"""`gpusq-compile`: the command line over `compile_model`.

Human text goes to stderr, data to stdout. Exit codes: 0 done, 1 a check or gate failed, 2 bad
input, 3 internal error, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from gpusq_compile import __version__
from gpusq_compile.allocator import keep_freed_memory
from gpusq_compile.collector import collect_rarely
from gpusq_compile.console import Console, write_out
from gpusq_compile.errors import (
    EXIT_INTERNAL,
    CheckFailed,
    GpusqError,
    InputError,
    did_you_mean,
)
from gpusq_compile.gates import Gates
from gpusq_compile.language.loader import load_rules
from gpusq_compile.output import REPORT
from gpusq_compile.questions import (
    Questions,
    answers_console,
    explain_option,
    gate_options,
    question_options,
    show_answers,
)
from gpusq_compile.report.annotations import error_annotations, report_annotations
from gpusq_compile.report.remarks_view import parse_choice
from gpusq_compile.report.terminal import show_plan, show_report
from gpusq_compile.sources.paths import typed_path

EXIT_SIGNAL = 128
"""Exit code of a command that a signal ended, less the signal's number."""


class Ended(KeyboardInterrupt):
    """A signal asked the process to end. A kind of Ctrl-C, so that everything cleans up alike."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


EPILOG = (
    "Exit codes: 0 done; 1 compiled, but a rule, a gate or the verification failed; 2 bad input; "
    "3 a fault of the compiler."
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--rules", help="Shipped rules (int8, int4, ...) or a YAML file.")
@click.option(
    "-o", "--output", type=click.Path(), help="Output folder, made if missing [default: out/MODEL]."
)
@click.option("--data", help="Data of a library model: imagefolder:DIR or coco:DIR.")
@click.option("--weights", help="Weights of a library model: pretrained, or a safetensors file.")
@click.option("--scope", help="Compile only this submodule, e.g. backbone.")
@click.option("--dry-run", is_flag=True, help="Trace and match the rules; write nothing.")
@click.option("--no-finetune", is_flag=True, help="One-shot: skip both fine-tune phases.")
@click.option("--steps", type=int, help="Optimizer steps of each phase, in place of the rules'.")
@click.option("--epochs", type=float, help="Epochs of each phase, in place of the rules'.")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="none, auto, tensorrt or tensorrt-rtx. auto builds with what is installed.",
)
@click.option("--target", help="GPU generations, e.g. sm80,sm89, in place of the rules'.")
@gate_options
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Equal seeds give equal CPU results."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where the fine-tune runs: cpu or cuda."
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of an unfinished run.")
@click.option(
    "--checkpoint-every", type=int, help="Steps between checkpoints [default: by time, 5 min]."
)
@click.option(
    "--emit", multiple=True, metavar="triton", help="Also write a Triton model repository."
)
@question_options
@click.option(
    "--dump-after",
    multiple=True,
    metavar="PASS",
    help="Write the graph's text after a pass, or after all; changed: what each pass changed.",
)
@explain_option
@click.option("--list-passes", is_flag=True, help="Say what each pass requires and ensures.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github"]),
    default="text",
    show_default=True,
    help="json also prints the report on stdout, github errors and remarks as annotations.",
)
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Every remark of every pass.")
@click.version_option(__version__, prog_name="gpusq-compile")
def command(**options: Any) -> None:
    """Compile MODEL to a 2:4-sparse, quantized, verified ONNX model and a TensorRT engine.

    MODEL is a Python file that defines model() and example_inputs(), or timm:NAME,
    torchvision:NAME, or hf: with a transformers folder, a config.json or a hub name. Running a
    model file runs its code.
    """
    if options["list_passes"]:
        list_passes()
        return
    if not options["model"] or not options["rules"]:
        missing = "MODEL" if not options["model"] else "--rules"
        raise click.UsageError(f"Missing {missing}. Example: gpusq-compile model.py --rules int8")
    verbosity = -1 if options["quiet"] else int(options["verbose"])
    # Of the processes that accelerate or torchrun start, the first speaks for all.
    stdout: TextIO = sys.stdout
    if not is_first_process():
        verbosity, stdout = -1, io.StringIO()
    # What the user's own code prints must not mix with the report on stdout.
    with contextlib.redirect_stdout(sys.stderr), annotated(options["form"], stdout):
        check_values(options)
        compile_command(options, Console(verbosity), stdout)


@contextlib.contextmanager
def annotated(form: str, stdout: TextIO) -> Iterator[None]:
    """Print an error as an annotation too, where annotations were asked for."""
    try:
        yield
    except GpusqError as error:
        if form == "github":
            write_out("\n".join(error_annotations(error)) + "\n", stdout)
        raise


def is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def check_values(options: dict[str, Any]) -> None:
    """Refuse what the command line alone can get wrong; `compile_model` checks the rest."""
    for name in ("output", "data", "weights", "scope", "target"):
        if options[name] is not None and not options[name].strip(" ,"):
            raise InputError("empty-option", f"--{name} was given an empty value")
    if options["quiet"] and options["verbose"]:
        raise InputError("options-conflict", "--quiet and --verbose exclude each other")


def compile_command(options: dict[str, Any], console: Console, stdout: TextIO) -> None:
    """Run one compilation and show its report, that of a failed check too."""
    rules = load_rules(options["rules"])
    keep_freed_memory()
    if options["weights"] == "pretrained" and ":" in options["model"]:
        console.info(f"loading {options['model']} with its pretrained weights")
    # Bad rules should not wait for torch to be imported.
    with console.busy("importing torch"):
        from gpusq_compile.api import compile_model
        from gpusq_compile.passes import PIPELINE
    collect_rarely()

    remarks = options["remarks"]
    questions = Questions(
        options["why"],
        remarks and parse_choice(remarks, [step.name for step in PIPELINE]),
        options["timing"],
    )
    gates = Gates(options["max_drop"], options["strict"], options["require_sparse"])
    output = Path(options["output"] or default_output(options["model"]))
    targets = [name.strip() for name in (options["target"] or "").split(",") if name.strip()]
    try:
        result = compile_model(
            options["model"],
            rules=rules,
            output=output,
            data=options["data"],
            weights=options["weights"],
            scope=options["scope"],
            finetune=not options["no_finetune"],
            steps=options["steps"],
            epochs=options["epochs"],
            engine=options["engine"],
            targets=targets or None,
            device=options["device"],
            seed=options["seed"],
            dump_after=options["dump_after"],
            emit=options["emit"],
            gates=gates,
            dry_run=options["dry_run"],
            resume=options["resume"],
            checkpoint_every=options["checkpoint_every"],
            console=console,
            command=sys.argv,
        )
    except CheckFailed:
        if not options["dry_run"] and is_first_process():
            report = json.loads((output / REPORT).read_text())
            show_report(report, console.rich, [str(output / REPORT)])
            show_answers(report, questions, answers_console())
            print_report(report, options["form"], stdout)
        raise
    if not is_first_process():
        return
    if not options["dry_run"]:
        show_report(result.report, console.rich, [str(path) for path in result.files])
    elif not questions:
        show_plan(result.report, console.rich)
    print_report(result.report, options["form"], stdout)
    try:
        show_answers(result.report, questions, answers_console())
    except InputError as error:
        if options["dry_run"]:
            raise
        # The compile itself is done, and the question can be asked again.
        console.warn(f"{error}\n  ask again: gpusq-report {output} --why LAYER")


def print_report(report: dict[str, Any], form: str, stdout: TextIO) -> None:
    if form == "json":
        write_out(json.dumps(report, indent=2) + "\n", stdout)
    elif form == "github":
        write_out("\n".join(report_annotations(report)) + "\n", stdout)


def default_output(model: str) -> Path:
    library, _, name = model.partition(":")
    if model.endswith(".py"):
        stem = Path(model).stem
    elif library == "hf" and os.path.exists(path := typed_path(name)):
        path = path.resolve()
        stem = f"hf-{path.parent.name if path.name == 'config.json' else path.stem}"
    else:
        stem = model.replace(":", "-").replace("/", "-")
    return Path("out") / stem


def list_passes() -> None:
    from gpusq_compile.passes import PIPELINE

    for step in PIPELINE:
        click.echo(f"{step.name}: {step.summary}")
        click.echo(f"    requires: {', '.join(step.requires) or 'nothing'}")
        click.echo(f"    ensures:  {', '.join(step.ensures) or 'nothing'}")
        kept = "measured and reported" if step.preserves is None else f"at most {step.preserves:g}"
        click.echo(f"    change:   {kept}")


def main() -> None:
    """Console entry point: errors become a message and an exit code, never a traceback."""
    # PyTorch 2.11 warns of itself when a graph is copied.
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    try:
        with ended_by_signals():
            command(prog_name="gpusq-compile", standalone_mode=False)
    except click.exceptions.NoSuchOption as error:
        valid = [name for parameter in command.params for name in parameter.opts]
        hint = did_you_mean(error.option_name, [name for name in valid if name.startswith("--")])
        fail(InputError("unknown-option", f"no option {error.option_name}", hint=hint))
    except click.UsageError as error:
        fail(InputError("usage", error.format_message(), hint="gpusq-compile --help"))
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except GpusqError as error:
        fail(error)
    except (KeyboardInterrupt, click.Abort) as interrupt:
        # click makes an Abort of every KeyboardInterrupt, its first versions without a cause.
        cause = interrupt.__cause__ or interrupt.__context__ or interrupt
        click.echo(
            "interrupted: nothing half-written is left; run the same command again to start over, "
            "or with --resume to go on from its last checkpoint",
            err=True,
        )
        sys.exit(EXIT_SIGNAL + (cause.number if isinstance(cause, Ended) else signal.SIGINT))
    except Exception as error:
        crashed(error)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the run as Ctrl-C does: with nothing left behind."""

    def end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup ignores SIGHUP, and that must stay so.
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def fail(error: GpusqError) -> None:
    click.echo(str(error), err=True)
    sys.exit(error.exit_code)


def crashed(error: Exception) -> None:
    """Say that this is a fault of the compiler, and keep the traceback in a file."""
    click.echo(f"error[internal]: {type(error).__name__}: {error}", err=True)
    with contextlib.suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="gpusq-crash-"))
        (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)))
        click.echo(f"  hint: please report it with {folder / 'traceback.txt'}", err=True)
    sys.exit(EXIT_INTERNAL)
