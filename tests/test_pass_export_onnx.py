"""export_onnx: the graph that was rewritten is the one that is exported, with int8 weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.edit import insert_get_attr
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.lowering.lift import lift
from tests.compilations import INT8, SPARSE, begin, make_rules, outputs, plans_of, run_until
from tests.models import Shape, TinyViT, images, noise, seeded

RULE = {"id": "all", "match": {"op": "linear"}, "sparsity": SPARSE, "quantize": INT8}


@pytest.fixture(scope="module")
def exported() -> Compilation:
    compilation = begin(seeded(TinyViT, Shape(depth=1)), images(4), make_rules(RULE))
    return run_until(compilation, "export_onnx")


def model_of(compilation: Compilation) -> onnx.ModelProto:
    assert compilation.onnx_model is not None
    return compilation.onnx_model


def test_the_model_is_opset_21_of_the_standard_domain_alone(exported: Compilation) -> None:
    model = model_of(exported)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0


def test_weights_are_stored_as_the_integers_of_the_graph(exported: Compilation) -> None:
    stored = {tensor.name: tensor for tensor in model_of(exported).graph.initializer}
    for plan in plans_of(exported).values():
        assert stored[plan.weight].data_type == TensorProto.INT8
        levels = tensor_attribute(exported.ir, plan.weight).numpy()
        assert np.array_equal(numpy_helper.to_array(stored[plan.weight]), levels)
        [reader] = [n for n in model_of(exported).graph.node if plan.weight in n.input]
        scale = tensor_attribute(exported.ir, reader.input[1]).numpy()
        assert scale.shape == plan.shape[:1]
        assert np.array_equal(numpy_helper.to_array(stored[reader.input[1]]), scale)


def test_scales_lie_on_the_output_channels_which_come_first(exported: Compilation) -> None:
    quantized = {plan.weight for plan in plans_of(exported).values()}
    found = [n for n in model_of(exported).graph.node if n.input and n.input[0] in quantized]
    assert len(found) == 6
    for node in found:
        assert node.op_type == "DequantizeLinear"
        assert [a.i for a in node.attribute if a.name == "axis"] == [0]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(torch.relu(self.same(x)))


def test_a_weight_that_is_read_twice_is_stored_once() -> None:
    nothing = {"id": "none", "match": {"op": "conv2d"}, "sparsity": "none", "optional": True}
    compilation = run_until(begin(Shared().eval(), noise(2, 32), make_rules(nothing)), "fold")
    graph = compilation.ir.graph
    second = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default][1]
    weight = second.args[1]
    assert isinstance(weight, torch.fx.Node)
    with graph.inserting_before(second):
        again = insert_get_attr(compilation.ir, str(weight.target), provenance=weight)
    second.replace_input_with(weight, again)
    assert compilation.convention is not None
    program = lift(compilation.ir, compilation.convention)
    read = [spec.target for spec in program.graph_signature.input_specs if spec.target]
    assert sorted(read) == ["same.bias", "same.weight"]
    args, kwargs = compilation.probe
    assert torch.equal(program.module()(*args, **kwargs), compilation.ir(*args, **kwargs))


def test_layer_norm_and_gelu_stay_one_operator_each(exported: Compilation) -> None:
    count = Counter(node.op_type for node in model_of(exported).graph.node)
    assert count["LayerNormalization"] == 3
    assert count["Gelu"] == 1
    assert count["DequantizeLinear"] == 12
    assert count["QuantizeLinear"] == 6


def test_the_batch_is_dynamic_in_and_out(exported: Compilation) -> None:
    graph = model_of(exported).graph
    for value in (*graph.input, *graph.output):
        first = value.type.tensor_type.shape.dim[0]
        assert not first.HasField("dim_value")


def test_lifting_keeps_the_function_and_traces_nothing_anew(exported: Compilation) -> None:
    assert exported.convention is not None
    program = lift(exported.ir, exported.convention)
    args, kwargs = exported.probe
    assert torch.equal(program.module()(*args, **kwargs), outputs(exported)[0])
    assert program.state_dict["stem.weight"].dtype == torch.int8
