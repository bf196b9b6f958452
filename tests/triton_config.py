"""Triton's ModelConfig, as far as our files use it: names and numbers of its model_config.proto.

What is parsed with it has no key that Triton does not know.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

Field = descriptor_pb2.FieldDescriptorProto
TYPES = {
    **{"TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_UINT8": 2, "TYPE_INT8": 6, "TYPE_INT32": 8},
    **{"TYPE_INT64": 9, "TYPE_FP16": 10, "TYPE_FP32": 11, "TYPE_FP64": 12, "TYPE_BF16": 14},
}
MESSAGES: dict[str, list[tuple[str, int, Any, bool]]] = {
    "ModelTensorReshape": [("shape", 1, Field.TYPE_INT64, True)],
    "ModelInput": [
        ("name", 1, Field.TYPE_STRING, False),
        ("data_type", 2, "DataType", False),
        ("dims", 4, Field.TYPE_INT64, True),
        ("reshape", 5, "ModelTensorReshape", False),
    ],
    "ModelOutput": [
        ("name", 1, Field.TYPE_STRING, False),
        ("data_type", 2, "DataType", False),
        ("dims", 3, Field.TYPE_INT64, True),
        ("reshape", 5, "ModelTensorReshape", False),
    ],
    "ModelDynamicBatching": [
        ("preferred_batch_size", 1, Field.TYPE_INT32, True),
        ("max_queue_delay_microseconds", 2, Field.TYPE_UINT64, False),
    ],
    "ModelConfig": [
        ("name", 1, Field.TYPE_STRING, False),
        ("max_batch_size", 4, Field.TYPE_INT32, False),
        ("input", 5, "ModelInput", True),
        ("output", 6, "ModelOutput", True),
        ("default_model_filename", 8, Field.TYPE_STRING, False),
        ("dynamic_batching", 11, "ModelDynamicBatching", False),
        ("backend", 17, Field.TYPE_STRING, False),
    ],
}


def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="inference")
    file.syntax = "proto3"
    kinds = file.enum_type.add(name="DataType")
    for name, number in TYPES.items():
        kinds.value.add(name=name, number=number)
    for message, fields in MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = described.field.add(name=name, number=number)
            field.label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type = Field.TYPE_ENUM if kind == "DataType" else Field.TYPE_MESSAGE
                field.type_name = f".inference.{kind}"
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("inference.ModelConfig")
    return message_factory.GetMessageClass(found)


MODEL_CONFIG = _model_config()


def parse_config(text: str) -> Any:
    """The message in a config.pbtxt; a ParseError for what Triton could not read."""
    return text_format.Parse(text, MODEL_CONFIG())
