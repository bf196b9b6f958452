"""The structural check reads the file and trusts no pass: whatever is tampered with is named.

Each case edits a model that was really compiled, as a broken exporter or another tool might.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpusq_compile.compilation import Compilation
from gpusq_compile.lowering.check import StoredLayer, check_layers
from gpusq_compile.plan import LayerPlan
from tests.compilations import begin, plans_of, run_until
from tests.models import Shape, TinyViT, images, labelled, seeded

LAYER = "layers.0.mix.wide"
WEIGHT = f"{LAYER}.weight"
SCALE = "gpusq.weight_scale.layers_0_mix_wide"
INPUT_SCALE = "gpusq.activation_scale.layers_0_mix_wide"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compilation:
    model = seeded(TinyViT, Shape(depth=1))
    workdir = tmp_path_factory.mktemp("compiled")
    return run_until(begin(model, images(4), "int8", workdir, data=labelled(2)), "verify_onnx")


@pytest.fixture
def model(compiled: Compilation) -> onnx.ModelProto:
    return onnx.load(compiled.workdir / "model.onnx")


def check(compiled: Compilation, model: onnx.ModelProto) -> dict[str, StoredLayer]:
    plans = [plan for plan in plans_of(compiled).values() if plan.applied.weight]
    return {layer.name: layer for layer in check_layers(model, plans)}


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def array(model: onnx.ModelProto, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return np.array(numpy_helper.to_array(tensor))


def store(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Replace a stored constant, or add one."""
    tensor = numpy_helper.from_array(value, name)
    for existing in model.graph.initializer:
        if existing.name == name:
            existing.CopyFrom(tensor)
            return
    model.graph.initializer.append(tensor)


def set_attribute(found: onnx.NodeProto, name: str, value: int) -> None:
    for attribute in list(found.attribute):
        if attribute.name == name:
            found.attribute.remove(attribute)
    found.attribute.append(helper.make_attribute(name, value))


def output_q(model: onnx.ModelProto) -> onnx.NodeProto:
    """The QuantizeLinear behind the layer's bias."""
    [bias] = [n for n in model.graph.node if node(model, LAYER).output[0] in n.input]
    [quantize] = [n for n in model.graph.node if bias.output[0] in n.input]
    assert quantize.op_type == "QuantizeLinear"
    return quantize


def reader(model: onnx.ModelProto, of: onnx.NodeProto) -> onnx.NodeProto:
    return next(n for n in model.graph.node if of.output[0] in n.input)


# --- tampering -----------------------------------------------------------------------------------


def revive_a_pruned_weight(model: onnx.ModelProto) -> None:
    weight = array(model, WEIGHT)
    column = weight[:4, 0]  # One group of four along the reduction axis of [K, N].
    column[column == 0] = 1
    store(model, WEIGHT, weight)


def prune_along_the_wrong_axis(model: onnx.ModelProto) -> None:
    weight = array(model, WEIGHT)
    weight[:] = 1
    weight[:, 2::4] = weight[:, 3::4] = 0
    store(model, WEIGHT, weight)


def reach_minus_128(model: onnx.ModelProto) -> None:
    weight = array(model, WEIGHT)
    weight[weight == weight.min()] = -128
    store(model, WEIGHT, weight)


def zero_a_weight_scale(model: onnx.ModelProto) -> None:
    scale = array(model, SCALE)
    scale[3] = 0
    store(model, SCALE, scale)


def make_a_weight_scale_infinite(model: onnx.ModelProto) -> None:
    scale = array(model, SCALE)
    scale[3] = np.inf
    store(model, SCALE, scale)


def make_a_weight_scale_nan(model: onnx.ModelProto) -> None:
    scale = array(model, SCALE)
    scale[3] = np.nan
    store(model, SCALE, scale)


def give_the_weight_one_scale(model: onnx.ModelProto) -> None:
    store(model, SCALE, array(model, SCALE)[:1])


def scale_along_the_reduction_axis(model: onnx.ModelProto) -> None:
    set_attribute(node(model, f"{LAYER}/weight_dq"), "axis", 0)


def shift_the_weights_zero_point(model: onnx.ModelProto) -> None:
    store(model, "shifted", np.full(array(model, SCALE).shape, 1, dtype=np.int8))
    node(model, f"{LAYER}/weight_dq").input.append("shifted")


