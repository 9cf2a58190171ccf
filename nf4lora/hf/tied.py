"""Adapters on a head that is tied to the embedding: merged, the two are no longer one weight."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


@contextmanager
def untied(tuner: BaseTuner) -> Iterator[None]:
    """Give adapted layers weights of their own, to be merged into; after an error they share them again.

    The model's configuration says then that embedding and head are apart, and so does that of a text model in it.
    Raises: ValueError naming a layer that shares its weight otherwise, or that is merged already, with nothing changed.
    """
    shared = _shared(tuner.model)
    for base, key, p in shared:
        base._parameters[key] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    try:
        yield
    except BaseException:
        for base, key, p in shared:
            base._parameters[key] = p
        raise
    for config in (tuner.model.config, tuner.model.config.get_text_config()) if shared else ():
        config.tie_word_embeddings = False


def _shared(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Bases of adapted layers, and their parameters that others have too. Keeps no other layer alive."""
    holders, names = defaultdict(list), {m: name for name, m in model.named_modules()}
    for m in names:
        for p in m.parameters(recurse=False):
            holders[p].append(m)
    shared = [
        (layer, base, key, p)
        for layer in names
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)  # which peft ties itself
        for base in [layer.get_base_layer()]
        for key, p in base.named_parameters(recurse=False)
        if len(holders[p]) > 1
    ]
    for layer, _, _, p in shared:
        others = [names[m] for m in holders[p] if m is not layer.get_base_layer()]
        if layer.merged:
            raise ValueError(
                f"{names[layer]}: found its adapter merged into the weight that it shares with {others[0]}, which has changed with it; "
                "call unmerge_adapter() first"
            )
        if len(others) > 1 or not _comes_apart(model, holders[p]):
            raise ValueError(
                f"{names[layer]}: found an adapter on the weight that it shares with {', '.join(others)}, which a model of this kind "
                "cannot have apart: keep the adapter beside its base, or train one without this layer"
            )
    return [found[1:] for found in shared]


def _comes_apart(model: nn.Module, holders: list[nn.Module]) -> bool:
    """Whether these are a model's embedding and head, and its configuration keeps the word that they are not tied."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return False
    ends = {m.get_base_layer() if isinstance(m, BaseTunerLayer) else getattr(m, "original_module", m) for m in ends}
    config = type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": False})
    return ends == set(holders) and not config.tie_word_embeddings
