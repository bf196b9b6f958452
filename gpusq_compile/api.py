"""`compile_model`: the whole compiler as one function. The command line calls nothing else."""

from __future__ import annotations

import copy
import errno
import math
import platform
import random
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import onnx
import torch
import torch.fx
from torch import nn

from gpusq_compile import __version__
from gpusq_compile.compilation import Compilation, EngineChoice, Options
from gpusq_compile.console import Console
from gpusq_compile.data import check_data
from gpusq_compile.driver import missed_remarks, run_passes
from gpusq_compile.engine import BatchRange, build_script
from gpusq_compile.engine.backends import choose_backend
from gpusq_compile.errors import CheckFailed, GpusqError, InputError, InternalError, did_you_mean
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.graph.text import graph_text
from gpusq_compile.language.loader import Rules, load_rules
from gpusq_compile.language.schema import Compute
from gpusq_compile.load_model import load_source
from gpusq_compile.model_source import DataFactory, ModelSource, check_source
from gpusq_compile.network import Network
from gpusq_compile.output import REPORT, REPRO, publish, staging, write_json
from gpusq_compile.passes import PIPELINE, mark
from gpusq_compile.passes.verify_onnx import MODEL_FILE
from gpusq_compile.plan import planned
from gpusq_compile.quantization.fake_quantize import broadcastable
from gpusq_compile.quantization.operators import DEQUANTIZE
from gpusq_compile.report.document import make_report

SCRIPT = "build_engine.sh"
LARGEST_SEED = 2**32 - 1
"""The largest that numpy takes."""


@dataclass(frozen=True)
class Gates:
    """What must hold for exit code 0 beside the verification.

    `max_drop` is the largest loss of top-1 from the dense model to the ONNX file, in percentage
    points; `strict` allows nothing that was asked for and not done.
    """

    max_drop: float | None = None
    strict: bool = False


@dataclass
class CompileResult:
    """A finished compilation.

    `graph` is the folded graph module: a drop-in for the compiled module whose weights are int8.
    `report` is the content of report.json. `output` is the folder, None if nothing was written.
    """

    graph: torch.fx.GraphModule
    report: dict[str, Any]
    onnx_model: onnx.ModelProto | None
    output: Path | None
    files: list[Path]
    parameter_shapes: dict[str, torch.Size]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Float32 weights under the user's own names and shapes, pruned and rounded as deployed."""
        scales = {
            str(node.args[0].target): str(node.args[1].target)
            for node in self.graph.graph.nodes
            if node.target is DEQUANTIZE and node.args[0].op == "get_attr"
        }
        state = {}
        for name, shape in self.parameter_shapes.items():
            try:
                value = tensor_attribute(self.graph, name).detach()
            except AttributeError:
                continue  # The graph does not read this parameter.
            if value.dtype == torch.int8:
                scale = tensor_attribute(self.graph, scales[name])
                value = value.float() * broadcastable(scale, value)
            state[name] = value.reshape(shape)
        return state


