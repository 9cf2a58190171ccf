"""What of a layer the formulas of `activations` do not know, so that what they count of it is a lower bound."""

from torch import nn

from ...nn.experts import NF4Experts

_MLP = ("mlp", "feedforward", "ffn")


def unknown_in(layer: nn.Module, attends: bool) -> tuple[str, ...]:
    """Names of parameters and modules of a layer whose activations no formula counts: conv1d, A_log, ….

    Known are linears, norms, experts and their router, biases, and the sinks of attention, which keep nothing more. Linears
    without attention beside them are known only in an MLP: elsewhere they belong to a mixer without parameters of its own.
    attends: whether attention was found in the layer.
    """
    found: dict[str, None] = {}
    for path, module in layer.named_modules():
        kind = type(module).__name__.lower()
        if isinstance(module, nn.Linear):
            owner = layer.get_submodule(path.rpartition(".")[0])
            if not attends and not any(word in type(owner).__name__.lower() for word in _MLP):
                found[type(owner).__name__] = None
        elif not isinstance(module, NF4Experts) and "norm" not in kind and "router" not in kind:
            named = module.named_parameters(recurse=False)
            own = [name for name, _ in named if not name.endswith("bias") and name != "sinks"]
            found |= dict.fromkeys([path.rpartition(".")[2]] if own == ["weight"] else own)
    return tuple(found)