def store_the_weight_unsigned(model: onnx.ModelProto) -> None:
    store(model, WEIGHT, array(model, WEIGHT).view(np.uint8))


def store_the_weight_as_float(model: onnx.ModelProto) -> None:
    dequantize = node(model, f"{LAYER}/weight_dq")
    store(model, "float_weight", (array(model, WEIGHT) * array(model, SCALE)).astype(np.float16))
    node(model, LAYER).input[1] = "float_weight"
    model.graph.node.remove(dequantize)


def compute_the_weight(model: onnx.ModelProto) -> None:
    dequantize = node(model, f"{LAYER}/weight_dq")
    copied = helper.make_node("Identity", [dequantize.output[0]], ["copied"], name="copy")
    model.graph.node.append(copied)
    node(model, LAYER).input[1] = "copied"


def lose_output_channels(model: onnx.ModelProto) -> None:
    store(model, WEIGHT, array(model, WEIGHT)[:, :-32])
    store(model, SCALE, array(model, SCALE)[:-32])


def cut_the_reduction_axis(model: onnx.ModelProto) -> None:
    """What is left is no multiple of the pattern's group."""
    store(model, WEIGHT, array(model, WEIGHT)[:-2])


def rename_the_layer(model: onnx.ModelProto) -> None:
    node(model, LAYER).name = "node_17"


def zero_the_input_scale(model: onnx.ModelProto) -> None:
    store(model, INPUT_SCALE, np.zeros((), dtype=np.float16))


def make_the_input_scale_a_vector(model: onnx.ModelProto) -> None:
    store(model, INPUT_SCALE, np.ones(32, dtype=np.float16))


def shift_the_inputs_zero_point(model: onnx.ModelProto) -> None:
    store(model, "shifted", np.ones((), dtype=np.int8))
    node(model, f"{LAYER}/input_q").input[2] = "shifted"


def make_the_input_unsigned(model: onnx.ModelProto) -> None:
    store(model, "unsigned", np.zeros((), dtype=np.uint8))
    node(model, f"{LAYER}/input_q").input[2] = "unsigned"


def drop_the_inputs_zero_point(model: onnx.ModelProto) -> None:
    """Without one, QuantizeLinear gives uint8."""
    del node(model, f"{LAYER}/input_q").input[2]


def quantize_and_dequantize_differently(model: onnx.ModelProto) -> None:
    store(model, "double", 2 * array(model, INPUT_SCALE))
    node(model, f"{LAYER}/input_dq").input[1] = "double"


def skip_the_input_quantizer(model: onnx.ModelProto) -> None:
    node(model, LAYER).input[0] = node(model, f"{LAYER}/input_q").input[0]


def never_quantize_the_input(model: onnx.ModelProto) -> None:
    store(model, "integers", np.ones((1, 4, 32), dtype=np.int8))
    node(model, f"{LAYER}/input_dq").input[0] = "integers"


def remove_the_output_quantizer(model: onnx.ModelProto) -> None:
    quantize = output_q(model)
    dequantize = reader(model, quantize)
    reader(model, dequantize).input[0] = quantize.input[0]
    model.graph.node.remove(quantize)
    model.graph.node.remove(dequantize)


def read_the_output_beside_its_quantizer(model: onnx.ModelProto) -> None:
    beside = helper.make_node("Identity", [output_q(model).input[0]], ["beside"], name="beside")
    model.graph.node.append(beside)


def shift_the_outputs_zero_point(model: onnx.ModelProto) -> None:
    store(model, "shifted", np.ones((), dtype=np.int8))
    output_q(model).input[2] = "shifted"