def compile_model(
    model: nn.Module | str | Path,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    rules: str | Path | Mapping[str, Any] | Rules,
    output: str | Path | None = None,
    train_data: Iterable[Any] | DataFactory | None = None,
    calibration_data: Iterable[Any] | DataFactory | None = None,
    eval_data: Iterable[Any] | DataFactory | None = None,
    logits: Callable[[Any], torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
    data: str | None = None,
    weights: str | None = None,
    scope: str | None = None,
    finetune: bool = True,
    steps: int | None = None,
    epochs: float | None = None,
    engine: str | None = None,
    targets: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    dump_after: Sequence[str] = (),
    gates: Gates | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> CompileResult:
    """Compile a vision transformer to a sparse, quantized, verified ONNX model and an engine.

    Args:
        model: a module in which the trained weights are loaded (it is copied, and left as it is),
            or what the command line takes: a model file, `timm:NAME`, `torchvision:NAME`.
        example_inputs: the tensors `forward` takes, batch first; required with a module.
        rules: a shipped name (`int8`), a YAML file, or the same document as a mapping.
        output: folder for the artifacts; nothing is written when None.
        train_data, calibration_data, eval_data: re-iterables of `(inputs, labels)` batches or of
            inputs alone, or functions that return them. Labels are class indices, int64 [batch].
        logits: maps the model's outputs to logits [batch, classes] where they are nothing else.
        dynamic_shapes: as `torch.export` takes them; default: dimension 0 of every input.
        data, weights: for library models, as the command line takes them.
        scope: dotted name of the submodule to compile; overrides the rules' `scope`.
        finetune: run both phases of the fine-tune. Without it the result is one-shot.
        steps, epochs: budget of each phase in place of the rules'.
        engine: `auto`, `none`, `tensorrt` or `tensorrt-rtx`; default `auto` with an output folder,
            else `none`.
        targets: GPU generations in place of the rules', e.g. `["sm89"]`.
        device: where calibration and fine-tune run, `cpu` or `cuda`.
        seed: seeds torch, numpy and random; equal seeds give equal results on CPU.
        dump_after: pass names, `changed` or `all`: graph texts go to `dumps/`.
        gates: what beside the verification must hold.
        dry_run: stop after the rules are matched; nothing is written.
        console: where progress goes; silent by default.
        command: the command line, for the manifest.

    Returns:
        The folded graph, the report and the written files.

    Raises:
        InputError: the model, the data, the rules or an option are wrong (exit code 2).
        CheckFailed: the model compiled, but the verification or a gate failed (exit code 1);
            report.json is written, model.onnx is not.
        InternalError: a promise of the compiler was broken (exit code 3).
    """
    console = console or Console(verbosity=-1)
    resolved = rules if isinstance(rules, Rules) else load_rules(rules)
    output = Path(output) if output is not None else None
    options = Options(
        finetune=finetune,
        steps=steps,
        epochs=epochs,
        engine=engine_choice(engine, output),
        targets=tuple(targets) if targets is not None else None,
        device=device,
        seed=seed,
        dump_after=tuple(dump_after),
        dry_run=dry_run,
    )
    gates = gates or Gates()
    check_options(options, gates)
    if not dry_run:
        # An engine that cannot be built should not be found out after hours of fine-tune.
        choose_backend(options.engine, options.targets or resolved.target.compute)
    seed_everything(seed)
    with staging(output) as stage:
        with console.busy("loading the model and its data"):
            source = (
                module_source(
                    model,
                    example_inputs,
                    train_data=train_data,
                    calibration_data=calibration_data,
                    eval_data=eval_data,
                    logits=logits,
                    dynamic_shapes=dynamic_shapes,
                )
                if isinstance(model, nn.Module)
                else load_source(str(model), data=data, weights=weights)
            )
            check_source(source)
            network = Network(source.module, scope or resolved.scope)
            check_data(
                source,
                finetune=finetune,
                scoped=network.scope is not None,
                labelled=gates.max_drop is not None,
            )
        compilation = Compilation(source, resolved, options, console, network, stage)
        passes = PIPELINE[: PIPELINE.index(mark.PASS) + 1] if dry_run else PIPELINE
        if console.verbosity >= 0:
            console.info(f"compiling {source.origin}")
        error: GpusqError | None = None
        try:
            with disk_full_named(output), exact_arithmetic():
                run_passes(compilation, passes, measure=not dry_run)
            check_gates(compilation, gates)
        except CheckFailed as failed:
            error = failed
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as crash:
            raise _internal(compilation, crash, output, command) from crash
        report = make_report(compilation, error, stage / MODEL_FILE)
        files: list[Path] = []
        if output is not None and not dry_run:
            with disk_full_named(output):
                files = _write(
                    compilation, report, stage, output, command, failed=error is not None
                )
    if error is not None:
        raise error
    assert compilation.graph is not None
    return CompileResult(
        compilation.graph,
        report,
        compilation.onnx_model,
        output if files else None,
        files,
        compilation.parameter_shapes,
    )


def _write(
    compilation: Compilation,
    report: dict[str, Any],
    stage: Path,
    output: Path,
    command: Sequence[str],
    *,
    failed: bool,
) -> list[Path]:
    """Write the report and publish the folder; of a failed run the report alone."""
    if failed:
        for name in (MODEL_FILE, SCRIPT):
            (stage / name).unlink(missing_ok=True)
        shutil.rmtree(stage / "engine", ignore_errors=True)
    else:
        write_script(compilation, stage / SCRIPT)
    write_json(stage / REPORT, report)
    about = {
        "tool": {"name": "gpusq-compile", "version": __version__},
        "versions": versions(),
        "command": list(command),
        "seed": compilation.options.seed,
        "rules": compilation.rules.as_dict(),
    }
    return publish(stage, output, about)


def write_script(compilation: Compilation, path: Path) -> None:
    """`build_engine.sh`, with the shapes of the ONNX file's inputs."""
    assert compilation.onnx_model is not None
    inputs = {
        value.name: [
            dimension.dim_value if dimension.HasField("dim_value") else None
            for dimension in value.type.tensor_type.shape.dim
        ]
        for value in compilation.onnx_model.graph.input
    }
    targets = compilation.options.targets or compilation.rules.target.compute
    plans = [plan for _, plan in planned(compilation.ir.graph)]
    text = build_script(
        targets,
        BatchRange(),
        inputs,
        onnx=MODEL_FILE,
        sparse=any(plan.applied.sparsity for plan in plans),
        half=compilation.rules.target.precision == "fp16",
    )
    path.write_text(text)
    path.chmod(0o755)


def module_source(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | None,
    *,
    train_data: Iterable[Any] | DataFactory | None,
    calibration_data: Iterable[Any] | DataFactory | None,
    eval_data: Iterable[Any] | DataFactory | None,
    logits: Callable[[Any], torch.Tensor] | None,
    dynamic_shapes: Any,
) -> ModelSource:
    """The source of a module given from Python."""
    if example_inputs is None:
        raise InputError(
            "example-inputs", "a module needs example_inputs: the tensors its forward() takes"
        )
    return ModelSource(
        origin=type(module).__name__,
        # The graph shares, prunes and trains the parameters it was traced from.
        module=copy.deepcopy(module),
        example_inputs=example_inputs,
        train_data=_factory(train_data, "train_data"),
        calibration_data=_factory(calibration_data, "calibration_data"),
        eval_data=_factory(eval_data, "eval_data"),
        logits=logits,
        dynamic_shapes=dynamic_shapes,
    )


def _factory(data: Iterable[Any] | DataFactory | None, name: str) -> DataFactory | None:
    if data is None:
        return None
    if callable(data):
        return data
    if iter(data) is data:
        raise InputError(
            "data-iterates-once",
            f"{name} is a {type(data).__name__}, which can be read only once",
            hint="give a list, a DataLoader, or a function that returns a new iterator",
        )
    return lambda: data


def engine_choice(engine: str | None, output: Path | None) -> EngineChoice:
    """The engine asked for; by default `auto` where there is a folder to put one in."""
    if engine is None:
        return "auto" if output is not None else "none"
    for choice in get_args(EngineChoice):
        if engine == choice:
            return cast(EngineChoice, choice)
    raise InputError(
        "unknown-engine",
        f"no engine '{engine}'",
        hint=did_you_mean(engine, get_args(EngineChoice)),
    )


def check_options(options: Options, gates: Gates) -> None:
    """Raise InputError for an option whose value cannot be, or that another one contradicts."""
    for target in options.targets or ():
        if target not in get_args(Compute):
            raise InputError(
                "unknown-target",
                f"no target '{target}'",
                hint=did_you_mean(target, get_args(Compute)),
            )
    if options.steps is not None and options.steps < 1:
        raise InputError("steps", f"{options.steps} steps: expected 1 or more")
    if options.epochs is not None and not 0 < options.epochs < math.inf:
        raise InputError(
            "epochs",
            f"{options.epochs:g} epochs: expected a number greater than 0, such as 0.5",
            hint="--no-finetune skips the fine-tune",
        )
    if options.steps is not None and options.epochs is not None:
        raise InputError("steps-and-epochs", "both steps and epochs were given: choose one budget")
    if not options.finetune and (options.steps is not None or options.epochs is not None):
        name = "epochs" if options.steps is None else "steps"
        raise InputError(
            "budget-without-finetune", f"{name} were given for the fine-tune that is switched off"
        )
    if not 0 <= options.seed <= LARGEST_SEED:
        raise InputError("seed", f"seed {options.seed}: expected 0 to {LARGEST_SEED}")
    if gates.max_drop is not None and not 0 <= gates.max_drop < math.inf:
        raise InputError(
            "max-drop",
            f"a largest drop of {gates.max_drop:g}: expected percentage points of 0 or more",
        )
    names = [step.name for step in PIPELINE]
    for name in options.dump_after:
        if name not in (*names, "changed", "all"):
            raise InputError(
                "unknown-pass",
                f"no pass '{name}' to dump after",
                hint=did_you_mean(name, [*names, "changed", "all"]),
            )
    try:
        kind = torch.device(options.device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise InputError(
            "unknown-device",
            f"no device '{options.device}'",
            hint=did_you_mean(options.device, ["cpu", "cuda"]),
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "no-cuda",
            f"device '{options.device}' was asked for, but torch sees no CUDA GPU",
            hint="leave --device out to run on the CPU; check the driver with nvidia-smi",
        )
    index = torch.device(options.device).index or 0
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise InputError(
            "no-cuda", f"no GPU {index}: torch sees {torch.cuda.device_count()}, counted from 0"
        )


def check_gates(compilation: Compilation, gates: Gates) -> None:
    """Raise CheckFailed for the first gate that does not hold, with by how much."""
    accuracy = compilation.accuracy
    if gates.max_drop is not None:
        dense, final = accuracy.get("dense"), accuracy.get("onnx")
        if dense is None or final is None:
            raise CheckFailed(
                "max-drop",
                "--max-drop was given, but there is no labelled eval_data to measure top-1 on",
            )
        drop = 100.0 * (dense - final)
        if drop > gates.max_drop:
            raise CheckFailed(
                "max-drop",
                f"top-1 fell by {drop:.2f} points, from {dense:.2%} to {final:.2%}; "
                f"the gate allows {gates.max_drop:g}",
            )
    if gates.strict and (left := missed_remarks(compilation)):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise CheckFailed("strict", f"{left[0]}{more}")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Convolutions in full float32 on a GPU: numerical checks compare them with linears."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def disk_full_named(output: Path | None) -> Iterator[None]:
    """Turn a full disk into an InputError that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            "disk-full",
            f"cannot write to {output}: {error.strerror}",
            hint="nothing was published; free some space, or choose another folder with -o, "
            "and run the same command again",
        ) from error


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in (
        "torch",
        "onnx",
        "onnxruntime",
        "onnx-graphsurgeon",
        "tensorrt-rtx",
        "tensorrt",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _internal(
    compilation: Compilation, crash: Exception, output: Path | None, command: Sequence[str]
) -> InternalError:
    """Keep what a maintainer needs, and say where it is."""
    text = crash.message if isinstance(crash, GpusqError) else f"{type(crash).__name__}: {crash}"
    code = crash.code if isinstance(crash, GpusqError) else "internal"
    done = [record.name for record in compilation.records]
    names = [step.name for step in PIPELINE]
    stopped = names[len(done)] if len(done) < len(names) else "report"
    message = f"pass '{stopped}': {text}"
    if output is None:
        return InternalError(code, message)
    folder = output / REPRO
    try:
        _write_repro(compilation, crash, folder, done, command)
    except OSError as error:
        return InternalError(code, message, hint=f"no report was kept: {error}")
    return InternalError(code, message, hint=f"please report it with the folder {folder}")


def _write_repro(
    compilation: Compilation,
    crash: Exception,
    folder: Path,
    done: list[str],
    command: Sequence[str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "about.json",
        {
            "command": list(command),
            "versions": {"gpusq-compile": __version__, **versions()},
            "passes_done": done,
            "rules": compilation.rules.as_dict(),
        },
    )
    (folder / "traceback.txt").write_text("".join(traceback.format_exception(crash)))
    if compilation.graph is not None:
        (folder / "graph.txt").write_text(graph_text(compilation.graph))
