"""`gpusq-compile`: the command line over `compile_model`.

Human text goes to stderr, data to stdout. Exit codes: 0 done, 1 a check or gate failed, 2 bad
input, 3 internal error, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from gpusq_compile import __version__
from gpusq_compile.console import Console
from gpusq_compile.errors import EXIT_INTERNAL, GpusqError, InputError, did_you_mean
from gpusq_compile.language.loader import load_rules

EXIT_INTERRUPTED = 130


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--rules", help="Shipped rules (int8, sparse-fp16) or a YAML file.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output folder [default: out/MODEL]."
)
@click.option("--data", help="Data of a library model: imagefolder:DIR.")
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
@click.option("--max-drop", type=float, help="Fail if top-1 falls by more points than this.")
@click.option("--strict", is_flag=True, help="Fail if anything asked for was not done.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--dump-after", multiple=True, help="Pass name, changed or all: graph texts.")
@click.option("--list-passes", is_flag=True, help="Say what each pass requires and ensures.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Every remark of every pass.")
@click.version_option(__version__, prog_name="gpusq-compile")
def command(**options: Any) -> None:
    """Compile MODEL to a 2:4-sparse, quantized, verified ONNX model and a TensorRT engine.

    MODEL is a Python file that defines model() and example_inputs(), or timm:NAME, or
    torchvision:NAME. Running a model file runs its code.
    """
    if options["list_passes"]:
        list_passes()
        return
    if not options["model"] or not options["rules"]:
        missing = "MODEL" if not options["model"] else "--rules"
        raise click.UsageError(f"Missing {missing}. Example: gpusq-compile model.py --rules int8")
    verbosity = -1 if options["quiet"] else int(options["verbose"])
    compile_command(options, Console(verbosity))


def compile_command(options: dict[str, Any], console: Console) -> None:
    """Run one compilation and show its report."""
    rules = load_rules(options["rules"])
    # Bad rules should not wait for torch to be imported.
    from gpusq_compile.api import Gates, compile_model
    from gpusq_compile.report.terminal import show_report

    output = options["output"] or default_output(options["model"])
    targets = options["target"].split(",") if options["target"] else None
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
        targets=targets,
        device=options["device"],
        seed=options["seed"],
        dump_after=options["dump_after"],
        gates=Gates(options["max_drop"], options["strict"]),
        dry_run=options["dry_run"],
        console=console,
        command=sys.argv,
    )
    show_report(result.report, console.rich, [str(path) for path in result.files])
    if options["form"] == "json":
        click.echo(json.dumps(result.report, indent=2))


def default_output(model: str) -> Path:
    stem = Path(model).stem if model.endswith(".py") else model.replace(":", "-").replace("/", "-")
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
    try:
        command(standalone_mode=False)
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
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\ninterrupted: nothing was published; run the same command again to start over",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        click.echo(f"error[internal]: {type(error).__name__}: {error}", err=True)
        sys.exit(EXIT_INTERNAL)


def fail(error: GpusqError) -> None:
    click.echo(str(error), err=True)
    sys.exit(error.exit_code)
