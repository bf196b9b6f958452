"""From the folded graph to the final ONNX model, and the check that it is what was asked for."""
