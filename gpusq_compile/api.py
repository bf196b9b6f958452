"""`compile_model`: the whole compiler as one function. The command line calls nothing else."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.fx
from safetensors import SafetensorError
from torch import nn

from gpusq_compile import __version__
from gpusq_compile.compilation import Compilation
from gpusq_compile.console import Console
from gpusq_compile.data import check_data
from gpusq_compile.driver import run_passes
from gpusq_compile.engine import build_script
from gpusq_compile.engine.backends import choose_backend
from gpusq_compile.errors import CheckFailed, GpusqError, InputError
from gpusq_compile.finetune.checkpoint import FOLDER as CHECKPOINTS
from gpusq_compile.finetune.loop import LOSS_NOT_FINITE
from gpusq_compile.finetune.resume import open_checkpoints
from gpusq_compile.gates import Gates, check_gates
from gpusq_compile.language.loader import Rules, load_rules
from gpusq_compile.load_model import load_source
from gpusq_compile.model_source import (
    DataFactory,
    LossFunction,
    MetricsFunction,
    ModelSource,
    check_source,
)
from gpusq_compile.network import Network
from gpusq_compile.options import Options, check_options, engine_choice
from gpusq_compile.output import REPORT, publish, staging, versions, write_json
from gpusq_compile.packed_graph import GRAPH, WEIGHTS
from gpusq_compile.passes import ANALYSIS, LOWERING, PIPELINE, ordered
from gpusq_compile.passes.verify_onnx import MODEL_FILE
from gpusq_compile.plan import planned
from gpusq_compile.processes import joined
from gpusq_compile.randomness import seed_everything
from gpusq_compile.report.document import make_report, outcome
from gpusq_compile.report.evidence import EVIDENCE, write_evidence
from gpusq_compile.report.html import PAGE, write_page
from gpusq_compile.report.observe import Observer
from gpusq_compile.reproducer import internal_error
from gpusq_compile.triton import FOLDER as TRITON
from gpusq_compile.triton import repository_name, write_repository
from gpusq_compile.user_state import UserParameters, in_user_model, user_state_dict

SCRIPT = "build_engine.sh"


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
    parameters: UserParameters

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Float32 weights under the user's own names and shapes, pruned and rounded as deployed.

        With a `scope` those of the submodule, under their names in the whole model.
        """
        state = user_state_dict(self.graph, self.parameters)
        return in_user_model(state, self.report.get("scope"))


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
    loss: LossFunction | None = None,
    metrics: MetricsFunction | None = None,
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
    emit: Sequence[str] = (),
    gates: Gates | None = None,
    dry_run: bool = False,
    resume: bool = False,
    checkpoint_every: int | None = None,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> CompileResult:
    """Compile a vision transformer to a sparse, quantized, verified ONNX model and an engine.

    Args:
        model: a module in which the trained weights are loaded (it is copied, and left as it is),
            or what the command line takes: a model file, `timm:NAME`, `torchvision:NAME`, `hf:DIR`.
        example_inputs: the tensors `forward` takes, batch first; required with a module.
        rules: a shipped name (`int8`), a YAML file, or the same document as a mapping.
        output: folder for the artifacts; nothing is written when None.
        train_data, calibration_data, eval_data: re-iterables of `(inputs, labels)` batches or of
            inputs alone, or functions that return them. Labels are class indices, int64 [batch].
        logits: maps the model's outputs to logits [batch, classes] where they are nothing else.
        loss: `loss(model, batch)` -> the scalar tensor to minimize in place of the cross-entropy
            with the labels. Batches may then have any form; the fine-tune gives them to `loss`
            as they are, with `model` holding what is trained at `scope`.
        metrics: `metrics(outputs, batch)` -> numbers by name for a batch of `eval_data`, higher is
            better; the report has their means, and the best checkpoint is chosen by the first.
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
        emit: `["triton"]` also writes a model repository for Triton Inference Server.
        gates: what beside the verification must hold.
        dry_run: stop after the rules are matched; nothing is written.
        resume: go on from the checkpoint that an unfinished run left in `output`.
        checkpoint_every: steps between two checkpoints; by default one every five minutes.
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
        emit=tuple(emit),
        dry_run=dry_run,
        resume=resume,
        checkpoint_every=checkpoint_every,
    )
    gates = gates or Gates()
    check_options(options, [step.name for step in PIPELINE])
    if options.emit and output is None:
        raise InputError("emit-without-output", f"emit={list(emit)} needs an output folder")
    passes = ordered(resolved.file.passes, resolved.passes_at)
    if dry_run:
        passes = ANALYSIS
    if not dry_run:
        # An engine that cannot be built should not be found out after hours of fine-tune.
        choose_backend(options.engine, options.targets or resolved.target.compute)
    seed_everything(seed)
    with (
        joined(options.device) as (processes, own_device),
        staging(output if processes.first else None, written=not dry_run) as stage,
    ):
        options = replace(options, device=own_device)
        if not processes.first:
            console, passes = Console(verbosity=-1), tuple(p for p in passes if p not in LOWERING)
        with console.busy("loading the model and its data"):
            source = (
                module_source(
                    model,
                    example_inputs,
                    train_data=train_data,
                    calibration_data=calibration_data,
                    eval_data=eval_data,
                    logits=logits,
                    loss=loss,
                    metrics=metrics,
                    dynamic_shapes=dynamic_shapes,
                )
                if isinstance(model, nn.Module)
                else load_source(
                    str(model), data=data, weights=weights, scope=scope or resolved.scope
                )
            )
            check_source(source)
            network = Network(source.module, scope or resolved.scope)
            check_data(
                source,
                finetune=finetune,
                scoped=network.scope is not None,
                labelled=gates.max_drop is not None,
                train_labels=resolved.finetune.labels == "required",
            )
        compilation = Compilation(
            source, resolved, options, console, network, stage, processes=processes
        )
        if output is not None and not dry_run and processes.first:
            compilation.observer = Observer()
        if console.verbosity >= 0:
            console.info(f"compiling {source.origin}")
        if output is not None and finetune and not dry_run:
            compilation.checkpoints = open_checkpoints(compilation, output / CHECKPOINTS)
        error: GpusqError | None = None
        try:
            with disk_full_named(output), exact_arithmetic():
                run_passes(compilation, passes)
        except CheckFailed as failed:
            error = failed
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as crash:
            raise internal_error(compilation, crash, output, command) from crash
        try:
            report = make_report(compilation, error, stage / MODEL_FILE)
            if dry_run and gates.max_drop is not None:
                console.warn("--max-drop is left out: a dry run measures no accuracy")
                gates = replace(gates, max_drop=None)
            if error is None and processes.first:
                check_gates(report, gates)
        except CheckFailed as failed:
            error = failed
            report |= outcome(error)
        except Exception as crash:
            raise internal_error(compilation, crash, output, command) from crash
        files: list[Path] = []
        if output is not None and not dry_run and processes.first:
            with disk_full_named(output):
                files = _write(
                    compilation, report, stage, output, command, failed=error is not None
                )
            if error is None and compilation.checkpoints is not None:
                shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        if error is not None and error.code == LOSS_NOT_FINITE:
            # All processes see it, and a launcher ends the others with the first that exits.
            processes.wait()
    if error is not None:
        raise error
    assert compilation.graph is not None
    return CompileResult(
        compilation.graph,
        report,
        compilation.onnx_model,
        output if files else None,
        files,
        compilation.parameters,
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
    """Write the report and publish the folder; of a failed run the report and its page alone."""
    if failed:
        for name in (MODEL_FILE, SCRIPT, WEIGHTS, GRAPH):
            (stage / name).unlink(missing_ok=True)
        shutil.rmtree(stage / "engine", ignore_errors=True)
    else:
        write_script(compilation, stage / SCRIPT)
        if "triton" in compilation.options.emit:
            write_triton(compilation, stage)
    write_json(stage / REPORT, report)
    evidence = None
    if compilation.observer is not None:
        evidence = write_evidence(stage / EVIDENCE, compilation.observer.evidence)
    write_page(stage / PAGE, report, evidence)
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
    plans = [plan for _, plan in planned(compilation.ir.graph)]
    text = build_script(
        compilation.targets,
        compilation.engine_batch,
        inputs,
        onnx=MODEL_FILE,
        sparse=any(plan.applied.sparsity for plan in plans),
        half=compilation.rules.target.precision == "fp16",
    )
    path.write_text(text)
    path.chmod(0o755)


def write_triton(compilation: Compilation, stage: Path) -> None:
    """`triton/`, with the engine where TensorRT itself built one and there is no choice of it."""
    assert compilation.onnx_model is not None
    engine = compilation.engine
    built = list(engine.targets.values()) if engine and engine.backend == "tensorrt" else []
    write_repository(
        compilation.onnx_model,
        stage / MODEL_FILE,
        stage / TRITON,
        repository_name(compilation.source.origin),
        compilation.engine_batch,
        stage / built[0].file if len(built) == 1 else None,
    )


def module_source(
    module: nn.Module,
    example_inputs: tuple[Any, ...] | None,
    *,
    train_data: Iterable[Any] | DataFactory | None,
    calibration_data: Iterable[Any] | DataFactory | None,
    eval_data: Iterable[Any] | DataFactory | None,
    logits: Callable[[Any], torch.Tensor] | None,
    loss: LossFunction | None,
    metrics: MetricsFunction | None,
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
        loss=loss,
        metrics=metrics,
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
    except (OSError, SafetensorError) as error:
        # safetensors says the system's error in words alone.
        number = getattr(error, "errno", None)
        words = f"{os.strerror(errno.ENOSPC)}", f"{os.strerror(errno.EDQUOT)}"
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not any(
            text in str(error) for text in words
        ):
            raise
        reason = os.strerror(number or errno.ENOSPC)
        raise InputError(
            "disk-full",
            f"cannot write to {output}: {reason}",
            hint="nothing was published; free some space, or choose another folder with -o, "
            "and run the same command again",
        ) from error
