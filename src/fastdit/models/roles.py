"""What each child of a block does to its tokens: data for the token caches, one entry a block class.

The entries hold for diffusers 0.37 to 0.42. A class that is not here is described by adding it to `TOKEN_ROLES` under
its name; subclasses inherit the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn


class Role(Enum):
    """What becomes of a child of a block at a partial step, where only chosen image tokens are recomputed."""

    KEPT = "not run; its kept output stands in, whole"
    TOKENS = "run on the chosen tokens; what comes out replaces their rows of its kept output"
    KEPT_CHOSEN = "not run; the chosen tokens' rows of its kept output stand in"
    ENTRY = "run on the chosen tokens, which is what it passes on"
    EXIT = "run on the chosen tokens that reach it; what comes out replaces their rows of its kept output"


@dataclass(frozen=True)
class TokenRoles:
    """How one class of blocks handles its tokens.

    `roles` names the children that act otherwise at a partial step. `image` and `text` are the forward's arguments of
    the two streams, `returns` the arguments whose streams the block gives back, in order. `joined` blocks hand their
    children the text's tokens followed by the image's. `attention` is the child in which image tokens see each other
    (with `text_first` where the text's tokens come first inside it), `cross_attention` the one in which they see the
    text, where that is another. The `text_children` give tokens of the text alone; a child that gives several tensors
    gives the image's first.
    """

    roles: Mapping[str, Role]
    returns: tuple[str, ...]
    attention: str
    image: str = "hidden_states"
    text: str | None = "encoder_hidden_states"
    joined: bool = False
    text_first: bool = False
    cross_attention: str | None = None
    text_children: tuple[str, ...] = ("ff_context",)


#: A text stream reaches the image through attention alone, and attention is kept at a partial step: recomputing the
#: text's feed-forward there would change no image, so it is kept too.
TOKEN_ROLES: dict[str, TokenRoles] = {
    "FluxTransformerBlock": TokenRoles(
        roles={"attn": Role.KEPT, "ff": Role.TOKENS, "ff_context": Role.KEPT},
        returns=("encoder_hidden_states", "hidden_states"),
        attention="attn",
        text_first=True,
    ),
    "FluxSingleTransformerBlock": TokenRoles(
        roles={"attn": Role.KEPT_CHOSEN, "proj_mlp": Role.ENTRY, "proj_out": Role.EXIT},
        returns=("encoder_hidden_states", "hidden_states"),
        attention="attn",
        joined=True,
        text_first=True,
    ),
    "JointTransformerBlock": TokenRoles(
        roles={"attn": Role.KEPT, "attn2": Role.KEPT, "ff": Role.TOKENS, "ff_context": Role.KEPT},
        returns=("encoder_hidden_states", "hidden_states"),
        attention="attn",
    ),
    "BasicTransformerBlock": TokenRoles(
        roles={"attn1": Role.KEPT, "attn2": Role.KEPT, "ff": Role.TOKENS},
        returns=("hidden_states",),
        attention="attn1",
        text=None,
        cross_attention="attn2",
    ),
}


def text_comes_first(transformer: nn.Module) -> bool | None:
    """Say whether the text's tokens come before the image's where blocks attend to both together.

    None where some block of the transformer's lists is not described, does not, or orders them otherwise.
    """
    blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    roles = [token_roles(block) for block in blocks]
    orders = {
        None if role is None or role.text is None or role.cross_attention is not None else role.text_first
        for role in roles
    }
    return orders.pop() if len(orders) == 1 else None


def token_roles(block: object) -> TokenRoles | None:
    """Find the description of a block by its class."""
    names = [cls.__name__ for cls in type(block).__mro__]
    return next((TOKEN_ROLES[name] for name in names if name in TOKEN_ROLES), None)
