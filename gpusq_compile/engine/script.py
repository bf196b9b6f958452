"""Write `build_engine.sh`, which builds and times the engine with trtexec on the GPU machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from gpusq_compile.engine.backends import PORTABLE
from gpusq_compile.engine.report import BatchRange
from gpusq_compile.errors import InputError

_TEMPLATE = r"""#!/usr/bin/env bash
# Builds the TensorRT engine of @ONNX@ and times it@AGAINST@.
# Run it on the machine with the GPU: ./build_engine.sh
# TRTEXEC=/path/to/trtexec ./build_engine.sh takes that trtexec.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

trtexec="${TRTEXEC:-trtexec}"
if ! command -v "$trtexec" >/dev/null 2>&1; then
  for place in /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
    if [ -x "$place" ]; then
      trtexec="$place"
      break
    fi
  done
fi
if ! command -v "$trtexec" >/dev/null 2>&1; then
  echo "error: trtexec was not found; it comes with TensorRT, not with its Python package." >&2
  echo "  Get it from https://developer.nvidia.com/tensorrt or use the container" >&2
  echo "  nvcr.io/nvidia/tensorrt, then set PATH or TRTEXEC." >&2
  exit 2
fi
if [ ! -f @ONNX@ ]; then
  echo "error: @ONNX_TEXT@ is not beside this script." >&2
  exit 2
fi
@CHECK_GPU@
# 10.x wants to be told that the file's types are binding; 11.x knows no other way and has dropped
# the builder's precision flags; 8.6 has no such option and needs the precisions allowed one by one.
help="$("$trtexec" --help 2>&1 || true)"
version="$(printf '%s\n' "$help" | sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)\].*/\1/p' | sed -n 1p)"
old=""
typing=()
if [ -n "$version" ] && [ "$version" -ge 110000 ]; then
  :
elif [[ "$help" == *--stronglyTyped* ]]; then
  typing=(--stronglyTyped)
elif [[ "$help" == *--int8* ]]; then
  old="yes"
  typing=(@WEAK@)
  echo "warning: this trtexec predates TensorRT 10: it reads ONNX up to opset 17, and" >&2
  echo "  @ONNX_TEXT@ has opset 21. @WEAK@ lets the builder choose the types." >&2
fi

# What a version does not know is left out, and said: an unknown option ends trtexec.
options=()
for option in \
  --builderOptimizationLevel=4 \
  --profilingVerbosity=detailed \
  --noDataTransfers \
  --useCudaGraph \
  --useSpinWait \
  --verbose; do
  if [[ -z "$help" || "$help" == *"${option%%=*}"* ]]; then
    options+=("$option")
  else
    echo "warning: this trtexec has no ${option%%=*}; it is left out." >&2
  fi
done

mkdir -p engine
partial=""
trap 'if [ -n "$partial" ]; then rm -f -- "$partial"; fi' EXIT

build() {
  local name="$1" sparsity="$2"
  partial="engine/.$name.plan.partial"
  echo "building engine/$name.plan (--sparsity=$sparsity), log in engine/$name.log" >&2
  if ! "$trtexec" \
    --onnx=@ONNX@ \
    ${typing[@]+"${typing[@]}"} \
    ${options[@]+"${options[@]}"} \
    "--sparsity=$sparsity" \
    "--exportLayerInfo=engine/$name.layers.json" \
    "--saveEngine=$partial" \
@SHAPES@    >"engine/$name.log" 2>&1; then
    echo "error: trtexec failed; the end of engine/$name.log:" >&2
    tail -n 30 -- "engine/$name.log" >&2
    if [ -n "$old" ]; then
      echo "TensorRT 8.6 has no FP16 scales and no opset 21: use TensorRT 10 or later." >&2
    fi
    exit 1
  fi
  mv -f -- "$partial" "engine/$name.plan"
  partial=""
}

show() {
  echo "engine/$1.plan:"
  grep -E '\] Throughput:|\] GPU Compute Time: min' -- "engine/$1.log" || true
}

@COMPARE@@BUILDS@"""

_COMPARE = r"""# What the builder says of sparse kernels, the last time it says it, and each layer
# whose kernel's name says that it is one.
show_sparse() {
  local kernels
  echo "sparse kernels:"
  for words in 'eligible' 'picked sparse|[Cc]hose'; do
    grep -E "\(Sparsity\).*($words)" -- "engine/$1.log" | sed -n '$p' || true
  done
  kernels="$(sed -n \
    's/.*Name: \(.*\), LayerType: .*TacticName: [^,]*sparse.*/  \1/p' "engine/$1.log")"
  if [ -n "$kernels" ]; then
    printf '%s\n' "$kernels"
  fi
  echo "  gpusq-report on this folder says it layer by layer, and why others have none."
}