CASES: dict[Callable[[onnx.ModelProto], None], str] = {
    revive_a_pruned_weight: "1 groups break 2:4",
    prune_along_the_wrong_axis: "groups break 2:4",
    reach_minus_128: "its weight reaches -128, outside the symmetric range",
    zero_a_weight_scale: "a weight scale is not positive and finite",
    make_a_weight_scale_infinite: "a weight scale is not positive and finite",
    make_a_weight_scale_nan: "a weight scale is not positive and finite",
    give_the_weight_one_scale: "(1,) scales for 96 output channels",
    scale_along_the_reduction_axis: "scales lie on axis 0, not 1",
    shift_the_weights_zero_point: "its weight zero-point is not int8 0",
    store_the_weight_unsigned: "its weight is uint8, not int8",
    store_the_weight_as_float: "its weight is stored as float16, not as int8 with scales",
    compute_the_weight: "its weight is no stored constant",
    lose_output_channels: "its weight has shape [64, 32], not [96, 32]",
    cut_the_reduction_axis: "its weight has shape [96, 30], not [96, 32]",
    rename_the_layer: "no node of this name in the file",
    zero_the_input_scale: "its input scale is 0.0",
    make_the_input_scale_a_vector: "its input scale is not one constant",
    shift_the_inputs_zero_point: "its input zero-point is not int8 0",
    make_the_input_unsigned: "its input zero-point is not int8 0",
    drop_the_inputs_zero_point: "its input is quantized to uint8",
    quantize_and_dequantize_differently: "its input is quantized by ",
    skip_the_input_quantizer: "its input is not quantized",
    never_quantize_the_input: "its input is dequantized, but never quantized",
    remove_the_output_quantizer: "its output is not quantized",
    read_the_output_beside_its_quantizer: "its output is not quantized",
    shift_the_outputs_zero_point: "its output zero-point is not int8 0",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_what_was_tampered_with_is_named_with_its_layer(
    compiled: Compilation, model: onnx.ModelProto, damage: Callable[[onnx.ModelProto], None]
) -> None:
    untouched = check(compiled, model)
    damage(model)
    found = check(compiled, model)
    assert any(CASES[damage] in fault for fault in found[LAYER].faults), found[LAYER].faults
    for name in found:
        if name != LAYER:
            assert found[name] == untouched[name]


def test_a_file_as_it_was_compiled_has_no_faults(
    compiled: Compilation, model: onnx.ModelProto
) -> None:
    for layer in check(compiled, model).values():
        assert layer.faults == ()
        assert layer.mask_ok is True
        assert layer.weight_dtype == "int8"


def test_a_broken_mask_is_counted_by_group(compiled: Compilation, model: onnx.ModelProto) -> None:
    weight = array(model, WEIGHT)
    weight[:8, :3] = 5  # Two groups in each of three columns.
    store(model, WEIGHT, weight)
    layer = check(compiled, model)[LAYER]
    assert layer.mask_ok is False
    assert layer.faults == ("6 groups break 2:4",)


def test_bytes_are_the_stored_weights_and_their_scales(
    compiled: Compilation, model: onnx.ModelProto
) -> None:
    assert check(compiled, model)[LAYER].weight_bytes == 96 * 32 + 2 * 96


def test_every_fault_of_a_layer_is_told(compiled: Compilation, model: onnx.ModelProto) -> None:
    zero_a_weight_scale(model)
    zero_the_input_scale(model)
    remove_the_output_quantizer(model)
    assert len(set(check(compiled, model)[LAYER].faults)) == 3


def test_a_convolutions_weight_is_read_output_first() -> None:
    """Conv stores [out, in, kh, kw]; its groups of four lie along `in`."""
    legal = np.zeros((4, 8, 3, 3), dtype=np.float32)
    legal[:, ::2] = 1
    plan = LayerPlan("conv", "conv2d", (), "w", legal.shape).apply(sparsity="2:4")

    def model_with(weight: np.ndarray) -> onnx.ModelProto:
        convolution = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 5, 5])
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 3, 3])
        stored = [numpy_helper.from_array(weight, "w")]
        return helper.make_model(helper.make_graph([convolution], "g", [image], [result], stored))

    [layer] = check_layers(model_with(legal), [plan])
    assert (layer.mask_ok, layer.faults) == (True, ())
    broken = copy.copy(legal)
    broken[2, :4, 1, 1] = 1
    [layer] = check_layers(model_with(broken), [plan])
    assert (layer.mask_ok, layer.faults) == (False, ("1 groups break 2:4",))


def test_the_checker_needs_nothing_but_the_file(compiled: Compilation, tmp_path: Path) -> None:
    saved = tmp_path / "copy.onnx"
    saved.write_bytes((compiled.workdir / "model.onnx").read_bytes())
    assert check(compiled, onnx.load(saved)) == compiled.stored


# --- 4-bit values in int8 ------------------------------------------------------------------------

INT4 = {
    "version": 1,
    "target": {"precision": "fp16"},
    "rules": [
        {
            "id": "all",
            "match": {"op": "linear"},
            "sparsity": {"pattern": "2:4"},
            "quantize": {"weight": "int4", "activation": "int4", "output": "int4"},
        }
    ],
}


