"""Examples side by side in one sequence, each seeing itself alone, and whether a model keeps them apart."""

import torch
from torch import Tensor, nn

from .settings import UserError

TOKENS = 8  # of each example that a model is tried with


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Which examples share a sequence of at most `room` tokens: the longest first, each where the least room is left after it.

    Args:
        lengths: of each example, from 1 to `room`
    Returns: indices of the examples, sequence by sequence; the same for the same lengths
    """
    sequences: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # space left -> sequences
    spaces = 0  # bit s is set where a sequence with s tokens left is
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            number = with_space[space].pop()
            if not with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, number = room, len(sequences)
            sequences.append([])
        sequences[number].append(index)
        if left := space - length:
            with_space.setdefault(left, []).append(number)
            spaces |= 1 << left
    return sequences


@torch.no_grad()
def check_packing(model: nn.Module, batch_size: int = 2) -> None:
    """Run two short examples packed and alone: the second must give the same logits whatever the first is.

    Args:
        model: causal language model of transformers; its mode is left as it is
        batch_size: of the run; some attention implementations keep packed examples apart in a batch of one only
    Raises: UserError naming the model and its attention, where they differ by more than rounding.
    """
    training = model.training
    model.eval()
    try:
        apart = _apart(model, batch_size)
    except (TypeError, ValueError) as error:
        raise _refusal(model, f"{type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    if not apart:
        raise _refusal(model, "one example changes the logits of the next")


def _apart(model: nn.Module, batch_size: int) -> bool:
    vocabulary, device = model.get_input_embeddings().num_embeddings, model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary, (3, 1, TOKENS), generator=generator).to(device)
    positions = torch.arange(TOKENS, device=device).repeat(2).expand(batch_size, -1)

    def packed(before: Tensor) -> Tensor:
        ids = torch.cat([before, second], dim=1).expand(batch_size, -1)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, TOKENS:].float()

    def alone(beside: Tensor) -> Tensor:
        return model(input_ids=torch.cat([second, beside]), use_cache=False).logits[:1].float()

    reference = alone(first)

    def differ(a: Tensor, b: Tensor) -> float:
        """The largest of the tokens' relative differences."""
        return ((a - b).norm(dim=-1) / reference.norm(dim=-1)).max().item()

    # What another neighbour in the batch changes is rounding: nothing in most models, something where experts share out tokens
    rounding = differ(alone(other), reference)
    tolerance = 1e-4 if model.get_input_embeddings().weight.dtype == torch.float32 else 0.1
    with_first = packed(first)
    return differ(packed(other), with_first) <= 10 * rounding + 1e-6 and differ(with_first, reference) <= tolerance


def _refusal(model: nn.Module, why: str) -> UserError:
    attention = getattr(model.config, "_attn_implementation", None)
    return UserError(
        f"--packing: {model.config.model_type} with the attention {attention!r} does not keep packed examples apart ({why}); "
        "run without --packing"
    )