# The median GPU time of one inference, in ms.
median() {
  sed -n 's/.*\] GPU Compute Time: min.* median = \([0-9.][0-9.]*\) ms.*/\1/p' \
    "engine/$1.log" | sed -n '$p'
}

compare() {
  local sparse dense
  sparse="$(median "$1")"
  dense="$(median "$2")"
  if [ -n "$sparse" ] && [ -n "$dense" ]; then
    awk -v s="$sparse" -v d="$dense" 'BEGIN {
      printf "median GPU time@AT@: sparse %s ms, dense %s ms, ", s, d
      printf "sparse/dense %.3f (%.2fx as fast)\n", s / d, d / s }'
  else
    echo "warning: a log has no GPU Compute Time, so there is nothing to compare." >&2
  fi
}

"""

_CHECK_GPU = r"""
if command -v nvidia-smi >/dev/null 2>&1; then
  gpu="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>&1 | sed -n '1s/\.//p' || true)"
  targets="@TARGETS@"
  case " $targets " in
    *" sm$gpu "*) ;;
    *) echo "warning: compiled for $targets, but this GPU is ${gpu:+sm}${gpu:-unknown}." >&2 ;;
  esac
fi
"""


def build_script(
    targets: Sequence[str],
    batch: BatchRange,
    inputs: Mapping[str, Sequence[int | None]],
    *,
    onnx: str = "model.onnx",
    sparse: bool = True,
    half: bool = True,
) -> str:
    """The text of `build_engine.sh`, to lie beside `onnx`.

    `inputs` maps each input's name to its shape, None for the dynamic batch, which only the first
    dimension may be. `sparse` builds a second engine without sparse kernels, to time against;
    `half` says that the file holds FP16 tensors. trtexec's engines are named `NAME.trt.plan`,
    `NAME.trt.dense.plan`: they do not replace those of TensorRT-RTX.

    Raises InputError (engine-dynamic-shape).
    """
    dynamic = any(shape and shape[0] is None for shape in inputs.values())
    stem = onnx.removesuffix(".onnx")
    names = [f"{stem}.trt"] + ([f"{stem}.trt.dense"] if sparse else [])
    kinds = ["enable", "disable"] if sparse else ["disable"]
    builds = [f"build {shlex.quote(n)} {kind}" for n, kind in zip(names, kinds, strict=True)]
    shows = [f"show {shlex.quote(n)}" for n in names]
    if sparse:
        shows += [f"show_sparse {shlex.quote(names[0])}", f"compare {shlex.join(names)}"]
    gpus = [t for t in targets if t != PORTABLE]
    check_gpu = _CHECK_GPU.replace("@TARGETS@", " ".join(gpus)) if gpus else ""
    fields = {
        "@COMPARE@": _COMPARE if sparse else "",
        "@CHECK_GPU@": check_gpu,
        "@ONNX_TEXT@": onnx.replace('"', "").replace("$", "").replace("`", ""),
        "@ONNX@": shlex.quote(onnx),
        "@AGAINST@": ", sparse kernels against dense ones" if sparse else "",
        "@WEAK@": "--fp16 --int8" if half else "--int8",
        "@AT@": f" at batch {batch.opt}" if dynamic else "",
        "@SHAPES@": _shapes(batch, inputs),
        "@BUILDS@": "\n".join([*builds, *shows]) + "\n",
    }
    text = _TEMPLATE
    for field, value in fields.items():
        text = text.replace(field, value)
    return text


def _shapes(batch: BatchRange, inputs: Mapping[str, Sequence[int | None]]) -> str:
    for name, shape in inputs.items():
        unknown = [axis for axis, size in enumerate(shape) if size is None and axis > 0]
        if unknown:
            raise InputError(
                "engine-dynamic-shape",
                f"input '{name}': dimension {unknown[0]} is dynamic, and only the first, "
                "the batch, may be",
            )
    dynamic = {name: shape for name, shape in inputs.items() if shape and shape[0] is None}
    if not dynamic:
        return ""
    lines = []
    for option, size in (("min", batch.min), ("opt", batch.opt), ("max", batch.max)):
        spec = ",".join(
            f"{name}:{'x'.join(str(n) for n in (size, *shape[1:]))}"
            for name, shape in dynamic.items()
        )
        lines.append(f"    {shlex.quote(f'--{option}Shapes={spec}')} \\\n")
    return "".join(lines)
