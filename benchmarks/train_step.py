"""Time of a step of sparse QAT with distillation over a step of plain distillation.

    make bench-train-step
    python benchmarks/train_step.py --device cuda --model deit_base_patch16_224 --batch 64 \\
        --autocast bfloat16 --threads 16 [--compile]

Both steps have the same teacher, losses, optimizer, images and parameters (`plain` lacks the
scales, which it has no use for), and run in one process in turns, so that what disturbs the
machine disturbs both. `qat` trains the graph as `gpusq-compile` has it in its quantized phase:
masks, fake-quantizers and taps. `plain` trains the same graph without masks and fake-quantizers,
which costs what the user's own module does. The loss is that of the quantized phase (labels,
logits, taps), the optimizer the one of the rules.

NVIDIA Model Optimizer does the same in its own process (`peer/modelopt_train_step.py`): a model
with 2:4 masks, INT8 quantizers and its distillation from the logits, over its distillation of the
unmodified model. The processes of both tools take turns too.

- `ratio` is the median `qat` step over the median `plain` step, by the wall clock.
- `cpu ratio` is the same of the processor time of all threads, which other processes on the
  machine hardly disturb. On CUDA it says little.
- Phases are medians: `student` is its forward pass, `teacher` the teacher's.
- On CUDA, `peak` is the most memory that tensors took in a process with one of the two alone.

Writes `results/train_step.json` and `results/train_step.md` (`--output` for another folder).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
import torch.fx
from torch import Tensor, nn

from compile_time import RESULTS, machine, peer_python, versions
from result_files import write_results

HERE = Path(__file__).resolve().parent
PEER_SCRIPT = HERE / "peer" / "modelopt_train_step.py"
VARIANTS = ("plain", "qat")
TOOLS = ("gpusq-compile", "nvidia-modelopt")
WARM_UP = 2
"""Steps of each variant before the clock counts: memory is taken, optimizer state is made."""
LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.01
AIM = 1.10


@dataclass(frozen=True)
class Settings:
    """What a process measures. `autocast` is a dtype's name or None for float32."""

    model: str
    batch: int
    device: str
    threads: int
    steps: int
    autocast: str | None
    compile: bool
    variants: tuple[str, ...]

    @contextmanager
    def precision(self) -> Iterator[None]:
        dtype = None if self.autocast is None else getattr(torch, self.autocast)
        kind = torch.device(self.device).type
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            yield

    def network(self) -> nn.Module:
        """The timm model with random weights under a fixed seed, in eval mode."""
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(self.model, pretrained=False)
        return network.eval().to(self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """One batch: float32 images, int64 labels."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, 224, 224, generator=generator)
        labels = torch.randint(0, 1000, (self.batch,), generator=generator)
        return images.to(self.device), labels.to(self.device)


@dataclass
class Clock:
    """Seconds of one step by phase: each `mark` ends a phase that began at the one before."""

    synchronize: bool
    phases: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    processor: float = 0.0
    last: float = 0.0

    def start(self) -> None:
        self._wait()
        self.wall, self.processor = time.perf_counter(), time.process_time()
        self.last = self.wall
        self.phases = {}

    def mark(self, phase: str) -> None:
        self._wait()
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def sample(self) -> dict[str, Any]:
        processor = time.process_time() - self.processor
        return {"wall": self.last - self.wall, "processor": processor, "phases": self.phases}

    def _wait(self) -> None:
        if self.synchronize:
            torch.cuda.synchronize()


Step = Callable[[Clock], None]


def measure(settings: Settings, steps: dict[str, Step]) -> dict[str, Any]:
    """Samples of each variant, taken in turns."""
    on_gpu = torch.device(settings.device).type == "cuda"
    clock = Clock(on_gpu)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for number in range(WARM_UP + settings.steps):
        for name, step in steps.items():
            clock.start()
            step(clock)
            if number >= WARM_UP:
                samples[name].append(clock.sample())
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return {"samples": samples, "peak_bytes": peak}


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clock: Clock) -> None:
    """The second half of a step, for both tools."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clock.mark("backward")
    optimizer.step()
    clock.mark("optimizer")


def our_steps(settings: Settings) -> dict[str, Step]:
    from gpusq_compile.compilation import Compilation
    from gpusq_compile.console import Console
    from gpusq_compile.data import Batch
    from gpusq_compile.driver import run_passes
    from gpusq_compile.finetune.distill import distillation_loss
    from gpusq_compile.finetune.optimizer import make_optimizer, unfreeze
    from gpusq_compile.finetune.taps import listen
    from gpusq_compile.graph.edit import bypass, finish
    from gpusq_compile.graph.query import module_calls
    from gpusq_compile.language.loader import load_rules
    from gpusq_compile.model_source import ModelSource
    from gpusq_compile.network import Network
    from gpusq_compile.options import Options
    from gpusq_compile.passes import PIPELINE
    from gpusq_compile.quantization.fake_quantize import FakeQuantize
    from gpusq_compile.sparsity import Mask

    def without(graph: torch.fx.GraphModule, *kinds: type[nn.Module]) -> torch.fx.GraphModule:
        graph = copy.deepcopy(graph)
        for node, module in module_calls(graph):
            if isinstance(module, kinds):
                bypass(node)
        finish(graph)
        return graph

    images, labels = settings.data()
    network = settings.network()
    source = ModelSource(
        origin=settings.model,
        module=network,
        example_inputs=(images,),
        train_data=lambda: [(images, labels)],
        calibration_data=lambda: [(images, labels)],
    )
    options = Options(steps=1, engine="none", device=settings.device)
    rules = load_rules("int8")
    compilation = Compilation(
        source, rules, options, Console(verbosity=-1), Network(network, None), HERE
    )
    names = [step.name for step in PIPELINE]
    run_passes(compilation, PIPELINE[: names.index("quantize") + 1])
    phase = rules.finetune.quantize
    batch = Batch((images,), labels, settings.batch)
    tap_weights = compilation.tap_weights
    assert compilation.sparse_teacher is not None
    assert tap_weights is not None

    def make(student: torch.fx.GraphModule, teacher: torch.fx.GraphModule) -> Step:
        unfreeze(student, frozenset())
        optimizer = make_optimizer(student, phase)
        listen(student)
        listen(teacher)
        running: list[Clock] = []
        teacher.register_forward_hook(lambda *_: running[0].mark("teacher"))
        student.register_forward_hook(lambda *_: running[0].mark("student"))
        if settings.compile:
            student.compile()
            teacher.compile()

        def step(clock: Clock) -> None:
            running[:] = [clock]
            with settings.precision():
                parts = distillation_loss(
                    compilation, student, teacher, batch, tap_weights, "batch"
                )
            clock.mark("loss")
            update(optimizer, parts.total, clock)

        return step

    models = {
        "plain": lambda: (
            without(compilation.ir, Mask, FakeQuantize),
            without(compilation.sparse_teacher, Mask),
        ),
        "qat": lambda: (compilation.ir, compilation.sparse_teacher),
    }
    return {name: make(*models[name]()) for name in settings.variants}


def parse_worker(description: str) -> Settings:
    """The settings that `main` hands to a worker as one JSON argument."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--worker", required=True, help="settings as JSON")
    given = json.loads(parser.parse_args().worker)
    return Settings(**{**given, "variants": tuple(given["variants"])})


def work(
    settings: Settings,
    make_steps: Callable[[Settings], dict[str, Step]],
    version: str | None = None,
) -> None:
    """A worker's life: measure, and print the answer as the last line of standard output."""
    torch.set_num_threads(settings.threads)
    answer = measure(settings, make_steps(settings))
    answer |= {} if version is None else {"version": version}
    if torch.device(settings.device).type == "cuda":
        answer["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(answer))


def run_worker(python: str, script: Path, settings: Settings) -> dict[str, Any]:
    command = [python, str(script), "--worker", json.dumps(asdict(settings))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    with tempfile.TemporaryFile("w+") as stderr:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
        )
        if done.returncode != 0:
            stderr.seek(0)
            sys.exit(f"{script.name} failed, exit code {done.returncode}\n{stderr.read()[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the samples of all rounds, seconds; and the ratios of the two variants."""
    result: dict[str, Any] = {}
    for name in VARIANTS:
        samples = [sample for answer in answers for sample in answer["samples"][name]]
        walls = [sample["wall"] for sample in samples]
        lower, _, upper = quantiles(walls, n=4)
        result[name] = {
            "step_seconds": median(walls),
            "step_seconds_quartiles": [lower, upper],
            "processor_seconds": median(sample["processor"] for sample in samples),
            "phases": {
                phase: median(sample["phases"][phase] for sample in samples)
                for phase in samples[0]["phases"]
            },
            "samples": len(samples),
        }
    plain, qat = result["plain"], result["qat"]
    result["ratio"] = qat["step_seconds"] / plain["step_seconds"]
    result["processor_ratio"] = qat["processor_seconds"] / plain["processor_seconds"]
    return result


def table(results: dict[str, Any]) -> str:
    """The results as Markdown tables: ratios, then milliseconds of each phase."""
    peaks = any(
        "peak_bytes" in tools[tool] for tools in results["threads"].values() for tool in tools
    )
    head = ["threads", "tool", "plain ms", "qat ms", "ratio", "cpu ratio"]
    head += ["plain peak MB", "qat peak MB"] if peaks else []
    lines = [head, ["---:", "---"] + ["---:"] * (len(head) - 2)]
    for threads, tools in results["threads"].items():
        for tool, found in tools.items():
            row = [threads, tool]
            row += [f"{1e3 * found[name]['step_seconds']:.1f}" for name in VARIANTS]
            row += [f"{found['ratio']:.3f}", f"{found['processor_ratio']:.3f}"]
            if peaks:
                row += [f"{found['peak_bytes'][name] / 1e6:.0f}" for name in VARIANTS]
            lines.append(row)
    text = ["| " + " | ".join(line) + " |" for line in lines]
    for threads, tools in results["threads"].items():
        for tool, found in tools.items():
            phases = list(found["plain"]["phases"])
            text += ["", f"| {tool}, threads {threads}, ms | " + " | ".join(phases) + " |"]
            text.append("| --- |" + " ---: |" * len(phases))
            for name in VARIANTS:
                cells = [f"{1e3 * found[name]['phases'][phase]:.1f}" for phase in phases]
                text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each variant")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each tool")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="default: float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile on all models")
    parser.add_argument("--no-peer", action="store_true", help="measure gpusq-compile alone")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--name", default="train_step", help="name of the result files")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps: medians and quartiles take 2 or more")

    workers = {TOOLS[0]: (sys.executable, Path(__file__).resolve())}
    if not arguments.no_peer:
        workers[TOOLS[1]] = (str(peer_python()), PEER_SCRIPT)
    results: dict[str, Any] = {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions() | {"nvidia-modelopt": None},
        "settings": {
            "model": arguments.model,
            "batch": arguments.batch,
            "device": arguments.device,
            "autocast": arguments.autocast,
            "compile": arguments.compile,
            "rules": "int8",
            "steps": arguments.steps,
            "rounds": arguments.rounds,
            "load_before": os.getloadavg()[0],
        },
        "aim": AIM,
        "threads": {},
    }
    for threads in arguments.threads:
        settings = Settings(
            arguments.model,
            arguments.batch,
            arguments.device,
            threads,
            arguments.steps,
            arguments.autocast,
            arguments.compile,
            VARIANTS,
        )
        answers: dict[str, list[dict[str, Any]]] = {tool: [] for tool in workers}
        for number in range(1, arguments.rounds + 1):
            for tool, (python, script) in workers.items():
                answer = run_worker(python, script, settings)
                answers[tool].append(answer)
                results["machine"] |= {"gpu": answer["gpu"]} if "gpu" in answer else {}
                if "version" in answer:
                    results["versions"][tool] = answer["version"]
                ratio = summary([answer])["ratio"]
                said = f"threads {threads}, round {number}/{arguments.rounds}, {tool}: {ratio:.3f}"
                print(said, file=sys.stderr)
        found = {tool: summary(taken) for tool, taken in answers.items()}
        if torch.device(arguments.device).type == "cuda":
            for tool, (python, script) in workers.items():
                found[tool]["peak_bytes"] = {
                    name: run_worker(
                        python, script, Settings(**{**asdict(settings), "variants": (name,)})
                    )["peak_bytes"]
                    for name in VARIANTS
                }
        results["threads"][str(threads)] = found

    text = table(results)
    write_results(arguments.output, arguments.name, results, text)
    print(text)


if __name__ == "__main__":
    if any(argument.startswith("--worker") for argument in sys.argv[1:]):
        work(parse_worker((__doc__ or "").splitlines()[0]), our_steps)
    else:
        main()
