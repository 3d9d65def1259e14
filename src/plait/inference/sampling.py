"""Next token from scores: greedy or by temperature; pure, and the same for a request whoever shares its batch."""

import torch
from jaxtyping import Float
from torch import Tensor


def sample(logits: Float[Tensor, " v"], *, temperature: float, generator: torch.Generator | None = None) -> int:
    """Choose a token.

    Args:
        logits: Scores of one request.
        temperature: 0 takes the highest score (the first of equal ones); above, ``softmax(logits / temperature)``.
        generator: Source of randomness, one a request, so that batch mates change nothing; needed above 0.

    Raises:
        ValueError: The temperature is negative, or above 0 without a generator.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if temperature == 0:
        return int(logits.argmax())
    if generator is None:
        raise ValueError("sampling needs a generator")
    weights = torch.softmax(logits.double() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