@pytest.fixture(scope="module")
def compiled4() -> Compilation:
    model = seeded(TinyViT, Shape(depth=1))
    return run_until(begin(model, images(4), INT4, data=labelled(2)), "store_int4")


@pytest.fixture
def model4(compiled4: Compilation) -> onnx.ModelProto:
    assert compiled4.onnx_model is not None
    return copy.deepcopy(compiled4.onnx_model)


def reach_8(model: onnx.ModelProto) -> None:
    weight = array(model, WEIGHT)
    weight[weight == weight.max()] = 8
    store(model, WEIGHT, weight)


def reach_minus_8(model: onnx.ModelProto) -> None:
    weight = array(model, WEIGHT)
    weight[weight == weight.min()] = -8
    store(model, WEIGHT, weight)


def remove_the_input_clip(model: onnx.ModelProto) -> None:
    node(model, f"{LAYER}/input_q").input[0] = node(model, f"{LAYER}/input_clip").input[0]


def widen_the_input_clip(model: onnx.ModelProto) -> None:
    clip = node(model, f"{LAYER}/input_clip")
    store(model, "wide", 2 * array(model, clip.input[2]))
    clip.input[2] = "wide"


def open_the_input_clip(model: onnx.ModelProto) -> None:
    """A Clip may leave a border out."""
    del node(model, f"{LAYER}/input_clip").input[2]


def make_an_input_border_nan(model: onnx.ModelProto) -> None:
    clip = node(model, f"{LAYER}/input_clip")
    store(model, "nan", np.full((), np.nan, dtype=np.float16))
    clip.input[1] = "nan"


def swap_the_input_borders(model: onnx.ModelProto) -> None:
    borders = node(model, f"{LAYER}/input_clip").input
    borders[1], borders[2] = borders[2], borders[1]


def remove_the_output_clip(model: onnx.ModelProto) -> None:
    clip = node(model, f"{LAYER}/output_clip")
    node(model, f"{LAYER}/output_q").input[0] = clip.input[0]
    model.graph.node.remove(clip)


INT4_CASES: dict[Callable[[onnx.ModelProto], None], str] = {
    reach_8: "its weight reaches 8, outside the symmetric range [-7, 7] of int4",
    reach_minus_8: "its weight reaches -8, outside the symmetric range [-7, 7] of int4",
    remove_the_input_clip: "its input is not clipped to the range of int4",
    widen_the_input_clip: "its input is clipped to the levels -8 to 14, not -8 to 7",
    open_the_input_clip: "its input is clipped to the levels -8 to ?, not -8 to 7",
    make_an_input_border_nan: "its input is clipped to the levels ? to 7, not -8 to 7",
    swap_the_input_borders: "its input is clipped to the levels 7 to -8, not -8 to 7",
    remove_the_output_clip: "its output is not clipped to the range of int4",
}


@pytest.mark.parametrize("damage", INT4_CASES, ids=lambda damage: damage.__name__)
def test_what_leaves_the_four_bits_is_named_with_its_layer(
    compiled4: Compilation, model4: onnx.ModelProto, damage: Callable[[onnx.ModelProto], None]
) -> None:
    damage(model4)
    found = check(compiled4, model4)
    assert INT4_CASES[damage] in found[LAYER].faults, found[LAYER].faults
    assert [name for name in found if found[name].faults] == [LAYER]


def test_four_bit_layers_as_compiled_have_no_faults_and_take_a_byte_per_weight(
    compiled4: Compilation, model4: onnx.ModelProto
) -> None:
    for layer in check(compiled4, model4).values():
        assert layer.faults == ()
        assert layer.mask_ok is True
        assert layer.weight_dtype == "int8"
    assert check(compiled4, model4)[LAYER].weight_bytes == 96 * 32 + 2 * 96


def test_the_file_of_a_four_bit_model_computes_what_the_graph_computes(tmp_path: Path) -> None:
    """In FP32, where no rounding to FP16 moves a value to the next of 16 levels."""
    document = {**INT4, "target": {"precision": "fp32"}, "verify": {"max_difference": 1e-3}}
    model = seeded(TinyViT, Shape(depth=1))
    compilation = begin(model, images(4), document, tmp_path, data=labelled(2))
    run_until(compilation, "verify_onnx")
    assert compilation.verify["ok"] is True
    assert compilation.verify["numerics"]["min_cosine"] > 0.9999
