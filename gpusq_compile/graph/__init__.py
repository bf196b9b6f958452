"""Reading and editing the IR: a `torch.fx.GraphModule` that `torch.export` produced."""
